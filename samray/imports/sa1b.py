"""SA-1B: folders of JSON files, one per image, or tars with JSON files and images, as published."""

from __future__ import annotations

import contextlib
import posixpath
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pyarrow as pa

from samray import storage
from samray.errors import ConfigError, FileError, ImageError
from samray.imports.places import outside_problem, printable
from samray.imports.records import bbox_convention_of, failed, image_hw, integer_of, record_of
from samray.imports.source import HEAD_BYTES, Source, image_ids, read_json
from samray.output.manifests import MANIFEST_SCHEMA
from samray.output.schema import ImageRecord
from samray.storage.strict_json import parse_json

_THREADS: Final = 32
_SAMPLES: Final = 20
MAX_JSON_BYTES: Final = 64 * 2**20
"""Maximum bytes of an image's file; parsed JSON takes up to 25 bytes per character."""
_READ_AHEAD_BYTES: Final = 4 * 2**20
"""Larger files are read one at a time."""

_IMAGE_FIRST: Final = re.compile(rb'\s*\{\s*"image"\s*:\s*(\{[^{}]*\})')


def planned_images(source: Source, images_root: str | None, allow_outside: bool) -> tuple[pa.Table, str]:
    """The images in the columns of `MANIFEST_SCHEMA` without shards, and the box convention of the source.

    Reads the start of each JSON file, where SA-1B describes the image, and a few files completely. images_root: folder
    that `file_name` is relative to; by default the image is next to its JSON file. Raises: ConfigError if no image is
    in an allowed place, StorageError.
    """
    files = source.files.to_pylist()
    with ThreadPoolExecutor(_THREADS) as pool:
        images = list(pool.map(_image_of, files))
    ids = image_ids([_id_of(image) for image in images])
    locations = [_location(file, image, images_root) for file, image in zip(files, images, strict=True)]
    rows = [{"image_id": id, **columns} for id, columns in zip(ids, locations, strict=True)]
    if not allow_outside and all(_problem(file, row, images_root) for file, row in zip(files, rows, strict=True)):
        raise ConfigError(
            f"SOURCE {storage.redact(source.uri)}: no image is below the folder of its images, the first is "
            f"{storage.redact(rows[0]['uri'])}; set --images to their folder, or add --allow-outside if you trust the "
            "annotations"
        )
    fields = [field for field in MANIFEST_SCHEMA if field.name != "shard"]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields)), _bbox_convention(files)


def categories_in(source: Source) -> list[str]:
    """The names that an export of a run that names lists in each of its files; taken from the first. Empty without.

    Raises: StorageError.
    """
    try:
        names = _whole_json(source.files.slice(0, 1).to_pylist()[0])["categories"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    # Lists of anything else belong to another tool.
    sound = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    return list(dict.fromkeys(map(printable, names))) if sound else []


def _image_of(file: dict[str, Any]) -> dict[str, Any]:
    """The file's `image`; empty if it cannot be parsed, which will be a failed row."""
    # SA-1B's files begin with the image, so a few kilobytes of most files are enough.
    match = _IMAGE_FIRST.match(read_json(file, HEAD_BYTES))
    image: Any = None
    if match:
        with contextlib.suppress(ValueError):  # a name may also contain a brace
            image = parse_json(match[1])
    try:
        image = _whole_json(file)["image"] if image is None else image
    except (ValueError, KeyError, TypeError):
        return {}
    return image if isinstance(image, dict) else {}


def _whole_json(file: dict[str, Any]) -> Any:
    """Raises: ValueError if it is not JSON, or too large; StorageError."""
    text = _read_or_error(file)
    if isinstance(text, ImageError):
        raise ValueError(text.message)
    return parse_json(text)


def _id_of(image: dict[str, Any]) -> Any:
    id = image.get("image_id")
    return id if integer_of(id) is None else integer_of(id)


def _problem(file: dict[str, Any], row: dict[str, Any], images_root: str | None) -> ImageError | None:
    """Why the image must not be read. row: of the manifest."""
    if row.get("container") is not None:
        return None  # a member of the imported tar
    return outside_problem(row["uri"], images_root or storage.parent(file["json"]))


def _location(file: dict[str, Any], image: dict[str, Any], images_root: str | None) -> dict[str, Any]:
    """The image's name, and the location of its bytes."""
    in_tar = file["json_offset"] is not None
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        name = posixpath.basename(file["photo"].partition("::")[0] if file["photo"] else file["json"])
    name = printable(name)
    row: dict[str, Any] = {"file_name": name}
    # A folder that the user names wins over a photo next to the JSON file.
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
            content = _whole_json(file)
            hw = image_hw(content["image"])
            convention = bbox_convention_of((raw, hw) for raw in content["annotations"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ImageError):
            continue
        if convention is not None:
            return convention
    return "coco"


def read_records(
    files: list[dict[str, Any]],
    planned: pa.Table,
    bbox_convention: str,
    *,
    images_root: str | None,
    allow_outside: bool,
    categories: Collection[str] | None,
) -> tuple[list[ImageRecord], int]:
    """The rows of a shard, and the number of annotations dropped because they have no pixels.

    files: rows of `JSON_FILES`. planned: the images' rows in the manifest. images_root: as for `planned_images`.
    categories: as for `record_of`.
    Raises: StorageError.
    """
    # Small files are read in parallel, large ones one at a time below: that bounds the memory.
    small = [file if (file["json_size"] or 0) <= _READ_AHEAD_BYTES else None for file in files]
    with ThreadPoolExecutor(_THREADS) as pool:
        texts = list(pool.map(lambda file: file and _read_or_error(file), small))
    records = []
    num_dropped = 0
    for file, row, text in zip(files, planned.to_pylist(), texts, strict=True):
        problem = None if allow_outside else _problem(file, row, images_root)
        record, dropped = _record(row, problem or text or _read_or_error(file), bbox_convention, categories)
        records.append(record)
        num_dropped += dropped
    return records, num_dropped


def _read_or_error(file: dict[str, Any]) -> bytes | ImageError:
    if (file["json_size"] or 0) > MAX_JSON_BYTES:
        return ImageError("too_large", f"its JSON has {file['json_size']} bytes; at most {MAX_JSON_BYTES} are read")
    try:
        return read_json(file)
    except FileError as error:
        return ImageError("unreadable", str(error))


def _record(
    row: dict[str, Any], text: bytes | ImageError, bbox_convention: str, categories: Collection[str] | None
) -> tuple[ImageRecord, int]:
    if isinstance(text, ImageError):
        return failed(row, text), 0
    try:
        content = parse_json(text)
        image, annotations = dict(content["image"]), list(content["annotations"])
    except (ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"  # the repr of some errors contains their whole input
        return failed(row, ImageError("unreadable", f"its JSON is not in SA-1B format: {why}")), 0
    return record_of(row, image, annotations, bbox_convention, categories)
