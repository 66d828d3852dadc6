"""Read files, whole or by ranges, and look up what exists."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Mapping
from typing import Any, BinaryIO, Final, cast

from samray.errors import FileError, NotFoundError, TooLargeError
from samray.storage.faults import DamagedBodyError, server_answer
from samray.storage.filesystems import SCHEMES_OF_HOSTS, filesystem
from samray.storage.redaction import redact
from samray.storage.retrying import attempt_options, retry
from samray.storage.uris import is_local, is_web, normalize, scheme_of
from samray.storage.web import read_range_once, read_whole_once

_BUFFER_BYTES: Final = 64 * 1024


def read_bytes(uri: str, offset: int | None = None, length: int | None = None) -> bytes:
    """The file's bytes, or `length` of them from `offset`; fewer only if the file ends earlier.

    Raises: NotFoundError, FileError, StorageError.
    """
    uri = normalize(uri)
    if length == 0:
        return b""

    def call() -> bytes:
        data = _read_once(uri, offset, length)
        # More than asked for: the server ignored the range.
        if length is not None and len(data) > length:
            raise DamagedBodyError(f"asked for {length} bytes, got {len(data)}")
        if length is not None and len(data) < length and not is_local(uri):
            size = _info_once(uri).get("size")  # the end of the file, or a truncated response?
            if size is not None and (offset or 0) + len(data) < min(int(size), (offset or 0) + length):
                raise DamagedBodyError(f"the answer ended after {len(data)} of {length} bytes")
        return data

    return retry("read", uri, call)


def read_whole(uri: str, max_bytes: int, size: int | None = None) -> bytes:
    """The file's bytes, if there are at most max_bytes. Bounds the memory whatever a web server sends.

    size: from the listing; None looks it up. A response of another length was truncated, unless that is the file's
    current size. Raises: TooLargeError, NotFoundError, FileError, StorageError.
    """
    uri = normalize(uri)
    if is_web(uri):
        return retry("read", uri, lambda: read_whole_once(uri, max_bytes))
    if size is None:
        size = file_size(uri)  # check first, because it may be a disk image
    if size is None:
        data = read_bytes(uri, 0, max_bytes + 1)
    elif size > max_bytes:
        raise TooLargeError(size, f"{redact(uri)} has {size} bytes")
    elif is_local(uri):
        # Reading one byte more than allowed detects a file that grew after listing, without reading all of it.
        data = read_bytes(uri, 0, max_bytes + 1)
    else:
        data = retry("read", uri, lambda: _read_listed(uri, size))
    if len(data) > max_bytes:
        raise TooLargeError(len(data), f"{redact(uri)} has more than {max_bytes} bytes")
    return data


def _read_listed(uri: str, size: int) -> bytes:
    # Another length than listed: the file was replaced, or the body truncated. Its current size tells which.
    data = _read_once(uri, None, None)
    if len(data) != size and (now := _info_once(uri).get("size")) is not None and len(data) != int(now):
        raise DamagedBodyError(f"the body has {len(data)} bytes, the file {now}")
    return data


def _read_once(uri: str, offset: int | None, length: int | None) -> bytes:
    if is_local(uri):
        with open_local(uri) as file:
            if offset:
                file.seek(offset)
            return file.read() if length is None else file.read(length)
    if is_web(uri):
        return read_range_once(uri, offset or 0, length)
    fs = filesystem(uri)
    if scheme_of(uri) in SCHEMES_OF_HOSTS:  # fsspec's FTP would request a file with that whole name
        uri = fs._strip_protocol(uri)
    if offset is None and length is None:
        # Without max_concurrency=1 s3fs requests the size first: two requests instead of one.
        options = {"max_concurrency": 1} if scheme_of(uri) in ("s3", "s3a") else {}
        return cast(bytes, fs.cat_file(uri, **options, **attempt_options(fs)))
    start = offset or 0
    end = None if length is None else start + length
    try:
        return cast(bytes, fs.cat_file(uri, start=start, end=end, **attempt_options(fs, length)))
    except Exception as error:
        code, status = server_answer(error)
        if code == "InvalidRange" or status == 416:  # starts at or past the end
            return b""
        raise


def open_local(path: str) -> BinaryIO:
    """Open a local file. Raises: FileError for a FIFO, socket or device, without opening it; OSError."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # for a folder, open() reports it
        raise FileError(f"cannot read {redact(path)}: it is {kind_of_file(mode)}, expected a file")
    return open(path, "rb")


def kind_of_file(mode: int) -> str:
    """Name the kind of a file that is not a regular file."""
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return kinds.get(stat.S_IFMT(mode), "a device")


class _RangeFile(io.RawIOBase):
    """A remote file as a seekable stream of ranged reads, with the retries of `read_bytes`."""

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
    """Open a seekable binary stream; on object stores each read is a ranged request, and small reads are buffered.

    size: the file's bytes, if known, which saves a request. buffered: False fetches exactly the bytes of each read, for
    readers that plan their own reads.

    Raises: NotFoundError, FileError, StorageError.
    """
    uri = normalize(uri)
    if is_local(uri):
        return retry("read", uri, lambda: open_local(uri))
    if size is None:
        size = file_size(uri)
    # Without a size there is no end to seek from, as readers of Parquet do first.
    if size is None:
        return io.BytesIO(read_bytes(uri))
    stream = _RangeFile(uri, size)
    return io.BufferedReader(stream, buffer_size=_BUFFER_BYTES) if buffered else cast(BinaryIO, stream)


def file_size(uri: str) -> int | None:
    """The file's size in bytes; None if the server does not say.

    Raises: NotFoundError if there is no such file or it is a folder, FileError, StorageError.
    """
    info = info_of(uri)
    if info.get("type") == "directory":
        raise NotFoundError(f"cannot read {redact(uri)}: it is a folder")
    size = info.get("size")
    return None if size is None else int(size)


# Entity tags first: object stores date files by the second, so two versions may have one time.
_VERSION_MARKS: Final = (
    *("ETag", "etag", "generation", "md5", "content_md5", "LastModified", "last_modified", "mtime_ns", "mtime"),
)


def file_version(uri: str) -> str | None:
    """A value that changes if the file is replaced: its size with the storage's entity tag, generation or time.

    None if it has none. `list_versions` gives the same for all files of a folder.
    Raises: NotFoundError, FileError, StorageError.
    """
    return version_of(info_of(uri))


def version_of(info: Mapping[str, Any]) -> str | None:
    """The version in a filesystem's info of a file; the same from a listing and from a lookup."""
    etag = etag_of(info)
    return None if etag is None else f"{info.get('size')} {etag}"


def size_of_version(version: str | None) -> int | None:
    """The size in bytes in a version (`file_version`); None if it has none."""
    size = (version or "").partition(" ")[0]
    return int(size) if size.isdecimal() else None


def etag_of(info: Mapping[str, Any]) -> str | None:
    """Entity tag, generation or modification time, whichever the storage has; None if it has none."""
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
        fs = filesystem(uri)
        return cast(dict[str, Any], fs.info(uri, **attempt_options(fs, 0)))
    except FileNotFoundError as error:
        # fsspec's HTTP reports "not found" for every error, even without a network; the cause is more precise.
        if isinstance(error.__cause__, Exception) and is_web(uri):
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
