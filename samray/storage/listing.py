"""List the files in a folder, below a prefix, or that match a glob."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, cast

from samray.errors import ConfigError, NotFoundError
from samray.storage.filesystems import SCHEMES_OF_HOSTS, filesystem
from samray.storage.reading import etag_of, exists, info_of, is_dir_like, kind_of_file, version_of
from samray.storage.redaction import redact
from samray.storage.retrying import attempt_options, retry
from samray.storage.uris import glob_base, has_glob, is_local, normalize, scheme_of


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A listed file: its location, and its size in bytes (None if the filesystem does not report it).

    etag: changes if the file is replaced: an object store's entity tag, on disks the modification time in nanoseconds;
    None if there is neither.
    """

    uri: str
    size: int | None
    etag: str | None = None
    problem: str | None = None
    """Why it cannot be read, as `reason: message`: a FIFO, socket or device, or a name that is not UTF-8."""


def list_files(uri: str) -> Iterator[FileEntry]:
    """Every file below a folder or prefix, or the files that match a glob, in no particular order.

    A URI that names something literally is not treated as a glob. In a glob `*` and `?` stay within one path segment,
    `**` spans any number of them, and files below a matched folder match, too. Symbolic links to folders are followed,
    but not in circles.

    Raises: NotFoundError if nothing has that name, FileError, StorageError.
    """
    uri = normalize(uri)
    if has_glob(uri):
        _refuse_glob_of_bucket(uri)
        if not exists(uri):
            yield from _glob(uri)
            return
    info = info_of(uri)
    if info.get("type") != "directory":
        size = None if info.get("size") is None else int(info["size"])
        yield FileEntry(uri, size, etag_of(info), info.get("problem"))
    else:
        yield from _walk(uri)


def _refuse_glob_of_bucket(uri: str) -> None:
    """Raises: ConfigError. Called before any request, because the storage would only report an invalid name."""
    if not is_local(uri) and has_glob(uri.partition("://")[2].partition("/")[0].partition("?")[0]):
        raise ConfigError(
            f"{redact(uri)}: a bucket name cannot be a glob; name one bucket, as in s3://bucket/*, "
            "and run once for each bucket"
        )


def _glob(pattern: str) -> Iterator[FileEntry]:
    from fsspec.utils import glob_translate

    base = glob_base(pattern)
    expression = glob_translate(pattern)
    # fsspec's translation ends in \Z or \z; files below a matched folder also match.
    body = re.sub(r"\\[zZ]$", "", expression)
    matches = re.compile(rf"{body}(?:/.*)?\Z", re.DOTALL).match
    if not is_dir_like(base):
        return
    for entry in _walk(base):
        if matches(entry.uri):
            yield entry


def _walk(folder: str) -> Iterator[FileEntry]:
    if is_local(folder):
        yield from _walk_local(folder)
        return
    fs = filesystem(folder)
    # s3fs returns a listing as a whole, so a retry lists from the start.
    infos = retry(
        "list", folder, lambda: cast(dict[str, dict[str, Any]], fs.find(folder, detail=True, **attempt_options(fs)))
    )
    scheme = scheme_of(folder)
    for name, info in infos.items():
        # Keys that end in a slash are placeholders for folders, as web consoles create them.
        if info.get("type") == "file" and not name.endswith("/"):
            size = info.get("size")
            if scheme in SCHEMES_OF_HOSTS:  # fsspec's names there start below the host
                path = folder.split("/", 3)[2] + "/" + name.lstrip("/")
            else:
                path = fs.unstrip_protocol(name).partition("://")[2]  # with the requested scheme: s3a, not s3
            yield FileEntry(f"{scheme}://{path}", None if size is None else int(size), etag_of(info))


def _walk_local(top: str) -> Iterator[FileEntry]:
    """Iterative, because folders may be nested deeper than Python's recursion limit."""
    folders: list[tuple[str, tuple[tuple[int, int], ...]]] = [(top, ())]
    while folders:
        folder, above = folders.pop()
        status = retry("list", folder, lambda: os.stat(folder))  # noqa: B023
        identity = (status.st_dev, status.st_ino)
        # A link to a folder above would be walked forever.
        if identity in above:
            continue
        for entry in retry("list", folder, lambda: _scan(folder)):  # noqa: B023
            with contextlib.suppress(FileNotFoundError):  # removed during the scan
                if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                    folders.append((entry.path, (*above, identity)))
                else:
                    yield _local_entry(entry)


