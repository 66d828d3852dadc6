"""What lies in a folder, below a prefix, or matches a glob."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from samray.errors import ConfigError, NotFoundError
from samray.storage.filesystems import filesystem, retry
from samray.storage.reading import exists, info_of, is_dir_like
from samray.storage.uris import glob_base, has_glob, is_local, normalize, redact


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file found by listing: where it is, and its size in bytes (None where the filesystem does not say)."""

    uri: str
    size: int | None


def list_files(uri: str) -> Iterator[FileEntry]:
    """Every file below a folder or prefix, or the files that a glob matches, in no promised order.

    A URI that names something as it stands is never taken for a glob. In a glob `*` and `?` stay within one path
    segment, `**` spans any number of them; what lies below a matched folder is matched, too. Symbolic links to
    folders are followed, but never in a circle.

    Raises: NotFoundError where nothing of that name is there, FileError, StorageError.
    """
    uri = normalize(uri)
    if has_glob(uri) and not exists(uri):
        yield from _glob(uri)
        return
    info = info_of(uri)
    if info.get("type") != "directory":
        yield FileEntry(uri, None if info.get("size") is None else int(info["size"]))
    else:
        yield from _walk(uri)


def _glob(pattern: str) -> Iterator[FileEntry]:
    from fsspec.utils import glob_translate

    base = glob_base(pattern)
    if base.endswith(":/") or base.endswith("://"):
        raise ConfigError(f"{redact(pattern)}: the bucket's name cannot be a glob; name the bucket")
    expression = glob_translate(pattern)
    # fsspec's translation ends in \Z or \z; what lies below a matched folder counts as matched.
    body = re.sub(r"\\[zZ]$", "", expression)
    matches = re.compile(rf"{body}(?:/.*)?\Z", re.DOTALL).match
    if not is_dir_like(base):
        return
    for entry in _walk(base):
        if matches(entry.uri):
            yield entry


def _walk(folder: str) -> Iterator[FileEntry]:
    if is_local(folder):
        yield from _walk_local(folder, ())
        return
    fs = filesystem(folder)
    found = retry("list", folder, lambda: cast(dict[str, dict[str, Any]], fs.find(folder, detail=True)))
    for name, info in found.items():
        if info.get("type") == "file" and not name.endswith("/"):
            size = info.get("size")
            yield FileEntry(fs.unstrip_protocol(name), None if size is None else int(size))


def _walk_local(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[FileEntry]:
    status = retry("list", folder, lambda: os.stat(folder))
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return

    def scan() -> list[os.DirEntry[str]]:
        with os.scandir(folder) as entries:
            return list(entries)

    for entry in retry("list", folder, scan):
        try:
            if entry.is_dir():
                yield from _walk_local(entry.path, (*above, identity))
            elif entry.is_file():
                yield FileEntry(_printable(entry.path), entry.stat().st_size)
            elif entry.is_symlink():  # dangling: listed, so that it becomes a failed row and not a silent gap
                yield FileEntry(_printable(entry.path), None)
        except FileNotFoundError:  # removed while we looked
            continue


def _printable(path: str) -> str:
    """`path`, with bytes that are no UTF-8 written as escapes: Parquet holds text, and such a row is to fail."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def list_names(folder: str) -> dict[str, int]:
    """The files directly in a folder: name to size in bytes; empty where the folder does not exist.

    Raises: FileError, StorageError.
    """
    folder = normalize(folder)
    if is_local(folder):

        def scan() -> dict[str, int]:
            sizes = {}
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # removed while we looked, as temporary files are
                        if entry.is_file():
                            sizes[entry.name] = entry.stat().st_size
            return sizes

        call: Callable[[], dict[str, int]] = scan
    else:
        fs = filesystem(folder)

        def ask() -> dict[str, int]:
            own = fs._strip_protocol(folder)  # some servers list an emptied folder as an object within itself
            found = [info for info in fs.ls(folder, detail=True) if info["name"].rstrip("/") != own]
            names = ((info["name"].rstrip("/").rpartition("/")[2], info) for info in found)
            return {name: int(info.get("size") or 0) for name, info in names if info.get("type") == "file"}

        call = ask
    try:
        return retry("list", folder, call)
    except NotFoundError:
        return {}
