"""Which images an input holds, in a fixed order.

An input is a folder, prefix or glob, a tar or glob of tars, a list with a column of URIs, or Parquet with image bytes.
All become a table of one schema, `INPUT_SCHEMA`; a slice of such a table is all that fetching needs. Whatever is left
out is counted, with the reason (`samray.inputs.skipped`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.errors import BucketNotFoundError, ConfigError, FileError, ImageError, NotFoundError, RefusedError
from samray.inputs.base import Container, Part, Reader, relative_to
from samray.inputs.fetch import fetch_images
from samray.inputs.folder import IMAGE_EXTENSIONS, files_table, relative_names
from samray.inputs.no_image import no_image_message, refuse_unreadable_kinds
from samray.inputs.readers import reader_of_all, what_to_give
from samray.inputs.rows import INPUT_SCHEMA
from samray.inputs.skipped import HIDDEN, UNUSABLE, Skipped, skipped_names
from samray.inputs.uri_rows import UriRows, is_samray_uri, merge_lists, rows_of_uris, with_distinct_names

if TYPE_CHECKING:
    from samray.config import InputConfig

__all__ = ["IMAGE_EXTENSIONS", "INPUT_SCHEMA", "fetch_images", "list_images"]

_LIST_THREADS: Final = 32


class Listing(NamedTuple):
    """The result of listing an input."""

    images: pa.Table
    """`INPUT_SCHEMA`, in the input's order: by name, or as a list has them."""
    skipped: Skipped
    """Files that were left out."""


def list_images(input_uri: str, config: InputConfig) -> Listing:
    """All images of an input. Equal URIs give one row; no two rows have the same file_name.

    Raises: ConfigError if the input has no image or cannot be understood, StorageError.
    """
    try:
        input_uri.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"INPUT {input_uri!a}: its name is not UTF-8; rename it, or give a link to it") from error
    if not input_uri.strip() or "\0" in input_uri:  # an unset variable of the shell would be the current folder
        raise ConfigError(f"INPUT is {input_uri!r}; {what_to_give()}")
    listing = _list_all(storage.normalize(input_uri), config)
    return listing if config.limit is None else listing._replace(images=listing.images.slice(0, config.limit))


def check_readable(images: pa.Table, input_uri: str) -> None:
    """Raises: ConfigError if listing says already that none of the images (`INPUT_SCHEMA`) can be read."""
    if images["problem"].null_count == 0 and images.num_rows:
        uri, problem = images["uri"][0].as_py(), images["problem"][0].as_py()
        where = storage.redact(storage.normalize(input_uri))
        raise ConfigError(
            f"INPUT {where}: none of its {images.num_rows:,} images can be read; "
            f"the first is {storage.redact(uri)}: {ImageError.parse(problem).message}"
        )


def _list_all(uri: str, config: InputConfig) -> Listing:
    where = storage.redact(uri)
    # INPUT names one image as samray writes it (tar://member::archive): a list with one row.
    if is_samray_uri(uri):
        folder = storage.normalize(".")
        written = pa.chunked_array([[uri]], pa.string())
        return Listing(*merge_lists([rows_of_uris(written, folder, folder, allow_outside=True)], folder))
    # By its name, before listing what may be a large bucket.
    refuse_unreadable_kinds(uri)
    try:
        files = files_table(uri)
    except BucketNotFoundError:  # as a storage that refuses: a run may be resumed when it is back
        raise
    except NotFoundError as error:
        raise ConfigError(f"INPUT {where} does not exist; {what_to_give()}") from error
    root = _root(uri)
    is_file = files.num_rows == 1 and files["uri"][0].as_py() == uri
    if is_file and (problem := files["problem"][0].as_py()):
        raise ConfigError(f"INPUT {where} cannot be read: {ImageError.parse(problem).message}")
    skipped = Skipped()
    if not is_file:
        # Hidden files, and the _samray folder of an OUTPUT that is part of INPUT, are counted but not labelled.
        keep = pc.invert(pc.match_substring_regex(relative_names(files["uri"], root), r"(^|/)(\.|_samray/)"))
        skipped = skipped_names(files["uri"], keep, HIDDEN)
        files = files.filter(keep)
    # A pattern that spells an extension out means what it says; everything else is narrowed to images.
    is_glob = storage.has_glob(uri) and root == storage.glob_base(uri)
    files_are_meant = is_file or (is_glob and re.search(r"\.[^./*?\[\]]+$", uri) is not None)
    reader = reader_of_all(files, files_are_meant=files_are_meant)
    if reader.list_at_once:
        listing = _list_at_once(reader, Container(uri, None, root, "", files, files_are_meant), config)
    else:
        listing = _Containers(uri, root, config, reader).list_all(files)
    skipped.update(listing.skipped)
    return listing._replace(skipped=skipped)


