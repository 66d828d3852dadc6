"""A self-contained HTML page about an output: results, examples, failures, time spent.

Everything comes from the output itself. Counts are exact, from the footers of the shards; distributions are estimated
from a random sample of a few thousand images, and the page marks each figure as exact or estimated. Only the photos in
the gallery are read from the input. An output of 100,000 images therefore takes seconds.
"""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.config import InputConfig
from samray.errors import ConfigError, ImageError, SamrayError, StorageError
from samray.inputs.decode_apart import decode_apart
from samray.inputs.listing import fetch_images
from samray.inputs.rasters import open_raster
from samray.masks.image_tiles import scaled
from samray.output import sample
from samray.output.plan import Plan, load_plan
from samray.output.schema import categories_of, schema_of
from samray.output.shards import done_shards
from samray.output.where import Where, make_where
from samray.report.overlays import Overlay, jpeg_uri, make_overlay
from samray.report.page import Counts, Figure, Numbers, render
from samray.report.selection import draw_selected

MAX_GALLERY_BYTES: Final = 13_000_000
"""Size limit of the gallery, which keeps the page fast to open."""

EXAMPLES_PER_REASON: Final = 4

_LARGE_SIDE: Final = 800
_SMALL_SIDE: Final = 400
"""Longest side of the photos in pixels: for up to 32 photos, and for very many."""

_PHOTO_THREADS: Final = 4


def write_report(
    output: str,
    out: str | None = None,
    *,
    num_images: int = 24,
    num_first: int = 0,
    agreement: Sequence[Figure] = (),
    where: str | None = None,
    quality: str | None = None,
) -> str:
    """Write the page about output to `out` (a path or URI), by default into the output; returns its location.

    num_images: images in the gallery. num_first: the first so many labelled images are among them in any case.
    agreement: figures on how well the masks fit known ones, if available. where: SQL expression; the page is then about
    the selected images and masks alone, without failed images, and reads the columns that it names of all images.
    quality: where its `samray quality` is, if not at the default place.
    Raises: ConfigError if output has no samray run or where selects nothing, StorageError if it cannot be read.
    """
    plan = load_plan(output)
    # Also of an output that is not finished: what is there is reported.
    done = sorted(done_shards(plan.output))
    if not done:
        raise ConfigError(f"{storage.redact(output)} has no finished shards yet; run samray label first")
    has_names = categories_of(plan.run["identity"]) is not None
    columns = (*sample.NUMBERS, "annotations.list.element.label") if has_names else sample.NUMBERS
    selection = make_where(where, plan.output, quality)
    examples: dict[str, list[tuple[str, str]]] = {}
    if selection is None:
        footers = sample.read_footers(plan.output, done)
        counts = _count(plan, done, footers)
        examples = sample.examples_by_reason(plan.output, footers, EXAMPLES_PER_REASON)
        drawn = list(sample.read_groups(plan.output, sample.draw_groups(footers), columns))
        chosen = _rows_to_show(drawn, num_images, num_first)
    else:
        counts, drawn, selected_rows = draw_selected(plan, done, selection, columns)
        chosen = _rows_to_show(drawn, num_images, num_first)
        chosen = {draw: selected_rows[draw][rows].tolist() for draw, rows in chosen.items()}
    numbers = _numbers([table for _, table in drawn])
    overlays = overlays_of(plan, chosen, num_images, selection)
    page = render(plan, len(done), counts, numbers, overlays, examples, agreement, where)
    uri = out or storage.join(plan.output, "_samray", "report.html")
    storage.remove_leftovers(storage.parent(uri), recursive=False)
    storage.put(uri, page.encode("utf-8"))
    return uri


def open_page(uri: str) -> bool:
    """Open a page in the browser; False if there is no display, or if the page is not on this machine."""
    # Without a display Python would start a text browser, if there is one, and wait for it.
    screens = sys.platform in ("darwin", "win32") or any(os.environ.get(d) for d in ("DISPLAY", "WAYLAND_DISPLAY"))
    return screens and storage.is_local(uri) and webbrowser.open(Path(storage.normalize(uri)).as_uri())


