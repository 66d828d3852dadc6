"""Image files: in a folder, below a prefix, or named by a glob."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.errors import ConfigError, ImageError
from samray.inputs.decode import image_extensions
from samray.inputs.no_image import nothing_found
from samray.inputs.rows import input_rows
from samray.inputs.skipped import NOT_AN_IMAGE, Skipped, skipped_names

if TYPE_CHECKING:
    from samray.config import InputConfig

IMAGE_EXTENSIONS: Final = image_extensions()
"""Names that are taken for images in folders and tars, in any case."""


def files_table(uri: str) -> pa.Table:
    """Columns uri, size, etag and problem of every file that INPUT names, sorted by URI. Raises: StorageError."""
    columns: dict[str, list[Any]] = {"uri": [], "size": [], "etag": [], "problem": []}
    for entry in storage.list_files(uri):
        columns["uri"].append(entry.uri)
        columns["size"].append(entry.size)
        columns["etag"].append(entry.etag)
        columns["problem"].append(entry.problem)
    types = {"size": pa.int64()}
    arrays = {name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()}
    return pa.table(arrays).sort_by("uri")


def relative_names(uris: Any, root: str) -> Any:
    """The paths below root, as an Arrow array."""
    return pc.utf8_slice_codeunits(uris, start=len(storage.join(root, "")))


def list_files(uri: str, root: str, files: pa.Table, *, spelled_out: bool) -> tuple[pa.Table, Skipped]:
    """The images among the files of INPUT, as a table of `INPUT_SCHEMA`, and what is left out.

    files: as `files_table` makes it. spelled_out: INPUT names them with their ending, so all of them are meant.
    Raises: ConfigError if there is none.
    """
    images, skipped = files, Skipped()
    if not spelled_out:
        extensions = "|".join(re.escape(e) for e in IMAGE_EXTENSIONS)
        keep = pc.match_substring_regex(files["uri"], f"({extensions})$", ignore_case=True)
        skipped = skipped_names(files["uri"], keep, NOT_AN_IMAGE)
        images = files.filter(keep)
    if images.num_rows == 0:
        raise ConfigError(nothing_found(uri, root, files["uri"]))
    names = relative_names(images["uri"], root)
    rows = input_rows(images["uri"], names, size=images["size"], etag=images["etag"], problem=images["problem"])
    return rows, skipped


def fetch(item: dict[str, Any], config: InputConfig) -> bytes | ImageError:
    """The bytes of an image file. Raises: StorageError, TooLargeError."""
    if not item["uri"]:
        return ImageError("missing", "the manifest's row holds no URI")
    return storage.read_whole(item["uri"], config.max_bytes, item["size"])
