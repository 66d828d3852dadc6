"""A checksum of a whole Parquet file, stored in the file itself, which detects any changed bit.

Parquet's own checksums cover the pages, but not their headers, and not the footer with its statistics and metadata. The
footer of a samray file therefore has the SHA-256 of all bytes of the file, computed with zeros in place of the
checksum. The checksum also identifies the version of a file, and can be read from the footer alone.
"""

from __future__ import annotations

import hashlib
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from samray.storage.tables import footer_bytes

CHECKSUM_KEY: Final = b"samray.sha256"
_MARK: Final = b"samray.sealed"
"""A second key in the footer: shows that there is a checksum even if the first key is damaged."""
_ZEROS: Final = b"0" * 64
_BEFORE: Final = CHECKSUM_KEY + b"\x18\x40"
"""The bytes before the checksum: its key, and the length 64 of a string (Thrift's compact protocol)."""


def leave_room(writer: pq.ParquetWriter) -> None:
    """Reserve space for the checksum. Call it before the writer is closed."""
    writer.add_key_value_metadata({_MARK: b"sha256", CHECKSUM_KEY: _ZEROS})


def unsealed(table: pa.Table) -> pa.Table:
    """The table without the checksum of its file, which Arrow keeps in the metadata."""
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key not in (CHECKSUM_KEY, _MARK)}
    return table.replace_schema_metadata(metadata or None)


def seal(data: bytes | pa.Buffer) -> bytes:
    """Insert the checksum. data: a Parquet file written with `leave_room`."""
    view = memoryview(data)
    start = _checksum_at(view)
    assert start is not None, "call leave_room before the writer is closed"
    return b"".join([view[:start], _digest(view, start), view[start + 64 :]])


def seal_of(footer: pq.FileMetaData) -> str | None:
    """The checksum stored in a file; None for files of samray 0.1 and earlier, which have none."""
    seal = (footer.metadata or {}).get(CHECKSUM_KEY)
    return None if seal is None else seal.decode("ascii", "replace")


def digest_in(data: bytes) -> str:
    """`seal_of` for the bytes of a file from `seal`."""
    start = _checksum_at(memoryview(data))
    assert start is not None, "this file was not sealed"
    return data[start : start + 64].decode("ascii")


def is_intact(data: bytes) -> bool | None:
    """Whether a file's bytes match the checksum in it; None if it has none."""
    view = memoryview(data)
    start = _checksum_at(view)
    if start is None:
        # With the mark, the file had a checksum, and its key is damaged.
        return False if _MARK in _footer(view) else None
    return view[start : start + 64] == _digest(view, start)


def _checksum_at(view: memoryview) -> int | None:
    footer = _footer(view)
    # The last match: the checksum was added after all other metadata, which may contain any text.
    mark_at = footer.rfind(_BEFORE)
    return None if mark_at < 0 else len(view) - len(footer) + mark_at + len(_BEFORE)


def _footer(view: memoryview) -> bytes:
    # A damaged length takes the whole file at most.
    return bytes(view[max(0, len(view) - footer_bytes(bytes(view[-8:]))) :])


def _digest(view: memoryview, start: int) -> bytes:
    # In three parts, without copying the file.
    digest = hashlib.sha256(view[:start])
    digest.update(_ZEROS)
    digest.update(view[start + 64 :])
    return digest.hexdigest().encode()
