"""The outlines of masks as polygons that follow the edges of pixels, so that filling them gives the mask back exactly.

Coordinates are those of pixel corners: the image spans 0..width and 0..height, and pixel (x, y) has its centre at
(x + 0.5, y + 0.5). Everything is done on runs, for all masks of an image at once; the cost grows with the length of the
outlines, not with the areas.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from samray.rle.runs import Runs, batches, column_intervals

Ring = npt.NDArray[np.int64]
"""(N, 2) x, y of the corners of a closed outline; the first is not repeated at the end."""

_MAX_NEAREST: Final = 256
"""Rings that are joined where they come closest; a mask of more is noise, for which that would take hours."""


def outlines(masks: list[Runs], image_hw: tuple[int, int]) -> Iterator[list[list[Ring]]]:
    """For each mask its components, for each component its outer ring and then its holes.

    masks: run lengths that sum to H * W. Components are 4-connected: pixels that touch at a corner only are two.
    Outer rings run counter-clockwise as seen on the screen, holes clockwise. An empty mask has no component.
    """
    for batch in batches(masks, image_hw[0]):
        yield from _outlines(batch, image_hw)


def _outlines(masks: list[Runs], image_hw: tuple[int, int]) -> list[list[list[Ring]]]:
    """As `outlines`, all at once."""
    height, width = image_hw
    number, column, top, bottom = column_intervals(masks, height)
    line = height + 1
    left_of = (number * (width + 1) + column) * line  # of the vertical line that is the column's left side
    toggles = np.stack([left_of + top, left_of + bottom], axis=1).ravel()
    direction = np.tile(np.array([1, -1], dtype=np.int8), len(left_of))

    # A corner lies where the columns on both sides of a vertical line do not start or end alike.
    places = np.union1d(toggles, toggles + line)
    on_right, on_left = np.zeros((2, len(places)), dtype=np.int8)
    on_right[np.searchsorted(places, toggles)] = direction
    on_left[np.searchsorted(places, toggles + line)] = direction
    is_corner = on_right != on_left
    places, on_right, on_left = places[is_corner], on_right[is_corner], on_left[is_corner]
    # Where two pixels touch at a corner, two outlines pass: it counts twice, above and below.
    twice = (on_right != 0) & (on_left != 0)
    repeats = 1 + twice
    second = np.arange(repeats.sum()) - np.repeat(repeats.cumsum() - repeats, repeats)
    places, on_right, on_left = (np.repeat(values, repeats) for values in (places, on_right, on_left))
    twice = np.repeat(twice, repeats)
    ys = places % line
    xs = places // line % (width + 1)
    number = places // line // (width + 1)

    # Along a vertical line the corners come in pairs, each an edge, and so they do along a horizontal one. Of a corner
    # that counts twice the one that bounds the pixel on the left ends the edge on the left.
    slot = np.where(twice & (on_left == 1), 1 - second, second)
    by_row = ((number * line + ys) * (width + 1) + xs) * 2 + slot
    row_order = np.argsort(by_row, kind="stable")
    across = np.empty_like(row_order)
    across[row_order[0::2]], across[row_order[1::2]] = row_order[1::2], row_order[0::2]
    rings, ring_of = _trace(across.tolist())

    first = np.array([ring[0] for ring in rings], dtype=np.int64)
    is_outer = on_right[first] == 1
    parent = np.arange(len(rings))
    # The pixel above a hole's first corner belongs to its component, and so does the edge at which that pixel's
    # interval starts: on an outline that was found before.
    holes = first[~is_outer]
    interval = np.searchsorted(toggles, places[holes]) // 2
    edge = ((number[holes] * line + top[interval]) * (width + 1) + xs[holes]) * 2 + 1
    parent[~is_outer] = ring_of[row_order[np.searchsorted(by_row[row_order], edge, side="right") - 1]]

    found: list[list[list[Ring]]] = [[] for _ in masks]
    component: list[list[Ring]] = []
    corners = np.stack([xs, ys], axis=1)
    owner = number[first].tolist()
    for index, (ring, outer, above) in enumerate(zip(rings, is_outer.tolist(), parent.tolist(), strict=True)):
        outline = corners[ring]
        if outer:
            component.append([outline])
            found[owner[index]].append(component[-1])
        else:
            component.append(component[above])
            component[-1].append(outline[::-1])
    return found


def _trace(across: list[int]) -> tuple[list[list[int]], npt.NDArray[np.int64]]:
    """Follow the edges. across: the other end of each corner's horizontal edge; that of its vertical one is i ^ 1.

    Returns the rings as corners, each from the top of its leftmost edge downwards, in the order of those; and the ring
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
    """One polygon of many: each ring hangs on the others by a bridge of no width, passed there and back.

    Filled by either rule, even-odd or non-zero, it covers what the rings cover: outer ones less their holes.
    """
    polygon, *others = rings
    for ring in others[:_MAX_NEAREST]:
        nearest = int(np.square(polygon - ring[0]).sum(axis=1).argmin())
        polygon = np.concatenate([polygon[: nearest + 1], ring, ring[:1], polygon[nearest:]])
    if len(others) > _MAX_NEAREST:
        rest = [part for ring in others[_MAX_NEAREST:] for part in (ring, ring[:1], polygon[:1])]
        polygon = np.concatenate([polygon[:1], *rest, polygon[1:]])
    return polygon


def simplified(ring: Ring, tolerance: float) -> Ring:
    """The ring without corners that lie within tolerance, in pixels, of the outline that is left.

    No longer exact: what it covers differs by up to that much. Source: Ramer 1972; Douglas and Peucker 1973.
    """
    closed = np.concatenate([ring, ring[:1]])
    far = int(np.square(ring - ring[0]).sum(axis=1).argmax())
    keep = {0, far}
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
    return ring if len(keep) < 3 else ring[sorted(keep)]
