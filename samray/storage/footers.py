"""What the footer of a Parquet file says that pyarrow does not tell, or not safely."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from samray.storage.thrift import BINARY, INT64, LIST, STRUCT, read_struct

_DECODE: Final[dict[str, Callable[[memoryview], Any]]] = {
    "INT32": lambda data: struct.unpack("<i", data)[0],
    "INT64": lambda data: struct.unpack("<q", data)[0],
    "BYTE_ARRAY": lambda data: str(data, "utf-8"),
}
"""A minimum or maximum by its physical type: of the columns that are looked up, whose binary ones are texts."""

_META_DATA, _STATISTICS = (STRUCT, 3), (STRUCT, 12)
_NULL_COUNT, _MAX, _MIN = (INT64, 3), (BINARY, 5), (BINARY, 6)
"""Fields of the statistics. Those of the deprecated form are not used: no writer of samray's has only these."""


class Bounds(NamedTuple):
    """What a footer says about the values of a column in a row group."""

    min: Any
    max: Any
    null_count: int | None


def raw_footer(footer: pq.FileMetaData) -> bytes:
    """The footer as Thrift, as Arrow writes it, whatever it was in the file."""
    sink = pa.BufferOutputStream()
    footer.write_metadata_file(sink)
    return bytes(sink.getvalue().to_pybytes())[4:]


def statistics(footer: pq.FileMetaData, column: str) -> list[Bounds | None]:
    """The statistics of a column, given by its path in the schema, in each row group; None without minimum and maximum.

    Read here, because pyarrow ends the process at what is damaged: a number of the wrong length, a histogram, a row
    group without the column. Raises: pa.ArrowInvalid if they are damaged.
    """
    # By path: Parquet numbers the leaf columns, not the fields of the schema.
    paths = [footer.schema.column(i).path for i in range(len(footer.schema))]
    index = paths.index(column)
    decode = _DECODE.get(footer.schema.column(index).physical_type)
    if decode is None:
        raise pa.ArrowInvalid(f"the column {column} has neither numbers nor texts")
    try:
        groups: list[dict[tuple[int, int], Any]] = read_struct(memoryview(raw_footer(footer)), 0)[0].get((LIST, 4), [])
        stated = [group[LIST, 1][index].get(_META_DATA, {}).get(_STATISTICS, {}) for group in groups]
    except (IndexError, KeyError) as error:
        raise pa.ArrowInvalid("the footer is damaged") from error
    try:
        return [
            Bounds(decode(of_group[_MIN]), decode(of_group[_MAX]), of_group.get(_NULL_COUNT))
            if {_MIN, _MAX} <= of_group.keys()
            else None
            for of_group in stated
        ]
    except (struct.error, ValueError) as error:
        raise pa.ArrowInvalid("the statistics in the footer are damaged") from error
