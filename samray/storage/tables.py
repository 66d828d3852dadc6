"""The only module that opens Parquet and Arrow data. Nothing that it returns can run code.

Arrow data may use extension types. Once Ray is imported, `ray.data.arrow_pickled_object` is one of them, and its values
are unpickled on access; other packages register types whose Python code runs even when a schema is read. samray needs
none of them. Parquet files are read by their Parquet types alone, which turns such a column into its storage type (a
pickled object into plain bytes). Columns passed in memory are checked by `code_free`. A test ensures that no other
module opens such data.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from samray.storage.page_headers import Codecs, chosen_columns, columns_of
from samray.storage.pages import Budget, CheckedStream

_TAIL_BYTES: Final = 64 * 1024
"""Bytes read first, from the end: enough for the footer of most files."""
_MAX_DEPTH: Final = 64
"""Maximum nesting of a schema. Arrow reads schemas recursively, and deep ones would crash the process."""

_ARROW_SCHEMA: Final = b"ARROW:schema"
_IGNORED: Final = b"ARROW-schema"  # same length, which preserves the footer's offsets


def _in_base64(text: bytes) -> list[bytes]:
    """How `text` appears within base64, at each of the three possible alignments."""
    encoded = [(shift, base64.b64encode(bytes(shift) + text)) for shift in range(3)]
    # Only the characters without bits of the bytes before or after.
    return [code[-(-shift * 8 // 6) : (shift + len(text)) * 8 // 6] for shift, code in encoded]


# A file stores its Arrow schema in base64, so the key of extension types is looked for in that form.
_EXTENSION_MARKS: Final = _in_base64(b"ARROW:extension:name")


def open_parquet(
    source: bytes | BinaryIO, footer: pq.FileMetaData | None = None, *, pre_buffer: bool = True
) -> pq.ParquetFile:
    """Open a Parquet file without extension types in its schema. Checks the checksums of pages that have one, and that
    no column expands beyond the limits of `pages`.

    source: the file's bytes, or a seekable binary stream. footer: from `parse_footer`, if read before.
    Raises: pa.ArrowException, OSError or ValueError if it is not valid Parquet.
    """
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    # The footer comes from `parse_footer`, never from ParquetFile itself, which would deserialize the Arrow schema.
    footer = footer or parse_footer(_read_tail(stream))
    checked = CheckedStream(stream)
    file = _CheckedFile(
        checked,
        metadata=footer,
        pre_buffer=pre_buffer,
        page_checksum_verification=True,
        arrow_extensions_enabled=False,
        schema_depth_limit=_MAX_DEPTH,
    )
    file.source = checked
    file.num_bytes = stream.seek(0, io.SEEK_END)
    if any(is_extension(field.type) for field in file.schema_arrow):  # impossible after parse_footer
        raise pa.ArrowInvalid("the schema names an extension type, which may run code")
    return file


class _CheckedFile(pq.ParquetFile):  # type: ignore[misc]
    """A Parquet file whose columns are checked before Arrow decodes them, see `samray.storage.pages`."""

    source: CheckedStream
    num_bytes: int

    def read(self, columns: Sequence[str] | None = None, **kwargs: Any) -> pa.Table:
        self._expect(range(self.num_row_groups), columns)
        return super().read(columns=columns, **kwargs)

    def read_row_group(self, i: int, columns: Sequence[str] | None = None, **kwargs: Any) -> pa.Table:
        self._expect([i], columns)
        return super().read_row_group(i, columns=columns, **kwargs)

    def read_row_groups(
        self, row_groups: Sequence[int], columns: Sequence[str] | None = None, **kwargs: Any
    ) -> pa.Table:
        self._expect(row_groups, columns)
        return super().read_row_groups(row_groups, columns=columns, **kwargs)

    def iter_batches(
        self,
        batch_size: int = 65536,
        row_groups: Sequence[int] | None = None,
        columns: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        groups = list(range(self.num_row_groups) if row_groups is None else row_groups)
        # One after the other: each may take what is allowed.
        self._expect(groups, columns, at_once=False)
        return super().iter_batches(batch_size, row_groups=groups, columns=columns, **kwargs)

    def _expect(self, groups: Iterable[int], names: Sequence[str] | None, *, at_once: bool = True) -> None:
        """Check the columns of these row groups that are read, together or each group for itself."""
        chosen = chosen_columns(self.metadata, names)
        budget, codecs = Budget(self.num_bytes), Codecs(self.metadata)
        for group in groups:
            budget = budget if at_once else Budget(self.num_bytes)
            self.source.expect(functools.partial(columns_of, self.metadata, group, chosen, codecs), budget)


def read_parquet(source: bytes | BinaryIO, columns: list[str] | None = None) -> pa.Table:
    """All rows of a Parquet file, read with `open_parquet`."""
    return open_parquet(source).read(columns=columns)


def parse_footer(tail: bytes) -> pq.FileMetaData:
    """Parse the footer of a Parquet file. tail: its last bytes, with at least the whole footer (`footer_bytes`).

    Raises: pa.ArrowException, OSError or ValueError.
    """
    if any(mark in tail for mark in _EXTENSION_MARKS):
        # Arrow first reads the Arrow schema that a writer stored next to the Parquet schema, under this name. Without
        # it, it uses the Parquet types, and there is nothing to deserialize.
        length = footer_bytes(tail)
        tail = tail[:-length] + tail[-length:].replace(_ARROW_SCHEMA, _IGNORED)
    # Only the footer's bytes are given, so nothing else of the file can be read here.
    file = pq.ParquetFile(
        pa.BufferReader(tail), pre_buffer=False, arrow_extensions_enabled=False, schema_depth_limit=_MAX_DEPTH
    )
    return file.metadata


def footer_bytes(tail: bytes) -> int:
    """Size of the footer at the end of a Parquet file, including the last eight bytes."""
    return int.from_bytes(tail[-8:-4], "little") + 8


def footer_value(tail: bytes, key: bytes) -> bytes | None:
    """The last value of a key in the footer's metadata, found without parsing the footer: some 100 times as fast.

    tail: the file's last bytes. None if they do not have the key, or are not the end of a Parquet file.
    """
    if not tail.endswith(b"PAR1"):
        return None
    # Thrift's compact protocol: field header 0x18 (a string), its length, its bytes; first the key, then the value.
    mark = b"\x18" + bytes([len(key)]) + key + b"\x18"
    mark_at = tail.rfind(mark)
    if mark_at < 0:
        return None
    start, length = mark_at + len(mark), 0
    # The length: seven bits per byte, lowest first; the last byte is below 128. Five bytes hold any length below 2^35.
    for shift in range(0, 35, 7):
        byte = tail[start]
        start += 1
        length |= (byte & 127) << shift
        if byte < 128:
            break
    value = tail[start : start + length]
    return value if len(value) == length else None


def _read_tail(source: BinaryIO) -> bytes:
    size = source.seek(0, io.SEEK_END)
    tail = _read_from(source, max(0, size - _TAIL_BYTES))
    length = footer_bytes(tail)
    return _read_from(source, size - length) if len(tail) < length <= size else tail


def _read_from(source: BinaryIO, start: int) -> bytes:
    source.seek(start)
    return bytes(source.read())


def is_extension(kind: pa.DataType) -> bool:
    """Whether a type is, or contains, an extension type."""
    return next(_extensions(kind), None) is not None


def _extensions(kind: pa.DataType) -> Iterator[pa.BaseExtensionType]:
    if isinstance(kind, pa.BaseExtensionType):
        yield kind
        yield from _extensions(kind.storage_type)
    elif pa.types.is_dictionary(kind):  # it reports no fields
        yield from _extensions(kind.value_type)
    else:
        for i in range(kind.num_fields):
            yield from _extensions(kind.field(i).type)


_TENSORS: Final = frozenset(
    {
        "arrow.fixed_shape_tensor",
        "ray.data.arrow_tensor",
        "ray.data.arrow_tensor_v2",
        "ray.data.arrow_variable_shaped_tensor",
    }
)


def is_tensor(kind: pa.DataType) -> bool:
    """Whether a type has arrays of numbers as Ray Data passes them, whose values are safe to access."""
    return (
        isinstance(kind, pa.BaseExtensionType)
        and kind.extension_name in _TENSORS
        and not is_extension(kind.storage_type)
        and pa.types.is_primitive(kind.value_type)
    )


def code_free(name: str, kind: pa.DataType) -> None:
    """Check a column that was passed in memory, before accessing a value.

    Raises: ValueError if it has an extension type other than a tensor of numbers.
    """
    if is_extension(kind) and not is_tensor(kind):
        names = ", ".join(sorted({extension.extension_name for extension in _extensions(kind)}))
        raise ValueError(
            f"the column {name!r} has the extension type {names}, whose values may run code when read; "
            "expected binary, struct<bytes, path>, lists or tensors of numbers: convert the column first"
        )


def to_stream(table: pa.Table) -> bytes:
    """Serialize the table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def from_stream(data: bytes) -> pa.Table:
    """Deserialize the output of `to_stream`. Raises: ValueError if a column has an extension type."""
    reader: Any = pa.ipc.open_stream(data)
    for field in reader.schema:
        code_free(field.name, field.type)
    return reader.read_all()
