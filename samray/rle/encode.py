"""COCO run-length encoding: alternating runs of 0 and 1, column by column, starting with 0.

`counts` is an int64 array of run lengths, the uncompressed form; pycocotools makes the strings. Everything here works
on runs, which limits how many masks of a large image are in memory.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from samray.rle.records import Rle

Counts = npt.NDArray[np.int64]


def encode_masks(masks: Tensor, origin_xy: tuple[int, int], image_hw: tuple[int, int]) -> list[Counts]:
    """Run lengths of masks that cover a window of the image; outside the window they are 0.

    masks: (M, h, w) bool, any device. origin_xy: the window's left top pixel. Returns M arrays, each with the sum H *
    W.
    """
    num, h, w = masks.shape
    # Pad every column with 0 above and below: its changes then alternate between starts and ends of runs.
    columns = torch.zeros((num, w, h + 2), dtype=torch.bool, device=masks.device)
    columns[:, :, 1:-1] = masks.transpose(1, 2)
    changed = (columns[:, :, 1:] != columns[:, :, :-1]).flatten()
    on_cpu = changed.device.type == "cpu"  # numpy is three times faster there
    flat = np.flatnonzero(changed.numpy()) if on_cpu else changed.nonzero()[:, 0].cpu().numpy()
    # Which mask, column and boundary between two pixels each change is; then its position in the image.
    index, column, row = flat // (w * (h + 1)), flat // (h + 1) % w, flat % (h + 1)
    return encode_changes(index, column, row, num, origin_xy, image_hw)


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
    each = height * width + 1
    position = np.sort(mask * each + (column + x0) * height + row + y0)
    # A run at the end of a column and one at the start of the next are the same run: both changes cancel.
    cancel = np.zeros(len(position) + 1, dtype=bool)
    cancel[1:-1] = position[1:] == position[:-1]
    position = position[~(cancel[1:] | cancel[:-1])]
    bounds = np.searchsorted(position, np.arange(num + 1) * each)
    return [
        _counts(position[first:last] - i * each, height * width) for i, (first, last) in enumerate(pairwise(bounds))
    ]


def encode_runs(starts: Counts, ends: Counts, num_pixels: int) -> Counts:
    """Run lengths of runs of 1 that do not overlap, in any order; ends are exclusive."""
    starts, ends = np.sort(starts), np.sort(ends)
    apart = np.ones(len(starts) + 1, dtype=bool)
    apart[1:-1] = starts[1:] > ends[:-1]
    return _counts(np.stack([starts[apart[:-1]], ends[apart[1:]]], axis=1).ravel(), num_pixels)


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


def runs(counts: Counts) -> tuple[Counts, Counts]:
    """Starts and ends (exclusive) of the runs of 1, as column-major positions."""
    ends = counts.cumsum()
    num = len(counts) // 2
    return ends[0::2][:num], ends[1::2]


def box_xyxy(counts: Counts, image_hw: tuple[int, int]) -> npt.NDArray[np.int64]:
    """(4,) first and last pixel of the mask (inclusive); zeros for an empty one."""
    starts, ends = runs(counts)
    starts, ends = starts[ends > starts], ends[ends > starts]
    if not len(starts):
        return np.zeros(4, dtype=np.int64)
    height = image_hw[0]
    last = ends - 1
    # A run that goes on into the next column touches the image's bottom and top.
    one_column = starts // height == last // height
    y0 = np.where(one_column, starts % height, 0).min()
    y1 = np.where(one_column, last % height, height - 1).max()
    return np.array([starts[0] // height, y0, last[-1] // height, y1])


def make_disjoint(masks: list[Counts], image_hw: tuple[int, int]) -> list[Counts]:
    """Assign each pixel to the first mask that has it. Returns the same number of masks, some possibly empty."""
    num_pixels = image_hw[0] * image_hw[1]
    owner = np.full(num_pixels, -1, dtype=np.int32)
    # The first mask is painted last, over the others.
    for index in reversed(range(len(masks))):
        for start, end in zip(*runs(masks[index]), strict=True):
            owner[start:end] = index
    # Runs of one owner; -2 is nobody's number, so that the first pixel starts a run.
    starts = np.flatnonzero(np.diff(owner, prepend=-2))
    ends = np.append(starts[1:], num_pixels)
    owners = owner[starts]
    disjoint = []
    for index in range(len(masks)):
        mine = owners == index
        disjoint.append(_counts(np.stack([starts[mine], ends[mine]], axis=1).ravel(), num_pixels))
    return disjoint


def _counts(changes: Counts, num_pixels: int) -> Counts:
    """Run lengths from the positions where the mask changes; it starts with 0."""
    counts = np.diff(changes, prepend=0, append=num_pixels)
    # If the last pixel is 1, its run is the last one: an extra empty run would give a different string.
    return counts[:-1] if counts[-1] == 0 and len(counts) > 1 else counts
