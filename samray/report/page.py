"""Render the HTML page of `samray report` from counts and charts. Reads only the templates."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any, Final

import jinja2
import numpy as np
import numpy.typing as npt

from samray import storage
from samray.config import SECTIONS, Sections, setting_rows
from samray.config.base import as_typed
from samray.output.plan import Plan
from samray.report.figures import Chart, HeatMap, bar_chart, heat_map, histogram
from samray.report.overlays import Overlay

STAGE_WORDS: Final = {
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
"""Names of the stages on the page; other stages keep their names."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A headline figure."""

    value: str
    what: str
    note: str = ""
    exact: bool = True
    """Otherwise an estimate from the sample."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """Values from the sampled images, as arrays: one value per labelled image, or one per mask."""

    num_images: int
    """Sampled images, including failed ones."""
    masks_per_image: npt.NDArray[np.int64]
    predicted_iou: npt.NDArray[np.float64]
    stability_score: npt.NDArray[np.float64]
    log_area: npt.NDArray[np.float64]
    """log10 of the mask's fraction of its image."""
    points: npt.NDArray[np.float64]
    """(N, 2) points of the masks, x and y as fractions of the image's width and height."""
    labels: Counter[str | None] | None = None
    """Name -> number of masks, None for those without a name; None for an output without names."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Sums over the footers."""

    num_images: int
    """In the finished shards."""
    num_masks: int
    num_failed: int
    failures: Counter[str]
    stage_seconds: Counter[str]
    device_seconds: float
    share_read: float
    """Fraction of the finished shards whose footers were read; below 1 the counts are extrapolated."""


def render(
    plan: Plan,
    num_done: int,
    counts: Counts,
    numbers: Numbers,
    overlays: Sequence[Overlay],
    examples: Mapping[str, Sequence[tuple[str, str]]],
    agreement: Sequence[Figure],
    where: str | None = None,
) -> str:
    """Render the page. num_done: finished shards. where: the selection that everything is about."""
    run = plan.run
    masks = run.get("config", {}).get("masks", {})
    model, checkpoint = _made_by(run)
    total, longest = sum(counts.stage_seconds.values()), max(counts.stage_seconds.values(), default=0.0)
    changed, all_settings = settings_tables(run.get("config", {}))
    return render_page(
        "report.html.j2",
        output=storage.redact(plan.output),
        output_name=" / ".join(storage.redact(plan.output).rpartition("//")[2].strip("/").split("/")[-2:]),
        run=run,
        model=model,
        checkpoint=checkpoint,
        adapter=run["identity"].get("model", {}).get("adapter_sha256"),
        num_shards=plan.num_shards,
        num_done=num_done,
        counts=counts,
        numbers=numbers,
        all_drawn=numbers.num_images == counts.num_images,
        headline=_headline(plan, counts, numbers, where),
        where=where,
        agreement=agreement,
        **gallery(overlays),
        charts=_charts(numbers, masks),
        points=_heat(numbers, masks),
        stages=[
            (
                STAGE_WORDS.get(name, name.replace("_", " ")),
                100 * seconds / longest,
                _seconds(seconds),
                100 * seconds / total,
            )
            for name, seconds in counts.stage_seconds.most_common()
            if longest > 0
        ],
        failures=[(reason, number, examples.get(reason, [])) for reason, number in counts.failures.most_common()],
        changed=changed,
        settings=all_settings,
    )


def gallery(overlays: Sequence[Overlay]) -> dict[str, Any]:
    """Variables of `gallery.html.j2` and `large.html.j2`."""
    return {
        "overlays": overlays,
        "data": [_data(overlay) for overlay in overlays],
        "names": _names(overlays),
        "num_shown": sum(len(overlay.masks) for overlay in overlays),
    }


