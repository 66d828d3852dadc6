"""Join the masks of the tiles of a large image into those of the whole.

Every tile was labelled like an image of its own. A mask that reaches an inner border of its tile is *cut*: its object
probably continues in the next tile.

1. Masks of neighbouring tiles are compared where the tiles overlap. If a cut mask and one on the other side agree there
   (`SEAM_IOU`), each being the other's best match, they are the same object, and their union is the mask. A cut one
   that is all inside of the tile of one that is whole adds only where the object was seen, too.
2. What is still cut has no partner and is dropped, as SAM drops masks that are cut by a crop: the object is whole in
   another tile, or in the overview.
3. Masks that more than one tile found are duplicates: of those with a mask IoU above `masks.crop_nms_thresh` the one
   from the windows stays, rather than that of the overview, and else the one with the higher predicted IoU.
4. Limits on the area and on the number of masks apply to what is left.

Nothing here is as large as the image: masks are lists of pieces of columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from samray.config import MaskConfig
from samray.masks.crops import Crop
from samray.masks.image_tiles import OVERVIEW, Box, Tiling
from samray.masks.records import Mask, apply_limits, to_records
from samray.rle import encode as rle
from samray.rle.records import MaskRecord
from samray.rle.runs import checked_runs, column_intervals, slices_of

Int = npt.NDArray[np.int64]

SEAM_IOU: Final = 0.5
"""IoU of two masks within the overlap of their tiles, from which on they are the same object."""

COVERED_SHARE: Final = 0.95
"""Share of a cut mask inside of the tile of a whole one, from which on it adds nothing to that."""

CUT_SHARE: Final = 1 / 128
"""Distance to an inner border of its tile, relative to the tile, at which a mask counts as cut."""


@dataclass(slots=True)
class Piece:
    """A mask of one tile, or joined from those of several, in pixels of the image."""

    starts: npt.NDArray[np.int64]
    """Runs of pixels, column by column, as positions x * height + y in the whole image: sorted, none adjacent."""
    ends: npt.NDArray[np.int64]
    """Exclusive."""
    box: Box
    predicted_iou: float
    stability_score: float
    points_xy: list[list[float]]
    crop: Box
    """The crop of the tile that it was found in; for a joined mask the box around all of its tiles."""
    tiles: tuple[int, ...]
    cut: tuple[bool, bool, bool, bool] = (False, False, False, False)
    """Left, top, right, bottom: whether an inner border of its tile cuts it."""

    @property
    def area(self) -> int:
        return int((self.ends - self.starts).sum())


def pieces_of(masks: Sequence[MaskRecord], tiling: Tiling, number: int) -> list[Piece]:
    """The masks of a tile in the frame of the whole image. Raises: ValueError if one does not fit its tile."""
    tile_hw, box = tiling.tile_hw(number), tiling.box(number)
    height, width = tiling.hw
    runs = [checked_runs(mask["segmentation"]["counts"], tile_hw) for mask in masks]
    intervals = column_intervals(runs, tile_hw[0])
    scale_x, scale_y = (box[2] - box[0]) / tile_hw[1], (box[3] - box[1]) / tile_hw[0]
    pieces = []
    for mask, rows in zip(masks, slices_of(intervals.mask, len(masks)), strict=True):
        columns, tops, bottoms = intervals.column[rows], intervals.top[rows], intervals.bottom[rows]
        if number == OVERVIEW:
            columns, tops, bottoms = _enlarged(columns, tops, bottoms, scale_x, scale_y)
        if not len(columns):
            continue
        starts, ends = _joined(
            (columns + box[0]) * height + tops + box[1], (columns + box[0]) * height + bottoms + box[1]
        )
        x, y, w, h = mask["crop_box"]
        crop = (x * scale_x + box[0], y * scale_y + box[1], (x + w) * scale_x + box[0], (y + h) * scale_y + box[1])
        x0, y0, x1, y1 = int(columns[0]), int(tops.min()), int(columns[-1]) + 1, int(bottoms.max())
        inside = (x0 + box[0], y0 + box[1], x1 + box[0], y1 + box[1])
        pieces.append(
            Piece(
                starts=starts,
                ends=ends,
                box=inside,
                predicted_iou=mask["predicted_iou"],
                stability_score=mask["stability_score"],
                points_xy=[[px * scale_x + box[0], py * scale_y + box[1]] for px, py in mask["point_coords"]],
                crop=(round(crop[0]), round(crop[1]), round(crop[2]), round(crop[3])),
                tiles=(number,),
                cut=_cut(inside, box, (height, width), tiling.tile),
            )
        )
    return pieces


def _enlarged(columns: Int, tops: Int, bottoms: Int, scale_x: float, scale_y: float) -> tuple[Int, Int, Int]:
    """Pieces of columns of a scaled image, at full size."""
    first, last = np.rint(columns * scale_x).astype(np.int64), np.rint((columns + 1) * scale_x).astype(np.int64)
    tops, bottoms = np.rint(tops * scale_y).astype(np.int64), np.rint(bottoms * scale_y).astype(np.int64)
    num = last - first
    column_of = np.repeat(np.arange(len(columns)), num)
    step = np.arange(len(column_of)) - np.repeat(num.cumsum() - num, num)
    wide = first[column_of] + step
    order = np.lexsort((tops[column_of], wide))
    return wide[order], tops[column_of][order], bottoms[column_of][order]


def _cut(inside: Box, tile: Box, hw: tuple[int, int], side: int) -> tuple[bool, bool, bool, bool]:
    near = max(1, round(side * CUT_SHARE))
    edges = (tile[0] > 0, tile[1] > 0, tile[2] < hw[1], tile[3] < hw[0])
    distances = (inside[0] - tile[0], inside[1] - tile[1], tile[2] - inside[2], tile[3] - inside[3])
    left, top, right, bottom = (
        is_inner and distance < near for is_inner, distance in zip(edges, distances, strict=True)
    )
    return left, top, right, bottom


def join(by_tile: dict[int, list[Piece]], tiling: Tiling) -> list[Piece]:
    """The masks of all tiles, those of one object joined; without what is still cut."""
    windows = sorted(number for number in by_tile if number != OVERVIEW)
    pieces = [piece for number in windows for piece in by_tile[number]]
    index_of: dict[int, range] = {}
    start = 0
    for number in windows:
        index_of[number] = range(start, start + len(by_tile[number]))
        start += len(by_tile[number])
    group = _Groups(len(pieces))
    answered = [[False] * 4 for _ in pieces]
    covered = [False] * len(pieces)
    for number in windows:
        for other, axis in tiling.neighbours(number):
            if other not in index_of:
                continue
            for a, b in _matches(pieces, index_of[number], index_of[other], tiling, number, other, axis):
                a_is_cut, b_is_cut = pieces[a].cut[axis + 2], pieces[b].cut[axis]
                group.join(a, b)
                answered[a][axis + 2] = answered[b][axis] = True
                if not (a_is_cut and b_is_cut):
                    cut, tile = (a, other) if a_is_cut else (b, number)
                    inside = _within(pieces[cut], tiling.box(tile), tiling.hw[0])
                    # Else it has parts elsewhere, which the whole one has not.
                    covered[cut] = inside is not None and inside[2] >= COVERED_SHARE * pieces[cut].area
    joined = []
    for members in group.all():
        shown = [i for i in members if not covered[i]] or members
        if all(answered[i][side] or not pieces[i].cut[side] for i in shown for side in range(4)):
            joined.append(_union([pieces[i] for i in shown], [pieces[i] for i in members], tiling))
    return joined + by_tile.get(OVERVIEW, [])


def _matches(
    pieces: list[Piece], of_tile: range, of_other: range, tiling: Tiling, number: int, other: int, axis: int
) -> list[tuple[int, int]]:
    """Pairs of masks of two neighbouring tiles that are each other's best match in the overlap, one of them cut."""
    ours, their = tiling.box(number), tiling.box(other)
    overlap = (max(ours[0], their[0]), max(ours[1], their[1]), min(ours[2], their[2]), min(ours[3], their[3]))
    if overlap[0] >= overlap[2] or overlap[1] >= overlap[3]:
        return []
    height = tiling.hw[0]
    left = {i: part for i in of_tile if (part := _within(pieces[i], overlap, height)) is not None}
    right = {j: part for j in of_other if (part := _within(pieces[j], overlap, height)) is not None}
    their_boxes = np.array([pieces[j].box for j in right], np.int64).reshape(-1, 4)
    their_areas = np.array([b[2] for b in right.values()], np.int64)
    theirs_cut = np.array([pieces[j].cut[axis] for j in right], bool)
    others = list(right.items())
    scores: dict[tuple[int, int], float] = {}
    for i, a in left.items():
        # Such an IoU needs boxes that share this much of the larger mask: few of thousands of masks do.
        shared = np.minimum(_shared(pieces[i].box, their_boxes, overlap), np.minimum(a[2], their_areas))
        near = (theirs_cut | pieces[i].cut[axis + 2]) & (shared >= SEAM_IOU * np.maximum(a[2], their_areas))
        for j, b in (others[number] for number in np.flatnonzero(near).tolist()):
            iou = _iou(a, b)
            if iou >= SEAM_IOU:
                scores[i, j] = iou
    best_of_i: dict[int, float] = defaultdict(float)
    best_of_j: dict[int, float] = defaultdict(float)
    for (i, j), iou in scores.items():
        best_of_i[i], best_of_j[j] = max(best_of_i[i], iou), max(best_of_j[j], iou)
    return [(i, j) for (i, j), iou in scores.items() if iou == best_of_i[i] == best_of_j[j]]


