"""Locate the images in a tar, to read each with one range request; archives are never unpacked.

Python's tarfile parses the headers. A stream between it and the file adds the limits that it lacks: bytes of headers
per member, and no offsets that go backwards.
"""

from __future__ import annotations

import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

import pyarrow as pa

from samray import storage
from samray.errors import ConfigError, FileError, ImageError
from samray.inputs.base import Container, FetchFile, Part, Reader, too_large
from samray.inputs.decode import image_extensions
from samray.inputs.rows import input_rows
from samray.inputs.skipped import HIDDEN, NOT_AN_IMAGE, REPLACED, SPECIAL, UNUSABLE, Skipped

if TYPE_CHECKING:
    from samray.config import InputConfig

_BLOCK: Final = 512
_SCAN_BYTES: Final = 2**20
_MAX_HEADER_BYTES: Final = 2**22
"""Maximum header bytes per member, including extended headers and sparse maps."""
_MAX_READ_BYTES: Final = 2**20
_MAX_GLOBAL_HEADERS: Final = 1000
_LONG_NUMBER: Final = re.compile(rb"[0-9]{128}")
"""Maximum digits: tarfile matches numbers in extended headers with a pattern of quadratic run time."""
_MAX_SIZE: Final = 2**62
_MAX_EXTENTS: Final = 100_000
_MAX_LINKS: Final = 40
"""Maximum symbolic links to follow from one name, as in Linux."""

