"""Parquet as an input: rows that hold encoded images (Hugging Face's layout or plain binary), or name them by URI."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from samray import storage
from samray.dataset.rows import input_rows
from samray.dataset.tables import open_parquet
from samray.dataset.uri_lists import rows_of_uris
from samray.errors import (
    BucketNotFoundError,
    ConfigError,
    FileError,
    ImageError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from samray.config import InputConfig

FetchFile = Callable[[str], bytes | ImageError]

_IMAGE_COLUMNS: Final = ("image", "jpeg", "jpg", "png")
"""Looked for, after the configured one, in columns of a type that can hold images."""


def image_column(schema: pa.Schema, config: InputConfig) -> str | None:
    """The column of encoded images: binary, or struct<bytes, path>; None where the Parquet file has none."""
    for name in dict.fromkeys((config.image_column, *_IMAGE_COLUMNS)):
        if name in schema.names:
            kind = schema.field(name).type
            if _is_binary(kind):
                return name
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type):
                return name
    return None


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def list_parquet(uri: str, prefix: str, config: InputConfig, etag: str | None) -> pa.Table:
    """Rows of a Parquet file: its images where it holds image bytes, else the files that its URI column names.

    etag: the Parquet file's own; the images it holds are taken for changed when it is.
    """
    where = storage.redact(uri)
    with storage.open_read(uri) as stream:
        try:
            file = open_parquet(stream)
            schema = file.schema_arrow
            column = image_column(schema, config)
            if column is None:
                if config.uri_column not in schema.names:
                    raise ConfigError(
                        f"INPUT {where} has neither image bytes (a binary or struct<bytes, path> column "
                        f"input.image_column={config.image_column!r}) nor a column "
                        f"input.uri_column={config.uri_column!r}; its columns are {', '.join(schema.names)}"
                    )
                uris = file.read(columns=[config.uri_column])[config.uri_column]
                return rows_of_uris(pc.cast(uris, pa.string()), storage.parent(uri))
            names = _names_of_rows(file, column)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ConfigError(f"INPUT {where} is no Parquet file that can be read: {error}") from error
        num_rows = file.metadata.num_rows
    places = pa.array(np.arange(num_rows))
    numbers = pc.cast(places, pa.string())
    if names is None:
        names = pc.binary_join_element_wise("row-", numbers, "")
    elif pc.count_distinct(names, mode="all").as_py() < num_rows or names.null_count:
        names = pc.binary_join_element_wise("row-", numbers, "/", pc.fill_null(names, "image"), "")
    if prefix:
        names = pc.binary_join_element_wise(f"{prefix}/", names, "")
    uris = pc.binary_join_element_wise(f"{uri}#row=", numbers, "")
    return input_rows(uris, names, etag=etag, container=uri, row=places)


def _names_of_rows(file: pq.ParquetFile, column: str) -> pa.ChunkedArray | None:
    """The images' own names: a `file_name` column, else the paths of a Hugging Face image column, else None."""
    schema = file.schema_arrow
    if "file_name" in schema.names and pa.types.is_string(schema.field("file_name").type):
        names = file.read(columns=["file_name"])["file_name"]
        return None if names.null_count else names
    kind = schema.field(column).type
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        paths = pc.struct_field(file.read(columns=[f"{column}.path"])[column], "path")
        return None if paths.null_count == len(paths) else paths
    return None


def fetch_rows(container: str, rows: list[int], config: InputConfig, fetch_file: FetchFile) -> list[bytes | ImageError]:
    """Image bytes at these rows of a Parquet file; only the row groups that hold them are read, one at a time."""
    try:
        with storage.open_read(container) as stream:
            file = open_parquet(stream)
            column = image_column(file.schema_arrow, config)
            if column is None:
                error = ImageError("missing", f"{storage.redact(container)} no longer holds a column of images")
                return [error] * len(rows)
            found: dict[int, bytes | ImageError] = {}
            start = 0
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                wanted = [row for row in rows if start <= row < end]
                if wanted:
                    try:
                        images = file.read_row_group(group, columns=[column])[column]
                    except (pa.ArrowException, OSError) as error:  # damage to this group says nothing of the others
                        found |= dict.fromkeys(wanted, _unreadable(container, error))
                    else:
                        for row in wanted:
                            found[row] = _bytes_of(images[row - start], storage.parent(container), config, fetch_file)
                start = end
    except (BucketNotFoundError, RefusedError, UnavailableError):
        raise  # perhaps not this file's fault alone
    except NotFoundError as error:
        return [ImageError("missing", str(error))] * len(rows)
    except (FileError, pa.ArrowException, OSError) as error:
        return [_unreadable(container, error)] * len(rows)
    gone = ImageError("missing", f"{storage.redact(container)} has fewer rows than when it was listed")
    return [found.get(row, gone) for row in rows]


def _unreadable(container: str, error: Exception) -> ImageError:
    return ImageError("unreadable", f"{storage.redact(container)}: {error}")


def _bytes_of(value: pa.Scalar, folder: str, config: InputConfig, fetch_file: FetchFile) -> bytes | ImageError:
    path = None
    if isinstance(value, pa.StructScalar):
        if not value.is_valid:
            return ImageError("missing", "the row holds no image")
        path = value["path"].as_py() if "path" in value else None
        value = value["bytes"]
    if value.is_valid:
        size = value.as_buffer().size
        return value.as_py() if size <= config.max_bytes else too_large(size, config)
    if path:  # Hugging Face's layout may refer to a file instead of holding its bytes
        return fetch_file(storage.resolve(folder, path))
    return ImageError("missing", "the row holds no image")


def too_large(size: int, config: InputConfig) -> ImageError:
    return ImageError("too_large", f"{size} bytes are more than input.max_bytes={config.max_bytes}")