# --- counting ------------------------------------------------------------------------------------------------------


def _count(plan: Plan, done: Sequence[int], footers: Sequence[sample.Footer]) -> Counts:
    seen = sum(footer.num_images for footer in footers)
    all_read = len(footers) == len(done)
    # The number of images is known from the plan; only what is in footers is extrapolated.
    num_images = seen if all_read else sum(plan.num_images_of(shard) for shard in done)
    scale = num_images / max(seen, 1)
    stage_seconds: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    for footer in footers:
        stage_seconds.update(footer.stats.get("stage_seconds", {}))
        failures.update(footer.failures)
    return Counts(
        num_images=num_images,
        num_masks=round(scale * sum(footer.num_masks for footer in footers)),
        num_failed=round(scale * sum(footer.num_failed for footer in footers)),
        failures=Counter({reason: round(scale * number) for reason, number in failures.items()}),
        stage_seconds=Counter({stage: scale * seconds for stage, seconds in stage_seconds.items()}),
        device_seconds=scale * sum(footer.stats.get("device_seconds", 0.0) for footer in footers),
        share_read=len(footers) / len(done),
    )


def _numbers(tables: Iterable[pa.Table]) -> Numbers:
    """tables: row groups with the columns `sample.NUMBERS`."""
    table = pa.concat_tables(tables)
    ok = table.filter(pc.equal(table["status"], "ok"))
    # By column: a sample may have hundreds of thousands of masks, too many for Python objects.
    masks, image = ok["annotations"].combine_chunks(), ok["image"].combine_chunks()
    per_image = masks.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    flat = masks.flatten()
    width, height = (np.repeat(_floats(image.field(name)), per_image) for name in ("width", "height"))
    with np.errstate(divide="ignore", invalid="ignore"):  # sizes may be damaged; such masks are skipped
        area = _floats(flat.field("area")) / (width * height)
    area = area[np.isfinite(area)]
    return Numbers(
        num_images=table.num_rows,
        masks_per_image=per_image,
        predicted_iou=_finite(flat.field("predicted_iou")),
        stability_score=_finite(flat.field("stability_score")),
        log_area=np.log10(np.maximum(area, 1e-9)),
        points=_points(flat.field("point_coords"), np.stack([width, height], 1)),
        labels=sample.count_labels(flat) if flat.type.get_field_index("label") >= 0 else None,
    )


