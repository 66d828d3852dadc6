"""COCO instances: one or more JSON files of any size, with annotations in any order.

The files are streamed twice: for their images, which make the plan, and for their annotations. Annotations are first
sorted on local disk, into one temporary file per range of shards, until the shards of that range can be written.
"""

from __future__ import annotations

import json
import reprlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import Any, BinaryIO, Final, cast

import pyarrow as pa

from samray import storage
from samray.errors import ConfigError, ImageError
from samray.imports.categories import Categories, NameOf
from samray.imports.json_stream import JsonStream
from samray.imports.places import names_of, outside_problem, printable
from samray.imports.records import bbox_convention_of, image_hw, integer_of
from samray.imports.source import Source, image_ids
from samray.output.manifests import MANIFEST_SCHEMA

_MAX_SPOOLS: Final = 200
"""Maximum number of open files while annotations are sorted."""

_SAMPLES: Final = 100

_RESULTS: Final = ""
"""The key for elements of a top-level list: results, as for pycocotools' loadRes."""

_ANNOTATIONS: Final = ("annotations", _RESULTS)


@dataclass
class CocoImages:
    """The images of all files, in order."""

    images: list[dict[str, Any]] = field(default_factory=list)
    """id, width, height, file_name and coco_url; ids that are whole numbers are int in any notation."""
    file_of: list[int] = field(default_factory=list)
    """The file index of each image."""
    index_of: list[dict[Any, int]] = field(default_factory=list)
    """COCO's id -> image index, for each file. A list of results uses the images of the other files."""
    samples: list[tuple[int, Any]] = field(default_factory=list)
    """The first annotations, each with its file index."""
    categories: Categories = field(default_factory=Categories)
    """Complete once `sorted_annotations` has read all files: COCO's own files end with their categories."""


@dataclass
class AnnotationCounts:
    """Counts of the annotations of all files."""

    num_known: int = 0
    """Number of annotations whose image exists."""
    num_unknown: int = 0
    """Number of annotations whose image does not exist."""
    num_with_mask: int = 0
    """Number of annotations of existing images with anything in `segmentation`."""
    example: str = ""
    """The image_id of one annotation whose image does not exist."""


def read_images(source: Source) -> CocoImages:
    """Read the images of the source. Raises: ConfigError if a file is not COCO JSON, StorageError."""
    in_coco = CocoImages()
    results: list[int] = []
    for number, uri in enumerate(source.files["json"].to_pylist()):
        index_of_id: dict[Any, int] = {}
        is_results = False
        for key, value in _items(uri):
            is_results = is_results or key == _RESULTS
            # Images may come after the annotations: read on until one comes.
            if (index_of_id or is_results) and key != "images" and len(in_coco.samples) >= _SAMPLES:
                break  # the annotations are read later
            if key == "images":
                image = _image_of(value, storage.redact(uri))
                if image["id"] in index_of_id:
                    raise ConfigError(f"{storage.redact(uri)} has two images with the id {reprlib.repr(image['id'])}")
                index_of_id[image["id"]] = len(in_coco.images)
                in_coco.images.append(image)
                in_coco.file_of.append(number)
            elif key in _ANNOTATIONS and len(in_coco.samples) < _SAMPLES:
                in_coco.samples.append((number, value))
        if is_results:
            results.append(number)
        elif not index_of_id:
            raise ConfigError(
                f"{storage.redact(uri)} has no list of images: it is not COCO instances JSON; "
                "use --format sa1b if it is SA-1B"
            )
        in_coco.index_of.append(index_of_id)
    if results:
        _join_results(source, in_coco, results)
    return in_coco


def _image_of(value: Any, where: str) -> dict[str, Any]:
    """An element of `images`, as in `CocoImages.images`. Raises: ConfigError if it has no id."""
    id = _key(value.get("id")) if isinstance(value, dict) else None
    if id is None:
        raise ConfigError(f"{where} has an image without an id: {reprlib.repr(value)}")
    return {name: value.get(name) for name in ("width", "height", "file_name", "coco_url")} | {"id": id}


def _key(id: Any) -> int | str | None:
    """Normalise an id, to match images with annotations: pandas writes 1.0 for 1, other tools "1"."""
    if isinstance(id, str):
        # Only the usual notation: "007" is another id than 7.
        return int(id) if len(id) < 20 and id.isascii() and id.isdigit() and str(int(id)) == id else id
    return integer_of(id)


