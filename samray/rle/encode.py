"""COCO run-length encoding: alternating runs of 0 and 1, column by column, starting with 0.

`counts` is an int64 array of run lengths, the uncompressed form; pycocotools makes the strings. Everything here works
on runs, which limits how many masks of a large image are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from samray.rle.records import Rle

Counts = npt.NDArray[np.int64]

_PIXELS_AT_ONCE = 2**24
"""Pixels of an image whose owners are in memory: 64 MB."""

_RUNS_AT_ONCE: Final = 2**15
"""Runs of the masks in a batch: they fit a CPU cache."""


def encode_masks(masks: Tensor, origin_xy: tuple[int, int], image_hw: tuple[int, int]) -> list[Counts]:
    """Run lengths of masks that cover a window of the image; outside the window they are 0.

    masks: (M, h, w) bool, any device. origin_xy: the window's left top pixel. Returns M arrays, each with the sum H *
    W.
    """
    num, h, w = masks.shape
    if (h, w) == image_hw and masks.device.type != "cpu":
        return _encode_whole(masks)
    # Pad every column with 0 above and below: its changes then alternate between starts and ends of runs.
    columns = torch.zeros((num, w, h + 2), dtype=torch.bool, device=masks.device)
    columns[:, :, 1:-1] = masks.transpose(1, 2)
    changed = (columns[:, :, 1:] != columns[:, :, :-1]).flatten()
    on_cpu = changed.device.type == "cpu"  # numpy is three times faster there
    flat = np.flatnonzero(changed.numpy()) if on_cpu else changed.nonzero()[:, 0].cpu().numpy()
    # Which mask, column and boundary between two pixels each change is; then its position in the image.
    index, column, row = flat // (w * (h + 1)), flat // (h + 1) % w, flat % (h + 1)
    return encode_changes(index, column, row, num, origin_xy, image_hw)


def _encode_whole(masks: Tensor) -> list[Counts]:
    """`encode_masks` for whole images on a device: only the positions of changes come to the host, in order."""
    num, h, w = masks.shape
    # One column after the other, with a 0 before and after each mask.
    columns = torch.zeros((num, w * h + 2), dtype=torch.bool, device=masks.device)
    columns[:, 1:-1] = masks.transpose(1, 2).flatten(1)
    position = (columns[:, 1:] != columns[:, :-1]).flatten().nonzero()[:, 0].cpu().numpy()
    return _split(position, num, h * w)


def encode_changes(
    mask: Counts, column: Counts, row: Counts, num: int, origin_xy: tuple[int, int], image_hw: tuple[int, int]
) -> list[Counts]:
    """Run lengths of masks that cover a window of the image, from the pixels at which they change.

    mask, column, row: (C,) in any order: which of the num masks, and where in the window a pixel differs from the one
    above it in its column. Outside the window everything is 0, so that below its last row there may be a change, too.
    Returns num arrays, each with the sum H * W.
    """
    (x0, y0), (height, width) = origin_xy, image_hw
    # One number orders masks, columns and rows. Each mask has one position more than pixels: the end.
    position = mask * (height * width + 1) + (column + x0) * height + row + y0
    return encode_positions(position, num, height * width)


def encode_positions(position: Counts, num: int, num_pixels: int) -> list[Counts]:
    """Run lengths of masks from the column-major positions at which they change, in any order.

    position: (C,) i * (num_pixels + 1) + p for a change of mask i at p, from 0 to num_pixels, the end. Two changes at
    one position cancel. Returns num arrays, each with the sum num_pixels.
    """
    position = np.sort(position)
    # A run at the end of a column and one at the start of the next are the same run: both changes cancel.
    cancel = np.zeros(len(position) + 1, dtype=bool)
    cancel[1:-1] = position[1:] == position[:-1]
    return _split(position.compress(~(cancel[1:] | cancel[:-1])), num, num_pixels)


def encode_runs(starts: Counts, ends: Counts, num_pixels: int) -> Counts:
    """Run lengths of runs of 1 that do not overlap, in any order; ends are exclusive."""
    starts, ends = np.sort(starts), np.sort(ends)
    apart = np.ones(len(starts) + 1, dtype=bool)
    apart[1:-1] = starts[1:] > ends[:-1]
    return _split(np.stack([starts[apart[:-1]], ends[apart[1:]]], axis=1).ravel(), 1, num_pixels)[0]


def encode_array(mask: npt.NDArray[np.bool_]) -> Counts:
    """mask: (H, W) bool, the whole image."""
    return encode_masks(torch.from_numpy(mask)[None], (0, 0), (mask.shape[0], mask.shape[1]))[0]


def compress(counts: Counts, image_hw: tuple[int, int]) -> Rle:
    """COCO's compressed form, ready for JSON."""
    size = [int(side) for side in image_hw]
    # pycocotools takes plain counts and gives its string as bytes, which JSON does not have.
    rle = coco_mask.frPyObjects({"size": size, "counts": counts}, *size)
    return {"size": size, "counts": rle["counts"].decode("ascii")}


def area(counts: Counts) -> int:
    return int(counts[1::2].sum())


def areas(masks: list[Counts]) -> Counts:
    """(M,) pixels of each mask."""
    return np.concatenate([np.zeros(0, np.int64), *(_areas(_runs_of_masks(batch)) for batch in batches(masks))])


def runs(counts: Counts) -> tuple[Counts, Counts]:
    """Starts and ends (exclusive) of the runs of 1, as column-major positions."""
    ends = counts.cumsum()
    num = len(counts) // 2
    return ends[0::2][:num], ends[1::2]


