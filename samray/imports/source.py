"""List the annotation files of a source, detect their format, and locate the images."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.errors import ConfigError, ImageError, NotFoundError
from samray.inputs.listing import IMAGE_EXTENSIONS
from samray.inputs.tar import is_tar, list_tar
from samray.output.schema import MAX_IMAGE_ID
from samray.storage import FileEntry

HEAD_BYTES: Final = 4096
_CHUNK_BYTES: Final = 4 * 2**20
_THREADS: Final = 32

JSON_FILES: Final = pa.schema(
    [
        ("json", pa.string()),  # the JSON file, or its tar
        ("json_offset", pa.int64()),  # in the tar; null for a separate file
        ("json_size", pa.int64()),
        ("photo", pa.string()),  # the image next to it; null if there is none
        ("photo_size", pa.int64()),
        ("photo_etag", pa.string()),
        ("photo_offset", pa.int64()),  # in the tar
        ("photo_extents", pa.string()),  # in the tar, for a sparse file
    ]
)


@dataclass(frozen=True)
class Source:
    """The annotation files to import."""

    uri: str
    format: str
    """sa1b or coco."""
    files: pa.Table
    """`JSON_FILES`, in the order of the images."""

    @property
    def folder(self) -> str:
        """The common folder of all files of the source."""
        if storage.has_glob(self.uri) and not storage.exists(self.uri):
            return storage.glob_base(self.uri)
        return storage.parent(self.uri) if self.files["json"][0].as_py() == self.uri else self.uri

    def fingerprint(self) -> str:
        """Changes if a file is added, removed or resized: names and sizes only, because there may be millions of
        files."""
        digest = hashlib.sha256()
        for batch in self.files.select(["json", "json_offset", "json_size"]).to_batches():
            digest.update(json.dumps([column.to_pylist() for column in batch.columns]).encode())
        return digest.hexdigest()

    def sha256(self) -> str:
        """SHA-256 of the files' content, concatenated; not for members of a tar.

        Reads the files completely. Raises: StorageError.
        """
        digest = hashlib.sha256()
        for uri in self.files["json"].to_pylist():
            with storage.open_read(uri) as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()


def open_source(uri: str, format: str | None) -> Source:
    """List the source, and detect the format from its first file if none is given.

    uri: a folder, prefix, glob, JSON file or tar. Raises: ConfigError if there is nothing to import, StorageError.
    """
    uri = storage.normalize(uri)
    where = storage.redact(uri)
    if format not in (None, "sa1b", "coco"):
        raise ConfigError(f"unknown import format {format!r}; formats are sa1b, coco")
    try:
        entries = sorted(storage.list_files(uri), key=lambda entry: entry.uri)
    except NotFoundError as error:
        raise ConfigError(f"SOURCE {where} does not exist; give a folder, glob, JSON file or tar") from error
    root = len(storage.glob_base(uri) if storage.has_glob(uri) and not storage.exists(uri) else uri)
    # Without hidden files and the folders in which samray keeps its own.
    shown = [entry for entry in entries if not re.search(r"/(\.|_samray/|_export/)", entry.uri[root:])]
    tables = [_table(_files_of(shown)), *_in_tars([entry.uri for entry in shown if is_tar(entry.uri)])]
    files = pa.concat_tables(tables)
    if files.num_rows == 0:
        raise ConfigError(f"SOURCE {where}: no JSON file found, among {len(entries)} files and in the tars of them")
    source = Source(uri, format or _format_of(files, where), files)
    if source.format == "coco" and pc.count(files["json_offset"]).as_py():
        raise ConfigError(f"SOURCE {where} is a tar, but COCO JSON is not read from tars: unpack it")
    return source


def _files_of(entries: list[FileEntry]) -> Iterator[dict[str, Any]]:
    # A JSON file's image has the same name except for the ending.
    photos = {entry.uri.rpartition(".")[0]: entry for entry in entries if entry.uri.lower().endswith(IMAGE_EXTENSIONS)}
    for entry in entries:
        if entry.uri.lower().endswith(".json"):
            row = {"json": entry.uri, "json_size": entry.size}
            photo = photos.get(entry.uri.rpartition(".")[0])
            if photo is not None:
                row |= {"photo": photo.uri, "photo_size": photo.size, "photo_etag": photo.etag}
            yield row


def _in_tars(uris: list[str]) -> Iterator[pa.Table]:
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(_list_tar, uris)


def _list_tar(uri: str) -> pa.Table:
    members = list_tar(uri, (".json", *IMAGE_EXTENSIONS))
    photos = {m.name.rpartition(".")[0]: m for m in members if not m.name.lower().endswith(".json")}
    rows = []
    for member in members:
        if not member.name.lower().endswith(".json"):
            continue
        if member.problem or member.extents is not None:
            problem = ImageError.parse(member.problem or "unreadable: it is a sparse file").message
            raise ConfigError(f"{storage.redact(uri)}, {member.name}: {problem}; create the tar without sparse files")
        row = {"json": uri, "json_offset": member.offset, "json_size": member.size}
        photo = photos.get(member.name.rpartition(".")[0])
        if photo is not None and photo.problem is None:
            name = f"tar://{photo.name}::{uri}"
            row |= {"photo": name, "photo_size": photo.size, "photo_offset": photo.offset}
            row["photo_extents"] = photo.extents
        rows.append(row)
    return _table(iter(rows))


def _table(rows: Iterator[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=JSON_FILES)


def _format_of(files: pa.Table, where: str) -> str:
    # The first file decides for all.
    head = read_json(files.slice(0, 1).to_pylist()[0], HEAD_BYTES)
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):  # a top-level list: results
        return "coco"
    if re.search(rb'"image"\s*:\s*\{', head):
        return "sa1b"
    if re.search(rb'"(images|annotations|categories|info|licenses)"\s*:\s*[\[{]', head):
        return "coco"
    raise ConfigError(f"SOURCE {where}: its first JSON file is neither SA-1B nor COCO; set --format")


def read_json(file: dict[str, Any], limit: int | None = None) -> bytes:
    """Read a row of `JSON_FILES`, or its first `limit` bytes. Raises: StorageError."""
    size = file["json_size"]
    length = size if limit is None or size is None else min(limit, size)
    if file["json_offset"] is None:
        return storage.read_bytes(file["json"]) if limit is None else storage.read_bytes(file["json"], 0, limit)
    return storage.read_bytes(file["json"], file["json_offset"], length)


def image_ids(wanted: list[Any]) -> list[int]:
    """The ids of the source; row indices for all if two ids are equal or one is invalid.

    None is an unknown id: it gets one after the largest.
    """
    known = [number for number in wanted if number is not None]
    # With room for the unknown ids after the largest.
    possible = all(isinstance(number, int) and 0 <= number <= MAX_IMAGE_ID - len(wanted) for number in known)
    if not possible or len(set(known)) < len(known):
        return list(range(len(wanted)))
    following = iter(range(max(known, default=-1) + 1, MAX_IMAGE_ID))
    return [next(following) if number is None else number for number in wanted]
