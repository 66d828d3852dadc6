"""Parquet as an input: rows with encoded images (Hugging Face's layout or plain binary) or with their URIs."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from samray import storage
from samray.errors import (
    BucketNotFoundError,
    ConfigError,
    FileError,
    ImageError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)
from samray.inputs.base import Container, FetchFile, Part, Reader, too_large
from samray.inputs.outside import location_problem
from samray.inputs.parquet_types import binary_column, is_binary, is_text, text_column
from samray.inputs.rows import input_rows
from samray.inputs.uri_list import missing_column
from samray.inputs.uri_rows import rows_of_uris
from samray.storage.tables import open_parquet

if TYPE_CHECKING:
    from samray.config import InputConfig

_IMAGE_COLUMNS: Final = ("image", "jpeg", "jpg", "png")
"""Column names to try after the configured one, among columns whose type can have images."""
_ROWS_AT_ONCE: Final = 16
_MAX_ROWS_IN_FEW_BYTES: Final = 2**20


def image_column(schema: pa.Schema, config: InputConfig) -> str | None:
    """The column of encoded images: bytes, or struct<bytes, path>; None if the Parquet file has none."""
    for name in dict.fromkeys((config.image_column, *_IMAGE_COLUMNS)):
        if name in schema.names:
            kind = schema.field(name).type
            in_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            # The type decides: a column of text may have the same name.
            if is_binary(kind.field("bytes").type if in_struct else kind):
                return name
    return None


def list_parquet(container: Container, config: InputConfig) -> Part:
    """The rows of a Parquet file: its images if it has image bytes, else the files in its URI column.

    prefix: start of the images' names. root: folder that local files must be in. etag: of the Parquet file; if it
    changes, all of its images count as changed. Raises: ConfigError, StorageError.
    """
    uri, prefix = container.uri, container.prefix
    where = storage.redact(uri)
    with storage.open_read(uri) as stream:
        try:
            file = open_parquet(stream)
            columns = Counter(file.schema_arrow.names)
            # Columns are read by name, so a name must mean one column.
            if repeated := [name for name, number in columns.items() if number > 1]:
                raise ValueError(f"several of its columns have the same name: {', '.join(sorted(repeated))[:200]}")
            column = image_column(file.schema_arrow, config)
            if column is None:
                written, allow = _written_uris(file, config), config.allow_outside
                return Part(rows_of_uris(written, storage.parent(uri), container.root, allow_outside=allow))
            names = _names_of_rows(file, column)
        except (pa.ArrowException, KeyError, OSError, ValueError) as error:
            raise ConfigError(f"{where} cannot be read as Parquet: {error}") from error
        num_rows, num_bytes = file.metadata.num_rows, stream.seek(0, io.SEEK_END)
    # Images take bytes; rows without one may be any number, and each of them would be a row of the plan.
    if num_rows > max(_MAX_ROWS_IN_FEW_BYTES, num_bytes):
        raise ConfigError(
            f"{where} has {num_rows:,} rows of images in {num_bytes:,} bytes: it is damaged, or made to exhaust memory"
        )
    row_numbers = pa.array(np.arange(num_rows))
    numbers = pc.cast(row_numbers, pa.string())
    if names is None:
        names = pc.binary_join_element_wise("row-", numbers, "")
    elif pc.count_distinct(names, mode="all").as_py() < num_rows or names.null_count:
        # Repeated or missing names get the row number, which makes them distinct.
        names = pc.binary_join_element_wise("row-", numbers, "/", pc.fill_null(names, "image"), "")
    if prefix:
        names = pc.binary_join_element_wise(f"{prefix}/", names, "")
    uris = pc.binary_join_element_wise(f"{uri}#row=", numbers, "")
    return Part(input_rows(uris, names, etag=container.etag, container=uri, row=row_numbers))


def _written_uris(file: pq.ParquetFile, config: InputConfig) -> pa.ChunkedArray:
    """The column of URIs. Raises: ValueError if there is none."""
    schema = file.schema_arrow
    if config.uri_column not in schema.names:
        # The file may be meant as images or as a list, so the message names both settings.
        raise ValueError(
            f"it has no image bytes (a binary or struct<bytes, path> column, input.image_column="
            f"{config.image_column!r}), and as a list {missing_column(config.uri_column, schema.names)}"
        )
    kind = schema.field(config.uri_column).type
    if not is_text(kind) and not is_binary(kind):
        raise ValueError(f"its column {config.uri_column!r} is {kind}, expected text; set input.uri_column")
    return text_column(file.read(columns=[config.uri_column])[config.uri_column])


def _names_of_rows(file: pq.ParquetFile, column: str) -> pa.ChunkedArray | None:
    """The images' names: a `file_name` column, else the paths of a Hugging Face image column, else None."""
    schema = file.schema_arrow
    if "file_name" in schema.names and (is_text(kind := schema.field("file_name").type) or is_binary(kind)):
        names = text_column(file.read(columns=["file_name"])["file_name"])
        return None if names.null_count else names
    kind = schema.field(column).type
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        paths = text_column(pc.struct_field(file.read(columns=[f"{column}.path"])[column], "path"))
        return None if paths.null_count == len(paths) else paths
    return None


