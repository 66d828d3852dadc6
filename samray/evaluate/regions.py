"""Data for `samray evaluate`: images, and the regions that people (or a model) marked on them.

Two Parquet layouts, distinguished by their columns:

- SA-1B's, as samray writes it: an OUTPUT, or any file, folder, prefix or glob of such Parquet. Images are read from
  their `uri`; relative ones start at the folder of the Parquet file.
- BSDS500's, one row per image: `jpeg` (the encoded image), `width`, `height`, and `annotators`, a list of structs whose
  `regions` are COCO's compressed run lengths of size [height, width]. The regions of one annotator are disjoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pycocotools import mask as coco_mask

from samray import storage
from samray.config import InputConfig
from samray.errors import ConfigError, ImageError, NotFoundError, StorageError
from samray.evaluate.columns import is_bytes, is_list, is_text, schema_of
from samray.inputs.decode import RGBArray
from samray.inputs.decode_apart import decode_apart
from samray.inputs.listing import fetch_images
from samray.inputs.rows import INPUT_SCHEMA
from samray.output.mask_dataset import input_config_of
from samray.output.plan import RUN, Plan, load_plan
from samray.output.shards import FOLDER, reraise_damaged, shard_number
from samray.rle.records import Rle
from samray.rle.runs import runs_of_image
from samray.storage.tables import open_parquet

Bool = npt.NDArray[np.bool_]

_ROWS_AT_ONCE: Final = 4


_WANTED: Final[dict[str, dict[str, Callable[[pa.DataType], bool]]]] = {
    "sa1b": {
        "image.width": pa.types.is_integer,
        "image.height": pa.types.is_integer,
        "annotations.segmentation.size": pa.types.is_integer,
        "annotations.segmentation.counts": is_text,
        "uri": is_text,
    },
    "bsds500": {
        "width": pa.types.is_integer,
        "height": pa.types.is_integer,
        "jpeg": is_bytes,
        "annotators.regions": is_text,
    },
}
"""Layout -> its characteristic fields, inside lists, too, and their types."""

_TEXT_IF_THERE: Final = ("status", "error")

_COLUMNS: Final = {
    "sa1b": ["image", "annotations", "uri", "status", "error"],
    "bsds500": ["image_id", "file_name", "width", "height", "jpeg", "annotators"],
}
"""Columns to read, if present."""

_WHAT_DATA_IS: Final = "give an OUTPUT of samray, or Parquet with regions: a file, folder, prefix or glob"


@dataclass(frozen=True, slots=True)
class RegionImage:
    """An image and its known regions."""

    name: str
    """Its URI or file name, without credentials."""
    pixels: RGBArray
    """(H, W, 3) uint8 RGB, upright."""
    annotators: list[list[Rle]]
    """The regions of each annotator, in the image's size; one list if annotators are not distinguished."""

    names: list[list[str | None]] = field(default_factory=list)
    """The class of each region of each annotator; empty lists if DATA has none."""
    file_name: str = ""
    """Its name in DATA, which an OUTPUT of the same images repeats."""
    scores: list[float] = field(default_factory=list)
    """In samray's layout, for each mask: label_score, or predicted_iou if that is null."""

    @property
    def regions(self) -> list[Rle]:
        """The regions of all annotators."""
        return [region for regions in self.annotators for region in regions]


class RleMasks:
    """Masks as run lengths; a slice decodes to (n, H, W) bool."""

    def __init__(self, rles: list[Rle]) -> None:
        self.rles = rles

    def __len__(self) -> int:
        return len(self.rles)

    def __getitem__(self, part: slice) -> Bool:
        columns = coco_mask.decode(self.rles[part])  # (H, W, n), each mask column by column in memory
        return np.ascontiguousarray(np.moveaxis(columns, 2, 0)).view(np.bool_)


def black(hw: tuple[int, int]) -> RGBArray:
    """(H, W, 3) uint8 zeros that take no memory: for an image of which only the size is needed. Read-only."""
    return np.broadcast_to(np.zeros(3, np.uint8), (*hw, 3))


def large_enough(regions: list[Rle], min_area: int) -> list[Rle]:
    """The regions of at least `min_area` pixels, and of at least one."""
    return [region for region, area in zip(regions, areas(regions), strict=True) if area >= max(min_area, 1)]


def with_large_regions(image: RegionImage, min_area: int) -> RegionImage:
    """The image with only its regions of at least `min_area` pixels, and their names."""
    large = [[i for i, area in enumerate(areas(regions)) if area >= max(min_area, 1)] for regions in image.annotators]
    return replace(
        image,
        annotators=[[regions[i] for i in kept] for regions, kept in zip(image.annotators, large, strict=True)],
        names=[[names[i] for i in kept if i < len(names)] for names, kept in zip(image.names, large, strict=False)],
        scores=[image.scores[i] for i in large[0]] if image.scores else [],
    )


