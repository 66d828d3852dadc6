"""Lists of images that users write: `.csv`, `.jsonl` and `.txt` with one URI a row (Parquet is read in inputs.py)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from samray import storage
from samray.dataset.rows import input_rows
from samray.errors import ConfigError

_BOM: Final = b"\xef\xbb\xbf"
_TXT_BYTES: Final = 2**24
"""Of lines that are Python's own at any time: as such they take several times their length."""
_ROWS_AT_ONCE: Final = 2**20

# What `storage.resolve` would leave as it is, or merely put behind the folder: nearly all URIs of nearly all lists.
_PLAIN_URI: Final = r"^[a-z][a-z0-9+.\-]*://.*[^/]$"
_LOCAL_URI: Final = r"^(file|local)://"
_PLAIN_PATH: Final = r"^(/[^/]+)+$"
_PLAIN_RELATIVE: Final = r"^[^/]+(/[^/]+)*$"
_IMAGE_ENDING: Final = re.compile(r"(?i)\.(?:jpe?g|png|webp|bmp|tiff?|gif)$")
_NOT_PLAIN_PATH: Final = r"(^|/)\.\.?(/|$)|^~"


def read_uris(manifest: str, column: str) -> pa.ChunkedArray:
    """The URI column of a manifest, as written, in its order; null where a row has none.

    Raises: ConfigError where the manifest cannot be read or has no such column, StorageError.
    """
    where = storage.redact(manifest)
    data = storage.read_bytes(manifest).removeprefix(_BOM)
    kind = manifest.lower().rpartition(".")[2]
    try:
        if kind == "txt":
            return _read_txt(data, column)
        table = _read_csv(data, column) if kind == "csv" else _read_jsonl(data, column)
    except UnicodeDecodeError as error:
        raise ConfigError(f"manifest {where} is not UTF-8 text: {error}") from error
    except (pa.ArrowException, ValueError) as error:
        raise ConfigError(f"manifest {where} cannot be read as {kind} with a column {column!r}: {error}") from error
    if table.num_rows and table[column].null_count == table.num_rows:
        raise ConfigError(f"manifest {where} has no column {column!r} (input.uri_column) that holds anything")
    return table[column]


def _read_txt(data: bytes, column: str) -> pa.ChunkedArray:
    chunks = [pa.array([line for line in lines if line.strip()], pa.string()) for lines in _lines(data)]
    lines = pa.chunked_array(chunks, pa.string())
    is_header = len(lines) > 0 and lines[0].as_py().strip() == column  # as in a one-column CSV
    return lines.slice(1) if is_header else lines


def _lines(data: bytes) -> Iterator[list[str]]:
    start = 0
    while start < len(data):
        end = data.find(b"\n", start + _TXT_BYTES) + 1 or len(data)
        yield re.split(r"\r?\n", data[start:end].decode("utf-8"))
        start = end


def _read_csv(data: bytes, column: str) -> pa.Table:
    header = next(iter(pa.csv.open_csv(io.BytesIO(data)).schema.names), None) if data.strip() else None
    if header is None:
        raise ValueError("it is empty")
    return pa.csv.read_csv(
        io.BytesIO(data),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(include_columns=[column], column_types={column: pa.string()}),
    )


def _read_jsonl(data: bytes, column: str) -> pa.Table:
    return pa.json.read_json(
        io.BytesIO(data),
        parse_options=pa.json.ParseOptions(
            explicit_schema=pa.schema([(column, pa.string())]), unexpected_field_behavior="ignore"
        ),
    )


def rows_of_uris(written: pa.ChunkedArray, folder: str) -> pa.Table:
    """Rows of `INPUT_SCHEMA` for the URIs of a manifest that lies in `folder`; relative ones start there.

    file_name is the URI as written where all are relative, else what follows the longest folder that all share.
    """
    written = pc.fill_null(written, "")
    uris = _resolved(written, folder)
    if pc.all(_is_relative(written), min_count=0).as_py():
        names = pc.replace_substring_regex(written, r"^\./", "")
    else:
        names = pc.utf8_slice_codeunits(uris, start=len(_shared_folder(uris)))
    return input_rows(uris, _without_signatures(names))


def _without_signatures(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """Names go into every file that is made of an output: of `photo.jpg?X-Amz-Signature=...` only `photo.jpg`.

    A query without a secret stays: it may be what tells two images apart.
    """
    if not pc.any(pc.match_substring(names, "?"), min_count=0).as_py():
        return names
    chunks = (map(_without_signature, chunk.to_pylist()) for chunk in names.chunks)
    return pa.chunked_array([pa.array(chunk, pa.string()) for chunk in chunks], pa.string())


def _without_signature(name: str) -> str:
    redacted = storage.redact(name)
    path = name.partition("?")[0]
    return path if redacted != name and _IMAGE_ENDING.search(path) else redacted


def _resolved(written: pa.ChunkedArray, folder: str) -> pa.ChunkedArray:
    """`storage.resolve` of each that is not empty."""
    parts = [written.slice(start, _ROWS_AT_ONCE) for start in range(0, len(written), _ROWS_AT_ONCE)]
    return pa.chunked_array([_resolved_chunk(chunk, folder) for part in parts for chunk in part.chunks], pa.string())


def _resolved_chunk(texts: pa.StringArray, folder: str) -> pa.StringArray:
    """In Python only those that are not spelled plainly; without a copy where nothing is to be done."""
    matches = pc.match_substring_regex
    dotted = matches(texts, _NOT_PLAIN_PATH)
    plain_uri = pc.and_not(matches(texts, _PLAIN_URI), matches(texts, _LOCAL_URI))
    as_is = pc.or_(plain_uri, pc.and_not(matches(texts, _PLAIN_PATH), dotted))
    if pc.all(as_is).as_py():
        return texts
    prefix = storage.join(storage.normalize(folder), "")
    uris = pc.if_else(as_is, texts, pc.binary_join_element_wise(prefix, texts, ""))
    others = pc.invert(pc.or_(as_is, pc.and_not(matches(texts, _PLAIN_RELATIVE), dotted)))
    resolved = [storage.resolve(folder, text) if text else "" for text in texts.filter(others).to_pylist()]
    return pc.replace_with_mask(uris, others, pa.array(resolved, pa.string()))


def _is_relative(texts: pa.ChunkedArray) -> Any:
    absolute = pc.or_(pc.starts_with(texts, "/"), pc.starts_with(texts, "~/"))
    return pc.invert(pc.or_(absolute, pc.match_substring(texts, "://")))


def _shared_folder(uris: pa.ChunkedArray) -> str:
    """The longest folder, with its slash, that all URIs but the empty ones start with."""
    ends = pc.min_max(pc.if_else(pc.equal(uris, ""), None, uris))  # what these two share, all share
    low, high = ends["min"].as_py() or "", ends["max"].as_py() or ""
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[: low.rfind("/", 0, length) + 1]
