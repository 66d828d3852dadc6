"""Flat table: Parquet with one row per mask, for SQL. In a run that names, with the columns `label` and `label_score`.

With --partitions N the files are in N Hive folders, `image_bucket=K` with K = image_id mod N.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from samray.exports.base import ExportOptions, Format
from samray.exports.pieces import LeftOut

if TYPE_CHECKING:
    from samray.exports.pieces import Files, Job, Piece

FLAT: Final = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("uri", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("mask_id", pa.int64()),
        *((name, pa.float64()) for name in ("bbox_x", "bbox_y", "bbox_w", "bbox_h")),
        ("area", pa.int64()),
        ("predicted_iou", pa.float64()),
        ("stability_score", pa.float64()),
        *((name, pa.float64()) for name in ("point_x", "point_y", "crop_x", "crop_y", "crop_w", "crop_h")),
        ("size", pa.list_(pa.int32())),
        ("counts", pa.string()),
    ]
)

NAMED_FLAT: Final = pa.schema([*FLAT, ("label", pa.string()), ("label_score", pa.float64())])
"""The table of a run that names."""

_ROWS_PER_GROUP: Final = 16384

IMAGES_PER_TABLE: Final = 1024
"""Images per file: some 100,000 masks, which are held in memory as compressed Parquet."""


class FlatOptions(ExportOptions):
    images_per_file: int | None = Field(None, gt=0)
    """Images per Parquet file; default 1024."""
    partitions: int | None = Field(None, gt=0)
    """Number of Hive folders image_bucket=K, with K = image_id mod this number."""


def write(job: Job[FlatOptions], piece: Piece, tables: Iterable[pa.Table]) -> Files:
    """Write the piece's masks: one Parquet file, or one in each folder that has any."""
    buckets = job.options.partitions
    # Files stay open in memory until the piece is done, and so every folder gets one file per piece.
    writers: dict[int, tuple[pa.BufferOutputStream, pq.ParquetWriter]] = {}
    waiting: list[pa.Table] = []
    num_waiting = 0

    def flush() -> None:
        # Row groups of a useful size: one table has few images.
        rows = pa.concat_tables(waiting)
        for bucket, bucket_rows in _by_bucket(rows, buckets) if buckets else [(0, rows)]:
            if bucket not in writers:
                sink = pa.BufferOutputStream()
                writers[bucket] = sink, pq.ParquetWriter(sink, rows.schema, compression="zstd", write_page_index=True)
            writers[bucket][1].write_table(bucket_rows)
        waiting.clear()

    for table in tables:
        waiting.append(flat_rows(table))
        num_waiting += waiting[-1].num_rows
        if num_waiting >= _ROWS_PER_GROUP:
            flush()
            num_waiting = 0
    if waiting:
        flush()
    for bucket, (sink, writer) in sorted(writers.items()):
        writer.close()
        folder = f"image_bucket={bucket}/" if buckets else ""
        yield f"{folder}part-{piece.number:06d}.parquet", bytes(sink.getvalue())
    return LeftOut()


def _by_bucket(rows: pa.Table, buckets: int) -> Iterator[tuple[int, pa.Table]]:
    bucket_of = rows["image_id"].to_numpy() % buckets
    for bucket in np.unique(bucket_of).tolist():
        yield bucket, rows.filter(pa.array(bucket_of == bucket))


def flat_rows(table: pa.Table) -> pa.Table:
    """The masks of a table of `SCHEMA` without failed images, as rows of `FLAT` or, with names, `NAMED_FLAT`.

    The point is the first of several.
    """
    annotations = table["annotations"].combine_chunks()
    masks = annotations.flatten()
    image = table["image"].combine_chunks()
    # For each mask the row of its image, to repeat the image's columns.
    of_image = pc.list_parent_indices(annotations)
    columns = {name: image.field(name).take(of_image) for name in ("image_id", "file_name", "width", "height")}
    columns["uri"] = table["uri"].combine_chunks().take(of_image)
    columns["mask_id"] = masks.field("id")
    for prefix in ("bbox", "crop"):
        box = masks.field("crop_box" if prefix == "crop" else "bbox")
        columns |= {f"{prefix}_{side}": pc.list_element(box, index) for index, side in enumerate("xywh")}
    columns |= {name: masks.field(name) for name in ("area", "predicted_iou", "stability_score")}
    # Fixed size: a mask without a point gets null there, so that the columns stay equally long.
    points = pc.list_flatten(pc.list_slice(masks.field("point_coords"), 0, 1, return_fixed_size_list=True))
    columns |= {f"point_{side}": pc.list_element(points, index) for index, side in enumerate("xy")}
    columns |= {name: masks.field("segmentation").field(name) for name in ("size", "counts")}
    schema = FLAT
    if masks.type.get_field_index("label") >= 0:
        schema = NAMED_FLAT
        columns |= {name: masks.field(name) for name in ("label", "label_score")}
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


FORMAT: Final = Format(
    help="Parquet with one row per mask",
    options=FlatOptions,
    sizes=lambda options: (options.images_per_file or IMAGES_PER_TABLE, None),
    write=write,
)
