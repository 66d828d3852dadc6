"""Lists of images that users write: `.csv`, `.jsonl` and `.txt` with one URI a row (Parquet is read in inputs.py)."""

from __future__ import annotations

import io
import re
from typing import Final

import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from samray import storage
from samray.dataset.rows import input_rows
from samray.errors import ConfigError

_BOM: Final = b"\xef\xbb\xbf"


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
    lines = [line for line in re.split(r"\r?\n", data.decode("utf-8")) if line.strip()]
    if lines and lines[0].strip() == column:
        del lines[0]  # a header, as in a one-column CSV
    return pa.chunked_array([pa.array(lines, pa.string())])


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
    texts = [text or "" for text in written.to_pylist()]
    resolved = [storage.resolve(folder, text) if text else "" for text in texts]
    if all(_is_relative(text) for text in texts):
        names = [text.removeprefix("./") for text in texts]
    else:
        shared = _shared_folder([uri for uri in resolved if uri])
        names = [uri[len(shared) :] for uri in resolved]
    return input_rows(pa.array(resolved, pa.string()), pa.array(names, pa.string()))


def _is_relative(text: str) -> bool:
    return "://" not in text and not text.startswith(("/", "~/"))


def _shared_folder(uris: list[str]) -> str:
    """The longest folder, with its slash, that all URIs start with."""
    if not uris:
        return ""
    low, high = min(uris), max(uris)  # what these two share, all share
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[: low.rfind("/", 0, length) + 1]
