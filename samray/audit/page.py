"""A self-contained HTML page about a check: the findings, with pictures of drift and the worst images."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import numpy as np
import pyarrow as pa

from samray import storage
from samray.audit.compare import MIN_OUTLIER, Comparison
from samray.audit.drift import MAX_P, MIN_D, MIN_PSI, Picture, Values
from samray.output import sample
from samray.output.plan import Plan
from samray.output.shards import open_shard
from samray.report.output import overlays_of
from samray.report.page import Figure, gallery, render_page

MAX_ROWS: Final = 20
"""Rows of a table on the page; the Parquet files have all."""

WORDS: Final = {
    "num_masks": "masks per image",
    "covered": "covered area",
    "log_area": "size of the masks (log10 of the fraction of the image)",
    "predicted_iou": "predicted IoU",
    "stability_score": "stability",
    "brightness": "brightness",
    "contrast": "contrast",
    "sharpness": "sharpness",
}
FINDINGS: Final = {
    "same_masks_as": ("images repeat another's masks", "equal boxes, areas and scores: practically the same pixels"),
    "duplicate_of": ("exact duplicates", "the same bytes as another image"),
    "near_duplicate_of": ("near duplicates", "perceptual hashes at most 3 bits apart"),
    "in_against": ("images are in the other output", ""),
    "unreadable": ("images cannot be read any more", "their pixels were not checked"),
    "is_blank": ("blank images", ""),
    "is_dark": ("dark images", ""),
    "is_blurred": ("blurred images", ""),
    "few_masks": ("images with few masks", "or none, where others have some"),
    "many_masks": ("images with many masks", ""),
    "repeated_regions": ("repeated regions", "masks at the same place in many images of a prefix"),
    "drifting_groups": ("groups drift", ""),
    "outliers": ("outliers", f"a robust z of {MIN_OUTLIER:g} or more"),
}
"""Key of `Comparison.counts` -> words and note of its figure."""


def write_page(
    plan: Plan, dest: str, comparison: Comparison, review: pa.Table, *, images: bool, num_examples: int
) -> str:
    """Write DEST/quality.html; returns its URI. review: the worst images first, with shard and row. Raises:
    StorageError."""
    counts = comparison.counts
    figures = [Figure(f"{counts['images']:,}", "images", f"{counts['masks']:,} masks")]
    for key, (what, note) in FINDINGS.items():
        if key in counts and not (key == "in_against" and not counts[key]):
            figures.append(Figure(f"{counts[key]:,}", what, note))
    worst = review.slice(0, num_examples)
    overlays = overlays_of(plan, _places(plan, worst), max(num_examples, 1)) if worst.num_rows else []
    page = render_page(
        "quality.html.j2",
        output=storage.redact(plan.output),
        output_name=" / ".join(storage.redact(plan.output).rpartition("//")[2].strip("/").split("/")[-2:]),
        dest=storage.redact(dest),
        headline=figures,
        counts=counts,
        has_findings=any(counts.get(key) for key in FINDINGS if key != "outliers"),
        images=images,
        charts=[_chart(picture) for picture in comparison.pictures],
        tests=[test for test in comparison.tests if test.drifts][:MAX_ROWS],
        num_tests=len(comparison.tests),
        bounds={"p": MAX_P, "d": MIN_D, "psi": MIN_PSI},
        metric_words=WORDS,
        regions=comparison.regions.table.slice(0, MAX_ROWS).to_pylist(),
        repeats=_repeats(comparison.images),
        worst=worst.to_pylist(),
        reasons=[_reasons(row) for row in worst.to_pylist()],
        **gallery(overlays),
    )
    uri = storage.join(dest, "quality.html")
    storage.put(uri, page.encode("utf-8"))
    return uri


def _places(plan: Plan, review: pa.Table) -> dict[sample.Draw, list[int]]:
    """The images by row group, as `overlays_of` takes them."""
    places: dict[sample.Draw, list[int]] = {}
    shards, rows = review["shard"].to_numpy(), review["row"].to_numpy()
    for shard in np.unique(shards).tolist():
        with open_shard(plan.output, shard) as file:
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = list(accumulate(groups))
        for row in np.sort(rows[shards == shard]).tolist():
            group = int(np.searchsorted(ends, row, side="right"))
            places.setdefault((shard, group), []).append(row - (ends[group] - groups[group]))
    return places


def _reasons(row: dict[str, Any]) -> str:
    """Why an image is on the list."""
    words = {
        "is_blank": "blank", "is_dark": "dark", "is_blurred": "blurred", "few_masks": "few masks",
        "many_masks": "many masks", "in_drift": "in a drifting group",
    }  # fmt: skip
    reasons = [text for name, text in words.items() if row.get(name)]
    reasons += ["repeats a region"] * bool(row["repeated_masks"])
    reasons += ["same masks as another"] * (row["same_masks_as"] is not None)
    if row["outlier_in"]:
        reasons.append(f"{WORDS[row['outlier_in']]}: {row['outlier']:.1f} sigma from the others")
    return ", ".join(reasons)


def _repeats(images: pa.Table) -> list[tuple[str, int, int]]:
    """(kind, image_id, images that repeat it), the most repeated first."""
    rows = []
    for name in ("duplicate_of", "same_masks_as", "near_duplicate_of"):
        if name in images.column_names:
            for entry in images[name].drop_null().value_counts().to_pylist():
                rows.append((name.replace("_", " ").removesuffix(" of"), entry["values"], entry["counts"]))
    return sorted(rows, key=lambda row: (-row[2], row[0], row[1]))[:MAX_ROWS]


@dataclass(frozen=True, slots=True)
class DriftChart:
    """Two distributions, in SVG units: 100 wide, 40 high, y downwards."""

    title: str
    note: str
    drifts: bool
    bars: list[tuple[float, float, float]]
    """(x, width, height) of all others."""
    line: str
    """Points of the group's own outline."""
    ticks: list[tuple[float, str]]


def _chart(picture: Picture) -> DriftChart:
    test, number = picture.test, len(picture.group)
    most = max(float(picture.group.max()), float(picture.others.max()), 1e-9)
    width = 100 / number
    corners = []
    for i, share in enumerate(picture.group.tolist()):
        corners += [(i * width, 40 - 40 * share / most), ((i + 1) * width, 40 - 40 * share / most)]
    return DriftChart(
        f"{test.group or 'no folder'}: {WORDS[test.metric]}",
        f"{test.num_images:,} images, median {test.median:.3g}, of all others {test.median_of_others:.3g}; "
        f"D {test.d:.2f}, PSI {test.psi:.2f}, p {'< 1e-99' if test.p < 1e-99 else f'{test.p:.1g}'}",
        test.drifts,
        [(i * width, width, 40 * share / most) for i, share in enumerate(picture.others.tolist())],
        " ".join(f"{x:.2f},{y:.2f}" for x, y in corners),
        [(position * 100, f"{_at(picture.edges, position):.3g}") for position in (0.0, 0.5, 1.0)],
    )


def _at(edges: Values, position: float) -> float:
    return float(edges[0] + position * (edges[-1] - edges[0]))