def areas(masks: list[Rle]) -> list[int]:
    """The number of pixels of each mask."""
    # One by one: for more than 255, pycocotools 2.0.11 writes their number into a uint8, which numpy 2 refuses.
    return [int(coco_mask.area(mask)) for mask in masks]


@dataclass(frozen=True, slots=True)
class _File:
    uri: str
    layout: str
    num_rows: int
    shard: int | None
    plan: Plan | None
    """The plan of the OUTPUT that the shard belongs to; has the location of images in tars and Parquet files."""


class RegionData:
    """The images of DATA, in order; can be iterated any number of times.

    Yields a RegionImage, or an ImageError if the image cannot be used: a row with status `failed`, an unreadable image,
    or regions that do not fit the image.

    Raises: ConfigError if DATA does not exist or has none of the layouts; StorageError, also while iterating, if
    storage fails as a whole.
    """

    def __init__(self, data: str, limit: int | None = None, *, with_pixels: bool = True) -> None:
        """limit: use only the first N images of DATA. with_pixels: read the images; else they are black."""
        self._with_pixels = with_pixels
        self.uri = storage.normalize(data)
        self.where = storage.redact(self.uri)
        self._files: list[_File] = []
        self.num_images = 0
        plans: dict[str, Plan | None] = {}
        for uri in self._parquet_files():
            if limit is not None and self.num_images >= limit:
                break
            # OUTPUT of OUTPUT/annotations/shard-000000.parquet: its plan locates images in tars and Parquet.
            folder, shard = storage.parent(storage.parent(uri)), shard_number(uri.rpartition("/")[2])
            if shard is not None and folder not in plans:
                plans[folder] = load_plan(folder) if _is_output(folder) else None
            file = _open_file(uri, shard, plans.get(folder))
            self._files.append(file)
            self.num_images += file.num_rows
        if limit is not None:
            self.num_images = min(self.num_images, limit)
        if self.num_images == 0:
            raise ConfigError(f"DATA {self.where} has no images: its Parquet has no rows")

    @property
    def layout(self) -> str:
        """sa1b or bsds500, from the first file."""
        return self._files[0].layout

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[RegionImage | ImageError]:
        """Reads and decodes the next image in a thread while the caller works on this one."""
        images = self._images()
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(next, images, None)
            for _ in range(self.num_images):
                image = coming.result()
                assert image is not None, "as many as were counted"
                coming = pool.submit(next, images, None)
                yield image

    def _parquet_files(self) -> list[str]:
        is_output = storage.is_dir_like(self.uri) and _is_output(self.uri)
        try:
            uris = sorted(
                entry.uri for entry in storage.list_files(storage.join(self.uri, FOLDER) if is_output else self.uri)
            )
        except NotFoundError as error:
            if not is_output:
                raise ConfigError(f"DATA {self.where} does not exist; {_WHAT_DATA_IS}") from error
            uris = []
        # Manifests are Parquet, too, but have no regions.
        files = [uri for uri in uris if uri.lower().endswith(".parquet") and "/_samray/" not in uri]
        if not files and is_output:
            raise ConfigError(f"DATA {self.where} has no labelled images yet; finish `samray label` first")
        if not files:
            raise ConfigError(f"DATA {self.where} has no .parquet file among its {len(uris)} files; {_WHAT_DATA_IS}")
        return files

    def _images(self) -> Iterator[RegionImage | ImageError]:
        left = self.num_images
        for file in self._files:
            places = None if file.plan is None or file.shard is None else file.plan.read_shard(file.shard)
            for number, row in enumerate(_rows(file)):
                if left == 0:
                    return
                left -= 1
                try:
                    if file.layout == "bsds500":
                        yield self._bsds500_image(row)
                    else:
                        yield self._sa1b_image(row, file, None if places is None else places.slice(number, 1))
                except ImageError as error:
                    yield error

    def _bsds500_image(self, row: dict[str, Any]) -> RegionImage:
        name = str(row.get("file_name") or row.get("image_id") or "")
        hw = (row["height"], row["width"])
        marked = [(annotator or {}).get("regions") or [] for annotator in row["annotators"] or []]
        annotators = [[{"size": list(hw), "counts": counts} for counts in regions] for regions in marked]
        names = [(annotator or {}).get("names") or [] for annotator in row["annotators"] or []]
        data = (row["jpeg"] or b"") if self._with_pixels else None
        return replace(_checked(name, hw, data, annotators, InputConfig()), names=names, file_name=name)

    def _sa1b_image(self, row: dict[str, Any], file: _File, photo_row: pa.Table | None) -> RegionImage:
        """photo_row: the image's row in the plan, if there is one."""
        if row.get("status") == "failed":
            error = ImageError.parse(row.get("error") or "")
            raise ImageError(error.reason, storage.redact(error.message) or "failed in DATA")
        # Without a plan the row's own URI is all that locates the image.
        if photo_row is None:
            uri = storage.resolve(storage.parent(file.uri), row["uri"]) if row["uri"] else ""
            photo_row = pa.Table.from_pylist([{"uri": uri}], INPUT_SCHEMA)
        config = InputConfig() if file.plan is None else input_config_of(file.plan)
        (data,) = fetch_images(photo_row, config) if self._with_pixels else (None,)
        if isinstance(data, ImageError):
            raise data
        image = row["image"] or {}
        annotations = [annotation or {} for annotation in row["annotations"] or []]
        hw = (image.get("height"), image.get("width"))
        return replace(
            _checked(str(row["uri"]), hw, data, [[mask.get("segmentation") for mask in annotations]], config),
            names=[[mask.get("label") for mask in annotations]],
            file_name=str(image.get("file_name") or row["uri"]),
            scores=[_score(mask) for mask in annotations],
        )