def render_page(template: str, **values: Any) -> str:
    """Render a page with the report's style and script."""
    # The page's policy allows this one script by its hash: text from an output can run nothing.
    script = _template("report.js")
    # autoescape, because names of files and URIs may contain HTML.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("samray.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"redact": storage.redact, "count": "{:,}".format}
    return environment.get_template(template).render(
        style=_template("report.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **values,
    )


def _template(name: str) -> str:
    return (resources.files("samray.report") / "templates" / name).read_text("utf-8")


def _data(overlay: Overlay) -> dict[str, Any]:
    """The data of an image for the page's script."""
    return {
        "name": storage.redact(overlay.file_name),
        "size": [overlay.width, overlay.height],
        "original": [overlay.original_hw[1], overlay.original_hw[0]],
        "masks": overlay.masks,
    }


def _made_by(run: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The network that made the masks, and the SHA-256 of its weights; None if they were imported."""
    identity = run["identity"]
    if identity.get("model") == {}:  # labels.by makes the masks itself
        labels = identity.get("labels", {})
        return labels.get("by"), labels.get("network_sha256")
    return run.get("config", {}).get("model", {}).get("name"), identity.get("model", {}).get("checkpoint_sha256")


def _headline(plan: Plan, counts: Counts, numbers: Numbers, where: str | None) -> list[Figure]:
    # Not 0, to divide by.
    labelled = max(counts.num_images - counts.num_failed, 1)
    counted, drawn = counts.share_read == 1, numbers.num_images == counts.num_images
    planned = "in all" if where is not None else "planned"
    unfinished = f"of {plan.num_images:,} {planned}" if counts.num_images != plan.num_images else ""
    median = f"median {np.median(numbers.masks_per_image):.0f}" if len(numbers.masks_per_image) else ""
    figures = [
        Figure(f"{counts.num_images:,}", "images", unfinished),
        Figure(f"{counts.num_masks:,}", "masks", exact=counted),
        Figure(f"{counts.num_masks / labelled:.1f}", "masks per image", median, exact=counted),
        Figure(
            f"{counts.num_failed:,}",
            "failed images",
            f"{100 * counts.num_failed / max(counts.num_images, 1):.2g}%" if counts.num_failed else "",
            exact=counted,
        ),
    ]
    if len(numbers.predicted_iou):
        stability = numbers.stability_score
        note = f"stability {stability.mean():.2f}" if len(stability) else ""
        figures.append(Figure(f"{numbers.predicted_iou.mean():.2f}", "mean predicted IoU", note, exact=drawn))
    if counts.device_seconds > 0:
        note = f"device time; {_seconds(counts.device_seconds)} in total"
        figures.append(Figure(_seconds(counts.device_seconds / labelled), "per image", note, exact=counted))
    return figures


def _charts(numbers: Numbers, masks: Mapping[str, Any]) -> list[Chart]:
    per_image, iou, stability = numbers.masks_per_image, numbers.predicted_iou, numbers.stability_score
    area = numbers.log_area

    def note(values: npt.NDArray[Any], show: str) -> str:
        return f"median {np.median(values):{show}}, mean {values.mean():{show}}" if len(values) else ""

    names = [] if numbers.labels is None else [_chart_of_names(numbers.labels)]
    area_note = f"fraction of the image, logarithmic; median {_part(float(np.median(area)))}" if len(area) else ""
    return [
        histogram("Masks per image", note(per_image, ".0f"), per_image, show="{:.0f}".format, whole_numbers=True),
        histogram("Relative area", area_note, area, show=_part),
        histogram("Predicted IoU", note(iou, ".3f"), iou, marker=masks.get("pred_iou_thresh")),
        histogram("Stability score", note(stability, ".3f"), stability, marker=masks.get("stability_score_thresh")),
        *names,
    ]


def _chart_of_names(labels: Counter[str | None]) -> Chart:
    named = [(name, number) for name, number in labels.most_common() if name is not None]
    unnamed = f"{labels[None]:,} masks without a name" if labels[None] else ""
    most = f"{len(named):,} names, the most frequent is {named[0][0][:40]}" if named else "no mask has a name"
    return bar_chart("Masks per name", "; ".join(filter(None, (most, unnamed))), named)


def _names(overlays: Sequence[Overlay]) -> list[str | None] | None:
    """The names of the masks in the gallery, sorted, then None if a mask has none; None for an output without names."""
    masks = [mask for overlay in overlays for mask in overlay.masks]
    if not any("label" in mask for mask in masks):
        return None
    labels = {mask["label"] for mask in masks}
    return [*sorted(name for name in labels if name is not None), *([None] if None in labels else [])]


def _heat(numbers: Numbers, masks: Mapping[str, Any]) -> HeatMap | None:
    # Grids of the user's own have no fixed number of points per side.
    points_per_side = masks.get("points_per_side") if not masks.get("point_grids") else None
    return heat_map(numbers.points, points_per_side) if len(numbers.points) else None


def _part(log10: float) -> str:
    """A fraction of the image, given its logarithm: `12%`, `0.3%`, `8e-6`."""
    percent = 100 * 10**log10
    return f"{percent:.0f}%" if percent >= 10 else f"{percent:.2g}%" if percent >= 1e-3 else f"{percent / 100:.0e}"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def settings_tables(
    config: Mapping[str, Any], sections: Sections = SECTIONS
) -> tuple[list[tuple[str, str, str]], list[tuple[str, list[tuple[str, str]]]]]:
    """(setting, value, default) for settings that differ from the default; and all, as (section, [(setting, value)]).

    config: section -> key -> value, as plain JSON. Defaults are those of its model.
    """
    changed, all_settings = [], []
    model = config.get("model", {}).get("name")
    for section in sections:
        values = config.get(section, {})
        rows = []
        for row in setting_rows(section, sections):
            key = row.name.partition(".")[2]
            if key not in values:
                continue
            # A model may have defaults of its own for some settings.
            value, default = values[key], row.default_of.get(model, row.default)
            # As JSON has it, to be comparable with the stored value.
            default = list(default) if isinstance(default, tuple) else default
            rows.append((row.name, _shown(value)))
            if value != default:
                changed.append((row.name, _shown(value), _shown(default)))
        if rows:
            all_settings.append((section, rows))
    return changed, all_settings


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else storage.redact(as_typed(value))