def _shared(box: Box, others: Int, overlap: Box) -> Int:
    """(N,) pixels that a box has in common with each of the (N, 4) others within the overlap."""
    low = np.maximum(others[:, :2], np.maximum(box[:2], overlap[:2]))
    high = np.minimum(others[:, 2:], np.minimum(box[2:], overlap[2:]))
    sides = (high - low).clip(min=0)
    shared: Int = sides[:, 0] * sides[:, 1]
    return shared


_Part = tuple[Int, Int, int]
"""Starts, ends and area of the part of a mask."""


def _within(piece: Piece, box: Box, height: int) -> _Part | None:
    """The part of a mask inside a box; None if empty."""
    x0, y0, x1, y1 = box
    if piece.box[0] >= x1 or piece.box[2] <= x0 or piece.box[1] >= y1 or piece.box[3] <= y0:
        return None
    first, last = np.searchsorted(piece.ends, x0 * height, "right"), np.searchsorted(piece.starts, x1 * height, "left")
    starts, ends = piece.starts[first:last], piece.ends[first:last]
    if y0 > 0 or y1 < height:
        columns = starts // height * height  # runs that go on into the next column touch both borders of the image
        starts, ends = np.maximum(starts, columns + y0), np.minimum(ends, columns + y1)
    else:
        starts, ends = np.maximum(starts, x0 * height), np.minimum(ends, x1 * height)
    filled = ends > starts
    starts, ends = starts[filled], ends[filled]
    area = int((ends - starts).sum())
    return (starts, ends, area) if area else None


