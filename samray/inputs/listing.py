"""Which images an input holds, in a fixed order.

An input is a folder, prefix or glob, a tar or glob of tars, a list with a column of URIs, or Parquet with image bytes.
All become a table of one schema, `INPUT_SCHEMA`; a slice of such a table is all that fetching needs. Whatever is left
out is counted, with the reason (`samray.inputs.skipped`).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.errors import BucketNotFoundError, ConfigError, FileError, NotFoundError, RefusedError, StorageError
from samray.inputs.decode import image_extensions
from samray.inputs.fetch import fetch_images
from samray.inputs.no_image import nothing_found, refuse_unreadable_kinds
from samray.inputs.parquet import list_parquet
from samray.inputs.rows import INPUT_SCHEMA, input_rows
from samray.inputs.skipped import HIDDEN, NOT_AN_IMAGE, UNUSABLE, Skipped, count_skipped
from samray.inputs.tar import index_tar
from samray.inputs.uri_list import LIST_EXTENSIONS, read_uris
from samray.inputs.uri_rows import UriRows, is_own_uri, merge_lists, rows_of_uris, with_distinct_names

if TYPE_CHECKING:
    from samray.config import InputConfig

__all__ = ["IMAGE_EXTENSIONS", "INPUT_SCHEMA", "fetch_images", "list_images"]

IMAGE_EXTENSIONS: Final = image_extensions()
"""Names that are taken for images in folders and tars, in any case."""

_LIST_THREADS: Final = 32


def list_images(input_uri: str, config: InputConfig, skipped: Skipped | None = None) -> Iterator[pa.Table]:
    """All images of an input as a table of `INPUT_SCHEMA`, in the input's order: by name, or as a list has them.

    skipped: where to count what is left out. Of equal URIs one row is made; no two rows have the same file_name.
    Raises: ConfigError where the input holds no image or cannot be understood, StorageError.
    """
    skipped = Skipped() if skipped is None else skipped
    try:
        input_uri.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"INPUT {input_uri!a}: its name is not UTF-8; rename it, or give a link to it") from error
    if not input_uri.strip() or "\0" in input_uri:  # an unset variable of the shell would be the current folder
        raise ConfigError(f"INPUT is {input_uri!r}; give a folder, glob, tar, list of URIs or Parquet file")
    table = _list_all(storage.normalize(input_uri), config, skipped)
    yield table if config.limit is None else table.slice(0, config.limit)


def check_readable(images: pa.Table, input_uri: str) -> None:
    """Raises: ConfigError if listing says already that none of the images (`INPUT_SCHEMA`) can be read."""
    if images["problem"].null_count == 0 and images.num_rows:
        uri, problem = images["uri"][0].as_py(), images["problem"][0].as_py()
        where = storage.redact(storage.normalize(input_uri))
        raise ConfigError(
            f"INPUT {where}: none of its {images.num_rows:,} images can be read; "
            f"the first is {storage.redact(uri)}: {problem.partition(': ')[2]}"
        )


def _list_all(uri: str, config: InputConfig, skipped: Skipped) -> pa.Table:
    where = storage.redact(uri)
    if is_own_uri(uri):
        folder = storage.normalize(".")
        written = pa.chunked_array([[uri]], pa.string())
        return merge_lists([rows_of_uris(written, folder, folder, allow_outside=True)], folder, skipped)
    refuse_unreadable_kinds(uri)
    try:
        found = _files_table(uri)
    except BucketNotFoundError:  # as a storage that refuses: a run may be resumed when it is back
        raise
    except NotFoundError as error:
        raise ConfigError(
            f"INPUT {where} does not exist; give a folder, glob, tar, list of URIs or Parquet file"
        ) from error
    root = _root(uri)
    is_file = found.num_rows == 1 and found["uri"][0].as_py() == uri
    if is_file and (problem := found["problem"][0].as_py()):
        raise ConfigError(f"INPUT {where} cannot be read: {problem.partition(': ')[2]}")
    if not is_file:
        keep = pc.invert(pc.match_substring_regex(_relative(found["uri"], root), r"(^|/)(\.|_samray/)"))
        count_skipped(found["uri"], keep, HIDDEN, skipped)
        found = found.filter(keep)
    # A pattern that spells an extension out means what it says; everything else is narrowed to images.
    is_glob = storage.has_glob(uri) and root == storage.glob_base(uri)
    spelled_out = is_file or (is_glob and re.search(r"\.[^./*?\[\]]+$", uri) is not None)
    kind = _kind(found, spelled_out)
    if kind is None:
        return _list_files(uri, root, found, spelled_out, skipped)
    files = _Containers(uri, root, config, kind)
    return files.list_all(found, skipped)


# --- folders, prefixes, globs --------------------------------------------------------------------------------------


def _files_table(uri: str) -> pa.Table:
    """Columns uri, size, etag and problem of every file that the input names, sorted by URI."""
    columns: dict[str, list[Any]] = {"uri": [], "size": [], "etag": [], "problem": []}
    for entry in storage.list_files(uri):
        columns["uri"].append(entry.uri)
        columns["size"].append(entry.size)
        columns["etag"].append(entry.etag)
        columns["problem"].append(entry.problem)
    types = {"size": pa.int64()}
    arrays = {name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()}
    return pa.table(arrays).sort_by("uri")


def _kind(found: pa.Table, spelled_out: bool) -> str | None:
    """tar, parquet or list if every file is one: then what they hold is meant. None for images."""
    patterns = {"tar": r"\.tar$", "parquet": r"\.parquet$"}
    if spelled_out:  # a folder of .txt files holds captions, not lists
        patterns["list"] = "(" + "|".join(re.escape(e) for e in LIST_EXTENSIONS) + ")$"
    for kind, pattern in patterns.items():
        if pc.all(pc.match_substring_regex(found["uri"], pattern, ignore_case=True)).as_py():
            return kind
    return None


def _root(uri: str) -> str:
    """What file names are relative to: the folder itself, or the folder above the first wild segment or the file."""
    if storage.has_glob(uri) and not storage.exists(uri):
        return storage.glob_base(uri)
    return uri if storage.is_dir_like(uri) else storage.parent(uri)


def _relative(uris: Any, root: str) -> Any:
    return pc.utf8_slice_codeunits(uris, start=len(storage.join(root, "")))


def _list_files(uri: str, root: str, found: pa.Table, spelled_out: bool, skipped: Skipped) -> pa.Table:
    images = found
    if not spelled_out:
        extensions = "|".join(re.escape(e) for e in IMAGE_EXTENSIONS)
        keep = pc.match_substring_regex(found["uri"], f"({extensions})$", ignore_case=True)
        count_skipped(found["uri"], keep, NOT_AN_IMAGE, skipped)
        images = found.filter(keep)
    if images.num_rows == 0:
        raise ConfigError(nothing_found(uri, root, found["uri"]))
    names = _relative(images["uri"], root)
    return input_rows(images["uri"], names, size=images["size"], etag=images["etag"], problem=images["problem"])


# --- tars, Parquet files, lists ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """What one of the files holds."""

    rows: pa.Table | UriRows | None = None
    skipped: Skipped = field(default_factory=Skipped)
    error: str | None = None
    """Why the file, or what follows the rows, cannot be read."""
    refused: StorageError | None = None
    """The error, if it may be the storage's and not the file's."""


@dataclass(frozen=True, slots=True)
class _Containers:
    """An input of files that hold images or name them."""

    uri: str
    root: str
    config: InputConfig
    kind: str

    def list_all(self, found: pa.Table, skipped: Skipped) -> pa.Table:
        """The rows of all of them. Of several files those that cannot be read are counted, with the reason.

        Raises: ConfigError if the only one, or every one, cannot be read, or none holds anything. StorageError.
        """
        parts: list[_Part] = []
        num_rows = 0
        for part in _in_order(self._list_one, found.to_pylist()):
            parts.append(part)
            skipped.update(part.skipped)
            if part.error is not None:
                skipped.add(UNUSABLE, part.error)
            num_rows += 0 if part.rows is None else _table(part.rows).num_rows
            if self.config.limit is not None and num_rows >= self.config.limit:
                break
        self._check(parts, found.num_rows, num_rows)
        tables = [part.rows for part in parts if isinstance(part.rows, pa.Table)]
        lists = [part.rows for part in parts if isinstance(part.rows, UriRows)]
        if lists:
            tables.append(merge_lists(lists, self.root, skipped))
        rows = pa.concat_tables(tables)
        return rows if found.num_rows == 1 and self.kind == "parquet" else with_distinct_names(rows)

    def _check(self, parts: list[_Part], num_files: int, num_rows: int) -> None:
        where = storage.redact(self.uri)
        errors = [part.error for part in parts if part.error is not None]
        refused = next((part.refused for part in parts if part.refused is not None), None)
        if refused is not None and all(part.rows is None for part in parts):
            raise refused
        if num_files == 1 and errors:
            raise ConfigError(f"INPUT {errors[0]}" if errors[0].startswith(where) else f"INPUT {where}: {errors[0]}")
        if errors and all(part.rows is None for part in parts):
            raise ConfigError(f"INPUT {where}: none of its {num_files} {self.kind} files can be read; {errors[0]}")
        if num_rows == 0:
            nothing = {"tar": "no image in the tar", "parquet": "no row in the Parquet file"}
            problem = nothing.get(self.kind, "no URI in the list")
            raise ConfigError(f"INPUT {where}: {problem}; there is nothing to label")

    def _list_one(self, file: dict[str, Any]) -> _Part:
        uri, etag = file["uri"], file["etag"]
        if file["problem"]:
            return _Part(error=f"{storage.redact(uri)}: {file['problem'].partition(': ')[2]}")
        try:
            if self.kind == "tar":
                return self._list_tar(uri, etag)
            if self.kind == "parquet":
                return _Part(list_parquet(uri, self._name_of(uri), self.root, self.config, etag))
            written = read_uris(uri, self.config.uri_column)
            allow = self.config.allow_outside
            return _Part(rows_of_uris(written, storage.parent(uri), self.root, allow_outside=allow))
        except (BucketNotFoundError, RefusedError) as error:
            return _Part(error=str(error), refused=error)
        except (ConfigError, FileError) as error:
            return _Part(error=str(error))

    def _name_of(self, container: str) -> str:
        """Its name relative to the input's root, without its extension; "" where it is the whole input."""
        return "" if container == self.uri else container[len(storage.join(self.root, "")) :].rpartition(".")[0]

    def _list_tar(self, archive: str, etag: str | None) -> _Part:
        index = index_tar(archive, IMAGE_EXTENSIONS)
        members, prefix = index.members, self._name_of(archive)
        if index.damage is not None and not members:
            return _Part(None, index.skipped, index.damage)
        rows = input_rows(
            pa.array([f"tar://{member.name}::{archive}" for member in members], pa.string()),
            # Names that lead out of the archive would lead out of an export's folder, too.
            pa.array(
                [posixpath.join(prefix, posixpath.normpath(f"//{m.name}").lstrip("/")) for m in members], pa.string()
            ),
            size=pa.array([member.size for member in members], pa.int64()),
            etag=etag,
            container=archive,
            offset=pa.array([member.offset for member in members], pa.int64()),
            extents=_text_or_none([member.extents for member in members]),
            problem=_text_or_none([member.problem for member in members]),
        )
        return _Part(rows, index.skipped, index.damage)


def _table(rows: pa.Table | UriRows) -> pa.Table:
    return rows.rows if isinstance(rows, UriRows) else rows


def _text_or_none(values: list[str | None]) -> pa.Array | None:
    return pa.array(values, pa.string()) if any(value is not None for value in values) else None


def _in_order(call: Callable[[dict[str, Any]], _Part], files: list[dict[str, Any]]) -> Iterator[_Part]:
    """`call` of each file, many at once: an archive's index is many small reads, each waiting for the network."""
    pool = ThreadPoolExecutor(min(_LIST_THREADS, len(files)))
    try:
        yield from pool.map(call, files)
    finally:
        pool.shutdown(cancel_futures=True)
