"""Measure the images of an output from its Parquet columns alone: a row of numbers per image, in a piece of shards.

Run-length strings, which are most of an output, are not read. Images whose masks have the same boxes, areas and scores
to the last bit are found by a hash: a labeler gives equal pixels equal masks, and others practically never.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from samray.audit.hashing import hash_groups, hash_rows
from samray.audit.regions import Repeats, repeats_in
from samray.output.shards import open_shard

Floats = npt.NDArray[np.float64]

COLUMNS: Final = (
    "image",
    "status",
    *(f"annotations.list.element.{name}" for name in ("bbox", "area", "predicted_iou", "stability_score")),
)
_ROWS_AT_ONCE: Final = 8192
MIN_HASHED: Final = 2
"""Images with fewer masks have no hash: one mask, such as the whole image of an import, may be the same by chance."""

MEASURED: Final = pa.schema(
    [
        ("image_id", pa.int64()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("prefix", pa.string()),
        ("ok", pa.bool_()),
        ("num_masks", pa.int32()),
        ("covered", pa.float32()),  # areas of all masks over the image's, which counts overlaps twice
        ("log_area", pa.float32()),  # mean decimal logarithm of the masks' fractions of the image
        ("predicted_iou", pa.float32()),  # mean
        ("stability_score", pa.float32()),  # mean
        ("masks_hash", pa.uint64()),  # null with fewer masks than MIN_HASHED
    ]
)
"""The measurements of each image; means are null without masks."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A piece of an output, measured."""

    images: pa.Table
    """`MEASURED`, in the order of the output."""
    repeats: pa.Table
    """`samray.audit.regions.REPEATS`: masks that many images of the piece share."""


def measure_shards(output: str, shards: range | list[int], depth: int) -> Measured:
    """Measure these shards. depth: folders of a file name that make its prefix. Raises: StorageError."""
    tables, regions, num_before = [], Repeats(), 0
    for shard in shards:
        row = 0
        with open_shard(output, shard) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=list(COLUMNS)):
                rows = pa.Table.from_batches([batch])
                table, boxes = _measure(rows, shard, row, depth)
                tables.append(table)
                regions.add(boxes, num_before)
                row += rows.num_rows
                num_before += rows.num_rows
    images = pa.concat_tables([MEASURED.empty_table(), *tables]).combine_chunks()
    return Measured(images, repeats_in(regions, images))


@dataclass(frozen=True, slots=True)
class Masks:
    """The masks of some images, as columns."""

    parents: npt.NDArray[np.int64]
    """(M,) row of each mask's image."""
    boxes_xywh: Floats
    """(M, 4) pixels."""
    area: Floats
    """(M,) pixels."""
    size_wh: Floats
    """(M, 2) of each mask's image, pixels."""


def _measure(rows: pa.Table, shard: int, first_row: int, depth: int) -> tuple[pa.Table, Masks]:
    image, annotations = rows["image"].combine_chunks(), rows["annotations"].combine_chunks()
    num = rows.num_rows
    flat = annotations.flatten()
    parents = np.asarray(pc.list_parent_indices(annotations).to_numpy(), np.int64)
    counts = np.bincount(parents, minlength=num)
    size_wh = np.stack([_floats(pc.struct_field(image, side)) for side in ("width", "height")], 1)
    area, iou, stability = (_floats(flat.field(name)) for name in ("area", "predicted_iou", "stability_score"))
    boxes = boxes_of(flat.field("bbox"))
    masks = Masks(parents, boxes, area, size_wh[parents])
    with np.errstate(divide="ignore", invalid="ignore"):
        part = area / (size_wh[parents].prod(1))
        log_area = np.log10(part)
    ok = np.asarray(pc.fill_null(pc.equal(rows["status"], "ok"), False).to_numpy(), bool)
    columns: dict[str, Any] = {
        "image_id": pc.struct_field(image, "image_id"),
        "shard": np.full(num, shard, np.int32),
        "row": np.arange(first_row, first_row + num, dtype=np.int32),
        "prefix": prefixes(pc.struct_field(image, "file_name"), depth),
        "ok": ok,
        "num_masks": counts.astype(np.int32),
        "covered": np.bincount(parents, np.nan_to_num(part, posinf=0.0), num),
        "log_area": _means(log_area, parents, num),
        "predicted_iou": _means(iou, parents, num),
        "stability_score": _means(stability, parents, num),
        "masks_hash": pa.array(
            hash_groups(hash_rows(np.column_stack([boxes, area, iou, stability])), parents, num) ^ hash_rows(size_wh),
            mask=counts < MIN_HASHED,
        ),
    }
    return pa.Table.from_arrays([_column(columns[field.name], field) for field in MEASURED], schema=MEASURED), masks


def _column(values: Any, field: pa.Field) -> pa.Array:
    return null_for_nan(values).cast(field.type) if isinstance(values, np.ndarray) else values


def null_for_nan(values: npt.NDArray[Any]) -> pa.Array:
    """A mean of no masks is NaN, which is null in a file."""
    return pa.array(values, mask=np.isnan(values) if values.dtype.kind == "f" else None)


def prefixes(names: pa.Array, depth: int) -> pa.Array:
    """The first `depth` folders of each name: `a/b/` for a/b/c.jpg with 2; "" without a folder."""
    # s: names may have line breaks.
    return pc.fill_null(pc.replace_substring_regex(names, rf"(?s)^((?:[^/]+/){{0,{depth}}}).*$", r"\1"), "")


def boxes_of(boxes: pa.Array) -> Floats:
    """(M, 4) float64; NaN for a box that is not four numbers, as in a damaged output."""
    values = _floats(boxes.flatten())
    if len(values) == 4 * len(boxes) and boxes.null_count == 0:
        return values.reshape(-1, 4)
    lists = [box if box is not None and len(box) == 4 else [None] * 4 for box in boxes.to_pylist()]
    return np.array(lists, np.float64).reshape(-1, 4)


def _floats(array: pa.Array) -> Floats:
    return np.asarray(array.to_numpy(zero_copy_only=False), np.float64)


def _means(values: Floats, parents: npt.NDArray[np.int64], num: int) -> Floats:
    """(num,) mean of the finite values of each image; NaN without any."""
    finite = np.isfinite(values)
    sums = np.bincount(parents[finite], values[finite], num)
    with np.errstate(invalid="ignore"):
        return sums / np.bincount(parents[finite], minlength=num)
