"""The manifest files of an output: `_samray/manifest.parquet`, and one more for each time that images were appended.

A generation is one file, created as a whole and never replaced. It has the new images first, in shards numbered after
those of earlier generations. Then may follow rows of earlier images that changed: the same id and shard, with the new
size and ETag. If an image has several rows, the row of the last generation counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from samray import storage
from samray.errors import ConfigError, NotFoundError, StorageError
from samray.inputs.rows import INPUT_SCHEMA, take
from samray.output.schema import MAX_IMAGE_ID
from samray.output.seals import leave_room, seal
from samray.storage.footers import Bounds, statistics
from samray.storage.strict_json import parse_json
from samray.storage.tables import open_parquet

FOLDER: Final = "_samray"

MANIFEST_SCHEMA: Final = pa.schema([("image_id", pa.int64()), ("shard", pa.int32()), *INPUT_SCHEMA])

_REQUIRED: Final = ("image_id", "shard", "uri", "file_name", "size")

_ROWS_PER_GROUP: Final = 16384
_ROWS_AT_ONCE: Final = 2**20
"""Rows per batch: intermediate values, in addition to the table itself, exist only for this many rows."""
_NAME: Final = re.compile(r"manifest-(\d{6})\.parquet")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Generation:
    """One manifest file, as described by its own metadata."""

    number: int
    identity: dict[str, Any]
    """Identity of the run that made it, including `input_uri`; the first generation's is the output's."""
    num_images: int
    """Number of new images."""
    images_per_shard: int
    first_shard: int = 0
    num_changed: int = 0
    """Number of rows, after the new images, of earlier images that changed."""
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)
    """Files that the listing of INPUT left out (`Skipped.counts`)."""
    num_hidden: int = 0
    """URIs and containers that the manifest stores without their credentials (`samray.output.credentials`)."""

    @property
    def num_shards(self) -> int:
        """Shards of its new images."""
        return -(-self.num_images // self.images_per_shard)

    @property
    def rows_per_group(self) -> int:
        """A multiple of the shard size: all rows of a shard are in one row group."""
        return self.images_per_shard * max(1, _ROWS_PER_GROUP // self.images_per_shard)

    @property
    def num_groups(self) -> int:
        """Row groups of new images; row groups of changed images follow."""
        return -(-self.num_images // self.rows_per_group)


def manifest_uri(output: str, generation: int) -> str:
    name = f"manifest-{generation:06d}.parquet" if generation else "manifest.parquet"
    return storage.join(output, FOLDER, name)


# --- making one ----------------------------------------------------------------------------------------------------


def build_manifest(images: pa.Table, images_per_shard: int, taken: pa.ChunkedArray | None = None) -> pa.Table:
    """Assign ids and shards, from 0, to the images of an input. Returns a table of `MANIFEST_SCHEMA`.

    taken: ids that are in use.
    """
    shards = pa.array((np.arange(images.num_rows) // images_per_shard).astype(np.int32))
    columns = [image_ids(images["file_name"], taken), shards, *(images[name] for name in INPUT_SCHEMA.names)]
    return pa.Table.from_arrays(columns, schema=MANIFEST_SCHEMA)


def image_ids(file_names: pa.ChunkedArray, taken: pa.ChunkedArray | None = None) -> pa.ChunkedArray:
    """The number in names like sa_<n>.jpg, else the row index; row indices for all if two images would share an id.

    taken: ids that are in use; row indices then count from the largest of them.
    Raises: ConfigError if no id is left.
    """
    first = 0 if taken is None or len(taken) == 0 else pc.max(taken).as_py() + 1
    if first + len(file_names) - 1 > MAX_IMAGE_ID:
        raise ConfigError(f"image ids up to {first - 1} are in use, and the maximum is {MAX_IMAGE_ID}")
    ids = np.arange(first, first + len(file_names))
    for start in range(0, len(file_names), _ROWS_AT_ONCE):
        part = ids[start : start + _ROWS_AT_ONCE]
        # `part` is a view: this fills `ids`.
        part[:] = _numbers_or(file_names.slice(start, _ROWS_AT_ONCE), part)
    collides = taken is not None and pc.any(pc.is_in(pa.array(ids), value_set=taken)).as_py()
    # Row indices cannot collide: they start after the largest id in use.
    if collides or not _all_differ(ids):
        ids = np.arange(first, first + len(file_names))
    return pa.chunked_array([pa.array(ids)])


def _numbers_or(file_names: pa.ChunkedArray, places: np.ndarray) -> np.ndarray:
    """The number in each name like sa_<n>.jpg, else the value in `places`."""
    # At most 15 digits, so that the cast cannot overflow; numbers above MAX_IMAGE_ID are dropped below.
    digits = pc.struct_field(pc.extract_regex(file_names, r"(?:^|/)sa_0*(?P<n>[0-9]{1,15})\.[^./]+$"), "n")
    numbers = pc.cast(digits, pa.int64())
    numbers = pc.if_else(pc.less_equal(numbers, MAX_IMAGE_ID), numbers, None)
    return np.asarray(pc.coalesce(numbers, pa.chunked_array([pa.array(places)])))


def _all_differ(ids: np.ndarray) -> bool:
    # Ids are mostly sorted already, which is checked without the copy that sorting makes.
    return bool((np.diff(ids) > 0).all()) or bool((np.diff(np.sort(ids)) > 0).all())


def create_generation(output: str, generation: Generation, new: pa.Table, changed: pa.Table | None = None) -> bool:
    """Store the generation's manifest; returns False if one with this number exists already.

    new, changed: tables of `MANIFEST_SCHEMA`. Shards of `new` are numbered over the whole output; `changed` is sorted
    by shard.
    Raises: StorageError.
    """
    assert new.num_rows == generation.num_images, (new.num_rows, generation)
    metadata = {
        "identity": generation.identity,
        "num_images": generation.num_images,
        "images_per_shard": generation.images_per_shard,
        "first_shard": generation.first_shard,
        "num_changed": generation.num_changed,
        "skipped": generation.skipped,
        "num_hidden": generation.num_hidden,
    }
    sink = pa.BufferOutputStream()
    schema = MANIFEST_SCHEMA.with_metadata({b"samray": json.dumps(metadata, sort_keys=True).encode()})
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        leave_room(writer)
        writer.write_table(new.cast(MANIFEST_SCHEMA), row_group_size=generation.rows_per_group)
        # In row groups of their own, after the new images: reading a shard's new images never touches them.
        if changed is not None and changed.num_rows:
            assert changed.num_rows == generation.num_changed, (changed.num_rows, generation)
            writer.write_table(changed.cast(MANIFEST_SCHEMA), row_group_size=_ROWS_PER_GROUP)
    # put_new decides between two runs that plan at the same time: the first one wins, the other reads its plan.
    return storage.put_new(manifest_uri(output, generation.number), seal(sink.getvalue()))


# --- reading them --------------------------------------------------------------------------------------------------


def read_generation(output: str, number: int) -> Generation | None:
    """Read a manifest's metadata; None if it does not exist. Raises: ConfigError, StorageError."""
    try:
        arguments = _with_manifest(output, number, lambda file: _arguments(file.schema_arrow.metadata))
    except NotFoundError:
        return None
    # The columns fit, but samray's metadata are missing.
    if not {"identity", "num_images", "images_per_shard"} <= arguments.keys():
        uri = storage.redact(manifest_uri(output, number))
        raise ConfigError(f"{uri} was not written by samray; choose another OUTPUT")
    return Generation(number, **arguments)


