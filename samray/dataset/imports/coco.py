"""COCO instances: one JSON file or several, of any size, whose annotations come in any order.

The files are read as a stream, twice: for their images, which make the plan, and for their annotations, which are
spooled to this machine's disk, sorted into boxes of neighbouring shards, until a box's shards can be written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import pyarrow as pa

from samray import storage
from samray.dataset.generations import MANIFEST_SCHEMA
from samray.dataset.imports.json_stream import JsonStream
from samray.dataset.imports.records import bbox_convention_of, image_hw, record_of
from samray.dataset.imports.source import Source, image_ids
from samray.dataset.manifest import Plan
from samray.dataset.schema import ImageRecord
from samray.errors import ConfigError, ImageError

_MAX_BOXES: Final = 200
"""Files open at once while annotations are sorted."""

_SAMPLES: Final = 100


@dataclass
class CocoImages:
    """The images of all files, in their order."""

    images: list[dict[str, Any]] = field(default_factory=list)
    """id, width, height and file_name."""
    place_of: list[dict[Any, int]] = field(default_factory=list)
    """For each file: COCO's id -> place."""
    samples: list[tuple[int, Any]] = field(default_factory=list)
    """The first annotations, each with its file's number."""
    num_unknown: int = 0
    """Annotations of images that are not there."""


def read_images(source: Source) -> CocoImages:
    """The images of the source. Raises: ConfigError where a file is not COCO's, StorageError."""
    found = CocoImages()
    for number, uri in enumerate(source.files["json"].to_pylist()):
        places: dict[Any, int] = {}
        for key, value in _items(uri):
            if places and key != "images" and len(found.samples) >= _SAMPLES:
                break  # what follows is not needed now
            if key == "images":
                if not isinstance(value, dict) or not isinstance(value.get("id"), int | str):
                    raise ConfigError(f"{storage.redact(uri)} holds an image without an id: {str(value)[:100]}")
                if value["id"] in places:
                    raise ConfigError(f"{storage.redact(uri)} holds two images with the id {value['id']}")
                places[value["id"]] = len(found.images)
                found.images.append({name: value.get(name) for name in ("id", "width", "height", "file_name")})
            elif key == "annotations" and len(found.samples) < _SAMPLES:
                found.samples.append((number, value))
        if not places:
            raise ConfigError(
                f"{storage.redact(uri)} holds no list of images: it is not COCO's instances JSON; "
                "give --format sa1b if it is SA-1B's"
            )
        found.place_of.append(places)
    return found


def _items(uri: str) -> Iterator[tuple[str, Any]]:
    with storage.open_read(uri) as stream:
        try:
            yield from JsonStream(stream).items()
        except ValueError as error:
            raise ConfigError(f"{storage.redact(uri)} is no JSON that can be read: {error}") from error


def planned_images(source: Source, found: CocoImages, images_root: str | None) -> tuple[pa.Table, str]:
    """The images as `MANIFEST_SCHEMA` has them, without shards, and the convention that the source's boxes follow.

    images_root: where `file_name` lies; without it, the folder of the JSON file. Raises: ConfigError.
    """
    files = source.files["json"].to_pylist()
    roots = [images_root or storage.parent(uri) for uri, own in zip(files, found.place_of, strict=True) for _ in own]
    ids = image_ids([image["id"] for image in found.images])
    rows = []
    for root, id, image in zip(roots, ids, found.images, strict=True):
        name = image["file_name"]
        if not isinstance(name, str) or not name:
            raise ConfigError(f"SOURCE {storage.redact(source.uri)}: the image {image['id']} has no file_name")
        rows.append({"image_id": id, "file_name": name, "uri": storage.resolve(root, name)})
    fields = [field for field in MANIFEST_SCHEMA if field.name != "shard"]
    table = pa.Table.from_pylist(rows, schema=pa.schema(fields))
    return table, bbox_convention_of(_samples(found)) or "coco"


