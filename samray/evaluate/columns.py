"""The columns of DATA's Parquet files, and what their types may be."""

from __future__ import annotations

import pyarrow as pa

from samray import storage
from samray.errors import ConfigError
from samray.storage.tables import open_parquet


def schema_of(uri: str) -> tuple[pa.Schema, int]:
    """Schema and number of rows of a Parquet file. Raises: ConfigError if it is not Parquet, StorageError."""
    try:
        with storage.open_read(uri) as stream:
            file = open_parquet(stream)
            return file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"DATA {storage.redact(uri)} cannot be read as Parquet: {error}") from error


def is_text(kind: pa.DataType) -> bool:
    """Whether it is text, in any of Arrow's layouts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Whether it is binary, in any of Arrow's layouts."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether it is a list of any length."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))
