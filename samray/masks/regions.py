"""Remove small holes and islands from run lengths: no pixels, and no OpenCV."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from samray.rle import encode as rle
from samray.rle.encode import Counts

Int = npt.NDArray[np.int64]


def remove_small_regions(counts: Counts, image_hw: tuple[int, int], min_area: int) -> Counts | None:
    """Fill holes, then drop islands, smaller than min_area pixels; both 8-connected.

    counts: the run lengths of a mask, with at least one pixel. Every background region counts as a hole, even at the
    image border. If all islands are small, the largest one is kept. Returns None if nothing is small (no change).
    Source: `segment_anything.utils.amg.remove_small_regions`, with the same result. If all islands are small and
    equally large, keeps the first in reading order (the reference's choice depends on OpenCV's labelling).
    """
    height, width = image_hw
    islands = _Pieces.of(*rle.runs(counts), height)
    holes = _Pieces.of(*rle.runs(np.append(0, counts)), height)
    # Holes first, as in the reference: an island inside of a filled hole is then a part of the mask.
    is_small = holes.sizes() < min_area
    filled = None
    if is_small.any():
        fill = is_small[holes.labels]
        starts = np.concatenate([islands.starts, holes.starts[fill]])
        ends = np.concatenate([islands.ends, holes.ends[fill]])
        filled = rle.encode_runs(starts, ends, height * width)
        islands = _Pieces.of(*rle.runs(filled), height)
    sizes = islands.sizes()
    is_large = sizes >= min_area
    if is_large.all():
        return filled
    if not is_large.any():
        largest = np.flatnonzero(sizes == sizes.max())
        is_large[largest[islands.first_in_reading_order(width)[largest].argmin()]] = True
    kept = is_large[islands.labels]
    return rle.encode_runs(islands.starts[kept], islands.ends[kept], height * width)


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The runs of a mask, cut where columns end, with the region that each belongs to."""

    starts: Int
    """(P,) column-major positions, ascending."""
    ends: Int
    """(P,) exclusive."""
    height: int
    labels: Int
    """(P,) number of the region, 8-connected."""

    @classmethod
    def of(cls, starts: Int, ends: Int, height: int) -> _Pieces:
        """starts, ends: of runs as from `rle.runs`."""
        starts, ends = starts[ends > starts], ends[ends > starts]
        column = starts // height
        num = (ends - 1) // height - column + 1  # columns of each run
        run = np.repeat(np.arange(len(num)), num)
        column = column[run] + np.arange(len(run)) - (num.cumsum() - num)[run]
        starts = np.maximum(starts[run], column * height)
        ends = np.minimum(ends[run], (column + 1) * height)
        return cls(starts, ends, height, _labels(column, starts - column * height, ends - column * height, height))

    def sizes(self) -> Int:
        """Pixels of each region."""
        return np.bincount(self.labels, weights=self.ends - self.starts).astype(np.int64)

    def first_in_reading_order(self, width: int) -> Int:
        """Row-major position of the first pixel of each region."""
        column, row = np.divmod(self.starts, self.height)
        first = np.full(self.labels.max() + 1, self.height * width)
        np.minimum.at(first, self.labels, row * width + column)
        return first


def _labels(column: Int, first: Int, end: Int, height: int) -> Int:
    """Number the 8-connected regions of vertical pieces, rows `first` to `end` (exclusive), ordered by position."""
    if len(column) == 0:
        return column
    # One number orders columns and rows, with a row to spare at both ends of a column.
    stride = height + 2
    top, bottom = column * stride + first + 1, column * stride + end
    # Pieces of the next column from one row above to one row below.
    begin = np.searchsorted(bottom, top + stride - 1)
    stop = np.searchsorted(top, bottom + stride + 1, side="right")
    num = np.maximum(stop - begin, 0)
    piece = np.repeat(np.arange(len(num)), num)
    neighbour = begin[piece] + np.arange(len(piece)) - (num.cumsum() - num)[piece]
    touching = coo_array((np.ones(len(piece), dtype=bool), (piece, neighbour)), shape=(len(num), len(num)))
    labels: Int = connected_components(touching, directed=False)[1].astype(np.int64)
    return labels
