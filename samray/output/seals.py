"""A checksum of a whole Parquet file, kept within the file: one wrong bit anywhere, and it no longer fits.

Parquet's own checksums cover the pages, not their headers, and not the footer with its statistics and metadata. So a
file of samray's also holds, in its footer, the SHA-256 of all its bytes, in which zeros stand for the checksum itself.
The checksum also names the file: it differs for files that differ, and reading the footer is enough to know it.
"""

from __future__ import annotations

import hashlib
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from samray.storage.tables import footer_bytes

_KEY: Final = b"samray.sha256"
_MARK: Final = b"samray.sealed"
"""Another key of the footer: it says that there is a checksum, should the first key be the damaged one."""
_ZEROS: Final = b"0" * 64
_BEFORE: Final = _KEY + b"\x18\x40"
"""What comes before the checksum: its key, and that 64 bytes of text follow (Thrift's compact protocol)."""


def leave_room(writer: pq.ParquetWriter) -> None:
    """Reserve the place of the checksum. Call it before the writer is closed."""
    writer.add_key_value_metadata({_MARK: b"sha256", _KEY: _ZEROS})


def unsealed(table: pa.Table) -> pa.Table:
    """The table without the checksum of the file that it was read from, which Arrow keeps in its metadata."""
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key not in (_KEY, _MARK)}
    return table.replace_schema_metadata(metadata or None)


def seal(data: bytes | pa.Buffer) -> bytes:
    """The file with its checksum. data: what a writer made, in which `leave_room` reserved the place."""
    view = memoryview(data)
    start = _place(view)
    assert start is not None, "call leave_room before the writer is closed"
    return b"".join([view[:start], _digest(view, start), view[start + 64 :]])


def seal_of(footer: pq.FileMetaData) -> str | None:
    """The checksum that a file was given; None for a file without, as samray wrote them until 0.1."""
    found = (footer.metadata or {}).get(_KEY)
    return None if found is None else found.decode("ascii", "replace")


def digest_in(data: bytes) -> str:
    """`seal_of` of a file that `seal` made, from its bytes."""
    start = _place(memoryview(data))
    assert start is not None, "this file was not sealed"
    return data[start : start + 64].decode("ascii")


def is_intact(data: bytes) -> bool | None:
    """Whether a file's bytes give the checksum that it holds; None if it has none."""
    view = memoryview(data)
    start = _place(view)
    if start is None:
        return False if _MARK in _footer(view) else None
    return view[start : start + 64] == _digest(view, start)


def _place(view: memoryview) -> int | None:
    footer = _footer(view)
    found = footer.rfind(_BEFORE)
    return None if found < 0 else len(view) - len(footer) + found + len(_BEFORE)


def _footer(view: memoryview) -> bytes:
    return bytes(view[max(0, len(view) - footer_bytes(bytes(view[-8:]))) :])


def _digest(view: memoryview, start: int) -> bytes:
    digest = hashlib.sha256(view[:start])
    digest.update(_ZEROS)
    digest.update(view[start + 64 :])
    return digest.hexdigest().encode()
