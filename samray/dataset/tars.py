"""Where in a tar its images lie, so that each can be read by one ranged request and no archive is ever unpacked."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from samray import storage
from samray.errors import ConfigError

_BLOCK = 512


@dataclass(frozen=True, slots=True)
class TarMember:
    """An image in a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


def is_tar(uri: str) -> bool:
    return uri.lower().endswith(".tar")


def is_compressed_tar(uri: str) -> bool:
    return uri.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst"))


def list_tar(uri: str, extensions: tuple[str, ...]) -> list[TarMember]:
    """The members whose names end in one of the extensions, in the archive's order; hidden ones are left out.

    Only headers are read. Links within the archive count as what they point to. A last member cut short is listed with
    the size it should have, so that it becomes a failed row.

    Raises: ConfigError where the archive is damaged between members: what follows could not be found.
    """
    found: dict[str, TarMember] = {}
    members: list[TarMember] = []
    with storage.open_read(uri) as stream:
        for info in _headers(stream, uri):
            name = posixpath.normpath(info.name.encode("utf-8", "backslashreplace").decode("utf-8"))
            if info.isreg():
                member: TarMember | None = TarMember(name, info.offset_data, info.size)
            elif info.islnk():
                member = found.get(posixpath.normpath(info.linkname))
            elif info.issym():
                member = found.get(posixpath.normpath(posixpath.join(posixpath.dirname(name), info.linkname)))
            else:
                continue
            if member is None:
                continue
            found[name] = member = TarMember(name, member.offset, member.size)
            hidden = any(part.startswith(".") and part != ".." for part in name.split("/"))
            if name.lower().endswith(extensions) and not hidden:
                members.append(member)
    return members


def _headers(stream: BinaryIO, uri: str) -> Iterator[tarfile.TarInfo]:
    where = storage.redact(uri)
    stream.seek(0, 2)
    size = stream.tell()
    stream.seek(0)
    if size == 0:
        raise ConfigError(f"{where} is empty, not a tar")
    try:
        archive = tarfile.TarFile(fileobj=stream, mode="r", errorlevel=1)
    except tarfile.TarError as error:
        raise ConfigError(f"{where} is not an uncompressed tar: {error}") from error
    end = 0
    last = "its start"
    try:
        while (info := archive.next()) is not None:
            end = info.offset_data + -(-info.size // _BLOCK) * _BLOCK if info.isreg() else info.offset_data
            last = info.name
            yield info
    except tarfile.TarError as error:
        if end < size:
            raise ConfigError(f"{where} is damaged after {last} (byte {end}): {error}") from error
        return
    # tarfile ends quietly at a header that it cannot read; a block of zeros, or the file's end, is the only true end.
    stream.seek(end)
    block = stream.read(_BLOCK)
    if block.strip(b"\0"):
        raise ConfigError(f"{where} is damaged after {last} (byte {end}): what follows is no tar header")