def _arguments(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The arguments of `Generation` in a manifest's metadata. Raises: ValueError if a value is invalid."""
    arguments = parse_json((metadata or {}).get(b"samray", b"{}"))
    if not isinstance(arguments, dict):
        raise ValueError("its samray metadata are not an object")
    # The smallest valid value of each; `num_shards` divides by images_per_shard.
    least = {"num_images": 0, "images_per_shard": 1, "first_shard": 0, "num_changed": 0, "num_hidden": 0}
    for name, number in least.items():
        value = arguments.get(name, number)
        if type(value) is not int or value < number:
            raise ValueError(f"its samray metadata have {name}={value!r}, expected a whole number from {number} on")
    if not isinstance(arguments.get("identity", {}), dict):
        raise ValueError("its samray metadata have an identity that is not an object")
    if not isinstance(arguments.get("skipped", {}), dict):
        raise ValueError("its samray metadata have skipped that is not an object")
    return {name: arguments[name] for name in ("identity", "skipped", *least) if name in arguments}


def read_generations(output: str) -> list[Generation]:
    """Read all generations, in order, with one LIST and one footer each.

    Raises: ConfigError; StorageError if one is missing or they are not consecutive.
    """
    names = storage.list_names(storage.join(output, FOLDER))
    numbers = sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))
    generations: list[Generation] = []
    for number in [0, *numbers]:
        generation = read_generation(output, number)
        before = generations[-1] if generations else None
        # A gap would shift the numbers of all later shards, and with them what is done.
        follows = before is None or number == before.number + 1
        if before is not None and generation is not None:
            follows &= generation.first_shard == before.first_shard + before.num_shards
        if generation is None or not follows:
            uri = storage.redact(manifest_uri(output, number))
            raise StorageError(
                f"{uri} is missing or does not continue the previous one: the plan of this OUTPUT is lost"
            )
        generations.append(generation)
    return generations


