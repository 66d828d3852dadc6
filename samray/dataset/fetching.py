"""The encoded bytes of the images of a listing or plan, or why there are none."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from samray import storage
from samray.dataset.parquet_images import fetch_rows, known_problem, too_large
from samray.dataset.rows import INPUT_SCHEMA
from samray.errors import ConfigError, FileError, ImageError, NotFoundError, StorageError

if TYPE_CHECKING:
    from samray.config import InputConfig

_FETCH_THREADS: Final = 16


def fetch_images(rows: pa.Table, config: InputConfig) -> list[bytes | ImageError]:
    """The encoded bytes of each row of a slice of a listing or plan, or why there are none.

    One image's fault (missing, too_large, no permission, a web server that fails) is an ImageError in its place.
    Raises: StorageError where the storage as a whole fails: then a retry later helps, and no row should say otherwise.
    """
    items = rows.select(INPUT_SCHEMA.names).to_pylist()
    fetched: list[bytes | ImageError | None] = [None] * len(items)
    by_container: dict[str, list[int]] = {}
    single: list[int] = []
    for i, item in enumerate(items):
        if item["problem"]:
            fetched[i] = known_problem(item["problem"])
        elif item["row"] is not None:
            by_container.setdefault(item["container"], []).append(i)
        else:
            single.append(i)
    if len(single) == 1:
        fetched[single[0]] = _fetch_one(items[single[0]], config)
    elif single:
        with ThreadPoolExecutor(min(_FETCH_THREADS, len(single))) as pool:
            for i, data in zip(single, pool.map(lambda i: _fetch_one(items[i], config), single), strict=True):
                fetched[i] = data

    def fetch_file(uri: str) -> bytes | ImageError:
        return _fetch_one({"uri": uri, "size": None, "offset": None}, config)

    for container, indices in by_container.items():
        found = fetch_rows(container, [items[i]["row"] for i in indices], config, fetch_file)
        for i, data in zip(indices, found, strict=True):
            fetched[i] = data
    assert all(data is not None for data in fetched)
    return fetched  # type: ignore[return-value]


def _read_member(item: dict[str, Any]) -> bytes:
    """The bytes of a tar member; fewer where the tar ends earlier. Holes are filled with zeros."""
    if item["extents"] is None:
        return storage.read_bytes(item["container"], item["offset"], item["size"])
    try:
        pieces = [(int(start), int(length)) for start, _, length in (p.partition("+") for p in item["extents"].split())]
    except ValueError as error:
        raise FileError("the plan's map of the image's holes is damaged") from error
    num_stored = sum(length for _, length in pieces)
    if any(start < 0 or length < 0 or start + length > item["size"] for start, length in pieces):
        raise FileError("the plan's map of the image's holes is damaged")
    stored = storage.read_bytes(item["container"], item["offset"], num_stored)
    data = bytearray(item["size"])
    place = 0
    for start, length in pieces:
        piece = stored[place : place + length]
        if len(piece) < length:
            return bytes(data[:start]) + piece
        data[start : start + length] = piece
        place += length
    return bytes(data)


def _fetch_one(item: dict[str, Any], config: InputConfig) -> bytes | ImageError:
    uri, size = item["uri"], item["size"]
    if not uri:
        return ImageError("missing", "the manifest's row holds no URI")
    try:
        if item["offset"] is not None:
            if size > config.max_bytes:
                return too_large(size, config)
            return _read_member(item)
        if size is None:
            size = storage.file_size(uri)  # a look before a leap into what may be a disk image
        if size is not None and size > config.max_bytes:
            return too_large(size, config)
        # One byte more than allowed shows that a file has grown since it was listed, without reading all of it.
        data = storage.read_bytes(uri) if size is not None else storage.read_bytes(uri, 0, config.max_bytes + 1)
    except NotFoundError as error:
        return ImageError("missing", str(error))
    except (FileError, ConfigError) as error:
        return ImageError("unreadable", str(error))
    except StorageError as error:
        # Each host of the web is a storage of its own: one that is gone for good must not end the run each time.
        if item["offset"] is None and storage.scheme_of(uri) in ("http", "https"):
            return ImageError("unreadable", str(error).partition("; ")[0])  # the rest says what to do about a run
        raise
    return data if len(data) <= config.max_bytes else too_large(len(data), config)
