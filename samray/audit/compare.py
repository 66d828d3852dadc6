"""Compare the measured images of an output with each other, and with those of a second one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from samray.audit import outliers
from samray.audit.drift import Picture, Test, find_drift, picture, windows
from samray.audit.duplicates import first_equal, first_match, first_near
from samray.audit.measure import null_for_nan
from samray.audit.regions import FoundRegions

Values = npt.NDArray[np.float64]

METRICS: Final = ("num_masks", "log_area", "predicted_iou", "stability_score")
"""Compared between groups."""
RANKED: Final = ("num_masks", "covered", "log_area", "predicted_iou", "stability_score")
"""An image far from the others in one of these is an outlier."""
OF_PIXELS: Final = ("brightness", "contrast", "sharpness")
"""The same of images that are read, if their pixels were measured."""
MIN_OUTLIER: Final = 8.0
"""From this distance on an image counts as an outlier. All images are ranked."""
MIN_PICTURES: Final = 4
MAX_PICTURES: Final = 12
_BAD, _UNUSUAL = 10_000.0, 1_000.0
"""Added to the distance of dark, blank and blurred images, and of those with few or many masks: they rank first."""

IMAGES: Final = pa.schema(
    [
        ("image_id", pa.int64()),
        ("prefix", pa.string()),
        ("num_masks", pa.int32()),
        ("covered", pa.float32()),
        ("log_area", pa.float32()),
        ("predicted_iou", pa.float32()),
        ("stability_score", pa.float32()),
        ("same_masks_as", pa.int64()),
        ("in_against", pa.int64()),
        ("few_masks", pa.bool_()),
        ("many_masks", pa.bool_()),
        ("repeated_masks", pa.int32()),
        ("in_drift", pa.bool_()),
        ("outlier", pa.float32()),
        ("outlier_in", pa.string()),
        ("rank", pa.int64()),
    ]
)
"""One row per image, in the order of the output."""

PIXELS: Final = pa.schema(
    [
        ("duplicate_of", pa.int64()),
        ("near_duplicate_of", pa.int64()),
        ("brightness", pa.float32()),
        ("contrast", pa.float32()),
        ("sharpness", pa.float32()),
        ("is_dark", pa.bool_()),
        ("is_blank", pa.bool_()),
        ("is_blurred", pa.bool_()),
    ]
)
"""More columns, if the images were read."""


@dataclass(slots=True)
class Comparison:
    """The result for an output."""

    images: pa.Table
    """`IMAGES`, with `PIXELS` if the images were read."""
    tests: list[Test]
    regions: FoundRegions
    pictures: list[Picture] = field(default_factory=list)
    """Histograms of the strongest drifts, or of the strongest differences if nothing drifted."""
    counts: dict[str, int] = field(default_factory=dict)
    """Finding -> number of images, groups or regions."""


def compare(measured: pa.Table, against: pa.Table | None, regions: FoundRegions) -> Comparison:
    """measured: of all images, in the order of the output, as `MEASURED`; against: of the second output."""
    num = measured.num_rows
    ok = _bools(measured["ok"])
    values = {name: _floats(measured[name]) for name in (*RANKED, *(n for n in OF_PIXELS if n in _names(measured)))}
    # A failed image has no masks because it failed: not suspicious.
    values = {name: np.where(ok, column, np.nan) for name, column in values.items()}
    group_of, prefixes = _groups(measured["prefix"])
    z, medians = {}, {}
    for name, column in values.items():
        z[name], medians[name] = outliers.distances(name, column, group_of, len(prefixes))
    has_few, has_many = outliers.unusual_counts(values["num_masks"], z["num_masks"], medians["num_masks"])
    score, at = outliers.worst({name: z[name] for name in RANKED})
    metrics = {name: values[name] for name in (*METRICS, *(n for n in OF_PIXELS if n in values))}
    groupings: dict[str, Any] = {"prefix": (group_of, prefixes)} if len(prefixes) > 1 else {}
    groupings["window"] = windows(num)
    tests = find_drift(metrics, groupings)
    columns: dict[str, Any] = {name: measured[name] for name in _names(measured) if name in IMAGES.names}
    columns |= _duplicates(measured, against)
    bad = np.zeros(num, bool)
    for name in ("is_dark", "is_blank", "is_blurred"):
        if name in columns:
            bad |= _bools(columns[name])
    severity = score + _BAD * bad + _UNUSUAL * (has_few | has_many)
    order = np.argsort(-severity, kind="stable")
    rank = np.empty(num, np.int64)
    rank[order] = np.arange(1, num + 1)
    names = np.array(RANKED, object)
    columns |= {
        "few_masks": has_few,
        "many_masks": has_many,
        "repeated_masks": np.bincount(regions.images, minlength=num),
        "in_drift": _in_drift(tests, groupings, num),
        "outlier": score,
        "outlier_in": pa.array(names[at], pa.string(), mask=score == 0),
        "rank": rank,
    }
    schema = pa.schema([*IMAGES, *(field for field in PIXELS if field.name in columns)])
    table = pa.Table.from_arrays([_cast(columns[field.name], field.type) for field in schema], schema=schema)
    counts = _count(table, tests, regions, ok)
    if "perceptual_hash" in measured.column_names:
        # Without pixels now, though they were labelled: nothing that --images looks for can be found in them.
        counts["unreadable"] = int((ok & ~_hashes(measured, "perceptual_hash")[1]).sum())
    return Comparison(table, tests, regions, _pictures(tests, metrics, groupings), counts)


def _pictures(tests: Sequence[Test], metrics: Mapping[str, Values], groupings: Mapping[str, Any]) -> list[Picture]:
    number = min(MAX_PICTURES, max(MIN_PICTURES, sum(test.drifts for test in tests)))
    return [
        picture(test, metrics[test.metric], groupings[test.kind][0] == groupings[test.kind][1].index(test.group))
        for test in tests[:number]
    ]


def _count(images: pa.Table, tests: Sequence[Test], regions: FoundRegions, ok: npt.NDArray[np.bool_]) -> dict[str, int]:
    counts = {"images": images.num_rows, "failed": int((~ok).sum()), "masks": pc.sum(images["num_masks"]).as_py() or 0}
    for name in ("same_masks_as", "duplicate_of", "near_duplicate_of", "in_against"):
        if name in images.column_names:
            counts[name] = images.num_rows - images[name].null_count
    for name in ("is_dark", "is_blank", "is_blurred", "few_masks", "many_masks"):
        if name in images.column_names:
            counts[name] = pc.sum(images[name]).as_py() or 0
    drifting = {(test.kind, test.group) for test in tests if test.drifts}
    return counts | {
        "repeated_regions": regions.table.num_rows,
        "drifting_groups": len(drifting),
        "tested_groups": len({(test.kind, test.group) for test in tests}),
        "outliers": int((images["outlier"].to_numpy() >= MIN_OUTLIER).sum()),
    }


def _duplicates(measured: pa.Table, against: pa.Table | None) -> dict[str, Any]:
    ids = measured["image_id"].to_numpy()
    hashes, has = _hashes(measured, "masks_hash")
    columns = {"same_masks_as": _ids_at(ids, first_equal(hashes, has))}
    in_against = np.full(len(ids), -1)
    if against is not None:
        others, has_others = _hashes(against, "masks_hash")
        at = np.flatnonzero(has_others)
        index_in_against = first_match(hashes, has, others[at])
        in_against = np.where(index_in_against >= 0, at[index_in_against] if len(at) else -1, -1)
    if "content_hash" in measured.column_names:
        content, has_content = _hashes(measured, "content_hash")
        columns["duplicate_of"] = _ids_at(ids, first_equal(content, has_content))
        perceptual, has_perceptual = _hashes(measured, "perceptual_hash")
        # Blank images all look alike.
        has_perceptual &= ~_bools(measured["is_blank"])
        columns["near_duplicate_of"] = _ids_at(ids, first_near(perceptual, has_perceptual))
        columns |= {name: measured[name] for name in PIXELS.names if name in measured.column_names}
        if against is not None and "content_hash" in against.column_names:
            in_against = _in_against(measured, against, in_against)
    other_ids = np.zeros(1, np.int64) if against is None else against["image_id"].to_numpy()
    columns["in_against"] = _ids_at(other_ids, in_against)
    return columns


def _in_against(
    measured: pa.Table, against: pa.Table, index_in_against: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Also images of the same bytes, or of the same perceptual hash."""
    for name in ("content_hash", "perceptual_hash"):
        hashes, has = _hashes(measured, name)
        others, has_others = _hashes(against, name)
        if name == "perceptual_hash":
            has &= ~_bools(measured["is_blank"])
            has_others &= ~_bools(against["is_blank"])
        at = np.flatnonzero(has_others)
        more_matches = first_match(hashes, has & (index_in_against < 0), others[at])
        index_in_against = np.where(more_matches >= 0, at[more_matches] if len(at) else -1, index_in_against)
    return index_in_against


