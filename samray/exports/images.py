"""The rows of an output for exports: streamed, and by column instead of as nested Python objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from samray import storage
from samray.errors import NotFoundError, StorageError
from samray.output.schema import check_columns
from samray.output.shards import shard_uri
from samray.storage.tables import open_parquet

ROWS_AT_ONCE: Final = 64
_SMALL_SHARD_ROWS: Final = 512
"""A remote shard of up to this many rows is fetched with one request; of a larger one only the needed parts."""


class Rows(NamedTuple):
    """Rows start to stop (exclusive) of a shard with num_rows rows."""

    shard: int
    start: int
    stop: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image and its masks. The lists have one item per mask, like the columns of `ANNOTATION`."""

    image_id: int
    width: int
    height: int
    file_name: str
    uri: str
    ids: list[int]
    counts: list[str]
    bbox: list[list[float]]
    area: list[int]
    predicted_iou: list[float]
    stability_score: list[float]
    point_coords: list[list[list[float]]]
    crop_box: list[list[float]]
    labels: list[str | None] = field(default_factory=list)
    """Empty if the run does not name."""
    label_scores: list[float | None] = field(default_factory=list)
    phrases: tuple[str, ...] = ()
    """As in `samray.output.schema.PHRASES`."""
    presence: Mapping[str, float] = field(default_factory=dict)
    """Phrase -> score, as in `samray.output.schema.PRESENCE`."""
    geo: Mapping[str, Any] | None = None
    """As in `samray.output.schema.GEO`."""

    def of_masks(self, indices: Sequence[int]) -> LabelledImage:
        """The image with only these masks, in this order."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        # Without names those lists are empty.
        lists: dict[str, Any] = {name: [v[i] for i in indices] for name, v in values if isinstance(v, list) and v}
        return replace(self, **lists)


def read_rows(output: str, parts: Sequence[Rows]) -> Iterator[pa.Table]:
    """Read the rows in order, at most `ROWS_AT_ONCE` at a time. Reads only the row groups that contain them.

    Raises: NotFoundError if a shard does not exist, StorageError if it cannot be read or has other rows.
    """
    for part in parts:
        uri = shard_uri(output, part.shard)
        num_left = part.stop - part.start
        try:
            # A request takes longer than the bytes of a small shard.
            small = not storage.is_local(uri) and part.num_rows <= _SMALL_SHARD_ROWS
            source = pa.BufferReader(storage.read_bytes(uri)) if small else storage.open_read(uri)
            with source, open_parquet(source) as file:
                check_columns(file.schema_arrow)
                for table in _slices(file, part):
                    num_left -= table.num_rows
                    yield table
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, NotFoundError):
                raise
            raise StorageError(f"shard {storage.redact(uri)} is damaged: {error}; delete it and run again") from error
        # Fewer rows than the plan says would otherwise be images missing without a word.
        if num_left:
            raise StorageError(
                f"shard {storage.redact(uri)} has fewer rows than planned; `samray verify` shows details"
            )


def _slices(file: pq.ParquetFile, part: Rows) -> Iterator[pa.Table]:
    start = 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        # Only row groups that overlap the part are decoded.
        if start < part.stop and end > part.start:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group]):
                first, last = max(part.start - start, 0), min(part.stop - start, batch.num_rows)
                if first < last:
                    yield pa.Table.from_batches([batch.slice(first, last - first)])
                start += batch.num_rows
        start = end


def images_of(table: pa.Table) -> Iterator[LabelledImage]:
    """The rows of a table of `SCHEMA` without failed images."""
    images = table["image"].to_pylist()
    uris = table["uri"].to_pylist()
    annotations = table["annotations"].combine_chunks()
    # Masks of all images in one flat list; ends says where each image's stop.
    ends = annotations.value_lengths().to_numpy(zero_copy_only=False).cumsum().tolist()
    masks = annotations.flatten()
    columns: dict[str, Any] = {
        "ids": masks.field("id").to_numpy().tolist(),
        "counts": masks.field("segmentation").field("counts").to_pylist(),
        "bbox": _fours(masks.field("bbox")),
        "area": masks.field("area").to_numpy().tolist(),
        "predicted_iou": masks.field("predicted_iou").to_numpy().tolist(),
        "stability_score": masks.field("stability_score").to_numpy().tolist(),
        "point_coords": masks.field("point_coords").to_pylist(),
        "crop_box": _fours(masks.field("crop_box")),
    }
    if masks.type.get_field_index("label") >= 0:
        columns["labels"] = masks.field("label").to_pylist()
        columns["label_scores"] = masks.field("label_score").to_pylist()
    rows: list[dict[str, Any]] = [{} for _ in uris]
    if "phrases" in table.column_names:
        for row, phrases in zip(rows, table["phrases"].to_pylist(), strict=True):
            row["phrases"] = tuple(phrases or ())
    if "presence" in table.column_names:
        for row, presence in zip(rows, table["presence"].to_pylist(), strict=True):
            row["presence"] = {item["phrase"]: item["score"] for item in presence or ()}
    if "geo" in table.column_names:
        for row, geo in zip(rows, table["geo"].to_pylist(), strict=True):
            row["geo"] = geo
    start = 0
    for image, uri, row, end in zip(images, uris, rows, ends, strict=True):
        of_image: dict[str, Any] = {name: values[start:end] for name, values in columns.items()}
        yield LabelledImage(**image, uri=uri, **row, **of_image)
        start = end


def _fours(boxes: pa.ListArray) -> list[list[float]]:
    values = boxes.flatten().to_numpy(zero_copy_only=False)
    if len(values) != 4 * len(boxes) or not np.all(boxes.value_lengths().to_numpy(zero_copy_only=False) == 4):
        return list(boxes.to_pylist())
    # In one step, not one Python object per box and number.
    return list(values.reshape(-1, 4).tolist())