def _is_output(folder: str) -> bool:
    return storage.exists(storage.join(folder, "_samray", RUN))


def _score(annotation: dict[str, Any]) -> float:
    scores = (annotation.get(name) for name in ("label_score", "predicted_iou"))
    return next((float(score) for score in scores if isinstance(score, int | float)), 0.0)


def _checked(
    name: str, hw: tuple[Any, Any], data: bytes | None, annotators: list[list[Any]], config: InputConfig
) -> RegionImage:
    """data: None for a black image. Raises: ImageError if it cannot be decoded or the regions do not fit it."""
    name = storage.redact(name)
    if _holds_null([hw, annotators]):
        raise ImageError("unreadable", f"the row of {name} lacks its size or part of a region")
    # In a child process with limits, because DATA may come from strangers.
    pixels = black(hw) if data is None else decode_apart(data, config)
    if pixels.shape[:2] != hw:
        is_now = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise ImageError("unreadable", f"{name} is {is_now} pixels, but its regions are for {hw[1]}x{hw[0]}")
    regions = [region for regions in annotators for region in regions]
    if any(region["size"] != list(hw) for region in regions):
        raise ImageError("unreadable", f"{name} has a region that is not {hw[1]}x{hw[0]} pixels like the image")
    try:  # pycocotools may write outside its memory for run lengths with a wrong sum
        runs_of_image(0, [region["counts"] for region in regions], hw)
    except StorageError as error:
        raise ImageError("unreadable", f"{name} has a region that cannot be decoded: {error}") from error
    return RegionImage(name, pixels, annotators)


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return value is None
    return any(map(_holds_null, value))


def _open_file(uri: str, shard: int | None, plan: Plan | None) -> _File:
    """Raises: ConfigError if it is not a Parquet file with a known layout."""
    where = storage.redact(uri)
    schema, num_rows = schema_of(uri)
    leaves = dict(leaf for field in schema for leaf in _leaves(field.name, field.type))
    for layout, wanted in _WANTED.items():
        if all(name in leaves and is_right(leaves[name]) for name, is_right in wanted.items()) and all(
            name not in leaves or is_text(leaves[name]) for name in _TEXT_IF_THERE
        ):
            if plan and (shard is None or shard >= plan.num_shards or plan.num_images_of(shard) != num_rows):
                plan = None  # not as planned any more: use its URIs
            return _File(uri, layout, num_rows, shard, plan)
    layouts = " or ".join(f"{', '.join(wanted)} ({layout})" for layout, wanted in _WANTED.items())
    raise ConfigError(f"DATA {where} has no regions in a known layout: expected {layouts}; found "
                      f"{', '.join(f'{name} {kind}' for name, kind in leaves.items())}")  # fmt: skip


def _leaves(name: str, kind: pa.DataType) -> Iterator[tuple[str, pa.DataType]]:
    """Dotted names of the leaf fields; list elements have no name, because writers differ."""
    while is_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        for field in kind:
            yield from _leaves(f"{name}.{field.name}", field.type)
    else:
        yield name, kind


def _rows(file: _File) -> Iterator[dict[str, Any]]:
    """The rows of a file, read on demand. Raises: StorageError."""
    with storage.open_read(file.uri) as stream:
        with reraise_damaged(file.uri):
            parquet = open_parquet(stream)
            columns = [name for name in _COLUMNS[file.layout] if name in parquet.schema_arrow.names]
            batches = parquet.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False)
        while True:
            with reraise_damaged(file.uri):
                batch = next(batches, None)
            if batch is None:
                return
            # One row at a time as Python objects, which take far more memory than Arrow's.
            for i in range(len(batch)):
                yield batch.slice(i, 1).to_pylist()[0]