def _list_at_once(reader: Reader, container: Container, config: InputConfig) -> Listing:
    """The images of a folder or glob. Raises: ConfigError if there is none."""
    part = reader.list(container, config)
    assert isinstance(part.rows, pa.Table)
    assert container.files is not None
    if part.rows.num_rows == 0:
        raise ConfigError(no_image_message(container.uri, container.root, container.files["uri"]))
    return Listing(part.rows, part.skipped)


def _root(uri: str) -> str:
    """The folder that file names are relative to: INPUT itself, or the folder above the pattern or file."""
    if storage.has_glob(uri) and not storage.exists(uri):
        return storage.glob_base(uri)
    return uri if storage.is_dir_like(uri) else storage.parent(uri)


# --- files that hold images or name them ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Containers:
    """An input of files that hold images or name them."""

    uri: str
    root: str
    config: InputConfig
    reader: Reader

    def list_all(self, files: pa.Table) -> Listing:
        """The rows of all of them. Files that cannot be read are counted, with the reason, if there are several.

        Raises: ConfigError if the only one, or every one, cannot be read, or none holds anything. StorageError.
        """
        parts: list[Part] = []
        skipped = Skipped()
        num_rows = 0
        # In order, so that a limit stops early and gives the same images each time.
        for part in _in_order(self._list_one, files.to_pylist()):
            parts.append(part)
            skipped.update(part.skipped)
            if part.error is not None:
                skipped.add(UNUSABLE, part.error)
            num_rows += 0 if part.rows is None else _table(part.rows).num_rows
            if self.config.limit is not None and num_rows >= self.config.limit:
                break
        self._check(parts, files.num_rows, num_rows)
        tables = [part.rows for part in parts if isinstance(part.rows, pa.Table)]
        lists = [part.rows for part in parts if isinstance(part.rows, UriRows)]
        # Lists are merged together, because the same URI may be in several of them.
        if lists:
            merged, repeated = merge_lists(lists, self.root)
            tables.append(merged)
            skipped.update(repeated)
        rows = pa.concat_tables(tables)
        # Only one archive with distinct names needs no second look at all names.
        if files.num_rows > 1 or not self.reader.distinct_names:
            rows = with_distinct_names(rows)
        return Listing(rows, skipped)

    def _check(self, parts: list[Part], num_files: int, num_rows: int) -> None:
        where = storage.redact(self.uri)
        errors = [part.error for part in parts if part.error is not None]
        refused = next((part.refused for part in parts if part.refused is not None), None)
        # If no file could be read and one was refused, the storage may be at fault, and a retry may help.
        if refused is not None and all(part.rows is None for part in parts):
            raise refused
        if num_files == 1 and errors:
            raise ConfigError(f"INPUT {errors[0]}" if errors[0].startswith(where) else f"INPUT {where}: {errors[0]}")
        if errors and all(part.rows is None for part in parts):
            raise ConfigError(
                f"INPUT {where}: none of its {num_files} {self.reader.name} files can be read; {errors[0]}"
            )
        if num_rows == 0:
            raise ConfigError(f"INPUT {where}: {self.reader.nothing}; there is nothing to label")

    def _list_one(self, file: dict[str, Any]) -> Part:
        uri = file["uri"]
        if file["problem"]:
            return Part(error=f"{storage.redact(uri)}: {ImageError.parse(file['problem']).message}")
        prefix = "" if uri == self.uri else relative_to(uri, self.root).rpartition(".")[0]
        try:
            return self.reader.list(Container(uri, file["etag"], self.root, prefix), self.config)
        except (BucketNotFoundError, RefusedError) as error:
            return Part(error=str(error), refused=error)
        except (ConfigError, FileError) as error:
            return Part(error=str(error))


def _table(rows: pa.Table | UriRows) -> pa.Table:
    return rows.rows if isinstance(rows, UriRows) else rows


def _in_order(call: Callable[[dict[str, Any]], Part], files: list[dict[str, Any]]) -> Iterator[Part]:
    """`call` of each file, many at once: an archive's index is many small reads, each waiting for the network."""
    pool = ThreadPoolExecutor(min(_LIST_THREADS, len(files)))
    try:
        yield from pool.map(call, files)
    finally:
        # Cancel what has not begun: with a limit most archives are never opened.
        pool.shutdown(cancel_futures=True)
