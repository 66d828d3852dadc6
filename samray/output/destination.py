"""Check, before anything is written or started, that a run can write its output."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from samray import storage
from samray.errors import ConfigError

MIN_FREE_BYTES: Final = 64 * 2**20
"""Minimum free disk space to start a run: a few shards, and Ray's temporary data."""

_SAME_STORE: Final = {"s3a": "s3", "gcs": "gs"}


def check_apart(input_uri: str, output_uri: str) -> None:
    """Raises: ConfigError if INPUT is inside OUTPUT, or OUTPUT inside INPUT: a listing of one would include the other.

    A glob without `**` ends at its own folders; OUTPUT may be below those.
    """
    source = storage.normalize(input_uri)
    # A local folder may have * or [ in its name.
    is_glob = storage.has_glob(source) and not (storage.is_local(source) and os.path.exists(source))
    root, output = _canonical(storage.glob_base(source) if is_glob else source), _canonical(output_uri)
    where = f"(INPUT {storage.redact(input_uri)}, OUTPUT {storage.redact(output_uri)})"
    if root == output:
        raise ConfigError(f"INPUT and OUTPUT are the same folder {where}: choose a separate OUTPUT")
    if _is_inside(root, output):
        raise ConfigError(f"INPUT is inside OUTPUT {where}: choose a separate OUTPUT, next to INPUT")
    if _is_inside(output, root) and (not is_glob or "**" in source):
        raise ConfigError(
            f"OUTPUT is inside INPUT {where}: the next listing would include it; choose a folder next to INPUT"
        )


def _canonical(uri: str) -> str:
    uri = storage.normalize(uri)
    if storage.is_local(uri):
        # Through links: two names of one folder are the same place.
        return os.path.realpath(uri)
    scheme, rest = uri.split("://", 1)
    return f"{_SAME_STORE.get(scheme, scheme)}://{rest}"


def _is_inside(uri: str, folder: str) -> bool:
    # With the slash: /data2 is not inside /data.
    return uri.startswith(folder.rstrip("/") + "/")


def check_writable(output_uri: str, *folders: str) -> None:
    """Raises: ConfigError if a local OUTPUT is a file, is not writable, or has no space left.

    folders: subfolders of OUTPUT that will be written. Remote storage reports such errors on the first write.
    """
    output = storage.normalize(output_uri)
    if not storage.is_local(output):
        return
    for folder in (output, *(os.path.join(output, name) for name in folders)):
        existing = check_is_folder(folder)
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError(
                f"OUTPUT {output} cannot be written: this user may not write to {existing} (permissions, or a read-only"
                " disk); choose another folder, or change the permissions"
            )
        check_space(existing, f"OUTPUT {output}")


def check_is_folder(output_uri: str) -> Path:
    """The nearest existing folder of a local OUTPUT. Raises: ConfigError if OUTPUT is a file or below one."""
    output = storage.normalize(output_uri)
    existing = Path(output)
    while storage.is_local(output) and not os.path.lexists(existing):
        existing = existing.parent
    if storage.is_local(output) and not existing.is_dir():
        raise ConfigError(f"OUTPUT {output} cannot be written: {existing} is a file; choose a folder")
    return existing


def check_space(folder: Path, what: str) -> None:
    """Raises: ConfigError if the disk of a folder is full, in bytes or in number of files."""
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise ConfigError(
            f"{what}: the disk of {folder} has {free / 2**20:.0f} MiB left, and a run needs at least"
            f" {MIN_FREE_BYTES // 2**20} MiB; free some space, or choose a folder on another disk"
        )
    # No inodes left, although bytes are free; filesystems without a limit report 0 files.
    if hasattr(os, "statvfs") and (disk := os.statvfs(folder)).f_files and not disk.f_favail:
        raise ConfigError(f"{what}: the disk of {folder} has no room for another file (no free inodes)")
