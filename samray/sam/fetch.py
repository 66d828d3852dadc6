"""Fetch weights to a local file: download once per node, under a lock, verify, then rename.

The cache is `$SAMRAY_CACHE`, else `~/.cache/samray`:

    checkpoints/NAME                 published files under their published names; may be put there manually
    checkpoints/<key>-NAME           copies of remote checkpoints; <key> is from the URI and the object's size and
version
    sha256/<key>.json                known digests, to hash 2.5 GB only once and not at every start
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from samray import storage
from samray.errors import ConfigError, StorageError

_log = logging.getLogger(__name__)

Check = Callable[[Path], str | None]

_PIECE_BYTES = 32 * 1024 * 1024
_MAX_TRIES = 3
_SMALL_FILE_BYTES = 32 * 1024 * 1024  # fast to hash: not worth a cache entry
_SIZE_TOLERANCE = 0.01  # sizes are published with three digits


def cache_dir() -> Path:
    """Folder of downloaded weights on this node."""
    return Path(os.environ.get("SAMRAY_CACHE") or "~/.cache/samray").expanduser()


def published_path(file_name: str) -> Path:
    """Path of a published file in the cache, whether it exists or not."""
    return cache_dir() / "checkpoints" / file_name


def fetch_published(file_name: str, url: str, sha256: str | None, size_mb: float) -> Path:
    """The published file in the cache, downloaded if missing, and always verified: by digest, or by size if sha256 is
    None.

    Raises ConfigError if digest or size is wrong, and StorageError if it cannot be downloaded.
    """
    path = published_path(file_name)
    # Verified below in any case: the file may have been there already, put there manually.
    _fetch(url, path, lambda part: _mismatch(part, sha256, size_mb))
    if mismatch := _mismatch(path, sha256, size_mb):
        raise ConfigError(
            f"{path} is not the published {file_name}: {mismatch}; "
            "delete it and run again, or set model.checkpoint to it if it differs on purpose"
        )
    return path


def _mismatch(path: Path, sha256: str | None, size_mb: float) -> str | None:
    """How a published file differs from what is expected; None if it does not."""
    if sha256 is not None:
        actual = file_sha256(path)
        return None if actual == sha256 else f"expected SHA-256 {sha256}, found {actual}"
    size = path.stat().st_size / 1e6
    if abs(size - size_mb) <= _SIZE_TOLERANCE * size_mb:
        return None
    return f"expected {size_mb:,.1f} MB, found {size:,.1f} MB"


def fetch_remote(uri: str) -> Path:
    """A remote checkpoint's copy in the cache. Downloads it again if the object behind the URI was replaced.

    Raises NotFoundError if there is no such object, and StorageError if it cannot be downloaded.
    """
    for _ in range(_MAX_TRIES):
        version = _version(uri)
        # The version is part of the name: a replaced object is another file, and old copies stay valid.
        key = hashlib.sha256(f"{uri}\n{version}".encode()).hexdigest()[:16]
        path = published_path(f"{key}-{uri.partition('?')[0].rpartition('/')[2]}")
        try:
            _fetch(uri, path, version=version)
            return path
        except _Replaced:
            continue
    raise StorageError(f"{storage.redact(uri)} was replaced each time it was downloaded ({_MAX_TRIES} times)")


class _Replaced(Exception):
    """The object changed during its download."""


def _version(uri: str) -> str:
    return str(storage.file_version(uri) or storage.file_size(uri))


def file_sha256(path: Path) -> str:
    """SHA-256 of a local file, cached for large files by path, inode, size and times of the last change."""
    stat = path.stat()
    identity = _identity(path)
    key = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]
    entry = cache_dir() / "sha256" / f"{key}.json"
    if stat.st_size > _SMALL_FILE_BYTES:
        # An unreadable or damaged entry counts as none: the file is hashed again.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(entry.read_text())
            if known["identity"] == identity:
                return str(known["sha256"])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if stat.st_size > _SMALL_FILE_BYTES:
        with contextlib.suppress(OSError):  # a read-only home only costs time at the next start
            entry.parent.mkdir(parents=True, exist_ok=True)
            # Renamed when complete, because other processes of this node read and write the same entry.
            part = entry.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps({"identity": identity, "sha256": digest}))
            part.replace(entry)
    return digest


def _identity(path: Path) -> list[str | int]:
    """Differs after every change; includes ctime, because programs can reset mtime but not ctime."""
    stat = path.stat()
    return [str(path.absolute()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


@contextlib.contextmanager
def unchanged(path: Path, sha256: str | None) -> Iterator[None]:
    """Ensure that the block reads a file with this SHA-256 from its first to its last byte; None allows any file.

    Raises: ConfigError if it is another file, or if it was replaced while the block read it.
    """
    # Taken before hashing: a change between hashing and the end of the block is noticed, too.
    before = _identity(path)
    actual = sha256 if sha256 is None else file_sha256(path)
    if actual != sha256:
        raise ConfigError(
            f"{path} on {socket.gethostname()} does not have this run's weights: their SHA-256 is {sha256}, the file"
            f" has {actual}. It was replaced, or differs between machines: restore the run's weights, or choose another"
            " OUTPUT for these"
        )
    yield
    if sha256 is not None and _identity(path) != before:
        raise ConfigError(f"{path} was replaced while it was loaded; restore this run's weights and run again")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock out other processes on this node; the kernel releases the lock of a process that dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(path.name + ".lock"))
        lock.acquire()
    except OSError as error:
        raise ConfigError(
            f"the cache of weights {path.parent} cannot be written ({error.strerror or error}); "
            "set SAMRAY_CACHE to a writable folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _fetch(uri: str, path: Path, mismatch: Check | None = None, version: str | None = None) -> None:
    """Create `path`. Files appear complete, so an existing file needs no lock and no writable folder."""
    if path.exists():
        return
    # The first process of a node downloads; the others wait here and then find the file.
    with _locked(path):
        # Look again: another process may have finished while this one waited for the lock.
        if not path.exists():
            _download(uri, path, mismatch, version)


def _download(uri: str, path: Path, mismatch: Check | None, version: str | None) -> None:
    """Download `uri` next to `path` and rename it when complete; the caller holds the lock.

    mismatch: says what is wrong with the downloaded file, or None. Raises: _Replaced if the object's version has
    changed: parts of two versions would be mixed.
    """
    part = path.with_name(path.name + ".part")
    _log.info("downloading %s to %s", storage.redact(uri), path)
    try:
        _stream(uri, part)
        if mismatch is not None and (wrong := mismatch(part)):
            raise ConfigError(f"{storage.redact(uri)} was damaged or changed: {wrong}")
        # The pieces are separate requests: together they are one file only if the object stayed the same.
        if version is not None and (_version(uri) != version or not _is_same_again(uri, part)):
            raise _Replaced
        part.replace(path)
    except OSError as error:  # from the local disk: `storage` raises its own errors
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}; SAMRAY_CACHE sets the folder"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _is_same_again(uri: str, part: Path) -> bool:
    """Whether a store without versions returns the same bytes again; with a version this needs no reading."""
    if storage.file_version(uri) is not None:
        return True
    again = part.with_name(part.name + ".again")
    try:
        _stream(uri, again)
        return file_sha256(again) == file_sha256(part)
    finally:
        again.unlink(missing_ok=True)


def _stream(uri: str, part: Path) -> None:
    """Download in pieces: needs little memory, and `storage` retries a piece instead of the whole file."""
    size = storage.file_size(uri)
    with part.open("wb") as file:
        if size is None:
            file.write(storage.read_bytes(uri))
            return
        while file.tell() < size:
            offset = file.tell()
            data = storage.read_bytes(uri, offset, min(_PIECE_BYTES, size - offset))
            file.write(data)
            # More than asked for: a server without ranges sends the whole file each time.
            if not data or file.tell() > size:
                raise StorageError(
                    f"cannot read {storage.redact(uri)}: expected {size:,} bytes, got {file.tell():,}; it was replaced "
                    "during the download, or its server does not support ranges"
                )