def _in_drift(tests: Sequence[Test], groupings: Mapping[str, Any], num: int) -> npt.NDArray[np.bool_]:
    drifting = np.zeros(num, bool)
    for kind, (group_of, names) in groupings.items():
        groups = {test.group for test in tests if test.drifts and test.kind == kind}
        drifting |= np.array([name in groups for name in names], bool)[group_of]
    return drifting


def _groups(prefixes: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], list[str]]:
    coded = prefixes.combine_chunks().dictionary_encode()
    return coded.indices.to_numpy(zero_copy_only=False).astype(np.int64), coded.dictionary.to_pylist()


def _hashes(table: pa.Table, name: str) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    has = np.asarray(pc.is_valid(table[name]).to_numpy(), bool)
    return np.asarray(pc.fill_null(table[name], pa.scalar(0, pa.uint64())).to_numpy(), np.uint64), has


def _ids_at(ids: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> pa.Array:
    """The ids at these places; null for -1."""
    return pa.array(ids[places], mask=places < 0)


def _names(table: pa.Table) -> list[str]:
    return list(table.column_names)


def _floats(column: pa.ChunkedArray) -> Values:
    return np.asarray(column.to_numpy(), np.float64)


def _bools(column: Any) -> npt.NDArray[np.bool_]:
    if isinstance(column, np.ndarray):
        return column
    return np.asarray(pc.fill_null(column, False).to_numpy(), bool)


def _cast(column: Any, kind: pa.DataType) -> Any:
    return (null_for_nan(column) if isinstance(column, np.ndarray) else column).cast(kind)