def _join_results(source: Source, in_coco: CocoImages, results: list[int]) -> None:
    """Link lists of results to the images of the other files. Raises: ConfigError if that is not possible."""
    first = storage.redact(source.files["json"][results[0]].as_py())
    if not in_coco.images:
        raise ConfigError(
            f"{first} is a list of results, without the names and sizes of its images: give a folder or glob as "
            "SOURCE that also has the JSON file with those images"
        )
    index_of_any_id: dict[Any, int] = {}
    for index_of_id in in_coco.index_of:
        if not index_of_any_id.keys().isdisjoint(index_of_id):
            raise ConfigError(
                f"{first} is a list of results, but several other files have images with the same ids: "
                "import it together with only the file that it belongs to"
            )
        index_of_any_id |= index_of_id
    for number in results:
        in_coco.index_of[number] = index_of_any_id


def _items(uri: str) -> Iterator[tuple[str, Any]]:
    with storage.open_read(uri) as stream:
        try:
            yield from JsonStream(stream).items(_RESULTS)
        except ValueError as error:
            raise ConfigError(f"{storage.redact(uri)} is not valid JSON: {error}") from error


def planned_images(
    source: Source, in_coco: CocoImages, images_root: str | None, allow_outside: bool
) -> tuple[pa.Table, str]:
    """The images in the columns of `MANIFEST_SCHEMA` without shards, and the box convention of the source.

    images_root: folder that `file_name` is relative to; default is the folder of the JSON file. Raises: ConfigError.
    """
    roots = roots_of(source, in_coco, images_root)
    ids = image_ids([image["id"] for image in in_coco.images])
    rows: list[dict[str, Any]] = []
    for root, id, image, name in zip(roots, ids, in_coco.images, names_of(in_coco.images, roots), strict=True):
        uri = storage.resolve(root, name) if name else ""
        rows.append({"image_id": id, "file_name": name or printable(str(image["id"])), "uri": uri})
    where = f"SOURCE {storage.redact(source.uri)}"
    if not any(row["uri"] for row in rows):
        raise ConfigError(f"{where}: the image {in_coco.images[0]['id']} has no file_name, and no other image has one")
    # One image inside is enough: the others become failed rows.
    if not allow_outside and all(outside_problem(row["uri"], root) for row, root in zip(rows, roots, strict=True)):
        raise ConfigError(
            f"{where}: no image is below {storage.redact(roots[0])}, the first is {storage.redact(rows[0]['uri'])}; "
            "set --images to their folder, or add --allow-outside if you trust the annotations"
        )
    fields = [field for field in MANIFEST_SCHEMA if field.name != "shard"]
    table = pa.Table.from_pylist(rows, schema=pa.schema(fields))
    return table, bbox_convention_of(_samples(in_coco)) or "coco"


def roots_of(source: Source, in_coco: CocoImages, images_root: str | None) -> list[str]:
    """For each image, the folder that its name is relative to."""
    files = [images_root or storage.parent(uri) for uri in source.files["json"].to_pylist()]
    return [files[number] for number in in_coco.file_of]


def _samples(in_coco: CocoImages) -> Iterator[tuple[Any, tuple[int, int]]]:
    for number, raw in in_coco.samples:
        index = _index_of(in_coco.index_of[number], raw)
        if index is not None:
            with suppress(ImageError):
                yield raw, image_hw(in_coco.images[index])


def _index_of(index_of_id: dict[Any, int], annotation: Any) -> int | None:
    return index_of_id.get(_key(annotation.get("image_id"))) if isinstance(annotation, dict) else None


