"""The rows of an input's listing: each image and the location of its bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from samray import storage

INPUT_SCHEMA: Final = pa.schema(
    [
        ("uri", pa.string()),  # recorded in the output; tar members in fsspec's form, tar://member::archive
        ("file_name", pa.string()),  # relative to the input's root, which keeps equal basenames apart
        ("size", pa.int64()),  # encoded bytes; null if unknown without reading
        ("etag", pa.string()),  # changes if the file (or container) is replaced; null if unknown
        ("container", pa.string()),  # the image's tar or Parquet file; null for a separate file
        ("offset", pa.int64()),  # first byte in the tar
        ("row", pa.int64()),  # row in the Parquet file
        # For a sparse tar member: "start+length ..." of its stored pieces, which follow each other from offset.
        ("extents", pa.string()),
        # Why the image cannot be read, if the listing already shows it, as "reason: message"; else null.
        ("problem", pa.string()),
    ]
)

_CHUNK_ROWS: Final = 65536
_ROWS_AT_ONCE: Final = 2**20
_MOST_TEXT_BYTES: Final = 2**30


def input_rows(uris: Any, names: Any, **columns: Any) -> pa.Table:
    """A table of `INPUT_SCHEMA`. A column is an array, or one value for all rows; missing columns are null."""
    values = {"uri": uris, "file_name": names, **columns}
    assert values.keys() <= set(INPUT_SCHEMA.names), values.keys()
    arrays = []
    for field in INPUT_SCHEMA:
        value = values.get(field.name)
        if value is None or isinstance(value, str):
            value = _repeat(pa.scalar(value, field.type), len(uris))
        arrays.append(value.cast(field.type))
    return pa.Table.from_arrays(arrays, schema=INPUT_SCHEMA)


def take(rows: pa.Table | pa.ChunkedArray, indices: Any) -> Any:
    """`rows.take(indices)`, also if a column has more text than pyarrow can take from at once, 2 GiB."""
    if isinstance(rows, pa.Table):
        return pa.Table.from_arrays([take(column, indices) for column in rows.columns], schema=rows.schema)
    if rows.type != pa.string() or rows.nbytes < _MOST_TEXT_BYTES:
        return rows.take(indices)
    # With 64-bit offsets, then back in parts that each fit into 32 bits.
    taken = rows.cast(pa.large_string()).take(indices)
    parts = [taken.slice(start, _ROWS_AT_ONCE) for start in range(0, len(taken), _ROWS_AT_ONCE)]
    chunks = [chunk.cast(pa.string()) for part in parts for chunk in part.chunks]
    return pa.chunked_array(chunks, pa.string())


def redact_all(uris: pa.ChunkedArray) -> pa.ChunkedArray:
    """`storage.redact` of each text that is not null; calls Python only for those that may have credentials."""
    return map_some(uris, may_hold_credentials(uris), storage.redact)


def may_hold_credentials(uris: pa.ChunkedArray, sign: str = r":/.*[@?;#]") -> pa.ChunkedArray:
    """Whether each may have credentials; False for null. sign: a pattern that all of those match."""
    # Two patterns in Arrow instead of Python per URI: first any sign of credentials, then the known harmless ones.
    signs = pc.fill_null(pc.match_substring_regex(uris, sign), False)
    if not pc.any(signs, min_count=0).as_py():
        return signs
    return pc.and_not(signs, pc.fill_null(pc.match_substring_regex(uris, storage.HARMLESS_QUERY), False))


def map_some(texts: pa.ChunkedArray, chosen: pa.ChunkedArray, call: Callable[[str], str]) -> pa.ChunkedArray:
    """Apply `call` to the texts where `chosen` is true."""
    if not pc.any(chosen, min_count=0).as_py():
        return texts
    chunks, start = [], 0
    for chunk in texts.chunks:
        # (len(chunk),): masks must have the chunks of the texts, and `chosen` may have others.
        mask = pa.concat_arrays(chosen.slice(start, len(chunk)).chunks) if len(chunk) else pa.array([], pa.bool_())
        changed = pa.array([call(text) for text in chunk.filter(mask).to_pylist()], pa.string())
        chunks.append(pc.replace_with_mask(chunk, mask, changed))
        start += len(chunk)
    return pa.chunked_array(chunks, pa.string())


def indices_of(wanted: Sequence[str | None], column: pa.ChunkedArray) -> dict[int, list[int]]:
    """Index in wanted -> indices in column of the same text, for each that is not None and occurs."""
    # From the column to the few wanted ones: no table of all texts is made.
    indices = pc.indices_nonzero(pc.is_in(column, value_set=pa.array(wanted, pa.string()).drop_null()))
    indices_by_text: dict[str | None, list[int]] = {}
    for index, text in zip(indices.to_pylist(), take(column, indices).to_pylist(), strict=True):
        indices_by_text.setdefault(text, []).append(index)
    return {number: indices_by_text[text] for number, text in enumerate(wanted) if text in indices_by_text}


def _repeat(value: pa.Scalar, number: int) -> pa.ChunkedArray:
    """The repeated value, in the memory of one chunk: null columns of ten million rows would take 300 MB."""
    chunk = pa.repeat(value, min(number, _CHUNK_ROWS))
    num_full, rest = divmod(number, _CHUNK_ROWS)
    chunks = [chunk] * num_full
    if rest:
        chunks.append(chunk.slice(0, rest))
    return pa.chunked_array(chunks, value.type)