def _points(coords: pa.ListArray, size_wh: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The first point of each mask that has one, as fractions of its image's size. coords: lists of [x, y]."""
    start, end = coords.offsets.to_numpy()[:-1], coords.offsets.to_numpy()[1:]
    has = end > start
    first = coords.values.take(pa.array(start[has]))
    # Points may be damaged or missing, so only those of two numbers are drawn.
    sound = np.asarray(first.value_lengths().fill_null(0).to_numpy(zero_copy_only=False) == 2, bool)
    with np.errstate(divide="ignore", invalid="ignore"):
        points = _floats(first.filter(pa.array(sound)).flatten()).reshape(-1, 2) / size_wh[has][sound]
    return np.asarray(points[np.isfinite(points).all(axis=1)])


def _finite(array: pa.Array) -> npt.NDArray[np.float64]:
    values = _floats(array)  # null becomes NaN: imported masks may have no scores
    return values[np.isfinite(values)]


def _floats(array: pa.Array) -> npt.NDArray[np.float64]:
    return np.asarray(array.to_numpy(zero_copy_only=False), np.float64)


# --- the gallery ---------------------------------------------------------------------------------------------------


def _rows_to_show(
    drawn: Sequence[tuple[sample.Draw, pa.Table]], number: int, num_first: int = 0
) -> dict[sample.Draw, list[int]]:
    """Row group -> rows to show: the first labelled images, and others spread over the numbers of masks."""
    candidates: list[tuple[int, sample.Draw, int]] = []
    for draw, table in drawn:
        num_masks = table["annotations"].combine_chunks().value_lengths().to_pylist()
        ok = pc.equal(table["status"], "ok").to_pylist()
        # Sorted by number of masks, then evenly spread: the gallery shows empty images and crowded ones.
        candidates += [(num_masks[row] or 0, draw, row) for row in range(table.num_rows) if ok[row]]
    candidates.sort(key=lambda candidate: candidate[1:])
    first, others = candidates[: min(num_first, number)], candidates[num_first:]
    chosen: dict[sample.Draw, list[int]] = {}
    for _, draw, row in [*first, *sample.spread(sorted(others), number - len(first))]:
        chosen.setdefault(draw, []).append(row)
    return chosen


def overlays_of(
    plan: Plan, chosen: Mapping[sample.Draw, Sequence[int]], number: int, where: Where | None = None
) -> list[Overlay]:
    """The images of the gallery, in output order, with the masks that where selects."""
    # Area per photo is what costs: beyond 32 photos, sides shrink with the square root of their number.
    side = round(max(_SMALL_SIDE, min(1.0, (32 / max(number, 1)) ** 0.5) * _LARGE_SIDE))
    # The run's own input settings, by which the images were found and read.
    settings = InputConfig(**plan.run["identity"].get("input", {}))
    reading_plan = threading.Lock()  # the plan caches the last part of the manifest
    unreachable: list[SamrayError] = []

    def finish(shard: int, row: Mapping[str, Any]) -> Overlay:
        if where is not None:
            row = where.apply(pa.Table.from_pylist([row], schema_of(plan.run))).to_pylist()[0]
        overlay = make_overlay(row, side)
        with reading_plan:
            planned = plan.read_shard(shard)
        try:
            if unreachable:  # fail the rest at once, because retries of each image would take minutes
                raise unreachable[0]
            planned = planned.filter(pc.equal(planned["image_id"], row["image"]["image_id"]))
            overlay.photo = _photo(planned, overlay, settings)
        except (ImageError, ConfigError, StorageError) as error:
            # Not of this image alone, so it is remembered for the others.
            if not isinstance(error, ImageError):
                unreachable.append(error)
            message = error.message if isinstance(error, ImageError) else str(error)
            overlay.problem = overlay.problem or f"The image cannot be read now: {storage.redact(message)}"
        return overlay

    overlays: list[Overlay] = []
    rows = [
        (draw, row)
        for draw, rows_of_draw in sample.read_rows(plan.output, dict(sorted(chosen.items())))
        for row in rows_of_draw
    ]
    with ThreadPoolExecutor(_PHOTO_THREADS) as pool:
        for overlay in pool.map(lambda item: finish(item[0][0], item[1]), rows):
            # An image that is too large is left out; a smaller one after it may still fit.
            if sum(other.num_bytes for other in overlays) + overlay.num_bytes <= MAX_GALLERY_BYTES:
                overlays.append(overlay)
    return overlays


def _photo(planned: pa.Table, overlay: Overlay, settings: InputConfig) -> str:
    """The photo as a data: URI. planned: its row of the manifest. Raises: ImageError."""
    (data,) = fetch_images(planned, settings)
    if isinstance(data, ImageError):
        raise data
    small_hw = overlay.height, overlay.width
    if overlay.original_hw[0] * overlay.original_hw[1] > settings.max_pixels:  # labelled in tiles
        with open_raster(data, settings) as image:
            hw = image.height, image.width
            pixels = scaled(image, small_hw) if hw == overlay.original_hw else None
    else:
        pixels = decode_apart(data, settings)
        hw = pixels.shape[0], pixels.shape[1]
    # Another size means another photo: masks would be drawn in the wrong places.
    if pixels is None or hw != overlay.original_hw:
        raise ImageError("unreadable", f"its size has changed to {hw[1]} x {hw[0]} pixels")
    return jpeg_uri(pixels, small_hw)
