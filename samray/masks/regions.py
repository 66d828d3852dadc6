"""Remove small holes and islands from run lengths: no pixels, and no OpenCV.

A *piece* is the part of a run, of a mask or of its background, within one column. All pieces of a small region are
short, and most other short pieces are soon seen to belong to something large: few are left to be looked at closely. The
pieces of many masks are handled together, because a call for each mask would cost more than its work.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    return [counts for batch in rle.batches(masks) for counts in _cleaned(batch, image_hw, min_area)]


def _cleaned(masks: list[Counts], image_hw: tuple[int, int], min_area: int) -> list[Counts | None]:
    """`remove_small_regions`, all at once."""
    small, region = _small_regions(_Runs.of(masks, image_hw), min_area)
    is_hole = ~small.is_mask
    holes, islands = (set(small.mask[of_kind].tolist()) for of_kind in (is_hole, ~is_hole))
    cleaned: list[Counts | None] = [None] * len(masks)
    # Holes first, as in the reference: an island next to a filled hole may be large then.
    steps = [(holes, small[is_hole]), (islands - holes, _dropped(masks, small, region))]
    for indices, pieces in steps:
        for index, counts in zip(sorted(indices), pieces.inverted_in(masks, sorted(indices)), strict=True):
            cleaned[index] = counts
    both = sorted(holes & islands)
    filled = [counts for counts in (cleaned[index] for index in both) if counts is not None]
    if filled:
        dropped = _dropped(filled, *_small_regions(_Runs.of(filled, image_hw), min_area))
        for index, counts in zip(both, dropped.inverted_in(filled, range(len(filled))), strict=True):
            cleaned[index] = counts
    return cleaned


def _dropped(masks: list[Counts], small: _Pieces, region: Int) -> _Pieces:
    """The pieces of all small islands, but for the largest one of a mask that has no other islands."""
    islands, region = small[small.is_mask], region[small.is_mask]
    # Masks of nothing else.
    pixels = np.bincount(islands.mask, weights=islands.sizes, minlength=len(masks))
    is_all = np.zeros(len(masks), bool)
    for index in np.flatnonzero(pixels).tolist():
        is_all[index] = pixels[index] == rle.area(masks[index])
    if not is_all.any():
        return islands
    return islands[~(is_all[islands.mask] & _are_largest(islands, region))]


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
        other = pieces.find(np.maximum(pieces.runs.start.take(touched.run), touched.column))
        known[touched.piece.compress(other < 0)] = min_area  # a piece that is not here is long
        # With one more node, at which all chains end.
        total, link = np.append(known, 0), np.full(num + 1, num)
        link[touched.piece] = np.where(other < 0, num, other)
        # Each round doubles the length of the chains that are summed.
        while len(open_):
            following, size = link.take(open_), total.take(open_)
            goes_on = np.flatnonzero((following < num) & (size < min_area))
            open_, following = open_.take(goes_on), following.take(goes_on)
            total[open_], link[open_] = size.take(goes_on) + total.take(following), link.take(following)
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
        size = self.end - self.start
        first_end = (self.start // height + 1) * height  # of a run's first column
        short = np.flatnonzero(size < min_area)
        one = short[(self.end[short] <= first_end[short]) & (size[short] > 0)]
        longer = np.flatnonzero(self.end > first_end)  # than one column
        head = longer[(first_end - self.start)[longer] < min_area]
        last_start = (self.end[longer] - 1) // height * height  # of a run's last column
        is_tail = self.end[longer] - last_start < min_area
        tail = longer[is_tail]
        run = [one, head, tail]
        start = [self.start[one], self.start[head], last_start[is_tail]]
        end = [self.end[one], first_end[head], self.end[tail]]
        if height < min_area:  # so may be whole columns between the first and the last, which are joined
            between = last_start - first_end[longer]
            few = (between > 0) & (between < min_area)
            around, num_columns = np.repeat(longer[few], between[few] // height), between[few] // height
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
        # Faster than three indices by booleans.
        at = np.flatnonzero(chosen)
        return _Pieces(self.runs, self.run.take(at), self.start.take(at), self.end.take(at))

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
        is_odd: Bool = ((self.run - self.runs.first.take(self.mask)) & 1).astype(bool)
        return is_odd

    def find(self, start: Int) -> Int:
        """The index of the piece that starts at each of these positions; -1 if there is none."""
        if len(self) == 0:
            return np.full(len(start), -1)
        index = np.minimum(np.searchsorted(self.start, start), len(self) - 1)
        return np.where(self.start.take(index) == start, index, -1)

    def touched(self, side: int, piece: Int) -> _Touched:
        """What the pieces of these indices touch of their own kind in the column to that side, also by a corner."""
        height, width = self.runs.image_hw
        column = self.start.take(piece) // height
        x = column % width
        inside = np.flatnonzero(x > 0 if side < 0 else x < width - 1)
        piece, column = piece.take(inside), (column.take(inside) + side) * height
        # From one row above to one row below.
        low = np.maximum(self.start.take(piece) - 1 + side * height, column)
        last = np.minimum(self.end.take(piece) + side * height, column + height - 1)
        run = np.searchsorted(self.runs.end, low, "right")
        # Runs of a mask and of its background alternate. Behind the last run of all there is nothing to touch.
        run += (run - self.run.take(piece)) & 1
        start = self.runs.start.take(run, mode="clip")
        touches = np.flatnonzero((run < len(self.runs.start)) & (start <= last))
        return _Touched(piece.take(touches), run.take(touches), last.take(touches), column.take(touches))

    def inverted_in(self, masks: list[Counts], indices: Sequence[int]) -> list[Counts]:
        """Run lengths of the masks of these indices, with those of the pieces that are in their images inverted.

        masks: run lengths of all masks. indices: ascending.
        """
        num_pixels = self.runs.image_hw[0] * self.runs.image_hw[1]
        number = np.full(len(masks), -1)
        number[indices] = np.arange(len(indices))
        index = self.mask
        here = number[index] >= 0
        # From one image after the other to one position more per image, as `encode_positions` takes them.
        offset = (number[index] * (num_pixels + 1) - index * num_pixels)[here]
        changes = [masks[i].cumsum()[: len(masks[i]) // 2 * 2] + at * (num_pixels + 1) for at, i in enumerate(indices)]
        # Two changes at one position cancel.
        position = np.concatenate([*changes, self.start[here] + offset, self.end[here] + offset])
        return rle.encode_positions(position, len(indices), num_pixels)


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
