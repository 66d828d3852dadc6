"""Files of large images on this machine's disk, fetched once for all processes that read them.

A folder per file, with the file and two locks. A process that reads the file holds one of them, shared, which the
kernel releases when the process ends, however it ends; the other is held to fetch the file. A file that no process
reads is removed as soon as another one is needed, and at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from samray.errors import StorageError

_PREFIX: Final = "samray-large-"
_LOCK: Final = "in-use"
_REMOVED: Final = ".removed"


def folder() -> Path:
    """Where the files of this user are."""
    path = Path(tempfile.gettempdir()) / f"{_PREFIX}{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to another user")
    return path


@contextmanager
def local_copy(key: str, fetch: Callable[[Path], None]) -> Iterator[Path]:
    """The file of this key, kept as long as the block lasts; the first process calls fetch(path) to write it.

    key: of exactly these bytes, in this run. Raises: what fetch raises; StorageError if the disk takes no copy.
    """
    try:
        with contextlib.ExitStack() as stack:
            try:
                remove_unused()
                copy_folder = folder() / hashlib.sha256(key.encode()).hexdigest()[:24]
                stack.enter_context(_in_use(copy_folder))
                file = copy_folder / "image"
                # Others wait here until it is there.
                with _opened(copy_folder / "fetch") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if not file.exists():
                        part = copy_folder / "part"
                        fetch(part)
                        os.replace(part, file)
            except OSError as error:  # of this machine, not of the image
                raise StorageError(
                    f"a large image cannot be copied to {tempfile.gettempdir()}: {error.strerror or error}; "
                    "make room there, or set TMPDIR to another folder"
                ) from error
            yield file
    finally:
        with contextlib.suppress(OSError):
            remove_unused()


@contextmanager
def _in_use(copy_folder: Path) -> Iterator[None]:
    """Keep a folder from being removed; creates it."""
    with contextlib.ExitStack() as stack:
        while True:
            copy_folder.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # removed in between
                lock = stack.enter_context(_opened(copy_folder / _LOCK))
                fcntl.flock(lock, fcntl.LOCK_SH)
                if os.stat(copy_folder / _LOCK).st_ino == os.fstat(lock).st_ino:
                    break
        yield


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        yield lock
    finally:
        os.close(lock)


def remove_unused() -> None:
    """Remove the files that no process reads, also those of runs that were killed."""
    for copy_folder in folder().iterdir():
        if copy_folder.name.endswith(_REMOVED):  # by a process that was killed, or is still at it
            shutil.rmtree(copy_folder, ignore_errors=True)
            continue
        with contextlib.suppress(OSError), _opened(copy_folder / _LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Not a folder that somebody made here after another process removed the one of this lock.
            if os.stat(copy_folder / _LOCK).st_ino == os.fstat(lock).st_ino:
                # In one step: a process that comes now makes a new folder, and never sees half of this one.
                removed = copy_folder.with_name(f"{copy_folder.name}-{uuid.uuid4().hex[:8]}{_REMOVED}")
                os.rename(copy_folder, removed)
                shutil.rmtree(removed, ignore_errors=True)