# What tarfile raises on damaged headers in addition to its own errors; found by fuzzing.
_PARSE_ERRORS: Final = (
    tarfile.TarError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in a tar: its name, and the location of its bytes."""

    name: str
    offset: int
    size: int
    extents: str | None = None
    """For a sparse file: `start+length` of each stored piece; the pieces follow each other from `offset`."""
    problem: str | None = None
    """Why there are no bytes to read, as `reason: message`."""


@dataclass(slots=True)
class TarIndex:
    """The members of a tar that count, in order."""

    members: list[TarMember] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)
    damage: str | None = None
    """Why nothing was found after the members, as a sentence."""


@dataclass(frozen=True, slots=True)
class _Link:
    target: str


def is_tar(uri: str) -> bool:
    return uri.lower().endswith(".tar")


def is_compressed_tar(uri: str) -> bool:
    return uri.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst"))


def list_tar(uri: str, extensions: tuple[str, ...]) -> list[TarMember]:
    """The members of `index_tar`. Raises: ConfigError if the archive is damaged, StorageError."""
    index = index_tar(uri, extensions)
    if index.damage is not None:
        raise ConfigError(index.damage)
    return index.members


def index_tar(uri: str, extensions: tuple[str, ...]) -> TarIndex:
    """The members whose names end in one of the extensions, in the archive's order; hidden files are left out.

    Reads only headers. If several members have the same name, the last one counts, as when unpacking. Links within the
    archive count as their target, which may come earlier or later; a dangling link has a `problem`. A truncated last
    member is listed with its full size, which makes it a failed row. Concatenated archives count as one.


    Raises: StorageError, FileError if the file cannot be read.
    """
    try:
        entries, index = _read(uri)
    except OSError as error:
        raise FileError(f"cannot read {storage.redact(uri)}: {error}") from error
    for name, entry in entries.items():
        if any(part.startswith(".") and part != ".." for part in name.split("/")):
            index.skipped.add_name(HIDDEN, name)
        elif not name.lower().endswith(extensions):
            index.skipped.add_name(NOT_AN_IMAGE, name)
        else:
            index.members.append(_resolved(name, entry, entries))
    return index


def _read(uri: str) -> tuple[dict[str, TarMember | _Link], TarIndex]:
    """The files and links of the archive by name, the last of each; and an index still without members."""
    entries: dict[str, TarMember | _Link] = {}
    index = TarIndex()
    with storage.open_read(uri) as stream:
        headers = _Headers(stream, uri)
        for info, num_stored in headers:
            name = _clean(info.name)
            entry = _entry_of(info, name, num_stored, entries)
            if entry is None:
                if not info.isdir():
                    index.skipped.add_name(SPECIAL, name)
                continue
            if entries.pop(name, None) is not None:  # the last one determines the order
                index.skipped.add_name(REPLACED, name)
            entries[name] = entry
    index.damage = headers.damage
    if headers.not_tar is not None:
        index.skipped.add(UNUSABLE, headers.not_tar)
    return entries, index


def _clean(name: str) -> str:
    """`name` as valid text: bytes that are not UTF-8 become escapes."""
    return posixpath.normpath(name.encode("utf-8", "backslashreplace").decode("utf-8"))


def _entry_of(
    info: tarfile.TarInfo, name: str, num_stored: int, entries: dict[str, TarMember | _Link]
) -> TarMember | _Link | None:
    """None for entries other than files and links."""
    if info.isreg():
        return _member(info, name, num_stored)
    if info.islnk():  # to the member that had the name at that point
        target = _clean(info.linkname)
        # A hard link to a later member is only a name so far; it is resolved at the end.
        return entries.get(target, _Link(target))
    if info.issym():
        return _Link(posixpath.normpath(posixpath.join(posixpath.dirname(name), _clean(info.linkname))))
    return None


def _member(info: tarfile.TarInfo, name: str, num_stored: int) -> TarMember:
    extents = None
    if not 0 <= info.size <= _MAX_SIZE:
        return TarMember(name, 0, 0, problem=f"unreadable: its size in the tar is {_short(info.size)} bytes")
    if info.issparse():
        pieces = [piece for piece in cast(Any, info).sparse if piece[1]]  # GNU tar ends the map with empty pieces
        ends = [0, *(start + length for start, length in pieces)]
        in_order = all(end <= start <= then for end, (start, _), then in zip(ends, pieces, ends[1:], strict=False))
        num_mapped = sum(length for _, length in pieces)
        # Pieces must follow each other, end inside the file, and have bytes stored for them.
        if not in_order or ends[-1] > info.size or num_mapped > num_stored or len(pieces) > _MAX_EXTENTS:
            return TarMember(name, 0, 0, problem="unreadable: its sparse map in the tar is damaged")
        extents = " ".join(f"{start}+{length}" for start, length in pieces)
    return TarMember(name, info.offset_data, info.size, extents)


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**18 else "more than 10^18" if number > 0 else "a negative number of"


def _resolved(name: str, entry: TarMember | _Link, entries: dict[str, TarMember | _Link]) -> TarMember:
    """The member under `name`; for a link, with the bytes of its target."""
    for _ in range(_MAX_LINKS):
        if isinstance(entry, TarMember):
            return TarMember(name, entry.offset, entry.size, entry.extents, entry.problem)
        # Members were collected by name, so the target may come before or after the link.
        target = entries.get(entry.target)
        if target is None:
            problem = f"missing: a link to {entry.target[:200]!r}, which is not a file of the tar"
            return TarMember(name, 0, 0, problem=problem)
        entry = target
    return TarMember(name, 0, 0, problem="missing: a link that leads back to itself")


# --- headers -------------------------------------------------------------------------------------------------------


class _HeaderStream:
    """The file as tarfile reads it: limits each read, and all reads per member."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._size = size
        self.budget = _MAX_HEADER_BYTES

    def read(self, size: int = -1) -> bytes:
        # tarfile reads as many bytes as a header announces; a hostile one announces gigabytes.
        if not 0 <= size <= _MAX_READ_BYTES or size > self.budget:
            raise tarfile.ReadError(f"a header of more than {_MAX_READ_BYTES} bytes")
        self.budget -= size
        data = self._stream.read(size)
        if size > _BLOCK and _LONG_NUMBER.search(data):
            raise tarfile.ReadError("a header with a number of more than 128 digits")
        return data

    def seek(self, offset: int) -> int:
        if offset < 0:
            raise tarfile.ReadError("a header leads backwards")
        return self._stream.seek(min(offset, self._size))  # at the end reads return nothing; disks refuse 2^60

    def tell(self) -> int:
        return self._stream.tell()


class _Headers:
    """The headers of an archive and of those after its end marks, each with the number of bytes stored for it."""

    def __init__(self, stream: BinaryIO, uri: str) -> None:
        self._stream, self._where = stream, storage.redact(uri)
        self.damage: str | None = None
        """Set at the end of iteration: why no header was read after the last one, as a sentence."""
        self.not_tar: str | None = None
        """Set at the end of iteration: what follows an end mark and is not a tar, as a sentence."""

    def __iter__(self) -> Iterator[tuple[tarfile.TarInfo, int]]:
        stream, where = self._stream, self._where
        size = stream.seek(0, 2)
        stream.seek(0)
        if size == 0:
            self.damage = f"{where} is empty (0 bytes), not a tar"
            return
        start = end = 0
        last = "its start"
        while True:
            bounded = _HeaderStream(stream, size)
            try:
                archive = tarfile.TarFile(fileobj=cast(Any, bounded), mode="r", errorlevel=1, encoding="utf-8")
                while (info := archive.next()) is not None:
                    cast(Any, archive).members.clear()  # tarfile would keep them all
                    # A header that leads back would be read forever; global headers pile up in tarfile without bound.
                    if archive.offset <= end or len(archive.pax_headers) > _MAX_GLOBAL_HEADERS:
                        raise tarfile.ReadError("its header leads backwards or is too long")
                    end, last = archive.offset, _clean(info.name)[-200:]
                    bounded.budget = _MAX_HEADER_BYTES
                    yield info, end - info.offset_data
            except _PARSE_ERRORS as error:
                damage = " ".join(str(error).split())[:200] or type(error).__name__
            else:
                # tarfile stops silently at an unreadable header; only a block of zeros or the end of the file is a real
                # end.
                stream.seek(end)
                damage = "what follows is not a tar header" if stream.read(_BLOCK).strip(b"\0") else ""
            if end >= size:  # also for a truncated last member
                return
            if damage and start == end > 0:  # tapes and disk images have old data there
                self.not_tar = f"{where}: {size - end} bytes after its end mark (from byte {end} on) are not a tar"
                return
            # Damage ends the archive: later members cannot be found without their headers.
            if damage:
                self.damage = _damage(where, last, end, damage)
                return
            # Joined archives (`cat a.tar b.tar`): another one may follow the zeros.
            following = _next_data(stream, end, size)
            if following is None:
                return
            start = end = stream.seek(following)


def _damage(where: str, last: str, end: int, reason: str) -> str:
    if end == 0:
        return f"{where} is not an uncompressed tar: {reason}"
    return f"{where} is damaged after {last} (byte {end}): {reason}; create the archive again"


def _next_data(stream: BinaryIO, start: int, size: int) -> int | None:
    """The first tar block from `start` that is not all zeros; None if there is none."""
    stream.seek(start)
    while start < size:
        data = stream.read(min(_SCAN_BYTES, size - start))
        if not data:
            return None
        rest = data.lstrip(b"\0")
        if rest:
            # Headers begin at whole blocks, counted from `start`.
            return start + (len(data) - len(rest)) // _BLOCK * _BLOCK
        start += len(data)
    return None


# --- as an input ---------------------------------------------------------------------------------------------------


def list_images(container: Container, config: InputConfig) -> Part:
    """The images of an archive, named by its name and theirs. Raises: StorageError, FileError."""
    index = index_tar(container.uri, image_extensions())
    members = index.members
    if index.damage is not None and not members:
        return Part(None, index.skipped, index.damage)
    # Names that lead out of the archive would lead out of an export's folder, too.
    inside = (posixpath.normpath(f"//{member.name}").lstrip("/") for member in members)
    rows = input_rows(
        pa.array([f"tar://{member.name}::{container.uri}" for member in members], pa.string()),
        pa.array([posixpath.join(container.prefix, name) for name in inside], pa.string()),
        size=pa.array([member.size for member in members], pa.int64()),
        etag=container.etag,
        container=container.uri,
        offset=pa.array([member.offset for member in members], pa.int64()),
        extents=_text_or_none([member.extents for member in members]),
        problem=_text_or_none([member.problem for member in members]),
    )
    return Part(rows, index.skipped, index.damage)


def _text_or_none(values: list[str | None]) -> pa.Array | None:
    return pa.array(values, pa.string()) if any(value is not None for value in values) else None


def fetch_members(
    archive: str, items: Sequence[dict[str, Any]], config: InputConfig, fetch_file: FetchFile
) -> list[bytes | ImageError]:
    """The bytes of members, each by one ranged request. Raises: StorageError."""
    return [
        _read_member(item) if item["size"] <= config.max_bytes else too_large(item["size"], config) for item in items
    ]


def _read_member(item: dict[str, Any]) -> bytes:
    """The bytes of a tar member; fewer where the tar ends earlier. Holes are filled with zeros."""
    if item["extents"] is None:
        return storage.read_bytes(item["container"], item["offset"], item["size"])
    try:
        pieces = [(int(start), int(length)) for start, _, length in (p.partition("+") for p in item["extents"].split())]
    except ValueError as error:
        raise FileError("the plan's map of the image's holes is damaged") from error
    num_stored = sum(length for _, length in pieces)
    # The plan may have been edited: a piece must stay inside the image's bytes.
    if any(start < 0 or length < 0 or start + length > item["size"] for start, length in pieces):
        raise FileError("the plan's map of the image's holes is damaged")
    stored = storage.read_bytes(item["container"], item["offset"], num_stored)
    data = bytearray(item["size"])
    offset = 0
    for start, length in pieces:
        piece = stored[offset : offset + length]
        # A truncated archive: the bytes up to here, which the decoder reports as truncated.
        if len(piece) < length:
            return bytes(data[:start]) + piece
        data[start : start + length] = piece
        offset += length
    return bytes(data)


READER: Final = Reader(
    name="tar",
    nouns=("tar",),
    nothing="no image in the tar",
    endings=(".tar",),
    list=list_images,
    fetch=fetch_members,
)