def _iou(a: _Part, b: _Part) -> float:
    union = _union_area(a, b)
    return (a[2] + b[2] - union) / union


def _union_area(a: _Part, b: _Part) -> int:
    starts, ends = _joined(np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]]))
    return int((ends - starts).sum())


def _joined(starts: Int, ends: Int) -> tuple[Int, Int]:
    """Runs in any order, which may overlap, as runs in order that neither overlap nor touch."""
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    begins = np.append(True, starts[1:] > reach[:-1])
    return starts[begins], reach[np.append(begins[1:], True)]


def _union(shown: list[Piece], members: list[Piece], tiling: Tiling) -> Piece:
    """One mask from pieces of it. Scores are means, weighted by area."""
    tiles = tuple(sorted({number for piece in members for number in piece.tiles}))
    if len(shown) == 1:
        return replace(shown[0], tiles=tiles)
    starts, ends = _joined(np.concatenate([p.starts for p in shown]), np.concatenate([p.ends for p in shown]))
    areas = [piece.area for piece in shown]
    return Piece(
        starts=starts,
        ends=ends,
        box=_around([piece.box for piece in shown]),
        predicted_iou=float(np.average([piece.predicted_iou for piece in shown], weights=areas)),
        stability_score=float(np.average([piece.stability_score for piece in shown], weights=areas)),
        points_xy=[point for piece in shown for point in piece.points_xy],
        crop=_around([tiling.box(number) for number in tiles]),
        tiles=tiles,
    )


