"""Shards: Parquet files that appear whole or not at all, under names that say which part of the plan they are.

That a shard's file exists is the only mark that it is done.
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
from samray.output.schema import CORRECTED_SCHEMA, SCHEMA, check_columns, samray_metadata, with_stats
from samray.output.seals import leave_room, seal, seal_of, unsealed
from samray.storage.strict_json import parse_json
from samray.storage.tables import open_parquet

FOLDER: Final = "annotations"
SUCCESS: Final = "_SUCCESS"
_NAME: Final = re.compile(r"shard-(\d{6,})\.parquet")
_PAGE_BYTES: Final = 128 * 1024
_MIN_GROUP_BYTES: Final = 128 * 1024
_FOOTER_BYTES_PER_GROUP: Final = 1700
"""What a row group of 16 columns adds to the footer, as measured."""
_NUM_THREADS: Final = 32
_LOOKED_UP: Final = ["image.image_id", "image.file_name", "status"]
"""Columns with statistics. Those of run-length strings and scores would double the footer, and nobody looks by them."""


def shard_name(shard: int) -> str:
    return f"shard-{shard:06d}.parquet"


def shard_number(name: str) -> int | None:
    """The shard that a file name stands for; None for any other name, also for a differently padded number."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and shard_name(int(match[1])) == name else None


def shard_uri(output: str, shard: int) -> str:
    return storage.join(storage.normalize(output), FOLDER, shard_name(shard))


def shard_bytes(table: pa.Table, compression_level: int = 3) -> bytes:
    """A table of `schema_of` a run as the bytes of a Parquet file; the same rows and metadata give the same bytes.

    Row groups of `rows_per_group`, statistics where one looks images up, and a page index: readers fetch single images
    by ranges.
    """
    assert table.schema.equals(SCHEMA) or table.schema.equals(CORRECTED_SCHEMA), table.schema
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
        use_dictionary=["status", "error"],  # run-length strings never repeat
        write_page_checksum=True,
    ) as writer:
        leave_room(writer)
        for start in range(0, max(1, table.num_rows), num_rows):
            # In one chunk: where a table's chunks end is no part of its rows, but would show in the pages.
            writer.write_table(table.slice(start, num_rows).combine_chunks(), row_group_size=num_rows)
    return seal(sink.getvalue())


