"""The columns of a shard. The first two columns of a row, as JSON, are an SA-1B annotation file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from samray.rle.records import MaskRecord
from samray.storage.strict_json import parse_json

ANNOTATIONS_PER_IMAGE: Final = 65536
"""Annotation id = image_id * 65536 + index, unique over the data set without a global counter."""

MAX_IMAGE_ID: Final = 2**47 - 1
"""Largest image_id whose annotation ids fit into 64 bits."""

ANNOTATION: Final = pa.struct(
    [
        ("id", pa.int64()),
        ("segmentation", pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])),
        ("bbox", pa.list_(pa.float64())),
        ("area", pa.int64()),
        ("predicted_iou", pa.float64()),
        ("stability_score", pa.float64()),
        ("point_coords", pa.list_(pa.list_(pa.float64()))),
        ("crop_box", pa.list_(pa.float64())),
    ]
)

NAMED_ANNOTATION: Final = pa.struct([*ANNOTATION, ("label", pa.string()), ("label_score", pa.float64())])
"""Schema of runs with `labels.by`. The label is null if none of the requested names fits."""

SCHEMA: Final = pa.schema(
    [
        (
            "image",
            pa.struct(
                [("image_id", pa.int64()), ("width", pa.int32()), ("height", pa.int32()), ("file_name", pa.string())]
            ),
        ),
        ("annotations", pa.list_(ANNOTATION)),
        ("uri", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)


CORRECTED_SCHEMA: Final = SCHEMA.append(
    pa.field("corrections", pa.list_(pa.struct([("id", pa.int64()), ("change", pa.string())])))
)
"""Corrections column of a manually corrected output. `change` is added, changed, removed (by the annotator) or left_out
(the mask was below the export's thresholds and is gone). Masks without an entry are unchanged. Null if the
image was not reviewed."""

PHRASES: Final = pa.field("phrases", pa.list_(pa.string()))
"""Last column of runs in which images have phrases of their own: those asked of this image, besides the ones asked of
every image."""

PRESENCE: Final = pa.field("presence", pa.list_(pa.struct([("phrase", pa.string()), ("score", pa.float64())])))
"""Last column of runs whose `labels.by` says how likely an image shows what a phrase names at all: one item per phrase
asked of the image, in order, found or not. Empty if the image failed."""

GEO: Final = pa.field("geo", pa.struct([("crs", pa.string()), ("transform", pa.list_(pa.float64()))]))
"""Last column of runs whose INPUT has TIFFs: where a GeoTIFF is; null for other images.

crs: as WKT 2. transform: six numbers, [a, b, c, d, e, f], from pixels to the CRS: x = a * column + b * row + c and
y = d * column + e * row + f, where (0, 0) is the outer corner of the first pixel of the upright image."""

TILES: Final = pa.field("tiles", pa.list_(pa.struct([("id", pa.int64()), ("boxes", pa.list_(pa.list_(pa.int32())))])))
"""Last column of runs with `masks.tile`: for each mask of an image that was labelled in tiles, its id and the tiles
that it was found in, [x, y, width, height] each. Empty for an image that was labelled as a whole."""

CHANGES: Final = ("added", "changed", "removed", "left_out")

STATS_SECONDS: Final = ("device_seconds", "held_seconds", "gpu_seconds")
"""Keys of a shard's `stats` that are summed over shards; see `samray.pipeline.report.Labelled`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """One row: an image and its masks, or the reason why it has none."""

    image_id: int
    width: int
    """Pixels, upright; 0 if the image could not be decoded."""
    height: int
    file_name: str
    uri: str
    annotations: list[MaskRecord] = field(default_factory=list)
    """As from `MaskGenerator`; a missing `id` is added."""
    error: str | None = None
    """"reason: message" of a failed image."""
    corrections: list[dict[str, Any]] | None = None
    """As in `CORRECTED_SCHEMA`; only in a corrected output."""
    phrases: list[str] | None = None
    """As in `PHRASES`; only stored in runs that have that column."""
    presence: list[dict[str, Any]] | None = None
    """As in `PRESENCE`; only stored in runs that have that column."""
    geo: dict[str, Any] | None = None
    """As in `GEO`; only stored in runs that have that column."""
    tiles: list[dict[str, Any]] | None = None
    """As in `TILES`; only stored in runs that have that column."""
    embedding: dict[str, Any] | None = None
    """A row of `samray.output.embeddings.SCHEMA`, which is stored apart."""


def schema_of(run: Mapping[str, Any]) -> pa.Schema:
    """The columns of the shards of a run (`Plan.run`)."""
    identity = run.get("identity", {})
    schema = CORRECTED_SCHEMA if "corrects" in identity else SCHEMA
    if categories_of(identity) is not None:
        schema = named(schema) if num_common_of(identity) is None else named(schema).append(PHRASES)
        schema = schema.append(PRESENCE) if has_presence(identity) else schema
    schema = schema.append(GEO) if has_geo(run) else schema
    return schema.append(TILES) if has_tiles(identity) else schema


def named(schema: pa.Schema) -> pa.Schema:
    """The columns of a run that names."""
    return schema.set(schema.get_field_index("annotations"), pa.field("annotations", pa.list_(NAMED_ANNOTATION)))


def categories_of(identity: Mapping[str, Any]) -> list[str] | None:
    """The names that a run asked for, in order; None for a run that does not name."""
    # FastSAM without phrases has settings of labels, but no names.
    categories = (identity.get("labels") or {}).get("categories")
    return None if categories is None else list(categories)


def num_common_of(identity: Mapping[str, Any]) -> int | None:
    """How many of `categories_of` are asked of every image, from the first; None: all. Of the others each image has its
    own, in the column `PHRASES`."""
    num_common: int | None = identity.get("labels", {}).get("asked_of_all")
    return num_common


def has_presence(identity: Mapping[str, Any]) -> bool:
    """Whether the shards of a run have the column `PRESENCE`."""
    return bool((identity.get("labels") or {}).get("presence"))


def has_geo(run: Mapping[str, Any]) -> bool:
    """Whether the shards of a run (`Plan.run`) have the column `GEO`."""
    return bool(run.get("geo"))


def has_tiles(identity: Mapping[str, Any]) -> bool:
    """Whether the shards of a run have the column `TILES`."""
    return (identity.get("masks") or {}).get("tile") is not None


def is_transform(values: Sequence[float | None]) -> bool:
    """Whether this is a transform as `GEO` has it."""
    return len(values) == 6 and all(value is not None and math.isfinite(value) for value in values)


def asked_of(user_phrases: Iterable[str], categories: Sequence[str], num_common: int | None) -> list[str]:
    """All phrases that were asked of an image, in order.

    user_phrases: those in `PHRASES`; num_common: as in `num_common_of`.
    """
    common = list(categories[:num_common])
    return common + [phrase for phrase in user_phrases if phrase not in common]


def count_named(table: pa.Table) -> int:
    """Number of masks with a name in rows of `schema_of` a run."""
    masks = pc.list_flatten(table["annotations"])
    return pc.count(pc.struct_field(masks, "label")).as_py() if masks.type.get_field_index("label") >= 0 else 0


def check_columns(schema: pa.Schema) -> None:
    """Check that a file has the columns of a shard, which lets its readers rely on the types.

    Strings and lists may have any offset width, as other writers choose it. Raises: ValueError that names the first
    column that is missing or has another type.
    """
    for column in SCHEMA:
        if schema.get_field_index(column.name) < 0:
            raise ValueError(f"expected one column {column.name!r}; shards have {SCHEMA.names}")
        _check_type(column.name, schema.field(column.name).type, column.type)
    for column in (PHRASES, PRESENCE, GEO, TILES):
        if schema.get_field_index(column.name) >= 0:
            _check_type(column.name, schema.field(column.name).type, column.type)


def _check_type(name: str, kind: pa.DataType, wanted: pa.DataType) -> None:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if pa.types.is_list(wanted) and is_list:
        _check_type(f"{name}.element", kind.value_type, wanted.value_type)
    elif pa.types.is_struct(wanted) and pa.types.is_struct(kind):
        for part in wanted:
            if kind.get_field_index(part.name) < 0:
                raise ValueError(f"the column {name!r} has no field {part.name!r}")
            _check_type(f"{name}.{part.name}", kind.field(part.name).type, part.type)
    elif not (kind == wanted or (pa.types.is_string(wanted) and pa.types.is_large_string(kind))):
        raise ValueError(f"the column {name!r} is of type {kind}, expected {wanted}")


def records_to_table(records: Iterable[ImageRecord], run: Mapping[str, Any]) -> pa.Table:
    """Convert records to a table with the explicit schema and the metadata of the run (`Plan.run`).

    Failed records have no annotations; their width and height are null in Parquet if unknown.
    """
    rows = [_row(record) for record in records]
    # Explicit, because Arrow would infer list<null> for a shard without masks.
    return pa.Table.from_pylist(rows, schema=schema_of(run)).replace_schema_metadata(shard_metadata(run))


def _row(record: ImageRecord) -> dict[str, Any]:
    failed = record.error is not None
    assert not (failed and record.annotations), record.uri
    # One mask more would get the first id of the next image.
    assert len(record.annotations) <= ANNOTATIONS_PER_IMAGE, len(record.annotations)
    first_id = record.image_id * ANNOTATIONS_PER_IMAGE
    return {
        "image": {
            "image_id": record.image_id,
            "width": record.width,
            "height": record.height,
            "file_name": record.file_name,
        },
        "annotations": [{"id": first_id + i, **mask} for i, mask in enumerate(record.annotations)],
        "uri": record.uri,
        "status": "failed" if failed else "ok",
        "error": record.error,
        "corrections": record.corrections,
        "phrases": record.phrases or [],
        "presence": [] if failed else record.presence or [],
        "geo": None if failed else record.geo,
        "tiles": [] if failed else record.tiles or [],
    }


def shard_metadata(run: Mapping[str, Any]) -> dict[bytes, bytes]:
    """Schema metadata: `samray` (version, run identity, plan generation, bbox convention), `huggingface` (features)."""
    identity = run.get("identity", {})
    # Hugging Face `datasets` takes its features from here instead of inferring them.
    features = {f.name: huggingface_feature(f.type) for f in schema_of(run)}
    metadata = {
        "version": run.get("samray_version"),
        "identity": identity,
        "generation": run.get("generation", 0),
        "bbox_convention": identity.get("masks", {}).get("bbox_convention", "coco"),
    }
    if (categories := categories_of(identity)) is not None:
        metadata["categories"] = categories
    return {
        b"samray": _dumps(metadata),
        b"huggingface": json.dumps({"info": {"features": features}}).encode(),  # in the columns' order: readers compare
    }


def with_stats(table: pa.Table, stats: Mapping[str, Any]) -> pa.Table:
    """Add figures about how the table was made (seconds per stage, device, ...) to its `samray` metadata."""
    metadata = dict(table.schema.metadata or {})
    of_samray = parse_json(metadata.get(b"samray", b"{}"))
    metadata[b"samray"] = _dumps({**of_samray, "stats": dict(stats)})
    return table.replace_schema_metadata(metadata)


def samray_metadata(schema: pa.Schema) -> dict[str, Any]:
    """The metadata from `shard_metadata` and `with_stats`; empty for a file that samray did not write.

    Raises: ValueError if it is damaged.
    """
    metadata = parse_json((schema.metadata or {}).get(b"samray", b"{}"))
    return metadata if isinstance(metadata, dict) else {}


def huggingface_feature(kind: pa.DataType) -> Any:
    """Convert an Arrow type to the JSON of Hugging Face `datasets` features; lists as [feature], which all versions
    read."""
    if pa.types.is_struct(kind):
        return {f.name: huggingface_feature(f.type) for f in kind}
    if pa.types.is_list(kind):
        return [huggingface_feature(kind.value_type)]
    names = {pa.float64(): "float64", pa.int64(): "int64", pa.int32(): "int32", pa.string(): "string"}
    return {"dtype": names[kind], "_type": "Value"}


def _dumps(value: Any) -> bytes:
    # Sorted: the same metadata must give the same bytes.
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def reason_of(error: str) -> str:
    """The reason at the start of an `error` column: `truncated` for `truncated: 12 bytes missing`."""
    return error.partition(":")[0]
