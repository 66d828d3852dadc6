"""Remove small holes and islands from run lengths: no pixels, and no OpenCV.

A *piece* is the part of a run, of a mask or of its background, within one column. All pieces of a small region are
short, and most other short pieces are soon seen to belong to something large: few are left to be looked at closely. The
pieces of many masks are handled together, because a call for each mask would cost more than its work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from samray.rle import encode as rle
from samray.rle.encode import Counts

Int = npt.NDArray[np.signedinteger[Any]]
Bool = npt.NDArray[np.bool_]

_SIDES: Final = (1, -1)
"""Steps to the column on the right and on the left."""


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
    pieces, _ = _small_regions(_Runs.of(masks, image_hw), min_area)
    holes = pieces[~pieces.is_mask]
    filled: list[Counts | None] = [None] * len(masks)
    for index in np.unique(pieces.mask).tolist():
        filled[index] = holes.flipped_in(masks[index], index)
    return filled


def _without_islands(masks: list[Counts], image_hw: tuple[int, int], min_area: int) -> list[Counts]:
    """The masks without small islands, unless an island is its mask's largest."""
    pieces, region = _small_regions(_Runs.of(masks, image_hw), min_area)
    islands, region = pieces[pieces.is_mask], region[pieces.is_mask]
    # Where the small islands are the whole mask, one stays.
    areas = np.bincount(islands.mask, weights=islands.sizes, minlength=len(masks))
    is_all = areas == rle.areas(masks)
    dropped = islands[~(is_all[islands.mask] & _are_largest(islands, region))]
    return [dropped.flipped_in(counts, index) for index, counts in enumerate(masks)]


def _are_largest(islands: _Pieces, region: Int) -> Bool:
    """(P,) whether a piece is of the largest island of its mask, the first in reading order of equally large ones."""
    height, width = islands.runs.image_hw
    column, row = np.divmod(islands.start % (height * width), height)
    # Islands by mask, then the largest, then the first: the first of each mask is the one.
    num = int(region.max(initial=-1)) + 1
    first_pixel = np.full(num, height * width)
    np.minimum.at(first_pixel, region, row * width + column)
    size = np.bincount(region, weights=islands.sizes, minlength=num)
    order = np.lexsort((first_pixel[region], -size[region], islands.mask))
    largest = order[np.unique(islands.mask[order], return_index=True)[1]]
    return np.isin(region, region[largest])


def _small_regions(runs: _Runs, min_area: int) -> tuple[_Pieces, Int]:
    """The pieces of all regions smaller than min_area pixels, in order, and the number of each piece's region (P,)."""
    pieces = runs.short_pieces(min_area)
    # What stays are all pieces of small regions, and few others.
    pieces = pieces[~_are_of_large(pieces, min_area)]
    num = len(pieces)
    touches_large = np.zeros(num, bool)
    ends: list[Int] = []
    for side in _SIDES:
        touched = pieces.touched(side, np.arange(num))
        # Every second run, from the first to the last that a piece touches.
        last = np.searchsorted(runs.start, touched.last, "right") - 1
        num_touched = (last - touched.run) // 2 + 1
        at = np.repeat(np.arange(len(last)), num_touched)
        step = np.arange(len(at)) - (num_touched.cumsum() - num_touched)[at]
        piece = touched.piece[at]
        other = pieces.find(np.maximum(runs.start[touched.run[at] + 2 * step], touched.column[at]))
        touches_large[piece[other < 0]] = True  # any piece that is not here is of a large region
        ends = [piece[other >= 0], other[other >= 0]]  # both sides give the same pairs
    region = _joined(num, *ends) if ends else np.arange(num)
    size = np.bincount(region, weights=pieces.sizes, minlength=num)
    size[region[touches_large]] = min_area
    is_small = size[region] < min_area
    return pieces[is_small], region[is_small]


def _are_of_large(pieces: _Pieces, min_area: int) -> Bool:
    """(P,) whether a piece, with some that are joined to it, has min_area pixels.

    From each piece goes a chain to the right, in each column to the first piece that touches it, and if these are not
    enough, another one to the left. pieces: all shorter than min_area.
    """
    num = len(pieces)
    known = pieces.sizes  # pixels of the region of each piece, at least
    open_ = np.arange(num)
    for side in _SIDES:
        touched = pieces.touched(side, open_)
        other = pieces.find(np.maximum(pieces.runs.start[touched.run], touched.column))
        known[touched.piece[other < 0]] = min_area  # a piece that is not here is long
        # With one more node, at which all chains end.
        total, link = np.append(known, 0), np.full(num + 1, num)
        link[touched.piece] = np.where(other < 0, num, other)
        # Each round doubles the length of the chains that are summed.
        while len(open_ := open_[(link[open_] < num) & (total[open_] < min_area)]):
            total[open_], link[open_] = total[open_] + total[link[open_]], link[link[open_]]
        # Not the sums: the other chain may come back to the pieces of this one.
        known = np.where(total[:-1] < min_area, known, min_area)
        open_ = np.flatnonzero(known < min_area)
    return known >= min_area


