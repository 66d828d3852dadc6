"""Shards: Parquet files that are written all or nothing, under names that say which part of the plan they are.

The existence of a shard's file is the only mark that the shard is done.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import NoneType
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from samray import storage
from samray.errors import NotFoundError, StorageError
from samray.output.manifests import read_generations
from samray.output.schema import (
    CORRECTED_SCHEMA,
    GEO,
    NAMED_ANNOTATION,
    PHRASES,
    PRESENCE,
    SCHEMA,
    TILES,
    check_columns,
    named,
    samray_metadata,
    with_stats,
)
from samray.output.seals import leave_room, seal, seal_of, unsealed
from samray.storage.strict_json import parse_json
from samray.storage.tables import open_parquet

FOLDER: Final = "annotations"
SUCCESS: Final = "_SUCCESS"
_NAME: Final = re.compile(r"shard-(\d{6,})\.parquet")
_PAGE_BYTES: Final = 128 * 1024
_MIN_GROUP_BYTES: Final = 128 * 1024
_FOOTER_BYTES_PER_GROUP: Final = 1700
"""Bytes that a row group of 16 columns adds to the footer, as measured."""
_NUM_THREADS: Final = 32
_LOOKED_UP: Final = ["image.image_id", "image.file_name", "status"]
"""Columns with statistics. Those of run-length strings and scores would double the footer, and no lookup uses them."""


def shard_name(shard: int) -> str:
    return f"shard-{shard:06d}.parquet"


def shard_number(name: str) -> int | None:
    """The shard number in a file name; None for any other name, including one with different zero padding."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and shard_name(int(match[1])) == name else None


def shard_uri(output: str, shard: int) -> str:
    return storage.join(storage.normalize(output), FOLDER, shard_name(shard))


def shard_bytes(table: pa.Table, compression_level: int = 3) -> bytes:
    """Encode a table of `schema_of` a run as Parquet; the same rows and metadata give the same bytes.

    Row groups of `rows_per_group`, statistics on the lookup columns, and a page index let readers fetch single images
    by ranges.
    """
    has_names = table.schema.field("annotations").type == pa.list_(NAMED_ANNOTATION)
    # Readers know only these schemas; any other is a bug of the caller.
    known = [named(schema) if has_names else schema for schema in (SCHEMA, CORRECTED_SCHEMA)]
    for column in (*((PHRASES, PRESENCE) if has_names else ()), GEO, TILES):
        known += [schema.append(column) for schema in known]
    assert any(table.schema.equals(schema) for schema in known), table.schema
    # Rows that were read from another file carry that file's checksum in their metadata.
    table = unsealed(table)
    num_rows = rows_per_group(table)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level=compression_level,
        data_page_size=_PAGE_BYTES,
        write_page_index=True,
        write_statistics=_LOOKED_UP,
        # Run-length strings never repeat.
        use_dictionary=["status", "error", *_repeated_names(table.schema)],
        write_page_checksum=True,
    ) as writer:
        # Metadata can be added only while the writer is open.
        leave_room(writer)
        # Also once for a table without rows.
        for start in range(0, max(1, table.num_rows), num_rows):
            # As one chunk: a table's chunk boundaries are not data, but would affect the pages.
            writer.write_table(table.slice(start, num_rows).combine_chunks(), row_group_size=num_rows)
    return seal(sink.getvalue())


def _repeated_names(schema: pa.Schema) -> Iterator[str]:
    """The Parquet columns of names, which repeat."""
    if schema.field("annotations").type == pa.list_(NAMED_ANNOTATION):
        yield "annotations.list.element.label"
    if PRESENCE.name in schema.names:
        yield "presence.list.element.phrase"
    if GEO.name in schema.names:
        yield "geo.crs"


