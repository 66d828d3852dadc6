"""One self-contained HTML page about an output: what was found, how it looks, what failed, where the time went.

Everything comes from the output itself, shard by shard, and only the photos shown are read again from where they lie.
Of an output with very many shards an even sample is read, and the page says so.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.config import SECTIONS, InputConfig, setting_rows
from samray.dataset.inputs import fetch_images
from samray.dataset.manifest import Plan, load_plan
from samray.dataset.schema import samray_metadata
from samray.dataset.shards import done_shards, read_shard
from samray.errors import ConfigError, ImageError
from samray.figures import Chart, Histogram, jpeg_uri, mask_overlay, overlay_uri, thumbnail
from samray.images import decode_image
from samray.settings import as_typed

MAX_SHARDS_READ = 200
"""Of more shards than this an even sample is read."""

EXAMPLES_PER_REASON = 4

STAGE_WORDS = {
    "fetch": "fetching images",
    "decode_wait": "waiting for pixels",
    "preprocess": "resizing",
    "encode": "image encoder",
    "decode": "mask decoder",
    "score": "scores and boxes",
    "nms": "removing duplicates",
    "regions": "cleaning regions",
    "rle": "run-length coding",
    "write": "writing shards",
}
"""What the stages are called on the page; others go by their own names."""


@dataclass
class Tile:
    """One image of the gallery."""

    file_name: str
    uri: str
    caption: str
    photo: str | None = None
    """A data: URI; None when the image cannot be read any more."""
    masks: str | None = None
    problem: str = ""


@dataclass
class Summary:
    """What is counted while the shards stream by."""

    num_images: int = 0
    num_masks: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    stage_seconds: Counter[str] = field(default_factory=Counter)
    device_seconds: float = 0.0
    tiles: list[Tile] = field(default_factory=list)
    masks_per_image: Histogram = field(default_factory=lambda: Histogram(0, 4096, 4096))
    predicted_iou: Histogram = field(default_factory=lambda: Histogram(0, 1.1, 220))
    stability_score: Histogram = field(default_factory=lambda: Histogram(0, 1, 200))
    log_area: Histogram = field(default_factory=lambda: Histogram(-7, 0, 140))
    """log10 of a mask's part of its image."""

    @property
    def num_failed(self) -> int:
        """Images that could not be labelled."""
        return sum(self.failures.values())

    def add(self, table: pa.Table) -> None:
        """Count the rows of one shard."""
        self.num_images += table.num_rows
        self._add_times(table.schema)
        ok = table.filter(pc.equal(table["status"], "ok"))
        masks = ok["annotations"].combine_chunks()
        per_image = masks.value_lengths().to_numpy(zero_copy_only=False)
        self.masks_per_image.add(per_image)
        flat = masks.flatten()
        self.num_masks += len(flat)
        self.predicted_iou.add(flat.field("predicted_iou").to_numpy(zero_copy_only=False))
        self.stability_score.add(flat.field("stability_score").to_numpy(zero_copy_only=False))
        image = ok["image"].combine_chunks()
        pixels = image.field("width").to_numpy().astype(np.float64) * image.field("height").to_numpy()
        area = flat.field("area").to_numpy(zero_copy_only=False) / np.repeat(pixels, per_image)
        self.log_area.add(np.log10(np.maximum(area, 1e-7)))
        failed = table.filter(pc.not_equal(table["status"], "ok")).select(["uri", "error"])
        for row in failed.to_pylist():
            reason, _, message = (row["error"] or "unknown").partition(": ")
            self.failures[reason] += 1
            if len(self.examples[reason]) < EXAMPLES_PER_REASON:
                self.examples[reason].append((storage.redact(row["uri"]), message))

    def _add_times(self, schema: pa.Schema) -> None:
        stats = samray_metadata(schema).get("stats", {})
        self.device_seconds += stats.get("device_seconds", 0.0)
        self.stage_seconds.update(stats.get("stage_seconds", {}))


def write_report(output: str, out: str | None = None, *, num_images: int = 24) -> str:
    """Write the page about output to `out` (a path or URI), by default into the output; returns where it lies.

    Raises ConfigError when output holds no samray run, StorageError when it cannot be read.
    """
    plan = load_plan(output)
    done = sorted(done_shards(plan.output))
    if not done:
        raise ConfigError(f"{storage.redact(output)} holds no finished shard yet; run samray label first")
    summary = Summary()
    sample = _evenly(done, MAX_SHARDS_READ)
    shown = _rows_to_show(sample, plan, num_images)
    for shard in sample:
        table = read_shard(plan.output, shard)
        summary.add(table)
        if shown.get(shard):
            summary.tiles += _tiles(plan, shard, table, shown[shard])
    page = render(plan, done, len(sample), summary)
    place = out or storage.join(plan.output, "_samray", "report.html")
    storage.put(place, page.encode("utf-8"))
    return place


def _evenly(items: Sequence[int], number: int) -> list[int]:
    """At most `number` of the items, spread evenly over them."""
    if len(items) <= number:
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * number)] for i in range(number)]


def _rows_to_show(sample: Sequence[int], plan: Plan, num_images: int) -> dict[int, int]:
    """Shard -> how many of its images the gallery shows."""
    if len(sample) >= num_images:
        return dict.fromkeys(_evenly(sample, num_images), 1)
    share, rest = divmod(num_images, len(sample))
    return {shard: share + (i < rest) for i, shard in enumerate(sample)}