def annotations_of_images(source: Source, in_coco: CocoImages) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (image index, annotation) in the files' order; indices as in `in_coco.index_of`.

    Raises: ConfigError if they are not JSON, StorageError.
    """
    for uri, index_of_id in zip(source.files["json"].to_pylist(), in_coco.index_of, strict=True):
        for key, value in _items(uri):
            index = _index_of(index_of_id, value) if key in _ANNOTATIONS else None
            if index is not None:
                yield index, value


Shards = Iterator[tuple[int, int, dict[int, list[Any]]]]
"""A shard, the index of its first image, and image index -> annotations."""


@contextmanager
def sorted_annotations(
    source: Source, in_coco: CocoImages, ends: list[int], todo: list[int], progress: Callable[[], None] = lambda: None
) -> Iterator[tuple[Shards, AnnotationCounts]]:
    """The annotations of each shard to do, after reading all of them; image indices as in `in_coco.index_of`.

    An annotation gets the name of its category as `label`: null for the class of masks without a name, none if its
    category is not in the file. `in_coco.categories` is then complete, unless there is nothing to do.
    ends: index after the last image of each shard. progress is called from time to time while sorting.
    Raises: ConfigError if they are not JSON, StorageError.
    """
    if not todo:
        yield iter(()), AnnotationCounts()  # nothing to do, do not read the files
        return
    with ExitStack() as stack:
        spools = _open_spools(todo, stack)
        counts = _sort(source, in_coco, ends, spools, progress)
        yield _shards(spools, ends, in_coco.categories), counts


def _shards(spools: list[tuple[BinaryIO, list[int]]], ends: list[int], categories: Categories) -> Shards:
    names_of: dict[int, NameOf] = {}
    for spool, shards in spools:
        # One file at a time: memory holds the annotations of its shards only.
        by_index: dict[int, list[Any]] = {}
        with spool:
            spool.seek(0)
            for line in spool:
                number, file, text = line.split(b"\t", 2)
                if int(file) not in names_of:
                    names_of[int(file)] = categories.names_of(int(file))
                annotation = _with_label(json.loads(text), names_of[int(file)])
                by_index.setdefault(int(number), []).append(annotation)
        for shard in shards:
            first = ends[shard - 1] if shard else 0
            # Taken out, so that what was yielded need not stay in memory.
            of_shard = {index: by_index.pop(index) for index in range(first, ends[shard]) if index in by_index}
            yield shard, first, of_shard


def _with_label(annotation: dict[str, Any], names: NameOf) -> dict[str, Any]:
    category = _key(annotation.get("category_id"))
    known = isinstance(category, int | str) and category in names
    # A `label` of another tool is not the name of a category.
    others = {key: value for key, value in annotation.items() if key != "label"}
    return {**others, "label": names[category]} if known else others


def _open_spools(todo: list[int], stack: ExitStack) -> list[tuple[BinaryIO, list[int]]]:
    """Temporary files for the annotations, each with its shards, in order. The stack closes them.

    The files have no name: they disappear if the process is killed.
    """
    spools: list[tuple[BinaryIO, list[int]]] = []
    for number, shard in enumerate(sorted(todo)):
        # The shards are spread evenly over the files, in order.
        if number * min(_MAX_SPOOLS, len(todo)) // len(todo) == len(spools):
            file = TemporaryFile()  # noqa: SIM115
            spools.append((cast(BinaryIO, stack.enter_context(file)), []))
        spools[-1][1].append(shard)
    return spools


def _sort(
    source: Source,
    in_coco: CocoImages,
    ends: list[int],
    spools: list[tuple[BinaryIO, list[int]]],
    progress: Callable[[], None],
) -> AnnotationCounts:
    """Write the annotations into the files of their shards; those of shards that have no file are only counted."""
    counts = AnnotationCounts()
    spool_of = {shard: spool for spool, shards in spools for shard in shards}
    for file, (uri, index_of_id) in enumerate(zip(source.files["json"].to_pylist(), in_coco.index_of, strict=True)):
        for number, (key, value) in enumerate(_items(uri)):
            if key == "categories" and isinstance(value, dict) and (id := _key(value.get("id"))) is not None:
                in_coco.categories.add(file, id, value)
            if key not in _ANNOTATIONS:
                continue
            index = _index_of(index_of_id, value)
            if index is None:
                counts.num_unknown += 1
                counts.example = reprlib.repr(value.get("image_id") if isinstance(value, dict) else value)
                continue
            counts.num_known += 1
            counts.num_with_mask += bool(value.get("segmentation"))
            spool = spool_of.get(bisect_right(ends, index))
            if spool is not None:
                spool.write(b"%d\t%d\t%s\n" % (index, file, _dumped(value, uri)))
            if number % 10_000 == 0:
                progress()
    return counts


def _dumped(value: Any, uri: str) -> bytes:
    try:
        return json.dumps(value).encode()
    except RecursionError as error:
        raise ConfigError(f"{storage.redact(uri)} has an annotation that is nested too deeply") from error


def refuse_if_nothing_is_kept(source: Source, in_coco: CocoImages, counts: AnnotationCounts) -> None:
    """Raises: ConfigError if there are annotations, but none can make a mask."""
    where = f"SOURCE {storage.redact(source.uri)}"
    if counts.num_unknown and not counts.num_known:
        raise ConfigError(
            f"{where}: none of its {counts.num_unknown:,} annotations belongs to one of its {len(in_coco.images):,} "
            f"images; an image_id is {counts.example}, an image has the id {reprlib.repr(in_coco.images[0]['id'])}"
        )
    if counts.num_known and not counts.num_with_mask:
        raise ConfigError(
            f"{where}: none of its {counts.num_known:,} annotations has a mask in `segmentation` (polygons or RLE); "
            "boxes alone are not imported; `samray label ... input.prompts=boxes.jsonl` makes masks from boxes"
        )
