"""Masks that are the same region in many images: a camera's border, a vehicle's bonnet, a watermark.

A mask's region is its box on a grid of 64 cells per side and the fraction of the box that it fills, in sixteenths. Two
grids, half a cell apart, let a mask that trembles at the edge of a cell of one fall into one cell of the other. A piece
of the output keeps the regions that enough of its images with the same prefix have; `find_regions` adds the pieces up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from samray.audit.hashing import hash_rows

if TYPE_CHECKING:
    from samray.audit.measure import Masks

SIDES: Final = ("x0", "y0", "x1", "y1", "fill")
GRID: Final = 64
_FILL: Final = 16

MIN_IMAGES: Final = 20
MIN_SHARE: Final = 0.1
"""A region is reported if this many images have it, and this share of those with its prefix."""
_PIECE_IMAGES: Final = 3
_PIECE_SHARE: Final = MIN_SHARE / 2
"""The same for a piece: lower, because images with a region need not be spread evenly."""

MASKS_AT_ONCE: Final = 4_000_000
"""Masks of regions that are in memory together, about 100 bytes each: of a camera that does not move, nearly all masks
repeat."""

REPEATS: Final = pa.schema(
    [("prefix", pa.string()), ("region", pa.uint64()), ("image", pa.int32())] + [(side, pa.float32()) for side in SIDES]
)
"""A mask of a region that many images of its piece have. image: row in the piece; sides as fractions of the image;
fill: the mask's fraction of its box."""

REGIONS: Final = pa.schema(
    [("prefix", pa.string()), ("num_images", pa.int64()), ("share", pa.float64())]
    + [(side, pa.float64()) for side in SIDES]
)


@dataclass(slots=True)
class Repeats:
    """The boxes of a piece, collected."""

    images: list[npt.NDArray[np.int32]] = field(default_factory=list)
    shapes: list[npt.NDArray[np.float32]] = field(default_factory=list)
    """(M, 5): x0, y0, x1, y1 as fractions of the image, and fill."""

    def add(self, masks: Masks, num_before: int) -> None:
        """num_before: images of the piece before those of the masks."""
        low, size = masks.boxes_xywh[:, :2], masks.boxes_xywh[:, 2:]
        with np.errstate(divide="ignore", invalid="ignore"):
            fill = masks.area / size.prod(1)
            shapes = np.concatenate([low / masks.size_wh, (low + size) / masks.size_wh, fill[:, None]], axis=1)
        sound = np.isfinite(shapes).all(1)
        self.images.append((masks.parents[sound] + num_before).astype(np.int32))
        self.shapes.append(shapes[sound].astype(np.float32))


