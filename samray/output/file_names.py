"""Names of files that are written per image: always inside their folder, and unique."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from samray.output.plan import Plan
from samray.storage import TEMPORARY_PREFIX

FOLDER: Final = "_export"
"""Folder in DEST for the export's own files."""

_MAX_PART_BYTES: Final = 200
"""Maximum bytes of a file or folder name. Filesystems allow 255; an image id and an extension may follow."""

_MAX_STEM_BYTES: Final = 700
"""Longest path below DEST: object stores allow keys of 1024 bytes, including DEST; filesystems 4096."""

ENDINGS: Final = (".json", ".png", ".txt", ".jpg")
"""Endings that exports add to a stem; with copies of the images also their extensions."""


def stem_of(file_name: str) -> str:
    """`a/b` for `a/b.jpg`: the path without its extension, and without any part that would lead out of DEST."""
    parts = [part for part in file_name.replace("\0", "_").split("/") if part not in ("", ".", "..")]
    if parts and parts[0].lower() == FOLDER:  # some filesystems ignore case
        parts[0] = "images"
    # `remove_leftovers` would take such a file for an unfinished one, and delete it.
    parts = ["_" + part[1:] if part.startswith(TEMPORARY_PREFIX) else part for part in parts]
    stem = posixpath.splitext("/".join(parts))[0] or "image"
    # Too long for a key: a hash replaces the folders, and the last part stays readable.
    if len(data := stem.encode()) > _MAX_STEM_BYTES and "/" in stem:
        stem = f"long-names/{hashlib.sha256(data).hexdigest()[:16]}-{stem.rpartition('/')[2]}"
    return "/".join(map(_short, stem.split("/")))


def _short(part: str) -> str:
    """Cut a name that could exceed the limit with an extension, and keep it unique."""
    data = part.encode()
    if len(data) <= _MAX_PART_BYTES:
        return part
    # The cut may fall inside a character, hence errors="ignore".
    return f"{data[:_MAX_PART_BYTES].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:12]}"


def extension_of(file_name: str) -> str:
    """`.jpg` for `a/b.jpg`; empty if there is none."""
    return posixpath.splitext(file_name)[1]


def shared_stems(
    plan: Plan, stem_of: Callable[[str], str] = stem_of, endings: tuple[str, ...] = ENDINGS
) -> dict[int, str]:
    """image_id -> stem with the id appended, for each image that would share its stem with another; mostly empty.

    Names that differ only in case count as equal, because some filesystems ignore case. Also covers images whose file
    would have the name of a folder: the first of `a.jpg` and `a.json/b.jpg`.
    """
    images = plan.read_images(["image_id", "file_name"])
    # Hashes instead of names: 8 bytes per image. A false match only renames an image without need.
    names = (stem_of(name).lower() for chunk in images["file_name"].chunks for name in chunk.to_pylist())
    hashes = np.fromiter(map(hash, names), dtype=np.int64, count=images.num_rows)
    values, counts = np.unique(hashes, return_counts=True)
    renamed = np.isin(hashes, values[counts > 1])
    folders = _dotted_folders(images["file_name"], stem_of)
    if folders:
        # A second pass over all names, only if there are such folders.
        names = (name for chunk in images["file_name"].chunks for name in chunk.to_pylist())
        renamed |= np.fromiter((_is_in_the_way(stem_of(n), n, folders, endings) for n in names), bool, images.num_rows)
    if not renamed.any():
        return {}
    taken = set(values.tolist())
    stems: dict[int, str] = {}
    for index in np.flatnonzero(renamed).tolist():
        image_id, name = images["image_id"][index].as_py(), images["file_name"][index].as_py()
        stem = f"{stem_of(name)}-{image_id}"
        # Another image may have this very name.
        while hash(stem.lower()) in taken or _is_in_the_way(stem, name, folders, endings):
            stem += "_"
        taken.add(hash(stem.lower()))
        stems[image_id] = stem
    return stems


def _dotted_folders(names: pa.ChunkedArray, stem_of: Callable[[str], str]) -> set[str]:
    """Folders of stems, in lower case, that could also be a file name: those with a dot in their name; mostly none."""
    dotted = names.filter(pc.match_substring_regex(names, r"\.[^/]*/"))
    folders: set[str] = set()
    for chunk in dotted.chunks:
        for name in chunk.to_pylist():
            folder = posixpath.dirname(stem_of(name).lower())
            while folder and folder not in folders:
                folders.add(folder)
                folder = posixpath.dirname(folder)
    return {folder for folder in folders if "." in posixpath.basename(folder)}


def _is_in_the_way(stem: str, file_name: str, folders: set[str], endings: tuple[str, ...]) -> bool:
    """Whether a file with this stem would have the name of a folder."""
    return any((stem + ending).lower() in folders for ending in (*endings, extension_of(file_name)))
