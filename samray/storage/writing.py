"""Atomic writes: a file appears complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, Final

from samray.errors import ConfigError, NotFoundError, StorageError
from samray.storage.faults import as_storage_error
from samray.storage.filesystems import filesystem
from samray.storage.reading import read_bytes
from samray.storage.redaction import redact
from samray.storage.retrying import attempt_options, retry
from samray.storage.uris import is_local, join, normalize, parent, scheme_of

TEMPORARY_PREFIX: Final = ".samray-"
"""Prefix of the names of unfinished files."""
_TEMPORARY_SUFFIX: Final = ".tmp"

# One PUT has at most 5 GiB. For bodies above twice its chunk size s3fs would use a multipart upload, which is not a
# single conditional request; a shard has megabytes, so one PUT is enough.
_MAX_PUT_BYTES: Final = 5 * 2**30

_OBJECT_STORES: Final = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"})
"""Schemes for which fsspec writes a file with one request, or with one that completes it."""


def put_new(uri: str, data: bytes) -> bool:
    """Create the file with exactly `data`, all or nothing; False if it already exists (left unchanged).

    If a request succeeded but its response was lost, the retry finds the object and returns False: callers treat
    "already there" as success.

    Raises: FileError, StorageError.
    """
    uri = normalize(uri)
    try:
        if is_local(uri):
            retry("write", uri, lambda: _write_local(uri, data, replace=False))
        else:
            retry("write", uri, lambda: _pipe(uri, data, "create"))
    except FileExistsError:
        return False
    return True


def put(uri: str, data: bytes) -> None:
    """Write the file with exactly `data`, atomically replacing an existing one. Raises: FileError, StorageError."""
    uri = normalize(uri)
    if is_local(uri):
        retry("write", uri, lambda: _write_local(uri, data, replace=True))
    else:
        retry("write", uri, lambda: _pipe(uri, data, "overwrite"))


def put_chunks(uri: str, chunks: Iterable[bytes]) -> None:
    """Write a file of any size in chunks, atomically replacing an existing one; memory holds one chunk.

    For object stores the chunks are first spooled to local disk and uploaded when complete: an error in `chunks` leaves
    nothing behind. Raises: FileError, StorageError, and what `chunks` raises.
    """
    uri = normalize(uri)
    # Next to its final name: a rename is atomic only within one filesystem.
    folder = os.path.dirname(uri) if is_local(uri) else None
    with _plain_errors(uri):
        if folder is not None:
            _make_folder(folder)
        handle, temporary = _temporary_file(folder)
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                with _plain_errors(uri):
                    file.write(chunk)
            # Before the rename: after a power loss the name could otherwise belong to an empty file.
            with _plain_errors(uri):
                _sync(file)
            if folder is None:
                retry("write", uri, lambda: _put_file_once(temporary, uri))
            else:
                with _plain_errors(uri):
                    os.replace(temporary, uri)
                    _sync_folder(folder)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def _plain_errors(uri: str) -> Iterator[None]:
    """Convert local errors to sentences, without retries: half of the work may have been done."""
    try:
        yield
    except OSError as error:
        raise as_storage_error(error, "write", uri) from error


def check_output(folder: str) -> None:
    """Check that an object store refuses to create a key twice, by doing so in a folder. Leaves nothing behind.

    Writes nothing on local disks, where hard links have this property.
    Raises: ConfigError if the storage is not suitable for an output, FileError, StorageError.
    """
    folder = normalize(folder)
    if is_local(folder) or not _puts_whole(filesystem(folder), folder):
        return
    uri = join(folder, f".samray-probe-{uuid.uuid4().hex}")
    try:
        put_new(uri, b"first")
        # The second write must be refused and must leave the first as it is.
        if put_new(uri, b"second") or read_bytes(uri) != b"first":
            raise ConfigError(
                f"OUTPUT {redact(folder)}: the storage overwrites existing files (it ignores If-None-Match), "
                "so two workers could overwrite each other's shards; use an OUTPUT with conditional writes"
            )
    finally:
        delete(uri)


def _puts_whole(fs: Any, uri: str) -> bool:
    """Whether a file appears there complete or not at all; False if it needs a temporary name and a rename.

    Raises: ConfigError if neither works: a killed process would leave a partial file that counts as done.
    """
    from fsspec.spec import AbstractFileSystem

    if scheme_of(uri) in _OBJECT_STORES:
        return True
    if type(fs).mv is AbstractFileSystem.mv:  # the default copies, then deletes the source
        raise ConfigError(
            f"{redact(uri)}: files on {scheme_of(uri)}:// are written in place and cannot be renamed, and a killed "
            "process would leave a partial file that counts as done; use an OUTPUT on a disk or an object store"
        )
    return False


def _write_and_rename(fs: Any, uri: str, write: Callable[[str], None], *, replace: bool) -> None:
    """Let `write` write another file in the folder, then rename it. Raises: FileExistsError."""
    folder = parent(uri)
    fs.makedirs(folder, exist_ok=True)
    if not replace and fs.exists(uri):
        raise FileExistsError(errno.EEXIST, "already there", redact(uri))
    temporary = join(folder, f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}{_TEMPORARY_SUFFIX}")
    try:
        write(temporary)
        # If two writers get here at the same time, the second may replace the first with its own complete bytes.
        fs.mv(temporary, uri)
    except BaseException:
        with contextlib.suppress(Exception):
            fs.rm_file(temporary)
        raise


def _put_file_once(source: str, uri: str) -> None:
    fs = filesystem(uri)
    if _puts_whole(fs, uri):
        fs.put_file(source, uri)
    else:
        _write_and_rename(fs, uri, lambda temporary: fs.put_file(source, temporary), replace=True)


def _pipe(uri: str, data: bytes, mode: str) -> None:
    fs = filesystem(uri)
    if not _puts_whole(fs, uri):
        _write_and_rename(fs, uri, lambda temporary: fs.pipe_file(temporary, data), replace=mode == "overwrite")
        return
    # On S3 mode "create" becomes `If-None-Match: *`, a conditional PUT.
    options: dict[str, Any] = {"mode": mode}
    if scheme_of(uri) in ("s3", "s3a"):
        if len(data) >= _MAX_PUT_BYTES:
            raise StorageError(f"cannot write {redact(uri)}: {len(data)} bytes exceed the limit of one PUT (5 GiB)")
        options["chunksize"] = _MAX_PUT_BYTES
    fs.pipe_file(uri, data, **options, **attempt_options(fs, len(data)))


def _write_local(path: str, data: bytes, *, replace: bool) -> None:
    folder = os.path.dirname(path)
    _make_folder(folder)
    handle, temporary = _temporary_file(folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            _sync(file)
            # Both are atomic: a kill before leaves only the temporary file, a kill after leaves the complete file.
            if replace:
                os.replace(temporary, path)
            else:
                _link_new(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    _sync_folder(folder)


def _make_folder(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError as error:  # different from "the file exists already"
        raise NotADirectoryError(errno.ENOTDIR, "a file with that name exists", folder) from error


def _temporary_file(folder: str | None) -> tuple[int, str]:
    """Hidden, with a suffix of its own: a partial file after kill -9 is never mistaken for a shard.

    Stays open and locked until it has its final name; otherwise `remove_leftovers` would delete it.
    """
    while True:
        handle, path = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, suffix=_TEMPORARY_SUFFIX, dir=folder)
        with contextlib.suppress(OSError):  # some network mounts have no locks; nothing is removed there either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, path
        os.close(handle)  # removed between creation and lock


def remove_leftovers(folder: str, *, recursive: bool = True) -> int:
    """Delete the unfinished files of killed processes in a folder; keeps files that are being written.

    Object stores have none, but their files were spooled on this machine: those are deleted. Returns the number
    deleted. Never raises.
    """
    folder, recursive = (normalize(folder), recursive) if is_local(folder) else (tempfile.gettempdir(), False)
    num_removed = 0
    for path, folders, names in os.walk(folder):
        if not recursive:
            folders.clear()
        for name in names:
            if name.startswith(TEMPORARY_PREFIX) and name.endswith(_TEMPORARY_SUFFIX):
                num_removed += _remove_unlocked(os.path.join(path, name))
    return num_removed


def _remove_unlocked(path: str) -> bool:
    """Delete a file that no process has locked."""
    try:
        # Never through a link, and never waiting for a FIFO of that name.
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        # A held lock belongs to a living writer: the kernel releases it when the process dies, however it dies.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def _sync(file: BinaryIO) -> None:
    """Flush the file to disk, with normal read permissions."""
    file.flush()
    os.fchmod(file.fileno(), 0o666 & ~_umask())
    os.fsync(file.fileno())


def _link_new(temporary: str, path: str) -> None:
    """Give the finished file its name, unless the name exists. Raises: FileExistsError."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        # No hard links here (FAT, some network mounts). A rename is still atomic; if two writers get here at the same
        # time, the second replaces the first with its own complete bytes of the same rows.
        if os.path.exists(path):
            raise FileExistsError(errno.EEXIST, "already there", path) from error
        os.replace(temporary, path)


def _sync_folder(folder: str) -> None:
    """Make the new name durable; some filesystems cannot sync a folder, and then nothing can be done."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    """The process's umask: mkstemp creates private files, but a dataset needs normal permissions."""
    global _cached_umask
    if _cached_umask is None:
        # The umask can be read only by setting it; two threads at once could restore the wrong one.
        with _umask_lock:
            _cached_umask = os.umask(0o077)
            os.umask(_cached_umask)
    return _cached_umask


_umask_lock = threading.Lock()
_cached_umask: int | None = None


def delete(uri: str) -> None:
    """Delete one file; does nothing if it does not exist. Raises: FileError, StorageError."""
    uri = normalize(uri)
    try:
        if is_local(uri):
            retry("delete", uri, lambda: os.unlink(uri))
        else:
            retry("delete", uri, lambda: _delete_once(uri))
    except NotFoundError:
        return


def _delete_once(uri: str) -> None:
    fs = filesystem(uri)
    fs.rm_file(uri, **attempt_options(fs, 0))
