"""Parquet files with planted pickles: who unpickles one leaves a file behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data  # noqa: F401  (registers the extension type whose values are unpickled)
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray, ArrowPythonObjectType

from samray import storage
from samray.storage.tables import open_parquet


class Pickle:
    """Makes the folder `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def pickles(number: int, mark: Path) -> pa.ExtensionArray:
    """A column of them."""
    return ArrowPythonObjectArray.from_objects([Pickle(mark)] * number)


def parquet(table: pa.Table) -> bytes:
    """The table as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def plant(uri: str, path: str, mark: Path) -> None:
    """Replace a column of a Parquet file, or a field within structs and lists, by pickles. path: as `a.b.element.c`."""
    table = open_parquet(storage.read_bytes(uri)).read().combine_chunks()
    column, *rest = path.split(".")
    column_index = table.schema.get_field_index(column)
    array = table[column].combine_chunks() if table.num_rows else table[column]
    planted = _planted(array, rest, mark)
    table = table.set_column(column_index, pa.field(column, planted.type), planted)
    storage.put(uri, parquet(table))


def _planted(array: pa.Array, path: list[str], mark: Path) -> pa.Array:
    if not path:
        return pickles(len(array), mark)
    first, *rest = path
    if first == "element":
        return pa.ListArray.from_arrays(array.offsets, _planted(array.values, rest, mark))
    names = [field.name for field in array.type]
    parts = [_planted(array.field(name), rest, mark) if name == first else array.field(name) for name in names]
    return pa.StructArray.from_arrays(parts, names)


def is_live(uri: str) -> bool:
    """Whether a file's schema names the type: plain pyarrow would run what is in it."""
    schema = pq.read_schema(pa.BufferReader(storage.read_bytes(uri)))
    return any("pickled" in str(field.type) for field in schema) and ArrowPythonObjectType() is not None
