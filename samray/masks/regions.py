"""Remove small holes and islands from run lengths: no pixels, and no OpenCV.

The runs of many masks are the nodes of one graph: a call for each mask would cost more than its work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from samray.rle import encode as rle
from samray.rle.encode import Counts

Int = npt.NDArray[np.signedinteger[Any]]
Bool = npt.NDArray[np.bool_]


def remove_small_regions(masks: list[Counts], image_hw: tuple[int, int], min_area: int) -> list[Counts | None]:
    """Fill holes, then drop islands, smaller than min_area pixels; both 8-connected.

    masks: the run lengths of each mask, with at least one pixel. Every background region counts as a hole, even at the
    image border. If all islands are small, the largest one is kept. None for masks in which nothing is small (no
    change). Source: `segment_anything.utils.amg.remove_small_regions`, with the same result. If all islands are small
    and equally large, keeps the first in reading order (the reference's choice depends on OpenCV's labelling).
    """
    # Holes first, as in the reference: an island inside of a filled hole is then a part of the mask.
    cleaned = [counts for batch in rle.batches(masks) for counts in _with_holes_filled(batch, image_hw, min_area)]
    changed = [i for i, counts in enumerate(cleaned) if counts is not None]
    filled = [counts for counts in cleaned if counts is not None]
    kept = [counts for batch in rle.batches(filled) for counts in _without_islands(batch, image_hw, min_area)]
    for index, counts in zip(changed, kept, strict=True):
        cleaned[index] = counts
    return cleaned


def _with_holes_filled(masks: list[Counts], image_hw: tuple[int, int], min_area: int) -> list[Counts | None]:
    """The masks without small holes; None for those without small holes and islands."""
    pieces = _Pieces.of(masks, image_hw)
    is_small = pieces.sizes()[pieces.region] < min_area
    changed = np.unique(pieces.mask[is_small])
    filled: list[Counts | None] = [None] * len(masks)
    for index, counts in zip(changed.tolist(), pieces.encode(pieces.is_mask | is_small, changed), strict=True):
        filled[index] = counts
    return filled


def _without_islands(masks: list[Counts], image_hw: tuple[int, int], min_area: int) -> list[Counts]:
    """The masks without small islands, unless an island is its mask's largest."""
    pieces = _Pieces.of(masks, image_hw)
    kept = pieces.kept_islands(min_area)[pieces.region] & pieces.is_mask
    return pieces.encode(kept, np.arange(len(masks)))


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The runs of masks and of their background, cut where columns end, with the region that each belongs to.

    Several whole columns of one run are one piece. Shapes: P pieces, those of masks first, then those of background;
    within both by mask and position.
    """

    image_hw: tuple[int, int]
    mask: Int
    """(P,) index of the mask."""
    is_mask: Bool
    """(P,) a piece of the mask, not of its background."""
    start: Int
    """(P,) column-major position."""
    end: Int
    """(P,) exclusive."""
    region: Int
    """(P,) number of the 8-connected region of one mask or of its background; not all numbers are used."""

    @classmethod
    def of(cls, masks: list[Counts], image_hw: tuple[int, int]) -> _Pieces:
        """masks: run lengths."""
        height, width = image_hw
        mask, is_mask, start, end = rle.all_runs(masks)
        # The part before the first border between columns, whole columns, and the part behind the last border.
        first, last = -(-start // height) * height, end // height * height
        first, last = np.minimum(first, end), np.maximum(last, np.minimum(first, end))
        order = np.concatenate([np.flatnonzero(is_mask), np.flatnonzero(~is_mask)])
        start, first, last, end = start[order], first[order], last[order], end[order]
        start, end = np.stack([start, first, last], axis=1).ravel(), np.stack([first, last, end], axis=1).ravel()
        piece = np.flatnonzero(end > start)
        run = order[piece // 3]
        start, end, mask, is_mask = start[piece], end[piece], mask[run], is_mask[run]
        # A column to spare after each mask, and a mask between masks and background.
        spare = mask + np.where(is_mask, 0, (len(masks) + 1) * (width + 1))
        region = _regions(start, end, spare, height)
        offset = mask * (height * width)
        return cls(image_hw, mask, is_mask, start - offset, end - offset, region)

    def sizes(self) -> Int:
        """Pixels of each region; 0 for a number that is not used."""
        return np.bincount(self.region, weights=self.end - self.start).astype(np.int64)

    def kept_islands(self, min_area: int) -> Bool:
        """Which regions have min_area pixels or are the largest island of their mask."""
        height, width = self.image_hw
        sizes = self.sizes()
        column, row = np.divmod(self.start, height)
        first_pixel = np.full(len(sizes), height * width)  # in reading order
        np.minimum.at(first_pixel, self.region, row * width + column)
        mask = np.zeros(len(sizes), dtype=np.int64)
        mask[self.region] = self.mask
        island = np.unique(self.region[self.is_mask])
        largest_first = island[np.lexsort((first_pixel[island], -sizes[island], mask[island]))]
        kept = sizes >= min_area
        kept[largest_first[np.unique(mask[largest_first], return_index=True)[1]]] = True
        return kept

    def encode(self, chosen: Bool, masks: Int) -> list[Counts]:
        """Run lengths of the chosen (P,) pieces of the masks of these indices, which ascend."""
        num_pixels = self.image_hw[0] * self.image_hw[1]
        number = np.full(self.mask.max() + 1, -1)
        number[masks] = np.arange(len(masks))
        number = number[self.mask]
        piece = np.flatnonzero(chosen & (number >= 0))
        offset = number[piece] * (num_pixels + 1)
        changes = np.concatenate([self.start[piece] + offset, self.end[piece] + offset])
        return rle.encode_positions(changes, len(masks), num_pixels)


def _regions(start: Int, end: Int, spare: Int, height: int) -> Int:
    """(P,) numbers of the 8-connected regions of pieces of columns.

    start, end: column-major positions. spare: columns to insert before each piece. With them, pieces are in order.
    """
    # One number orders columns and rows, with a row to spare at both ends of a column.
    stride = height + 2
    first, last = start // height, (end - 1) // height  # columns
    top, bottom = start - first * height + 1, end - last * height
    first, last = (first + spare) * stride, (last + spare) * stride
    # The highest piece of the column before and of the next one, from one row above to one row below. Of two columns'
    # pieces that touch, one is the highest that touches the other: no more need to be known.
    itself = np.arange(len(start))
    before = np.searchsorted(last + bottom, first + top - stride - 1)
    touches = (last + top)[before] <= first + bottom - stride + 1  # `before` is never behind the piece itself
    before = np.where(touches, before, itself)
    after = np.searchsorted(first + bottom, last + top + stride - 1)
    is_last = after == len(start)
    after[is_last] = 0
    touches = ~is_last & ((first + top)[after] <= last + bottom + stride + 1)
    joins = np.flatnonzero(touches & (before[after] != itself))  # few: those with a second piece before them
    leftmost = _followed(before)
    is_leftmost = leftmost == itself
    number = (is_leftmost.cumsum() - 1)[leftmost]
    region: Int = _joined(int(is_leftmost.sum()), number[joins], number[after[joins]])[number]
    return region


def _joined(num: int, one: Int, other: Int) -> Int:
    """(num,) the lowest member of the component of each of num nodes. one, other: (E,) ends of the edges."""
    lowest = np.arange(num)
    # Each round at least halves the components that are not complete, or the next one does.
    while len(one):
        np.minimum.at(lowest, np.maximum(one, other), np.minimum(one, other))
        lowest = _followed(lowest)
        one, other = lowest[one], lowest[other]
        apart = one != other
        one, other = one[apart], other[apart]
    return lowest


def _followed(to: Int) -> Int:
    """(N,) where each node ends that goes on to the node `to` until that is itself."""
    while not np.array_equal(further := to[to], to):
        to = further
    return to
