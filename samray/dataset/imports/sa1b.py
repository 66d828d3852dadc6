"""SA-1B: folders of JSON files, one an image, or tars of them with their images, as published."""

from __future__ import annotations

import contextlib
import json
import posixpath
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pyarrow as pa

from samray import storage
from samray.dataset.generations import MANIFEST_SCHEMA
from samray.dataset.imports.records import bbox_convention_of, failed, image_hw, record_of
from samray.dataset.imports.source import HEAD_BYTES, Source, image_ids, read_json
from samray.dataset.schema import ImageRecord
from samray.errors import FileError, ImageError

_THREADS: Final = 32
_SAMPLES: Final = 20

_IMAGE_FIRST: Final = re.compile(rb'\s*\{\s*"image"\s*:\s*(\{[^{}]*\})')


def planned_images(source: Source, images_root: str | None) -> tuple[pa.Table, str]:
    """The images as `MANIFEST_SCHEMA` has them, without shards, and the convention that the source's boxes follow.

    Reads the start of each JSON file, where SA-1B says which image it is, and a few files whole. images_root: where
    `file_name` lies; without it, the image beside the JSON file is taken. Raises: StorageError.
    """
    files = source.files.to_pylist()
    with ThreadPoolExecutor(_THREADS) as pool:
        images = list(pool.map(_image_of, files))
    ids = image_ids([image.get("image_id") for image in images])
    places = [_place(file, image, images_root) for file, image in zip(files, images, strict=True)]
    rows = [{"image_id": id, **place} for id, place in zip(ids, places, strict=True)]
    fields = [field for field in MANIFEST_SCHEMA if field.name != "shard"]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields)), _bbox_convention(files)


def _image_of(file: dict[str, Any]) -> dict[str, Any]:
    """The file's `image`; empty where it cannot be understood, which will be a failed row."""
    match = _IMAGE_FIRST.match(read_json(file, HEAD_BYTES))
    image: Any = None
    if match:
        with contextlib.suppress(ValueError):  # a name may hold a brace, too
            image = json.loads(match[1])
    try:
        image = json.loads(read_json(file))["image"] if image is None else image
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return image if isinstance(image, dict) else {}


def _place(file: dict[str, Any], image: dict[str, Any], images_root: str | None) -> dict[str, Any]:
    """The image's name, and where its bytes are."""
    in_tar = file["json_offset"] is not None
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        name = posixpath.basename(file["photo"].partition("::")[0] if file["photo"] else file["json"])
    row: dict[str, Any] = {"file_name": name}
    if images_root is not None:
        return row | {"uri": storage.resolve(images_root, name)}
    if file["photo"] is None:
        return row | {"uri": storage.resolve(storage.parent(file["json"]), name)}
    row |= {"uri": file["photo"], "size": file["photo_size"], "etag": file["photo_etag"]}
    if in_tar:
        row |= {"container": file["json"], "offset": file["photo_offset"], "extents": file["photo_extents"]}
    return row


def _bbox_convention(files: list[dict[str, Any]]) -> str:
    step = max(1, len(files) // _SAMPLES)
    for file in files[::step]:
        try:
            content = json.loads(read_json(file))
            hw = image_hw(content["image"])
            convention = bbox_convention_of((raw, hw) for raw in content["annotations"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ImageError):
            continue
        if convention is not None:
            return convention
    return "coco"


def read_records(files: list[dict[str, Any]], planned: pa.Table, bbox_convention: str) -> tuple[list[ImageRecord], int]:
    """The rows of a shard, and how many annotations without a pixel were dropped.

    files: rows of `JSON_FILES`. planned: the images' rows of the manifest. Raises: StorageError.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        texts = list(pool.map(_read_or_error, files))
    records = []
    num_dropped = 0
    for row, text in zip(planned.to_pylist(), texts, strict=True):
        record, dropped = _record(row, text, bbox_convention)
        records.append(record)
        num_dropped += dropped
    return records, num_dropped


def _read_or_error(file: dict[str, Any]) -> bytes | ImageError:
    try:
        return read_json(file)
    except FileError as error:
        return ImageError("unreadable", str(error))


def _record(row: dict[str, Any], text: bytes | ImageError, bbox_convention: str) -> tuple[ImageRecord, int]:
    if isinstance(text, ImageError):
        return failed(row, text), 0
    try:
        content = json.loads(text)
        image, annotations = dict(content["image"]), list(content["annotations"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return failed(row, ImageError("unreadable", f"its JSON is not SA-1B's: {error!r}")), 0
    return record_of(row, image, annotations, bbox_convention)