def _samples(found: CocoImages) -> Iterator[tuple[Any, tuple[int, int]]]:
    for number, raw in found.samples:
        place = _place_of(found.place_of[number], raw)
        if place is not None:
            with suppress(ImageError):
                yield raw, image_hw(found.images[place])


def _place_of(places: dict[Any, int], annotation: Any) -> int | None:
    image = annotation.get("image_id") if isinstance(annotation, dict) else None
    return places.get(image) if isinstance(image, int | str) else None


def annotations_of_images(source: Source, found: CocoImages) -> Iterator[tuple[int, dict[str, Any]]]:
    """(place, annotation) of each image's annotations, in the files' order; places as `found.place_of` has them.

    Raises: ConfigError where they are no JSON, StorageError.
    """
    for uri, places in zip(source.files["json"].to_pylist(), found.place_of, strict=True):
        for key, value in _items(uri):
            place = _place_of(places, value) if key == "annotations" else None
            if place is not None:
                yield place, value


def shard_records(
    source: Source,
    found: CocoImages,
    plan: Plan,
    todo: list[int],
    bbox_convention: str,
    progress: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, list[ImageRecord], int]]:
    """(shard, its rows, annotations dropped) for each shard to do. As `annotations_of_shards`."""
    for shard, first, by_place in annotations_of_shards(source, found, plan, todo, progress):
        records, num_dropped = [], 0
        for place, row in enumerate(plan.read_shard(shard).to_pylist(), start=first):
            record, dropped = record_of(row, found.images[place], by_place.get(place, []), bbox_convention)
            records.append(record)
            num_dropped += dropped
        yield shard, records, num_dropped


def annotations_of_shards(
    source: Source, found: CocoImages, plan: Plan, todo: list[int], progress: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, int, dict[int, list[Any]]]]:
    """(shard, the place of its first image, place -> annotations) for each shard to do; places as `found.place_of` has
    them, in the plan. progress is called now and then while sorting.

    Counts found.num_unknown on the way. Raises: ConfigError where the annotations are no JSON, StorageError.
    """
    if not todo:
        return  # and the files need not be read
    ends = np.cumsum([plan.num_images_of(shard) for shard in range(plan.num_shards)])
    with TemporaryDirectory(prefix="samray-import-") as folder:
        boxes = _sort(source, found, ends, todo, Path(folder), progress)
        for box, shards in boxes.items():
            by_place: dict[int, list[Any]] = {}
            with open(box, "rb") as lines:
                for line in lines:
                    number, _, text = line.partition(b"\t")
                    by_place.setdefault(int(number), []).append(json.loads(text))
            box.unlink()
            for shard in shards:
                first = int(ends[shard]) - plan.num_images_of(shard)
                own = {place: by_place.pop(place) for place in range(first, int(ends[shard])) if place in by_place}
                yield shard, first, own


def _sort(
    source: Source, found: CocoImages, ends: Any, todo: list[int], folder: Path, progress: Callable[[], None]
) -> dict[Path, list[int]]:
    """Write each annotation of a shard to do into a box; returns which shards a box is for, in order."""
    shards_of: dict[Path, list[int]] = {}
    box_of: dict[int, Path] = {}
    for number, shard in enumerate(sorted(todo)):
        box_of[shard] = folder / f"{number * min(_MAX_BOXES, len(todo)) // len(todo):04d}"
        shards_of.setdefault(box_of[shard], []).append(shard)
    with ExitStack() as stack:
        files = {box: stack.enter_context(open(box, "wb")) for box in shards_of}
        for uri, places in zip(source.files["json"].to_pylist(), found.place_of, strict=True):
            for number, (key, value) in enumerate(_items(uri)):
                if key != "annotations":
                    continue
                place = _place_of(places, value)
                if place is None:
                    found.num_unknown += 1
                    continue
                box = box_of.get(int(np.searchsorted(ends, place, side="right")))
                if box is not None:
                    files[box].write(b"%d\t%s\n" % (place, json.dumps(value).encode()))
                if number % 10_000 == 0:
                    progress()
    return shards_of