def _around(boxes: Iterable[Box]) -> Box:
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def without_duplicates(pieces: list[Piece], iou_thresh: float) -> list[Piece]:
    """The masks without those whose IoU with a better one is above iou_thresh, best first.

    Masks of the windows are better than those of the overview, and else those with the higher predicted IoU.
    """
    order = sorted(range(len(pieces)), key=lambda i: (OVERVIEW in pieces[i].tiles, -pieces[i].predicted_iou))
    boxes = np.array([piece.box for piece in pieces], dtype=np.int64).reshape(-1, 4)
    areas = np.array([piece.area for piece in pieces], dtype=np.int64)
    kept: list[int] = []
    rows = np.empty(len(pieces), dtype=np.int64)
    for index in order:
        rest = rows[: len(kept)]
        # An IoU above the threshold needs boxes that overlap and areas of about the same size.
        near = rest[(areas[rest] > iou_thresh * areas[index]) & (areas[rest] * iou_thresh < areas[index])]
        box, near_boxes = boxes[index], boxes[near]
        overlap = (np.minimum(box[2:], near_boxes[:, 2:]) - np.maximum(box[:2], near_boxes[:, :2])).clip(min=0)
        near = near[overlap[:, 0] * overlap[:, 1] > iou_thresh * areas[index]]
        candidate = (pieces[index].starts, pieces[index].ends, int(areas[index]))
        others = ((pieces[i].starts, pieces[i].ends, int(areas[i])) for i in near.tolist())
        if not any(_iou(candidate, other) > iou_thresh for other in others):
            rows[len(kept)] = index
            kept.append(index)
    return [pieces[index] for index in kept]


def merge(
    by_tile: dict[int, list[Piece]], tiling: Tiling, config: MaskConfig, max_masks: int
) -> tuple[list[MaskRecord], list[list[Box]]]:
    """The masks of an image from those of its tiles, at most max_masks; and for each the boxes of its tiles."""
    hw = tiling.hw
    thresh = config.crop_nms_thresh if config.mask_nms_thresh is None else config.mask_nms_thresh
    masks = [
        Mask(
            counts=rle.encode_runs(piece.starts, piece.ends, hw[0] * hw[1]),
            predicted_iou=piece.predicted_iou,
            stability_score=piece.stability_score,
            points_xy=np.array(piece.points_xy, dtype=np.float64).reshape(-1, 2),
            crop=Crop(*piece.crop, 0),
            tiles=tuple(tiling.box(number) for number in piece.tiles),
        )
        for piece in without_duplicates(join(by_tile, tiling), thresh)
    ]
    # Duplicates are gone already, without comparing each mask with all others.
    most = max_masks if config.max_masks is None else min(config.max_masks, max_masks)
    masks = apply_limits(masks, hw, config.model_copy(update={"mask_nms_thresh": None, "max_masks": most}))
    return to_records(masks, hw, config), [list(mask.tiles) for mask in masks]


def of_one_tile(config: MaskConfig) -> MaskConfig:
    """The settings with which a tile is labelled: limits are for masks of the whole image, and `merge` applies them."""
    unlimited = {"min_mask_area": 0, "max_mask_area_fraction": None, "max_masks": None, "non_overlapping": False}
    return config.model_copy(update=unlimited)


class _Groups:
    """Union-find over numbers."""

    def __init__(self, num: int) -> None:
        self._parent = list(range(num))

    def find(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        """The lower number stays the root, so that the result does not depend on the order of the pairs."""
        low, high = sorted((self.find(i), self.find(j)))
        self._parent[high] = low

    def all(self) -> list[list[int]]:
        """The groups, in the order of their first members."""
        groups: dict[int, list[int]] = defaultdict(list)
        for i in range(len(self._parent)):
            groups[self.find(i)].append(i)
        return list(groups.values())