def fetch_rows(
    container: str, items: Sequence[dict[str, Any]], config: InputConfig, fetch_file: FetchFile
) -> list[bytes | ImageError]:
    """Image bytes of these rows of a Parquet file; reads only their row groups, a few rows at a time."""
    rows: list[int] = [item["row"] for item in items]
    try:
        with storage.open_read(container) as stream:
            file = open_parquet(stream)
            column = image_column(file.schema_arrow, config)
            if column is None:
                error = ImageError("missing", f"{storage.redact(container)} no longer has a column of images")
                return [error] * len(rows)
            data_by_row: dict[int, bytes | ImageError] = {}
            start = 0
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                # A row group is the smallest unit that Parquet reads; groups without wanted rows are skipped.
                wanted = [row for row in rows if start <= row < end]
                if wanted:
                    try:
                        for row, value in _values(file, group, column, start, set(wanted)):
                            data_by_row[row] = _bytes_of(value, storage.parent(container), config, fetch_file)
                    except (pa.ArrowException, OSError) as error:  # other groups may be intact
                        unread = [row for row in wanted if row not in data_by_row]
                        data_by_row |= dict.fromkeys(unread, _unreadable(container, error))
                start = end
    except (BucketNotFoundError, RefusedError, UnavailableError):
        raise  # other files may fail in the same way
    except NotFoundError as error:
        return [ImageError("missing", str(error))] * len(rows)
    except (FileError, pa.ArrowException, KeyError, OSError, ValueError) as error:
        return [_unreadable(container, error)] * len(rows)
    gone = ImageError("missing", f"{storage.redact(container)} has fewer rows than when it was listed")
    return [data_by_row.get(row, gone) for row in rows]


def _values(
    file: pq.ParquetFile, group: int, column: str, start: int, wanted: set[int]
) -> Iterator[tuple[int, pa.Array]]:
    """Each wanted row of a row group, whose first row is `start`, with an array of only its value.

    A row group is read in small batches: repeated values are stored once, but take their full size in memory.
    """
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[group], columns=[column]):
        for row in range(start, start + batch.num_rows):
            if row in wanted:
                yield row, batch.column(0).slice(row - start, 1)
        start += batch.num_rows
        # Nothing wanted follows; the rest of the group is not read.
        if start > max(wanted):
            return


def _unreadable(container: str, error: Exception) -> ImageError:
    return ImageError("unreadable", f"{storage.redact(container)}: {error}")


def _bytes_of(value: pa.Array, folder: str, config: InputConfig, fetch_file: FetchFile) -> bytes | ImageError:
    """value: an array with one image, bytes or struct<bytes, path>."""
    path = None
    if pa.types.is_struct(value.type):
        if value.type.get_field_index("path") >= 0:
            path = text_column(pa.chunked_array([pc.struct_field(value, "path")]))[0].as_py()
        value = pc.struct_field(value, "bytes")
    data = binary_column(pa.chunked_array([value]))[0]
    if data.is_valid:
        # The size without a copy: too large an image never becomes a Python object.
        size = data.as_buffer().size
        return data.as_py() if size <= config.max_bytes else too_large(size, config)
    if path:  # Hugging Face's layout may have a path instead of bytes
        uri = storage.resolve(folder, path)
        # The path comes from the file, so the rules for lists apply.
        problem = location_problem(uri, folder, allow_outside=config.allow_outside)
        return fetch_file(uri) if problem is None else ImageError.parse(problem)
    return ImageError("missing", "the row has no image")


READER: Final = Reader(
    name="parquet",
    nouns=("Parquet file",),
    nothing="no row in the Parquet file",
    endings=(".parquet",),
    list=list_parquet,
    fetch=fetch_rows,
    fetch_at_once=True,
    lists_uris=True,
    distinct_names=True,
)
