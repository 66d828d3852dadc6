"""Locations of the images of an import: below one folder, whatever the annotations say.

Annotations may be untrusted. A name such as `/etc/passwd`, `../secret.png`, `file:///...`, a server in the local
network, or a symbolic link out of the folder would show a private image in a report, or copy it into an export. Such an
image becomes a failed row unless `--allow-outside` marks the annotations as trusted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final
from urllib.parse import unquote

import pyarrow as pa

from samray import storage
from samray.errors import FileError, ImageError, StorageError

_LOOKED_FOR: Final = 32
_TRIED_NAMES: Final = 8


def printable(name: str) -> str:
    """The name with lone surrogates (Python's form of file names that are not UTF-8) escaped."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def outside_problem(uri: str, root: str) -> ImageError | None:
    """Why the image must not be read; None if it is below the root, also after following symbolic links.

    uri: from `storage.resolve` of the root and a name.
    """
    if not uri.startswith(storage.join(storage.normalize(root), "")):
        return _refusal(root)
    # Unescaped twice: %252e%252e becomes %2e%2e, and then two dots.
    if not storage.is_local(root):
        # Servers unescape and resolve dots only after this check.
        return _refusal(root) if ".." in re.split(r"[/\\]", unquote(unquote(uri))) else None
    # On a disk, a link may lead out of the folder.
    with suppress(ValueError, OSError):  # for an impossible file name, such as one with a NUL
        if not storage.join(os.path.realpath(uri)).startswith(storage.join(os.path.realpath(root), "")):
            return _refusal(root)
    return None


def _refusal(root: str) -> ImageError:
    return ImageError(
        "not_allowed",
        f"its annotations name a file outside {storage.redact(root)}; if you trust them, add --allow-outside",
    )


def names_of(images: list[dict[str, Any]], roots: list[str]) -> Iterator[str | None]:
    """The name of each COCO image, relative to its root; None for an image without one.

    Windows writes backslashes, which other systems allow in names, and LVIS has a `coco_url` instead of a name. If a
    name is ambiguous, the first few are looked up, and the result is used for all.
    """
    spelled = [_spellings(image) for image in images]
    ambiguous = [(root, names) for root, names in zip(roots, spelled, strict=True) if len(names) > 1][:_TRIED_NAMES]
    best = 0
    if ambiguous:
        num_existing = [
            sum(_is_there(storage.resolve(root, names[way]), root) for root, names in ambiguous) for way in (0, 1)
        ]
        best = int(num_existing[1] > num_existing[0])
    for names in spelled:
        yield names[min(best, len(names) - 1)] if names else None


def _spellings(image: dict[str, Any]) -> list[str]:
    """Possible names of the image, the most likely first."""
    name = image.get("file_name")
    if isinstance(name, str) and name:
        # Check the original name: escapes add backslashes.
        return [printable(name.replace("\\", "/")), printable(name)] if "\\" in name else [printable(name)]
    url = image.get("coco_url")
    parts = [part for part in re.split(r"[?#]", url)[0].split("/")[3:] if part] if isinstance(url, str) else []
    return [printable("/".join(parts[-number:])) for number in (2, 1)] if parts else []


def _is_there(uri: str, root: str) -> bool:
    try:
        return outside_problem(uri, root) is None and storage.exists(uri)
    except (StorageError, ValueError):
        return False


def missing_images(planned: pa.Table, base: str, allow_outside: bool) -> tuple[int, str]:
    """The number of images looked for if none was found, and one of their URIs; (0, "") if one may exist.

    planned: rows of the manifest; looks for a spread-out sample. base: images outside of it are not requested from
    servers, unless allow_outside.
    """
    step = max(1, -(-planned.num_rows // _LOOKED_FOR))
    row_numbers = pa.array(range(0, planned.num_rows, step), pa.int64())
    rows = planned.select(["uri", "container"]).take(row_numbers).to_pylist()
    # Members of an imported tar were just listed.
    if any(row["container"] is not None for row in rows):
        return 0, ""
    below = storage.join(base, "")
    uris = [row["uri"] for row in rows if row["uri"] and (allow_outside or row["uri"].startswith(below))]
    with ThreadPoolExecutor(_LOOKED_FOR) as pool:
        if not uris or any(pool.map(_may_be_there, uris)):
            return 0, ""
    return len(uris), uris[0]


def _may_be_there(uri: str) -> bool:
    try:
        return storage.exists(uri)
    except FileError:
        return False
    except StorageError:  # no answer from storage: it may exist
        return True
