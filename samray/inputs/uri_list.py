"""Lists of images from users: `.csv`, `.jsonl` and `.txt` with one URI per row.

Parquet is read in parquet.py; what the URIs mean is in uri_rows.py.
"""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from samray import storage
from samray.errors import ConfigError
from samray.inputs.base import Container, Part, Reader
from samray.inputs.uri_rows import rows_of_uris
from samray.storage.strict_json import parse_json
from samray.text import abridged

if TYPE_CHECKING:
    from samray.config import InputConfig

LIST_EXTENSIONS: Final = (".csv", ".jsonl", ".txt")

_BOM: Final = b"\xef\xbb\xbf"
_TXT_BYTES: Final = 2**24
"""Bytes converted to Python strings at a time, because those take several times their length."""
_SHOWN_COLUMNS: Final = 20
_USUAL_COLUMNS: Final = ("uri", "url", "path", "file", "file_name", "filename", "image", "image_path", "image_url")


def read_uris(manifest: str, column: str) -> pa.ChunkedArray:
    """Read the URI column of a list, as written and in order; null for rows without one.

    Raises: ConfigError if the list cannot be read or has no such column, StorageError.
    """
    where = storage.redact(manifest)
    data = storage.read_bytes(manifest).removeprefix(_BOM)
    kind = manifest.lower().rpartition(".")[2]
    try:
        if kind == "txt":
            return _read_txt(data, column)
        if kind == "csv":
            return _read_csv(data, column)
        return _read_jsonl(data, column)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (pa.ArrowException, RecursionError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read as a list in {kind}: {error}") from error


def missing_column(column: str, columns: Sequence[str]) -> str:
    """The error for a file without the URI column: its columns, and the setting to choose one."""
    lower = {name.lower(): name for name in reversed(columns)}
    usual = next((lower[name] for name in _USUAL_COLUMNS if name in lower), None)
    near = usual or next(iter(difflib.get_close_matches(column, columns, 1)), None)
    shown = abridged([name[:50] for name in columns], _SHOWN_COLUMNS)
    what = f"set the one with paths or URIs, as in input.uri_column={near or '...'}"
    return f"it has no column {column!r} (input.uri_column); its columns are {shown}; {what}"


def _read_txt(data: bytes, column: str) -> pa.ChunkedArray:
    chunks = [pa.array([line for line in lines if line.strip()], pa.string()) for lines in _lines(data)]
    lines = pa.chunked_array(chunks, pa.string())
    is_header = len(lines) > 0 and lines[0].as_py().strip() == column  # as in a one-column CSV
    return lines.slice(1) if is_header else lines


def _lines(data: bytes) -> Iterator[list[str]]:
    start = 0
    while start < len(data):
        # Cut at a line break, so that no line and no character is split.
        end = data.find(b"\n", start + _TXT_BYTES) + 1 or len(data)
        yield re.split(r"\r?\n", data[start:end].decode("utf-8"))
        start = end


def _read_csv(data: bytes, column: str) -> pa.ChunkedArray:
    if not data.strip():
        raise ValueError("it is empty")
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    # Only the names first: a wrong column is reported without converting the whole file.
    names = pa.csv.open_csv(io.BytesIO(data), parse_options=parse).schema.names
    if column not in names:
        other = next((mark for mark in ";\t|" if mark in names[0]), None)
        if len(names) == 1 and other is not None:
            raise ValueError(
                f"fields are separated by {other!r} in its first line, {names[0][:100]!r}; expected commas: "
                "save it as comma-separated values"
            )
        raise ValueError(missing_column(column, names))
    return pa.csv.read_csv(
        io.BytesIO(data),
        parse_options=parse,
        # As text: Arrow would turn names like 0001 into numbers.
        convert_options=pa.csv.ConvertOptions(include_columns=[column], column_types={column: pa.string()}),
    )[column]


def _read_jsonl(data: bytes, column: str) -> pa.ChunkedArray:
    schema = pa.schema([(column, pa.string())])
    # Other fields may have any type, also differing ones, which Arrow would otherwise refuse.
    options = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        uris = pa.json.read_json(io.BytesIO(data), parse_options=options)[column]
    except pa.ArrowInvalid as error:
        if "surrogate" not in str(error):
            raise
        # Half of a UTF-16 pair, which some writers leave in a name, only fails that one image.
        uris = pa.chunked_array([_parse_jsonl(data, column)])
    # Arrow gives nulls for a column that is in no row.
    if len(uris) and uris.null_count == len(uris):
        raise ValueError(missing_column(column, _keys_of_first(data)))
    return uris


def _parse_jsonl(data: bytes, column: str) -> pa.Array:
    uris = []
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            row = parse_json(line)
            uri = row.get(column) if isinstance(row, dict) else row
            if not isinstance(uri, str | None):
                raise ValueError(f"line {number} is not an object with text in {column!r}")
            uris.append(uri and uri.encode("utf-8", "backslashreplace").decode("utf-8"))
    return pa.array(uris, pa.string())


def _keys_of_first(data: bytes) -> list[str]:
    try:
        return list(parse_json(data[: data.find(b"\n") + 1 or len(data)]))
    except (ValueError, TypeError, RecursionError):
        return []


def list_uris(container: Container, config: InputConfig) -> Part:
    """The files that a list names. Raises: ConfigError, StorageError."""
    written = read_uris(container.uri, config.uri_column)
    folder = storage.parent(container.uri)
    return Part(rows_of_uris(written, folder, container.root, allow_outside=config.allow_outside))


READER: Final = Reader(
    name="list",
    nouns=("list of URIs",),
    nothing="no URI in the list",
    endings=LIST_EXTENSIONS,
    list=list_uris,
    lists_uris=True,
    only_by_name=True,
)
