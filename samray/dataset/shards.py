"""Shards: Parquet files that appear whole or not at all, under names that say which part of the plan they are.

That a shard's file exists is the only mark that it is done.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from samray import storage
from samray.dataset.schema import SCHEMA, with_stats
from samray.errors import StorageError

FOLDER: Final = "annotations"
SUCCESS: Final = "_SUCCESS"
_NAME: Final = re.compile(r"shard-(\d{6,})\.parquet")
_ROWS_PER_GROUP: Final = 64
_PAGE_BYTES: Final = 128 * 1024


def shard_name(shard: int) -> str:
    return f"shard-{shard:06d}.parquet"


def shard_number(name: str) -> int | None:
    """The shard that a file name stands for; None for any other name, also for a differently padded number."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and shard_name(int(match[1])) == name else None


def shard_uri(output: str, shard: int) -> str:
    return storage.join(storage.normalize(output), FOLDER, shard_name(shard))


def shard_bytes(table: pa.Table, compression_level: int = 3) -> bytes:
    """A table of `SCHEMA` as the bytes of a Parquet file; the same table and metadata give the same bytes.

    Small row groups, pages and a page index, so that readers may fetch single images by ranges.
    """
    assert table.schema.equals(SCHEMA), table.schema
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=compression_level,
        row_group_size=_ROWS_PER_GROUP,
        data_page_size=_PAGE_BYTES,
        write_page_index=True,
        use_dictionary=["status", "error"],  # run-length strings never repeat
    )
    return bytes(sink.getvalue())


def commit_shard(
    output: str, shard: int, table: pa.Table, stats: Mapping[str, Any] | None = None, *, compression_level: int = 3
) -> bool:
    """Put a finished shard in its place; False if it is there already, which is success, too. Raises: StorageError."""
    data = shard_bytes(table if stats is None else with_stats(table, stats), compression_level)
    return storage.put_new(shard_uri(output, shard), data)


def replace_shard(
    output: str, shard: int, table: pa.Table, stats: Mapping[str, Any] | None = None, *, compression_level: int = 3
) -> None:
    """Put a shard in the place of an earlier one, in one step. Raises: StorageError."""
    data = shard_bytes(table if stats is None else with_stats(table, stats), compression_level)
    storage.put(shard_uri(output, shard), data)


def done_shards(output: str) -> set[int]:
    """The shards whose file is there: one LIST. Raises: StorageError."""
    names = storage.list_names(storage.join(storage.normalize(output), FOLDER))
    return {number for name in names if (number := shard_number(name)) is not None}


def read_shard(output: str, shard: int, columns: list[str] | None = None) -> pa.Table:
    """A shard as it lies, with its schema metadata.

    Raises: NotFoundError where it is not there, StorageError where it cannot be read or is no Parquet.
    """
    uri = shard_uri(output, shard)
    data = storage.read_bytes(uri)
    try:
        return pq.ParquetFile(pa.BufferReader(data)).read(columns=columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"shard {storage.redact(uri)} is damaged: {error}; delete it and run again") from error


def mark_success(output: str, **counts: int) -> None:
    """Say that every shard is there. Whoever calls this has looked. Raises: StorageError."""
    data = json.dumps({**counts, "num_shards": len(done_shards(output))}, sort_keys=True).encode()
    storage.put(storage.join(storage.normalize(output), SUCCESS), data + b"\n")