def read_group(output: str, generation: Generation, group: int) -> pa.Table:
    """One row group of new images. Raises: StorageError."""
    return _with_manifest(output, generation.number, lambda file: _conform(file.read_row_group(group)))


def read_changed(output: str, generation: Generation, shard: int | None = None) -> pa.Table:
    """Rows of the images that this generation found changed, of one shard or of all. Raises: StorageError."""

    def read(file: pq.ParquetFile) -> pa.Table:
        groups = list(range(generation.num_groups, file.metadata.num_row_groups))
        if shard is not None:  # sorted by shard, so the statistics of a group tell which shards it can have
            bounds = statistics(file.metadata, "shard")
            groups = [group for group in groups if _may_have(bounds[group], shard)]
        table = _conform(file.read_row_groups(groups))
        return table if shard is None else table.filter(pc.equal(table["shard"], shard))

    return _with_manifest(output, generation.number, read)


def _may_have(bounds: Bounds | None, shard: int) -> bool:
    return bounds is None or bounds.min <= shard <= bounds.max


def read_rows(output: str, generation: Generation, columns: list[str]) -> pa.Table:
    """These columns of all rows: new images, then changed ones. Raises: StorageError."""

    def read(file: pq.ParquetFile) -> pa.Table:
        present = [name for name in columns if name in file.schema_arrow.names]
        return _conform(file.read(columns=present)).select(columns)

    return _with_manifest(output, generation.number, read)


def with_rows(table: pa.Table, newer: pa.Table) -> pa.Table:
    """`table` with its rows replaced by those of `newer` with the same image_id; both have the same columns."""
    # Arrow has no update by key: find the newer row of each row (or null), then take from both tables at once.
    at = pc.index_in(table["image_id"], value_set=newer["image_id"])
    kept = pa.array(range(table.num_rows), pa.int64())
    order = pc.coalesce(pc.add(pc.cast(at, pa.int64()), table.num_rows), pa.chunked_array([kept]))
    return take(pa.concat_tables([table, newer]), order)


def _conform(table: pa.Table) -> pa.Table:
    """Add missing columns of `MANIFEST_SCHEMA`; manifests of samray 0.1 have no ETag."""
    nulls = {field.name: pa.nulls(table.num_rows, field.type) for field in MANIFEST_SCHEMA}
    arrays = [table[name] if name in table.schema.names else nulls[name] for name in MANIFEST_SCHEMA.names]
    return pa.Table.from_arrays(arrays, schema=MANIFEST_SCHEMA)


def check_manifest(schema: pa.Schema) -> None:
    """Check that a file has the columns of a manifest, which lets its readers rely on the types.

    Files of older versions lack some columns, which then count as null. Raises: ValueError.
    """
    for column in MANIFEST_SCHEMA:
        number = schema.names.count(column.name)
        if number > 1 or (not number and column.name in _REQUIRED):
            raise ValueError(f"it has {number} columns {column.name!r}, expected one")
        if number and schema.field(column.name).type != column.type:
            kind = schema.field(column.name).type
            raise ValueError(f"the column {column.name!r} is of type {kind}, expected {column.type}")


def _with_manifest(output: str, number: int, call: Callable[[pq.ParquetFile], T]) -> T:
    uri = manifest_uri(output, number)
    try:
        with storage.open_read(uri) as stream:
            file = open_parquet(stream)
            check_manifest(file.schema_arrow)
            return call(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"{storage.redact(uri)} is damaged: {error}; choose another OUTPUT") from error
