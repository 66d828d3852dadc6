"""Outlines of masks as polygons along the edges of pixels: filling them gives exactly the mask.

Coordinates are those of pixel corners: the image spans 0..width and 0..height, and pixel (x, y) has its centre at
(x + 0.5, y + 0.5). Works on runs, for all masks of an image at once; the cost grows with the length of the outlines,
not with the areas.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from samray.rle.runs import Runs, batches, column_intervals

Ring = npt.NDArray[np.int64]
"""(N, 2) x, y of the corners of a closed outline, without repeating the first."""

_MAX_NEAREST: Final = 256
"""Maximum number of rings to join at their closest points. A mask with more is noise, and would take hours."""


def outlines(masks: list[Runs], image_hw: tuple[int, int]) -> Iterator[list[list[Ring]]]:
    """For each mask its components; for each component its outer ring, then its holes.

    masks: run lengths with the sum H * W. Components are 4-connected: pixels that touch only at a corner are separate.
    Outer rings run counter-clockwise on the screen, holes clockwise. An empty mask has no components.
    """
    for batch in batches(masks, image_hw[0]):
        yield from _outlines(batch, image_hw)


def _outlines(masks: list[Runs], image_hw: tuple[int, int]) -> list[list[list[Ring]]]:
    """`outlines`, all at once."""
    height, width = image_hw
    number, column, top, bottom = column_intervals(masks, height)
    line = height + 1
    left_of = (number * (width + 1) + column) * line  # index of the vertical line at the column's left side
    toggles = np.stack([left_of + top, left_of + bottom], axis=1).ravel()
    direction = np.tile(np.array([1, -1], dtype=np.int8), len(left_of))

    # A vertical line has a corner where the intervals of the columns on its two sides do not start or end alike. Each
    # toggle is one of the column on the right of its own line, and of the column on the left of the next line.
    corners_at, corner_of_toggle = np.unique(np.concatenate([toggles, toggles + line]), return_inverse=True)
    corner_as_right, corner_as_left = np.split(corner_of_toggle, 2)
    on_right, on_left = np.zeros((2, len(corners_at)), dtype=np.int8)
    on_right[corner_as_right] = direction
    on_left[corner_as_left] = direction
    is_corner = on_right != on_left
    corners_at, on_right, on_left = corners_at[is_corner], on_right[is_corner], on_left[is_corner]
    # Where two pixels touch at a corner, two outlines pass: the corner counts twice, above and below.
    twice = (on_right != 0) & (on_left != 0)
    repeats = 1 + twice
    second = np.arange(repeats.sum()) - np.repeat(repeats.cumsum() - repeats, repeats)
    corners_at, on_right, on_left = (np.repeat(values, repeats) for values in (corners_at, on_right, on_left))
    twice = np.repeat(twice, repeats)
    ys = corners_at % line
    xs = corners_at // line % (width + 1)
    number = corners_at // line // (width + 1)

    # Corners come in pairs along a vertical line, each pair an edge, and likewise along a horizontal one. Of a corner
    # that counts twice, the one that bounds the pixel on the left ends the edge on the left.
    slot = np.where(twice & (on_left == 1), 1 - second, second)
    by_row = ((number * line + ys) * (width + 1) + xs) * 2 + slot
    row_order = np.argsort(by_row, kind="stable")
    across = np.empty_like(row_order)
    across[row_order[0::2]], across[row_order[1::2]] = row_order[1::2], row_order[0::2]
    # Lists: `_trace` reads single elements, which is slow from an array.
    rings, ring_of = _trace(across.tolist())

    first = np.array([ring[0] for ring in rings], dtype=np.int64)
    # A ring's leftmost edge has the mask on its right if it is an outer ring, on its left if it is a hole.
    is_outer = on_right[first] == 1
    parent = np.arange(len(rings))
    # The pixel above a hole's first corner belongs to the hole's component, and so does the edge where that pixel's
    # interval starts, which is on an outline found earlier.
    holes = first[~is_outer]
    interval = np.searchsorted(toggles, corners_at[holes]) // 2  # two toggles each: where it starts and where it ends
    # The edge's own corner may be further to the left on that row: the last one at or before this pixel's.
    edge = ((number[holes] * line + top[interval]) * (width + 1) + xs[holes]) * 2 + 1
    parent[~is_outer] = ring_of[row_order[np.searchsorted(by_row[row_order], edge, side="right") - 1]]

    corners = np.stack([xs, ys], axis=1)
    outlines = [corners[ring] for ring in rings]
    return _components(outlines, is_outer.tolist(), parent.tolist(), number[first].tolist(), len(masks))


def _components(
    outlines: list[Ring], is_outer: list[bool], parent: list[int], owner: list[int], num_masks: int
) -> list[list[list[Ring]]]:
    """Each mask's components, each its outer ring and its holes. parent: a hole's ring around it. owner: its mask."""
    components: list[list[list[Ring]]] = [[] for _ in range(num_masks)]
    component_of: list[list[Ring]] = []  # of each ring
    for outline, outer, above, mask in zip(outlines, is_outer, parent, owner, strict=True):
        if outer:
            component_of.append([outline])
            components[mask].append(component_of[-1])
        else:
            # Its outer ring comes earlier: `_trace` goes from left to right.
            component_of.append(component_of[above])
            component_of[-1].append(outline[::-1])  # all rings were traced downwards first: holes turn the other way
    return components


def _trace(across: list[int]) -> tuple[list[list[int]], npt.NDArray[np.int64]]:
    """Follow the edges. across: the other end of each corner's horizontal edge; that of its vertical edge is i ^ 1.

    Returns the rings as corners, each from the top of its leftmost edge downwards, ordered by that edge; and the ring
    of each corner.
    """
    ring_of = [-1] * len(across)
    rings: list[list[int]] = []
    for start in range(0, len(across), 2):
        if ring_of[start] >= 0:
            continue
        ring: list[int] = []
        at = start
        while True:
            below = at ^ 1
            ring += (at, below)
            ring_of[at] = ring_of[below] = len(rings)
            at = across[below]
            if at == start:
                break
        rings.append(ring)
    return rings, np.array(ring_of, dtype=np.int64)


def join(rings: list[Ring]) -> Ring:
    """Join many rings to one polygon: bridges of zero width, passed in both directions, connect them.

    Filled with either rule, even-odd or non-zero, it covers the same area: outer rings minus their holes.
    """
    # A bridge starts at the corner of the polygon so far that is closest to the ring's first corner.
    polygon, *others = rings
    for ring in others[:_MAX_NEAREST]:
        nearest = int(np.square(polygon - ring[0]).sum(axis=1).argmin())
        polygon = np.concatenate([polygon[: nearest + 1], ring, ring[:1], polygon[nearest:]])
    # The rest without looking for the closest corner: each look reads the whole polygon.
    if len(others) > _MAX_NEAREST:
        rest = [part for ring in others[_MAX_NEAREST:] for part in (ring, ring[:1], polygon[:1])]
        polygon = np.concatenate([polygon[:1], *rest, polygon[1:]])
    return polygon


def parted(rings: list[Ring]) -> list[Ring]:
    """The rings of a component, parted where one touches itself at a corner.

    An outer ring that touches itself encloses a hole there, and becomes an outer ring and that hole, as OGC's polygons
    must be: rings that touch in points are valid, one that touches itself is not. Filled, they are the same.
    """
    parts: list[Ring] = []
    for ring in rings:
        numbers = ring[:, 0] << 32 | ring[:, 1]
        if len(np.unique(numbers)) == len(numbers):
            parts.append(ring)
            continue
        loops: list[Ring] = []
        path: list[int] = []  # indices of corners
        index_in_path: dict[int, int] = {}  # corner -> its index in path
        for index, number in enumerate(numbers.tolist()):
            if number in index_in_path:
                start = index_in_path[number]
                loops.append(ring[path[start:]])
                for gone in path[start:]:
                    del index_in_path[int(numbers[gone])]
                del path[start:]
            index_in_path[number] = len(path)
            path.append(index)
        loops.append(ring[path])
        if not parts:  # the outer ring is the loop that turns the other way than all others: the largest
            loops.sort(key=lambda loop: -abs(_area(loop)))
        parts += loops
    return parts


def _area(ring: Ring) -> int:
    """Twice the area that a ring encloses, signed."""
    xs, ys = ring[:, 0], ring[:, 1]
    return int(np.dot(xs, np.roll(ys, -1)) - np.dot(ys, np.roll(xs, -1)))


def simplified(ring: Ring, tolerance: float) -> Ring:
    """The ring without corners that are within tolerance, in pixels, of the remaining outline.

    Not exact: the covered area differs by up to that distance. Source: Ramer 1972; Douglas and Peucker 1973.
    """
    # The algorithm is for open lines: split the ring at its first corner and at the one furthest from it.
    closed = np.concatenate([ring, ring[:1]])
    far = int(np.square(ring - ring[0]).sum(axis=1).argmax())
    keep = {0, far}
    # A list instead of recursion: outlines of large masks would exceed Python's depth.
    todo = [(0, far), (far, len(ring))]
    while todo:
        start, end = todo.pop()
        if end - start < 2:
            continue
        along = closed[end] - closed[start]
        between = closed[start + 1 : end] - closed[start]
        length = float(np.hypot(*along))
        if length:
            distance = np.abs(between[:, 0] * along[1] - between[:, 1] * along[0]) / length
        else:
            distance = np.hypot(between[:, 0], between[:, 1])
        middle = start + 1 + int(distance.argmax())
        if distance[middle - start - 1] > tolerance:
            keep.add(middle)
            todo += [(start, middle), (middle, end)]
    # Two corners have no area: such a small ring stays as it is.
    return ring if len(keep) < 3 else ring[sorted(keep)]