class _Touched(NamedTuple):
    """What pieces touch in the next column. Shapes: T pieces that touch any of their own kind."""

    piece: Int
    """(T,) index of the piece."""
    run: Int
    """(T,) the first run that it touches."""
    last: Int
    """(T,) the last position that it can touch."""
    column: Int
    """(T,) where the column starts."""


@dataclass(frozen=True, slots=True)
class _Runs:
    """The runs of M masks and of their background. The images of the masks follow each other. Shapes: N runs."""

    image_hw: tuple[int, int]
    start: Int
    """(N,) column-major position."""
    end: Int
    """(N,) exclusive."""
    first: Int
    """(M,) the first run of each mask, which is of its background; every second one is."""

    @classmethod
    def of(cls, masks: list[Counts], image_hw: tuple[int, int]) -> _Runs:
        """masks: run lengths."""
        lengths = np.concatenate(masks)
        end = lengths.cumsum()  # those of a mask sum to the pixels of its image
        num_runs = np.array([len(counts) for counts in masks])
        return cls(image_hw, end - lengths, end, num_runs.cumsum() - num_runs)

    def short_pieces(self, min_area: int) -> _Pieces:
        """All pieces of fewer than min_area pixels, but for whole columns of a run that have more together."""
        height = self.image_hw[0]
        first_end = (self.start // height + 1) * height  # of a run's first column
        last_start = (self.end - 1) // height * height  # of its last one
        is_in_one = self.end <= first_end
        one = np.flatnonzero(is_in_one & (self.end - self.start < min_area) & (self.end > self.start))
        head = np.flatnonzero(~is_in_one & (first_end - self.start < min_area))
        tail = np.flatnonzero(~is_in_one & (self.end - last_start < min_area))
        run = [one, head, tail]
        start = [self.start[one], self.start[head], last_start[tail]]
        end = [self.end[one], first_end[head], self.end[tail]]
        if height < min_area:  # so may be whole columns between the first and the last, which are joined
            few = np.flatnonzero((first_end < last_start) & (last_start - first_end < min_area))
            num_columns = (last_start - first_end)[few] // height
            around = np.repeat(few, num_columns)
            step = np.arange(len(around)) - np.repeat(num_columns.cumsum() - num_columns, num_columns)
            column = first_end[around] + step * height
            run.append(around)
            start.append(column)
            end.append(column + height)
        starts = np.concatenate(start)
        order = np.argsort(starts)
        return _Pieces(self, np.concatenate(run)[order], starts[order], np.concatenate(end)[order])


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Parts of runs within one column, in order. Shapes: P pieces."""

    runs: _Runs
    run: Int
    """(P,) index of the run."""
    start: Int
    """(P,) position as in `_Runs`."""
    end: Int
    """(P,) exclusive."""

    def __getitem__(self, chosen: Bool) -> _Pieces:
        return _Pieces(self.runs, self.run[chosen], self.start[chosen], self.end[chosen])

    def __len__(self) -> int:
        return len(self.run)

    @property
    def sizes(self) -> Int:
        """(P,) pixels."""
        return self.end - self.start

    @property
    def mask(self) -> Int:
        """(P,) index of the mask."""
        height, width = self.runs.image_hw
        index: Int = self.start // (height * width)
        return index

    @property
    def is_mask(self) -> Bool:
        """(P,) a piece of the mask, not of its background."""
        is_odd: Bool = (self.run - self.runs.first[self.mask]) % 2 == 1
        return is_odd

    def find(self, start: Int) -> Int:
        """The index of the piece that starts at each of these positions; -1 if there is none."""
        if len(self) == 0:
            return np.full(len(start), -1)
        index = np.minimum(np.searchsorted(self.start, start), len(self) - 1)
        return np.where(self.start[index] == start, index, -1)

    def touched(self, side: int, piece: Int) -> _Touched:
        """What the pieces of these indices touch of their own kind in the column to that side, also by a corner."""
        height, width = self.runs.image_hw
        column = self.start[piece] // height
        x = column % width
        is_inside = x > 0 if side < 0 else x < width - 1
        piece, column = piece[is_inside], (column[is_inside] + side) * height
        # From one row above to one row below.
        low = np.maximum(self.start[piece] - 1 + side * height, column)
        last = np.minimum(self.end[piece] + side * height, column + height - 1)
        run = np.searchsorted(self.runs.end, low, "right")
        # Runs of a mask and of its background alternate. Behind the last run of all there is nothing to touch.
        run += (run - self.run[piece]) % 2
        is_run = run < len(self.runs.start)
        run[~is_run] = 0
        touches = is_run & (self.runs.start[run] <= last)
        return _Touched(piece[touches], run[touches], last[touches], column[touches])

    def flipped_in(self, counts: Counts, index: int) -> Counts:
        """Run lengths of mask number `index`, with those of these pieces that are in its image inverted.

        counts: its run lengths.
        """
        height, width = self.runs.image_hw
        num_pixels = height * width
        here = slice(*np.searchsorted(self.start, [index * num_pixels, (index + 1) * num_pixels]))
        if here.start == here.stop:
            return counts
        changes = counts.cumsum()[: len(counts) // 2 * 2]
        offset = index * num_pixels
        changes = np.concatenate([changes, self.start[here] - offset, self.end[here] - offset])
        return rle.encode_positions(changes, 1, num_pixels)[0]


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