def rows_per_group(table: pa.Table) -> int:
    """Rows per row group for a table of `SCHEMA`, from the number and length of its masks.

    To read one image, a reader fetches the footer, which grows with the number of groups, and one group, which shrinks
    with it; the sum is smallest if both are equal. Small tables get few groups, to keep the footer small in comparison.
    """
    masks = pc.list_flatten(table["annotations"])
    counts_bytes = pc.sum(pc.binary_length(pc.struct_field(masks, ["segmentation", "counts"]))).as_py() or 0
    # Compressed size, as measured: run-length strings by half, everything else of a mask to 32 bytes.
    table_bytes = counts_bytes // 2 + 32 * len(masks) + 8 * table.num_rows
    group_bytes = max(_MIN_GROUP_BYTES, math.isqrt(table_bytes * _FOOTER_BYTES_PER_GROUP))
    return max(1, int(-(-table.num_rows * group_bytes // max(1, table_bytes))))


def commit_shard(
    output: str, shard: int, table: pa.Table, stats: Mapping[str, Any] | None = None, *, compression_level: int = 3
) -> int:
    """Write a finished shard; returns its bytes, or 0 if it exists already, which is also success. Raises:
    StorageError."""
    return put_shard(
        output, shard, shard_bytes(table if stats is None else with_stats(table, stats), compression_level)
    )


def put_shard(output: str, shard: int, data: bytes) -> int:
    """`commit_shard` for bytes from `shard_bytes`."""
    # Two attempts may finish the same shard. The first file stays: readers may have read it already.
    return len(data) if storage.put_new(shard_uri(output, shard), data) else 0


def replace_shard(
    output: str, shard: int, table: pa.Table, stats: Mapping[str, Any] | None = None, *, compression_level: int = 3
) -> int:
    """Replace an existing shard atomically; returns its bytes. Raises: StorageError."""
    data = shard_bytes(table if stats is None else with_stats(table, stats), compression_level)
    storage.put(shard_uri(output, shard), data)
    return len(data)


def done_shards(output: str) -> set[int]:
    """The shards that exist: one LIST. Raises: StorageError."""
    return set(shard_versions(output))


def shard_versions(output: str) -> dict[int, str | None]:
    """Existing shards -> a version that changes if the file is replaced (`storage.file_version`): one LIST.

    Raises: StorageError.
    """
    versions = storage.list_versions(storage.join(storage.normalize(output), FOLDER))
    return {number: version for name, version in versions.items() if (number := shard_number(name)) is not None}


def read_shard(output: str, shard: int, columns: list[str] | None = None) -> pa.Table:
    """Read a shard with its schema metadata.

    Raises: NotFoundError if it does not exist, StorageError if it cannot be read or is not Parquet.
    """
    uri = shard_uri(output, shard)
    data = storage.read_bytes(uri)
    with reraise_damaged(uri):
        return _checked(open_parquet(data)).read(columns=columns)


@contextmanager
def open_shard(output: str, shard: int) -> Iterator[pq.ParquetFile]:
    """Open a shard to read it by ranges. Raises: NotFoundError if it does not exist, StorageError, also from later
    reads."""
    uri = shard_uri(output, shard)
    with reraise_damaged(uri), storage.open_read(uri) as stream:
        yield _checked(open_parquet(stream))


def _checked(file: pq.ParquetFile) -> pq.ParquetFile:
    check_columns(file.schema_arrow)
    return file


@contextmanager
def reraise_damaged(uri: str) -> Iterator[None]:
    """Re-raise pyarrow's errors about a damaged shard as a StorageError that says what to do."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(
            f"{storage.redact(uri)} is damaged, or was replaced while it was read: {error}; try again, or "
            "delete it and run again"
        ) from error


@dataclass(frozen=True, slots=True)
class Success:
    """The content of `_SUCCESS`. Files of samray 0.1 have no generation and no digests."""

    num_shards: int | None = None
    num_failed: int | None = None
    generation: int | None = None
    """Last generation of the plan."""
    digests: tuple[str | None, ...] = ()
    """The checksum (`seals.seal_of`) of each shard, by number; None for a shard without one."""

    def marks(self, num_shards: int, generation: int) -> bool:
        """Whether it belongs to a plan with this many shards and this last generation."""
        return self.num_shards == num_shards and self.generation in (None, generation)


def read_success(output: str) -> Success | None:
    """Read `_SUCCESS`; None if it does not exist. A damaged file counts as empty. Raises: StorageError."""
    try:
        fields = parse_json(storage.read_bytes(storage.join(storage.normalize(output), SUCCESS)))
        numbers = {name: fields.get(name) for name in ("num_shards", "num_failed", "generation")}
        # Not isinstance: True would pass as a number.
        if any(type(value) not in (int, NoneType) for value in numbers.values()):
            return Success()
        return Success(**numbers, digests=tuple(fields.get("shards") or ()))
    except NotFoundError:
        return None
    except (ValueError, TypeError, AttributeError):
        return Success()


def mark_success(
    output: str,
    *,
    seen: Mapping[int, str | None] | None = None,
    generation: int | None = None,
    digests: Mapping[int, str | None] | None = None,
    **counts: int,
) -> bool:
    """Write `_SUCCESS`, with a checksum of each shard. The caller has checked that all shards exist.

    seen: shard -> version (`shard_versions`), and generation of the plan, both as the caller saw them. If another
    process changed the output since, or does so now, nothing is written and the result is False. digests: known
    checksums of exactly these versions; others are read from the shards. Raises: ConfigError, StorageError.
    """
    last, num_shards, versions = _look(output)
    # Another driver may have appended images or replaced a shard since the caller looked.
    if generation not in (None, last) or (seen is not None and dict(seen) != versions):
        return False
    known = dict(digests or {})
    # Shards of earlier runs: one footer each.
    unknown = [shard for shard in versions if shard not in known]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        known.update(zip(unknown, pool.map(lambda shard: read_digest(output, shard), unknown), strict=True))
    marks: dict[str, Any] = {**counts, "num_shards": len(versions), "generation": last}
    marks["shards"] = [known.get(shard) for shard in range(num_shards)]
    data = json.dumps(marks, sort_keys=True).encode() + b"\n"
    uri = storage.join(storage.normalize(output), SUCCESS)
    storage.put(uri, data)
    # Look again: a generation added between the first look and this write would be marked as finished.
    if _look(output) == (last, num_shards, versions):
        return True
    with suppress(NotFoundError):
        if storage.read_bytes(uri) == data:  # not if another process wrote it
            storage.delete(uri)
    return False


def _look(output: str) -> tuple[int, int, dict[int, str | None]]:
    """The plan's last generation and number of shards, and the versions of the existing shards."""
    # Generations first: shards of a generation added after this line are beyond num_shards, and are left out.
    generations = read_generations(storage.normalize(output))
    num_shards = sum(generation.num_shards for generation in generations)
    versions = {shard: version for shard, version in shard_versions(output).items() if shard < num_shards}
    return generations[-1].number, num_shards, versions


def read_digest(output: str, shard: int) -> str | None:
    """A shard's checksum, from its footer; None if it has none. Raises: StorageError."""
    with open_shard(output, shard) as file:
        return seal_of(file.metadata)


def unmark_success(output: str) -> None:
    """Delete `_SUCCESS`, because more shards will follow. Raises: StorageError."""
    storage.delete(storage.join(storage.normalize(output), SUCCESS))


def read_metadata(output: str, shard: int) -> dict[str, Any]:
    """Read a shard's metadata on how it was made (`schema.samray_metadata`) from its footer.

    Raises: NotFoundError if it does not exist, StorageError if it cannot be read or is not Parquet.
    """
    with open_shard(output, shard) as file:
        return samray_metadata(file.schema_arrow)