def _tiles(plan: Plan, shard: int, table: pa.Table, number: int) -> Iterator[Tile]:
    """Gallery tiles for `number` labelled images of a shard, spread over it."""
    places = np.flatnonzero(pc.equal(table["status"], "ok").to_numpy(zero_copy_only=False)).tolist()
    planned = plan.read_shard(shard)
    settings = InputConfig(**plan.run["identity"]["input"])
    for place in _evenly(places, number):
        row = table.slice(place, 1).to_pylist()[0]
        image, masks = row["image"], row["annotations"]
        caption = f"{image['width']} x {image['height']}, {len(masks)} masks"
        tile = Tile(image["file_name"], storage.redact(row["uri"]), caption)
        try:
            (data,) = fetch_images(planned.slice(place, 1), settings)
            if isinstance(data, ImageError):
                raise data
            pixels = decode_image(data, settings.max_pixels)
            if pixels.shape[:2] != (image["height"], image["width"]):
                raise ImageError("unreadable", f"it is {pixels.shape[1]} x {pixels.shape[0]} now")
            photo = thumbnail(pixels)
            tile.photo, tile.masks = jpeg_uri(photo), overlay_uri(mask_overlay(masks, photo.size))
        except ImageError as error:
            tile.problem = storage.redact(error)
        yield tile


def render(plan: Plan, done: Sequence[int], num_read: int, summary: Summary) -> str:
    """The page. num_read: shards that summary is made of."""
    run = plan.run
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("samray"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    settings = run.get("config", {})
    sampled = f"Figures are from {num_read:,} of {len(done):,} shards, spread evenly." if num_read < len(done) else ""
    stages = summary.stage_seconds.most_common()
    total, longest = sum(summary.stage_seconds.values()), max(summary.stage_seconds.values(), default=0.0)
    return environment.get_template("report.html.j2").render(
        output=storage.redact(plan.output),
        output_name=plan.output.rstrip("/").rpartition("/")[2],
        input=storage.redact(run.get("input", "")),
        model=settings.get("model", {}).get("name", "an unknown model"),
        made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        missing_shards=plan.num_shards - len(done),
        num_shards=plan.num_shards,
        headline=_headline(plan, summary),
        sampled=sampled,
        tiles=summary.tiles,
        charts=_charts(summary, settings.get("masks", {})),
        stages=[
            (
                STAGE_WORDS.get(name, name.replace("_", " ")),
                seconds / longest,
                f"{_seconds(seconds)}, {100 * seconds / total:.0f}%",
            )
            for name, seconds in stages
            if longest > 0
        ],
        failures=[(reason, number, summary.examples[reason]) for reason, number in summary.failures.most_common()],
        settings=_settings(run),
    )


def _headline(plan: Plan, summary: Summary) -> list[tuple[str, str, str]]:
    labelled = summary.num_images - summary.num_failed
    cards = [
        (
            f"{plan.num_images:,}",
            "images",
            f"{summary.num_images:,} read here" * (summary.num_images != plan.num_images),
        ),
        (f"{summary.num_masks:,}", "masks", ""),
        (
            f"{summary.num_masks / max(labelled, 1):.1f}",
            "masks an image",
            f"median {summary.masks_per_image.quantile(0.5):.0f}",
        ),
        (f"{summary.num_failed:,}", "failed images", f"{100 * summary.num_failed / max(summary.num_images, 1):.1f}%"),
    ]
    if summary.num_masks:
        stability = f"stability {summary.stability_score.mean:.2f}"
        cards.append((f"{summary.predicted_iou.mean:.2f}", "mean predicted IoU", stability))
    if summary.device_seconds > 0:
        each = summary.device_seconds / max(labelled, 1)
        cards.append((_seconds(each), "time an image", f"{_seconds(summary.device_seconds)} on devices"))
    return cards


def _charts(summary: Summary, masks: Mapping[str, Any]) -> list[Chart]:
    median = f"median {summary.masks_per_image.quantile(0.5):.0f}"
    iou, stability, area = summary.predicted_iou, summary.stability_score, summary.log_area
    area_note = f"part of the image, median {_part(area.quantile(0.5))}; logarithmic"
    return [
        summary.masks_per_image.chart("Masks an image", median, show="{:.0f}".format, whole_numbers=True),
        iou.chart("Predicted IoU", f"mean {iou.mean:.3f}", marker=masks.get("pred_iou_thresh")),
        stability.chart("Stability score", f"mean {stability.mean:.3f}", marker=masks.get("stability_score_thresh")),
        area.chart("Relative area", area_note, show=_part),
    ]


def _part(log10: float) -> str:
    """A part of the image, given its logarithm: `12%`, `0.3%`, `8e-6`."""
    part = 10**log10
    return f"{100 * part:.2g}%" if part >= 1e-4 else f"{part:.0e}"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _settings(run: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Blocks of (setting, value, whether it is not the default): the run itself, then its sections."""
    about = {key: run.get(key) for key in ("input", "created_at", "samray_version")}
    about["checkpoint_sha256"] = run["identity"].get("model", {}).get("checkpoint_sha256")
    about |= run.get("versions", {})
    blocks = [("run", [(key, storage.redact(value), False) for key, value in about.items() if value is not None])]
    for section in SECTIONS:
        given = run.get("config", {}).get(section, {})
        rows = []
        for row in setting_rows(section):
            key = row.name.partition(".")[2]
            if key in given:
                rows.append((key, _shown(given[key]), given[key] != row.default))
        if rows:
            blocks.append((section, rows))
    return blocks


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else storage.redact(as_typed(value))
