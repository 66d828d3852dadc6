"""Masks at full resolution, from low-res logits: measured for the filters, and as run lengths.

On a CPU only those tiles of a mask are computed whose pixels do not follow from the low-res logits alone
(`samray.masks.tiles`). On other devices, in small images, and if torch does not interpolate as expected, whole masks
are. Both give the same.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from samray.masks import tiles
from samray.masks.scores import MASK_THRESHOLD, above, areas, mask_boxes, stability_of
from samray.masks.windows import upsample_occupied
from samray.rle import encode as rle
from samray.rle.encode import Counts
from samray.sam.frames import Frame
from samray.sam.kernels import enabled

_MIN_TILED_PIXELS: Final = 2**15
"""In smaller images tiles cost more than they save."""
_TILED_BYTES: Final = 8 * 2**20
"""Limit to the bits of the masks that are tiled together."""
_MAX_TILED: Final = 16
"""More masks together are hardly faster, and their logits are copied."""


def measure(frame: Frame, logits: Tensor, hw: tuple[int, int], offset: float, at_once: int) -> Tensor:
    """Stability score, area and box xyxy (inclusive) of each mask of (H, W) = hw pixels.

    logits: (M, 4h, 4w) low-res float32. at_once: whole masks that may be in memory. Returns (M, 6) float64.
    """
    grid = tile_grid_of(frame, logits, hw)
    if grid is None:
        return measure_whole(frame, logits, hw, offset, at_once)
    measured = []
    for part in logits.split(_tiled_at_once(hw, at_once)):
        upper, masks, lower = tiles.measure(grid, part.numpy(), MASK_THRESHOLD, offset)
        stability = stability_of(torch.from_numpy(upper), torch.from_numpy(lower))
        columns = [stability, *(torch.from_numpy(column) for column in (masks.areas(), *masks.boxes().T))]
        measured.append(torch.stack([column.double() for column in columns], dim=1))
    return torch.cat(measured)


def measure_whole(frame: Frame, logits: Tensor, hw: tuple[int, int], offset: float, at_once: int) -> Tensor:
    """`measure` on the pixels of whole masks, or on a GPU in one kernel."""
    if len(logits) == 0:
        return torch.zeros(0, 6, dtype=torch.float64, device=logits.device)
    side, inside_hw = frame.mask_steps(logits.shape[-1], hw)
    if enabled(logits.device):
        from samray.sam.kernels.measure import measure as by_kernel

        return by_kernel(logits, side, inside_hw, hw, MASK_THRESHOLD, offset)
    measured = []
    for part in logits.split(at_once):
        if at_once == 1:  # in a large image most pixels are far from a single mask
            lowest = MASK_THRESHOLD - offset
            (x0, y0), upscaled = upsample_occupied(part, lowest, side, inside_hw, hw)
        else:
            (x0, y0), upscaled = (0, 0), frame.masks_out(part, hw)
        masks, upper, lower = (above(upscaled, MASK_THRESHOLD + by) for by in (0, offset, -offset))  # (M, h', w')
        boxes = mask_boxes(masks)
        if x0 or y0:  # not on a GPU with room for two masks, which would wait for the copy of these numbers
            boxes += torch.tensor([x0, y0, x0, y0], device=masks.device)
        columns = [stability_of(areas(upper), areas(lower)), areas(masks), *boxes.T]
        measured.append(torch.stack([column.double() for column in columns], dim=1))
    return torch.cat(measured)


def run_lengths(
    frame: Frame,
    logits: Tensor,
    hw: tuple[int, int],
    origin_xy: tuple[int, int],
    image_hw: tuple[int, int],
    at_once: int,
) -> list[Counts]:
    """Run lengths in the image of masks of a crop, (H, W) = hw pixels with the left top corner origin_xy.

    logits: (M, 4h, 4w) low-res float32. at_once: whole masks that may be in memory.
    """
    grid = tile_grid_of(frame, logits, hw)
    if grid is None:
        return run_lengths_whole(frame, logits, hw, origin_xy, image_hw, at_once)
    runs: list[Counts] = []
    for part in logits.split(_tiled_at_once(hw, at_once)):
        changes = tiles.cut(grid, part.numpy(), MASK_THRESHOLD).changes()
        runs += rle.encode_changes(*changes, len(part), origin_xy, image_hw)
    return runs


def run_lengths_whole(
    frame: Frame,
    logits: Tensor,
    hw: tuple[int, int],
    origin_xy: tuple[int, int],
    image_hw: tuple[int, int],
    at_once: int,
) -> list[Counts]:
    """`run_lengths` from the pixels of whole masks."""
    runs: list[Counts] = []
    for part in logits.split(at_once) if len(logits) else []:
        pixels = above(frame.masks_out(part, hw), MASK_THRESHOLD)
        x0 = y0 = 0
        if pixels.device.type == "cpu":  # a GPU is faster with all pixels than waiting for the boxes
            boxes = mask_boxes(pixels).numpy()
            (x0, y0), (x1, y1) = boxes[:, :2].min(axis=0).tolist(), boxes[:, 2:].max(axis=0).tolist()
            pixels = pixels[:, y0 : y1 + 1, x0 : x1 + 1]  # the rest is outside of all boxes
        runs += rle.encode_masks(pixels, (origin_xy[0] + x0, origin_xy[1] + y0), image_hw)
    return runs


def tile_grid_of(frame: Frame, logits: Tensor, hw: tuple[int, int]) -> tiles.Grid | None:
    """The tiles to divide masks into, or None if whole masks are to be computed."""
    if logits.device.type != "cpu" or enabled(logits.device) or len(logits) == 0:
        return None
    if logits.dtype != torch.float32 or hw[0] * hw[1] < _MIN_TILED_PIXELS:
        return None
    side, inside_hw = frame.mask_steps(logits.shape[-1], hw)
    return tiles.tile_grid(logits.shape[-1], side, inside_hw, hw)


def _tiled_at_once(hw: tuple[int, int], at_once: int) -> int:
    """Number of masks to divide into tiles together; at least as many as whole masks may be in memory."""
    return max(min(_TILED_BYTES * 8 // (hw[0] * hw[1]), _MAX_TILED), at_once)