def boxes_xyxy(masks: list[Counts], image_hw: tuple[int, int]) -> Counts:
    """(M, 4) first and last pixel of each mask (inclusive); zeros for an empty one."""
    boxes = [_boxes_xyxy(_runs_of_masks(batch), image_hw) for batch in batches(masks)]
    return np.concatenate([np.zeros((0, 4), np.int64), *boxes])


class _MaskRuns(NamedTuple):
    """The runs of 1 of M masks. Shapes: N runs."""

    start: Counts
    """(N,) column-major position; the images of the masks follow each other."""
    end: Counts
    """(N,) exclusive. A mask whose last run is of 0 has an empty run behind it."""
    first: Counts
    """(M,) the first run of each mask, which has at least one."""


def _runs_of_masks(masks: list[Counts]) -> _MaskRuns:
    """masks: at least one."""
    # With an even number of runs in each mask, every second one of all is a run of 1.
    none = np.zeros(1, np.int64)
    ends = np.concatenate([part for counts in masks for part in (counts, none[: len(counts) % 2])]).cumsum()
    num_runs = np.array([(len(counts) + 1) // 2 for counts in masks])
    return _MaskRuns(ends[0::2], ends[1::2], num_runs.cumsum() - num_runs)


def _areas(runs: _MaskRuns) -> Counts:
    """(M,) pixels of each mask."""
    return np.add.reduceat(runs.end - runs.start, runs.first)


def _boxes_xyxy(runs: _MaskRuns, image_hw: tuple[int, int]) -> Counts:
    """`boxes_xyxy`, all at once."""
    height, width = image_hw
    last = runs.end - 1
    x0, x1 = runs.start // height, last // height
    # A run that continues in the next column touches the image's bottom and top.
    is_in_one = x0 == x1
    y0 = np.where(is_in_one, runs.start - x0 * height, 0)
    y1 = np.where(is_in_one, last - x1 * height, height - 1)
    is_empty = last < runs.start
    y0[is_empty], y1[is_empty] = height, -1
    # The last run that is not empty has the last column.
    last_run = np.append(runs.first[1:], len(last)) - 1
    last_run -= is_empty[last_run] & (last_run > runs.first)
    offset = np.arange(len(runs.first)) * width  # columns of the masks before
    low, high = np.minimum.reduceat(y0, runs.first), np.maximum.reduceat(y1, runs.first)
    boxes = np.stack([x0[runs.first] - offset, low, x1[last_run] - offset, high], axis=1)
    boxes[is_empty[runs.first]] = 0
    return boxes


def batches(masks: list[Counts]) -> Iterator[list[Counts]]:
    """The masks in order, in lists to work on together: one call for each mask would cost more than its work."""
    batch: list[Counts] = []
    num_runs = 0
    for counts in masks:
        if batch and num_runs + len(counts) > _RUNS_AT_ONCE:
            yield batch
            batch, num_runs = [], 0
        batch.append(counts)
        num_runs += len(counts)
    if batch:
        yield batch


def make_disjoint(masks: list[Counts], image_hw: tuple[int, int]) -> list[Counts]:
    """Assign each pixel to the first mask that has it. Returns the same number of masks, some possibly empty.

    Works on a part of the image at a time, which bounds the memory for large images.
    """
    num_pixels = image_hw[0] * image_hw[1]
    of_masks = [runs(counts) for counts in masks]
    none = np.zeros(0, dtype=np.int64)
    parts: list[list[tuple[Counts, Counts]]] = [[(none, none)] for _ in masks]
    for low in range(0, num_pixels, _PIXELS_AT_ONCE):
        owner = np.full(min(_PIXELS_AT_ONCE, num_pixels - low), -1, dtype=np.int32)
        # The first mask is painted last, over the others.
        for index in reversed(range(len(masks))):
            starts, ends = of_masks[index]
            first, last = np.searchsorted(ends, low, "right"), np.searchsorted(starts, low + len(owner), "left")
            first_and_last = (starts[first:last] - low).clip(min=0), ends[first:last] - low
            for start, end in zip(*(side.tolist() for side in first_and_last), strict=True):
                owner[start:end] = index
        # Runs of one owner; -2 is not an owner, so that the first pixel starts a run.
        starts = np.flatnonzero(np.diff(owner, prepend=-2))
        ends, owners = np.append(starts[1:], len(owner)), owner[starts]
        order = np.argsort(owners, kind="stable")
        for run in np.split(order, np.flatnonzero(np.diff(owners[order])) + 1):
            if owners[run[0]] >= 0:
                parts[owners[run[0]]].append((starts[run] + low, ends[run] + low))
    sides = (zip(*of_mask, strict=True) for of_mask in parts)
    return [encode_runs(np.concatenate(starts), np.concatenate(ends), num_pixels) for starts, ends in sides]


def _split(position: Counts, num: int, num_pixels: int) -> list[Counts]:
    """Run lengths of num masks. position: as for `encode_positions`, ascending, without those that cancel."""
    origin = np.arange(num) * (num_pixels + 1)
    first = np.append(np.searchsorted(position, origin), len(position))
    # With the start and the end of each mask, the differences are its run lengths, and one more to the next mask.
    ends = np.stack([origin, origin + num_pixels], axis=1).ravel()
    bounds = np.insert(position, np.repeat(first, 2)[1:-1], ends)
    lengths = bounds[1:] - bounds[:-1]
    counts = []
    for begin, end in pairwise((first + 2 * np.arange(num + 1)).tolist()):
        # If the last pixel is 1, its run is the last one: an extra empty run would give a different string.
        is_empty = end - begin > 2 and lengths[end - 2] == 0
        counts.append(lengths[begin : end - 1 - is_empty])
    return counts
