"""Image files: in a folder, below a prefix, or named by a glob."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.errors import ImageError
from samray.inputs.base import Container, FetchFile, Part, Reader
from samray.inputs.decode import image_extensions
from samray.inputs.rows import input_rows
from samray.inputs.skipped import NOT_AN_IMAGE, Skipped, skipped_names

if TYPE_CHECKING:
    from samray.config import InputConfig

IMAGE_EXTENSIONS: Final = image_extensions()
"""Names that are taken for images in folders and tars, in any case."""


def files_table(uri: str) -> pa.Table:
    """Columns uri, size, etag and problem of every file that INPUT names, sorted by URI. Raises: StorageError."""
    # Columns instead of one object per file: a folder may have millions.
    columns: dict[str, list[Any]] = {"uri": [], "size": [], "etag": [], "problem": []}
    for entry in storage.list_files(uri):
        columns["uri"].append(entry.uri)
        columns["size"].append(entry.size)
        columns["etag"].append(entry.etag)
        columns["problem"].append(entry.problem)
    types = {"size": pa.int64()}
    arrays = {name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()}
    # Storages list in different orders; ids and shards follow from this one.
    return pa.table(arrays).sort_by("uri")


def relative_names(uris: Any, root: str) -> Any:
    """The paths below root, as an Arrow array."""
    return pc.utf8_slice_codeunits(uris, start=len(storage.join(root, "")))


def list_files(container: Container, config: InputConfig) -> Part:
    """The images among the files of a folder or glob: those with an image's ending, unless INPUT spells the ending."""
    assert container.files is not None
    images, skipped = container.files, Skipped()
    if not container.files_are_meant:
        # One pattern for all endings, matched by Arrow on the whole column.
        extensions = "|".join(re.escape(extension) for extension in IMAGE_EXTENSIONS)
        keep = pc.match_substring_regex(images["uri"], f"({extensions})$", ignore_case=True)
        skipped = skipped_names(images["uri"], keep, NOT_AN_IMAGE)
        images = images.filter(keep)
    names = relative_names(images["uri"], container.root)
    rows = input_rows(images["uri"], names, size=images["size"], etag=images["etag"], problem=images["problem"])
    return Part(rows, skipped)


def fetch_files(
    uri: str, items: Sequence[dict[str, Any]], config: InputConfig, fetch_file: FetchFile
) -> list[bytes | ImageError]:
    """The bytes of image files. Raises: StorageError, TooLargeError."""
    return [_fetch(item, config) for item in items]


def _fetch(item: dict[str, Any], config: InputConfig) -> bytes | ImageError:
    # A row of a list without a URI.
    if not item["uri"]:
        return ImageError("missing", "the manifest's row holds no URI")
    return storage.read_whole(item["uri"], config.max_bytes, item["size"])


READER: Final = Reader(
    name="image",
    nouns=("folder", "glob"),
    nothing="no image found",
    endings=(),
    list=list_files,
    fetch=fetch_files,
    list_at_once=True,
)