def rows_per_group(table: pa.Table) -> int:
    """Rows of each row group of a table of `SCHEMA`, from its masks' number and length alone.

    Whoever reads one image fetches the footer, which grows with the number of groups, and one group, which shrinks with
    it; their sum is least where they are equal. Small tables have few groups, so that theirs stays small beside them.
    """
    masks = pc.list_flatten(table["annotations"])
    counts_bytes = pc.sum(pc.binary_length(pc.struct_field(masks, ["segmentation", "counts"]))).as_py() or 0
    # Compressed, as measured: run-length strings shrink to a half, all else of a mask to 32 bytes.
    table_bytes = counts_bytes // 2 + 32 * len(masks) + 8 * table.num_rows
    group_bytes = max(_MIN_GROUP_BYTES, math.isqrt(table_bytes * _FOOTER_BYTES_PER_GROUP))
    return max(1, int(-(-table.num_rows * group_bytes // max(1, table_bytes))))


def commit_shard(
    output: str, shard: int, table: pa.Table, stats: Mapping[str, Any] | None = None, *, compression_level: int = 3
) -> int:
    """Put a finished shard in its place; its bytes, or 0 if it is there already: success, too. Raises: StorageError."""
    return put_shard(
        output, shard, shard_bytes(table if stats is None else with_stats(table, stats), compression_level)
    )


def put_shard(output: str, shard: int, data: bytes) -> int:
    """`commit_shard` of the bytes that `shard_bytes` made."""
    return len(data) if storage.put_new(shard_uri(output, shard), data) else 0


def replace_shard(
    output: str, shard: int, table: pa.Table, stats: Mapping[str, Any] | None = None, *, compression_level: int = 3
) -> int:
    """Put a shard in the place of an earlier one, in one step; returns its bytes. Raises: StorageError."""
    data = shard_bytes(table if stats is None else with_stats(table, stats), compression_level)
    storage.put(shard_uri(output, shard), data)
    return len(data)


def done_shards(output: str) -> set[int]:
    """The shards whose file is there: one LIST. Raises: StorageError."""
    return set(shard_versions(output))


def shard_versions(output: str) -> dict[int, str | None]:
    """The shards whose file is there -> what changes when it is replaced (`storage.file_version`): one LIST.

    Raises: StorageError.
    """
    versions = storage.list_versions(storage.join(storage.normalize(output), FOLDER))
    return {number: version for name, version in versions.items() if (number := shard_number(name)) is not None}


def read_shard(output: str, shard: int, columns: list[str] | None = None) -> pa.Table:
    """A shard as it lies, with its schema metadata.

    Raises: NotFoundError where it is not there, StorageError where it cannot be read or is no Parquet.
    """
    uri = shard_uri(output, shard)
    data = storage.read_bytes(uri)
    with damage_is_told(uri):
        return _checked(open_parquet(data)).read(columns=columns)


@contextmanager
def open_shard(output: str, shard: int) -> Iterator[pq.ParquetFile]:
    """A shard, read by ranges. Raises: NotFoundError where it is not there, StorageError, also as it is read."""
    uri = shard_uri(output, shard)
    with damage_is_told(uri), storage.open_read(uri) as stream:
        yield _checked(open_parquet(stream))


def _checked(file: pq.ParquetFile) -> pq.ParquetFile:
    check_columns(file.schema_arrow)
    return file


@contextmanager
def damage_is_told(uri: str) -> Iterator[None]:
    """What pyarrow says of a shard that is no sound Parquet, as a StorageError with what to do about it."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(
            f"{storage.redact(uri)} is damaged, or was replaced while it was read: {error}; look again, or "
            "delete it and run again"
        ) from error


@dataclass(frozen=True, slots=True)
class Success:
    """What `_SUCCESS` says. Those that samray wrote until 0.1 have no generation and no digests."""

    num_shards: int | None = None
    num_failed: int | None = None
    generation: int | None = None
    """The last one of the plan."""
    digests: tuple[str | None, ...] = ()
    """The checksum (`seals.seal_of`) of each shard, by number; None for a shard without."""

    def marks(self, num_shards: int, generation: int) -> bool:
        """Whether it speaks of a plan of so many shards, the last of this generation."""
        return self.num_shards == num_shards and self.generation in (None, generation)


def read_success(output: str) -> Success | None:
    """None if there is no `_SUCCESS`; one that is damaged says nothing. Raises: StorageError."""
    try:
        found = parse_json(storage.read_bytes(storage.join(storage.normalize(output), SUCCESS)))
        numbers = {name: found.get(name) for name in ("num_shards", "num_failed", "generation")}
        if any(type(value) not in (int, NoneType) for value in numbers.values()):
            return Success()
        return Success(**numbers, digests=tuple(found.get("shards") or ()))
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
    """Say in `_SUCCESS` that every shard is there, with a checksum of each. The caller has looked at them.

    seen: shard -> version (`shard_versions`), generation: of the plan, both as the caller looked at them. If another
    process has changed the output since, or does so now, there is no mark: False. digests: checksums that are known
    of just these versions; others are read from the shards. Raises: ConfigError, StorageError.
    """
    last, num_shards, versions = _look(output)
    if generation not in (None, last) or (seen is not None and dict(seen) != versions):
        return False
    known = dict(digests or {})
    unknown = [shard for shard in versions if shard not in known]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        known.update(zip(unknown, pool.map(lambda shard: read_digest(output, shard), unknown), strict=True))
    marks: dict[str, Any] = {**counts, "num_shards": len(versions), "generation": last}
    marks["shards"] = [known.get(shard) for shard in range(num_shards)]
    data = json.dumps(marks, sort_keys=True).encode() + b"\n"
    uri = storage.join(storage.normalize(output), SUCCESS)
    storage.put(uri, data)
    if _look(output) == (last, num_shards, versions):
        return True
    with suppress(NotFoundError):
        if storage.read_bytes(uri) == data:  # not what the other process marked
            storage.delete(uri)
    return False


def _look(output: str) -> tuple[int, int, dict[int, str | None]]:
    """The plan's last generation and number of shards, and the versions of those that are there."""
    generations = read_generations(storage.normalize(output))
    num_shards = sum(generation.num_shards for generation in generations)
    versions = {shard: version for shard, version in shard_versions(output).items() if shard < num_shards}
    return generations[-1].number, num_shards, versions


def read_digest(output: str, shard: int) -> str | None:
    """A shard's checksum, from its footer; None if it has none. Raises: StorageError."""
    with open_shard(output, shard) as file:
        return seal_of(file.metadata)


def unmark_success(output: str) -> None:
    """Take `_SUCCESS` away: more is to come. Raises: StorageError."""
    storage.delete(storage.join(storage.normalize(output), SUCCESS))


def read_metadata(output: str, shard: int) -> dict[str, Any]:
    """What a shard says of how it was made (`schema.samray_metadata`); only its footer is read.

    Raises: NotFoundError where it is not there, StorageError where it cannot be read or is no Parquet.
    """
    with open_shard(output, shard) as file:
        return samray_metadata(file.schema_arrow)
