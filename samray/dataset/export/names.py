"""Names of the files that an export writes for an image: below DEST, and never the same for two images."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable
from typing import Final

import numpy as np

from samray.dataset.manifest import Plan

FOLDER: Final = "_export"
"""Below DEST: what the export remembers of itself."""

_MAX_PART_BYTES: Final = 200
"""Of a file's or folder's name; filesystems take 255, and an image id and an ending may follow."""


def stem_of(file_name: str) -> str:
    """`a/b` of `a/b.jpg`: the path without its last ending, and without any part that would lead out of DEST."""
    parts = [part for part in file_name.split("/") if part not in ("", ".", "..")]
    if parts and parts[0] == FOLDER:
        parts[0] = "images"
    stem = posixpath.splitext("/".join(parts))[0] or "image"
    return "/".join(map(_short, stem.split("/")))


def _short(part: str) -> str:
    """Cut where with an ending it might be longer than filesystems take, and then never like another one."""
    data = part.encode()
    if len(data) <= _MAX_PART_BYTES:
        return part
    return f"{data[:_MAX_PART_BYTES].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:12]}"


def extension_of(file_name: str) -> str:
    """`.jpg` of `a/b.jpg`; empty where there is none."""
    return posixpath.splitext(file_name)[1]


def shared_stems(plan: Plan, stem_of: Callable[[str], str] = stem_of) -> dict[int, str]:
    """image_id -> stem with the id appended, for each image that would share its stem with another; mostly empty.

    Names that differ only in case count as the same, as some filesystems have it.
    """
    images = plan.read_images(["image_id", "file_name"])
    names = (stem_of(name).lower() for chunk in images["file_name"].chunks for name in chunk.to_pylist())
    hashes = np.fromiter(map(hash, names), dtype=np.int64, count=images.num_rows)
    values, counts = np.unique(hashes, return_counts=True)
    shared = set(values[counts > 1].tolist())
    if not shared:
        return {}
    taken = set(values.tolist())
    stems: dict[int, str] = {}
    for place in np.flatnonzero(np.isin(hashes, list(shared))).tolist():
        image_id = images["image_id"][place].as_py()
        stem = f"{stem_of(images['file_name'][place].as_py())}-{image_id}"
        while hash(stem.lower()) in taken:
            stem += "_"
        taken.add(hash(stem.lower()))
        stems[image_id] = stem
    return stems
