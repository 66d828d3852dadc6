"""Cast Parquet's text and binary columns to one type each: writers use large, view, dictionary and fixed-size types.

pandas 3, Polars, DuckDB and Hugging Face's datasets all differ. Columns are cast once, on reading.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values: of a dictionary its value type, else the type itself."""
    while pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind


def is_binary(kind: pa.DataType) -> bool:
    """Whether a column has bytes."""
    kind = value_type(kind)
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column has text."""
    kind = value_type(kind)
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def text_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast a column of text, or of UTF-8 bytes, to string. Raises: pa.ArrowInvalid if it is not UTF-8."""
    return _cast(column, pa.string())


def binary_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast a column of bytes to large_binary."""
    return _cast(column, pa.large_binary())


def _cast(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    if column.type == wanted:
        return column
    return pa.chunked_array([_cast_array(chunk, wanted) for chunk in column.chunks], wanted)


def _cast_array(array: pa.Array, wanted: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(array.type):  # Arrow cannot cast dictionaries of views
        return _cast_array(array.dictionary, wanted).take(array.indices)
    if wanted == pa.string() and is_binary(array.type):
        array = pc.cast(array, pa.binary())  # the cast from binary checks that it is UTF-8
    return pc.cast(array, wanted)