def repeats_in(regions_of_masks: Repeats, images: pa.Table) -> pa.Table:
    """The masks (`REPEATS`) whose region enough images of the piece have. images: `MEASURED`."""
    if not regions_of_masks.images:
        return REPEATS.empty_table()
    image, shapes = np.concatenate(regions_of_masks.images), np.concatenate(regions_of_masks.shapes)
    coded = images["prefix"].combine_chunks().dictionary_encode()
    prefix_of = coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    num_of_prefix = np.bincount(prefix_of, minlength=len(coded.dictionary))
    # Prefixes are numbered differently in each piece; their hashes are not.
    hash_of = np.array([_hash_of_text(text) for text in coded.dictionary.to_pylist()], np.uint64)
    needed = np.maximum(_PIECE_IMAGES, np.ceil(_PIECE_SHARE * num_of_prefix))
    columns: list[tuple[Any, ...]] = []
    for shift in (0.0, 0.5):
        regions = _cells(shapes, hash_of[prefix_of[image]], shift)
        values, inverse = np.unique(regions, return_inverse=True)
        # An image counts once, however many such masks it has.
        pairs = np.unique(inverse.astype(np.int64) * images.num_rows + image)
        counts = np.bincount(pairs // images.num_rows, minlength=len(values))
        kept = counts[inverse] >= needed[prefix_of[image]]
        columns.append((prefix_of[image[kept]], regions[kept], image[kept], shapes[kept]))
    prefix, region, image, shapes = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    sides = [pa.array(column) for column in shapes.T]
    return pa.Table.from_arrays(
        [coded.dictionary.take(pa.array(prefix)), pa.array(region), pa.array(image), *sides], schema=REPEATS
    )


def _hash_of_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _cells(shapes: npt.NDArray[np.float32], prefix: npt.NDArray[np.uint64], shift: float) -> npt.NDArray[np.uint64]:
    """A number for the cell of each shape; the prefix is part of it, so that prefixes are counted apart."""
    scaled = shapes * np.array([GRID] * 4 + [_FILL], np.float32) + np.float32(shift)
    cells = np.floor(scaled).astype(np.int64).view(np.uint64)
    grid = np.full(len(prefix), round(2 * shift), np.uint64)
    return hash_rows(np.column_stack([cells, prefix, grid]))


@dataclass(frozen=True, slots=True)
class FoundRegions:
    """The repeated regions of an output."""

    table: pa.Table
    """`REGIONS`, the most frequent first."""
    images: npt.NDArray[np.int64]
    """Images with a mask of one, as indices in the order of the output, each once per region."""
    image_of_region: list[int]
    """For each region, an image that shows it."""


Pieces = Callable[[], Iterable[tuple[pa.Table, int]]]
"""`REPEATS` of each piece, and the images before the piece; called again for each part that fits into memory."""
_Regions = dict[tuple[Any, ...], tuple[dict[str, Any], npt.NDArray[np.int64]]]
"""Prefix and rough place of a region -> its row, and the images with it."""


def find_regions(pieces: Pieces, num_of_prefix: Mapping[str, int]) -> FoundRegions:
    """The regions that enough images have. num_of_prefix: prefix -> its images with masks."""
    num_parts = sum(table.num_rows for table, _ in pieces()) // MASKS_AT_ONCE + 1
    regions: _Regions = {}
    for part in range(num_parts):
        _add_regions(regions, *_part(pieces(), part, num_parts), num_of_prefix)
    rows = sorted(
        regions.values(),
        key=lambda region: (-region[0]["num_images"], region[0]["prefix"], *(region[0][side] for side in SIDES)),
    )
    return FoundRegions(
        pa.Table.from_pylist([record for record, _ in rows], schema=REGIONS),
        np.concatenate([np.zeros(0, np.int64), *(images for _, images in rows)]),
        [int(images[0]) for _, images in rows],
    )


def _part(pieces: Iterable[tuple[pa.Table, int]], part: int, num_parts: int) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    """The masks of a part of the regions, each region whole, and the image of each mask."""
    tables, images = [REPEATS.empty_table()], [np.zeros(0, np.int64)]
    for table, before in pieces:
        chosen = table["region"].to_numpy() % np.uint64(num_parts) == np.uint64(part)
        table = table.filter(pa.array(chosen))
        tables.append(table)
        images.append(table["image"].to_numpy().astype(np.int64) + before)
    return pa.concat_tables(tables), np.concatenate(images)


def _add_regions(
    regions: _Regions, table: pa.Table, image: npt.NDArray[np.int64], num_of_prefix: Mapping[str, int]
) -> None:
    """table: `REPEATS`; image: (M,) of each mask, in the order of the output."""
    cells, inverse = np.unique(table["region"].to_numpy(), return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    stops = np.searchsorted(inverse[order], np.arange(len(cells) + 1))
    shapes = np.column_stack([table[name].to_numpy() for name in SIDES])
    for start, stop in pairwise(stops.tolist()):
        masks = order[start:stop]
        images = np.unique(image[masks])
        prefix = table["prefix"][int(masks[0])].as_py()
        share = len(images) / max(num_of_prefix.get(prefix, 0), 1)
        if len(images) < MIN_IMAGES or share < MIN_SHARE:
            continue
        shape = np.median(shapes[masks], axis=0)
        record = {"prefix": prefix, "num_images": len(images), "share": share}
        record |= dict(zip(SIDES, shape.tolist(), strict=True))
        # The two grids find the same region twice: the one with more images stays.
        key = (prefix, *np.round(shape * (GRID / 4)).tolist())
        if key not in regions or len(regions[key][1]) < len(images):
            regions[key] = (record, images)
