"""Which images an input holds, in a fixed order, and the bytes of any of them.

An input is a folder, prefix or glob, a tar or glob of tars, a manifest with a column of URIs, or Parquet with image
bytes. All become tables of one schema, `INPUT_SCHEMA`; a slice of such a table is all that fetching needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.dataset.fetching import fetch_images
from samray.dataset.parquet_images import list_parquet
from samray.dataset.rows import INPUT_SCHEMA, input_rows
from samray.dataset.tars import is_compressed_tar, is_tar, list_tar
from samray.dataset.uri_lists import read_uris, rows_of_uris
from samray.errors import BucketNotFoundError, ConfigError, NotFoundError

if TYPE_CHECKING:
    from samray.config import InputConfig

__all__ = ["IMAGE_EXTENSIONS", "INPUT_SCHEMA", "MANIFEST_EXTENSIONS", "fetch_images", "list_images"]

IMAGE_EXTENSIONS: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Names that are taken for images in folders and tars, in any case."""

MANIFEST_EXTENSIONS: Final = (".csv", ".jsonl", ".txt")

_FETCH_THREADS: Final = 16
_LIST_THREADS: Final = 32


def list_images(input_uri: str, config: InputConfig) -> Iterator[pa.Table]:
    """All images of an input as tables of `INPUT_SCHEMA`, in the input's order: by name, or as the manifest has them.

    Raises: ConfigError where the input holds no image or cannot be understood, StorageError.
    """
    left = config.limit
    for table in _list_all(storage.normalize(input_uri), config):
        if left is not None:
            table = table.slice(0, left)
            left -= table.num_rows
        yield table
        if left == 0:
            return


def _list_all(uri: str, config: InputConfig) -> Iterator[pa.Table]:
    where = storage.redact(uri)
    try:
        found = _files_table(uri)
    except BucketNotFoundError:  # as a storage that refuses: a run may be resumed when it is back
        raise
    except NotFoundError as error:
        raise ConfigError(
            f"INPUT {where} does not exist; give a folder, glob, tar, manifest or Parquet file"
        ) from error
    root = _root(uri)
    names = found["uri"].to_pylist() if found.num_rows == 1 or _all_containers(found) else []
    etags = dict(zip(names, found["etag"].to_pylist(), strict=True)) if names else {}
    if names and all(is_tar(name) for name in names):
        tables = _in_order(lambda name: _list_tar(name, _container_name(name, uri, root), etags[name]), names)
        yield from _nonempty(tables, where, "no image in the tar")
    elif names and all(name.lower().endswith(".parquet") for name in names):
        tables = _in_order(
            lambda name: list_parquet(name, _container_name(name, uri, root), config, etags[name]), names
        )
        yield from _nonempty(tables, where, "no row in the Parquet file")
    elif names == [uri] and uri.lower().endswith(MANIFEST_EXTENSIONS):
        tables = iter([rows_of_uris(read_uris(uri, config.uri_column), root)])
        yield from _nonempty(tables, where, "no URI in the manifest")
    else:
        yield _list_files(uri, root, found)


def _in_order(call: Callable[[str], pa.Table], names: list[str]) -> Iterator[pa.Table]:
    """`call` of each name, many at once: an archive's index is many small reads, each waiting for the network."""
    pool = ThreadPoolExecutor(min(_LIST_THREADS, len(names)))
    try:
        yield from pool.map(call, names)
    finally:
        pool.shutdown(cancel_futures=True)


def _nonempty(tables: Iterator[pa.Table], where: str, problem: str) -> Iterator[pa.Table]:
    num_rows = 0
    for table in tables:
        num_rows += table.num_rows
        yield table
    if num_rows == 0:
        raise ConfigError(f"INPUT {where}: {problem}; there is nothing to label")


# --- folders, prefixes, globs --------------------------------------------------------------------------------------


