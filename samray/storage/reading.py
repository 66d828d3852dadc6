"""Bytes of files, whole or by ranges, and what is there."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Mapping
from typing import Any, BinaryIO, Final, cast

from samray.errors import FileError, NotFoundError
from samray.storage.faults import server_answer
from samray.storage.filesystems import filesystem, retry
from samray.storage.uris import is_local, normalize, redact, scheme_of

_BUFFER_BYTES: Final = 64 * 1024


def read_bytes(uri: str, offset: int | None = None, length: int | None = None) -> bytes:
    """The file's bytes, or `length` of them from `offset`; fewer where the file ends earlier.

    Raises: NotFoundError, FileError, StorageError.
    """
    uri = normalize(uri)
    if length == 0:
        return b""
    return retry("read", uri, lambda: _read_once(uri, offset, length))


def _read_once(uri: str, offset: int | None, length: int | None) -> bytes:
    if is_local(uri):
        with open_local(uri) as file:
            if offset:
                file.seek(offset)
            return file.read() if length is None else file.read(length)
    fs = filesystem(uri)
    if offset is None and length is None:
        # Without max_concurrency=1 s3fs asks for the size first: two requests where one does.
        options = {"max_concurrency": 1} if scheme_of(uri) in ("s3", "s3a") else {}
        return cast(bytes, fs.cat_file(uri, **options))
    start = offset or 0
    try:
        return cast(bytes, fs.cat_file(uri, start=start, end=None if length is None else start + length))
    except Exception as error:
        code, status = server_answer(error)
        if code == "InvalidRange" or status == 416:  # starts at or past the end
            return b""
        raise


def open_local(path: str) -> BinaryIO:
    """A file of this machine. Raises: FileError for a FIFO, socket or device, without opening it; OSError."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder, open() says what it is
        raise FileError(f"cannot read {redact(path)}: it is {kind_of_file(mode)}, expected a file")
    return open(path, "rb")


def kind_of_file(mode: int) -> str:
    """What `os.stat` says of something that is not a regular file, in words."""
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return kinds.get(stat.S_IFMT(mode), "a device")


class _RangeFile(io.RawIOBase):
    """A remote file as a seekable stream of ranged reads, each with the retries of `read_bytes`."""

    def __init__(self, uri: str, size: int) -> None:
        self._uri = uri
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        length = min(len(view), self._size - self._position)
        if length <= 0:
            return 0
        data = read_bytes(self._uri, self._position, length)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_read(uri: str, *, size: int | None = None, buffered: bool = True) -> BinaryIO:
    """A seekable binary stream; on object stores each read is a ranged request, small ones are buffered.

    size: the file's bytes where they are known, which saves asking for them. buffered: False fetches exactly the bytes
    of each read, for a reader that knows what it wants.

    Raises: NotFoundError, FileError, StorageError.
    """
    uri = normalize(uri)
    if is_local(uri):
        return retry("read", uri, lambda: open_local(uri))
    if size is None:
        size = file_size(uri)
    if size is None:
        return io.BytesIO(read_bytes(uri))
    stream = _RangeFile(uri, size)
    return io.BufferedReader(stream, buffer_size=_BUFFER_BYTES) if buffered else cast(BinaryIO, stream)


def file_size(uri: str) -> int | None:
    """The file's size in bytes; None where the server does not tell.

    Raises: NotFoundError where there is no such file (a folder of that name is none), FileError, StorageError.
    """
    info = info_of(uri)
    if info.get("type") == "directory":
        raise NotFoundError(f"cannot read {redact(uri)}: it is a folder")
    size = info.get("size")
    return None if size is None else int(size)


_VERSION_MARKS: Final = (
    *("ETag", "etag", "generation", "md5", "content_md5", "LastModified", "last_modified", "mtime_ns", "mtime"),
)


def file_version(uri: str) -> str | None:
    """What changes when the file is replaced: its size with the entity tag, generation or time the storage keeps.

    None where it keeps none. `list_versions` says the same of all files of a folder.
    Raises: NotFoundError, FileError, StorageError.
    """
    return version_of(info_of(uri))


def version_of(info: Mapping[str, Any]) -> str | None:
    """Of what a filesystem says of a file; the same whether it was listed or looked up by itself."""
    etag = etag_of(info)
    return None if etag is None else f"{info.get('size')} {etag}"


def etag_of(info: Mapping[str, Any]) -> str | None:
    """The first of the marks that the storage keeps of a file's version; None where it keeps none."""
    return next((str(info[mark]).strip('"') for mark in _VERSION_MARKS if info.get(mark)), None)


def info_of(uri: str) -> dict[str, Any]:
    uri = normalize(uri)
    if is_local(uri):
        status = retry("look up", uri, lambda: os.stat(uri))
        info = {
            "type": "directory" if stat.S_ISDIR(status.st_mode) else "file",
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
        }
        if info["type"] == "file" and not stat.S_ISREG(status.st_mode):
            info["problem"] = f"unreadable: {uri} is {kind_of_file(status.st_mode)}"
        return info
    return retry("look up", uri, lambda: _info_once(uri))


def _info_once(uri: str) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], filesystem(uri).info(uri))
    except FileNotFoundError as error:
        # fsspec's HTTP says "not found" whatever went wrong, be it that there is no network; the cause knows better.
        if isinstance(error.__cause__, Exception) and scheme_of(uri) in ("http", "https"):
            raise error.__cause__ from None
        raise


def exists(uri: str) -> bool:
    """Whether a file or folder of exactly this name is there. Raises: StorageError."""
    try:
        info_of(uri)
    except NotFoundError:
        return False
    return True


def is_dir_like(uri: str) -> bool:
    """Whether the URI names a folder, or a prefix with something below it. Raises: StorageError."""
    try:
        return info_of(uri).get("type") == "directory"
    except NotFoundError:
        return False
