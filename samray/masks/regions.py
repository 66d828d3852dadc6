"""Remove small holes and islands, without OpenCV and without touching pixels far from the mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Bool = npt.NDArray[np.bool_]
Int = npt.NDArray[np.signedinteger[Any]]
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


def remove_small_regions(mask: Bool, box_xyxy: npt.ArrayLike, image_hw: tuple[int, int], min_area: int) -> Bool | None:
    """Fill holes, then drop islands, smaller than min_area pixels; both 8-connected.

    mask: (y1 - y0 + 1, x1 - x0 + 1) bool, the part of the mask within its box; box_xyxy: (4,), inclusive. Every
    background region counts as a hole, even at the image border. If all islands are small, the largest one is kept.
    Returns the (H, W) mask of the whole image, or None if nothing is small (no change).
    Source: `segment_anything.utils.amg.remove_small_regions`, with the same result. If all islands are small and
    equally large, keeps the first in reading order (the reference's choice depends on OpenCV's labelling).
    """
    x0, y0, x1, y1 = (int(v) for v in np.asarray(box_xyxy))
    height, width = image_hw
    # Around its box the mask is 0: the area above, below, left and right is represented by one row or column each,
    # weighted by the pixels it represents. Connections and sizes are those of the whole image.
    rows = np.array([y0, *[1] * (y1 - y0 + 1), height - 1 - y1])
    cols = np.array([x0, *[1] * (x1 - x0 + 1), width - 1 - x1])
    framed = np.pad(mask, 1)[np.ix_(rows > 0, cols > 0)]
    rows, cols = rows[rows > 0], cols[cols > 0]

    # Holes first, as in the reference: an island inside of a filled hole is then a part of the mask.
    filled = _fill_holes(framed, rows, cols, min_area)
    cleaned = _drop_islands(framed if filled is None else filled, rows, cols, min_area)
    result = filled if cleaned is None else cleaned
    # Back to the image's size: a row or column as often as the pixels that it represents.
    return None if result is None else result.repeat(rows, axis=0).repeat(cols, axis=1)


def _fill_holes(mask: Bool, rows: Int, cols: Int, min_area: int) -> Bool | None:
    labels, sizes = _label(~mask, rows, cols)
    small = sizes < min_area
    small[0] = False  # the mask itself
    return mask | small[labels] if small.any() else None


def _drop_islands(mask: Bool, rows: Int, cols: Int, min_area: int) -> Bool | None:
    labels, sizes = _label(mask, rows, cols)
    large = sizes >= min_area
    large[0] = False  # the background
    num_large = np.count_nonzero(large)
    if num_large == len(sizes) - 1:
        return None
    if num_large == 0:
        # argmax takes the first of equals.
        large[1 + np.argmax(sizes[1:])] = True
    kept: Bool = large[labels]
    return kept


def _label(mask: Bool, rows: Int, cols: Int) -> tuple[Int, Int]:
    """Regions of 1, numbered from 1 in reading order, and each label's size in pixels (label 0: outside the mask)."""
    labels, num = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)
    # Pixels that each cell of the frame represents.
    weights = np.multiply.outer(rows, cols).ravel()
    sizes = np.bincount(labels.ravel(), weights=weights, minlength=num + 1)
    return labels, sizes.astype(np.int64)