def _files_table(uri: str) -> pa.Table:
    """Columns uri, size and etag of every file that the input names, sorted by URI."""
    uris: list[str] = []
    sizes: list[int | None] = []
    etags: list[str | None] = []
    for entry in storage.list_files(uri):
        uris.append(entry.uri)
        sizes.append(entry.size)
        etags.append(entry.etag)
    arrays = [pa.array(uris, pa.string()), pa.array(sizes, pa.int64()), pa.array(etags, pa.string())]
    return pa.table(arrays, ["uri", "size", "etag"]).sort_by("uri")


def _all_containers(found: pa.Table) -> bool:
    """Whether every file is a tar, or every file is Parquet: then what they hold is meant."""
    return any(
        pc.all(pc.match_substring_regex(found["uri"], pattern, ignore_case=True)).as_py()
        for pattern in (r"\.tar$", r"\.parquet$")
    )


def _root(uri: str) -> str:
    """What file names are relative to: the folder itself, or the folder above the first wild segment or the file."""
    if storage.has_glob(uri) and not storage.exists(uri):
        return storage.glob_base(uri)
    return uri if storage.is_dir_like(uri) else storage.parent(uri)


def _relative(uris: Any, root: str) -> Any:
    return pc.utf8_slice_codeunits(uris, start=len(storage.join(root, "")))


def _list_files(uri: str, root: str, found: pa.Table) -> pa.Table:
    where = storage.redact(uri)
    names = _relative(found["uri"], root)
    # A pattern that spells an extension out means what it says; everything else is narrowed to images.
    is_glob = storage.has_glob(uri) and root == storage.glob_base(uri)
    spelled_out = is_glob and re.search(r"\.[^./*?\[\]]+$", uri) is not None
    if found.num_rows == 1 and found["uri"][0].as_py() == uri:
        spelled_out = True
    keep = pc.invert(pc.match_substring_regex(names, r"(^|/)(\.|_samray/)"))
    if not spelled_out:
        extensions = "|".join(re.escape(e) for e in IMAGE_EXTENSIONS)
        keep = pc.and_(keep, pc.match_substring_regex(names, f"({extensions})$", ignore_case=True))
    images = found.filter(keep)
    if images.num_rows == 0:
        raise ConfigError(_nothing_found(where, found))
    if any(is_compressed_tar(name.as_py()) for name in images["uri"].slice(0, 100)):
        raise ConfigError(
            f"INPUT {where} is a compressed tar, from which single images cannot be read; "
            "unpack it, or decompress it to a plain .tar"
        )
    names = _relative(images["uri"], root)
    return input_rows(images["uri"], names, size=images["size"], etag=images["etag"])


def _nothing_found(where: str, found: pa.Table) -> str:
    looked = f"INPUT {where}: no image found; looked for names ending in {', '.join(IMAGE_EXTENSIONS)}"
    held = []
    for extension in (".tar", ".parquet", ".csv", ".jsonl", ".tar.gz", ".tgz"):
        pattern = re.escape(extension) + "$"
        number = pc.sum(pc.match_substring_regex(found["uri"], pattern, ignore_case=True)).as_py() or 0
        if number:
            held.append(f"{number} {extension}")
    if held:
        example = f"{where.rstrip('/')}/*{held[0].split()[1]}"
        return f"{looked}, but there are {' and '.join(held)} files; name them, as in {example}"
    if found.num_rows:
        return f"{looked}, among {found.num_rows} files"
    return looked + "; there is no file at all"


# --- containers ----------------------------------------------------------------------------------------------------


def _container_name(container: str, uri: str, root: str) -> str:
    """The container's name relative to the input's root, without its extension; "" where it is the whole input."""
    return "" if container == uri else container[len(storage.join(root, "")) :].rpartition(".")[0]


def _list_tar(archive: str, prefix: str, etag: str | None) -> pa.Table:
    members = list_tar(archive, IMAGE_EXTENSIONS)
    return input_rows(
        pa.array([f"tar://{member.name}::{archive}" for member in members], pa.string()),
        pa.array([storage.join(prefix, m.name) if prefix else m.name for m in members], pa.string()),
        size=pa.array([member.size for member in members], pa.int64()),
        etag=etag,
        container=archive,
        offset=pa.array([member.offset for member in members], pa.int64()),
    )