def _scan(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _local_entry(entry: os.DirEntry[str]) -> FileEntry:
    """A file, or anything else with a name: listed, to become a failed row and not a silent gap."""
    path = _printable(entry.path)
    problem = None
    if path != entry.path:
        problem = f"unreadable: the name of {path} is not UTF-8; rename it"
    try:
        status = entry.stat()
    except OSError:
        if not entry.is_symlink():
            raise
        return FileEntry(path, None, problem=problem)  # a dangling or circular link: reading it reports that
    if not stat.S_ISREG(status.st_mode):
        return FileEntry(path, None, problem=problem or f"unreadable: {path} is {kind_of_file(status.st_mode)}")
    return FileEntry(path, status.st_size, str(status.st_mtime_ns), problem)


def _printable(path: str) -> str:
    """`path` with bytes that are not UTF-8 escaped: Parquet stores text, and the row must fail."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def list_names(folder: str) -> dict[str, int]:
    """The files directly in a folder: name -> size in bytes; empty if the folder does not exist.

    Raises: FileError, StorageError.
    """
    return {name: int(info.get("size") or 0) for name, info in _list_folder(folder).items()}


def list_times(folder: str) -> dict[str, float | None]:
    """The files directly in a folder: name -> time of the last write, by the storage's clock (see `clock`).

    Seconds since 1970; None if the storage does not report it. Object stores have a resolution of one second. Empty if
    the folder does not exist. Raises: FileError, StorageError.
    """
    return {name: _written_at(info) for name, info in _list_folder(folder).items()}


def list_versions(folder: str) -> dict[str, str | None]:
    """The files directly in a folder: name -> version that changes if the file is replaced, as in `file_version`.

    Empty if the folder does not exist. Raises: FileError, StorageError.
    """
    return {name: version_of(info) for name, info in _list_folder(folder).items()}


def _list_folder(folder: str) -> dict[str, dict[str, Any]]:
    """Name -> the filesystem's info, for each file directly in a folder."""
    folder = normalize(folder)
    if is_local(folder):

        def scan() -> dict[str, dict[str, Any]]:
            infos = {}
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # removed during the scan, like temporary files
                        if entry.is_file():
                            status = entry.stat()
                            times = {"mtime": status.st_mtime, "mtime_ns": status.st_mtime_ns}
                            infos[entry.name] = {"size": status.st_size, **times}
            return infos

        call: Callable[[], dict[str, dict[str, Any]]] = scan
    else:
        fs = filesystem(folder)

        def ask() -> dict[str, dict[str, Any]]:
            folder_name = fs._strip_protocol(folder)  # some servers list an emptied folder as an object inside itself
            infos = [
                info
                for info in fs.ls(folder, detail=True, **attempt_options(fs))
                if info["name"].rstrip("/") != folder_name
            ]
            names = ((info["name"].rstrip("/").rpartition("/")[2], info) for info in infos)
            return {name: info for name, info in names if info.get("type") == "file"}

        call = ask
    try:
        return retry("list", folder, call)
    except NotFoundError:
        return {}


def _written_at(info: dict[str, Any]) -> float | None:
    """The write time, from the differing keys and types (datetime, ISO text, number) of filesystems."""
    names = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
    value = next((info[name] for name in names if info.get(name)), None)
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return float(value) if isinstance(value, int | float) else None


def clock(uri: str) -> float | None:
    """The current time, in seconds since 1970, by the clock that dates the files there: S3's, or this machine's for a
    disk.

    None if the storage does not report it. Raises: StorageError if it does not respond.
    """
    uri = normalize(uri)
    if is_local(uri):
        return time.time()
    if scheme_of(uri) not in ("s3", "s3a"):
        return None
    fs = filesystem(uri)
    bucket, prefix, _ = fs.split_path(uri)
    # A small request: only the Date header of its answer is used.
    answer = retry(
        "list",
        uri,
        lambda: fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1, **attempt_options(fs, 0)),
    )
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    return None if date is None else parsedate_to_datetime(date).timestamp()
