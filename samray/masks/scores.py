"""Measure masks at full resolution: stability, area, box.

Shapes: M masks of (H, W) pixels.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

MASK_THRESHOLD: Final = 0.0
"""Logit above which a pixel belongs to a mask."""


def above(logits: Tensor, threshold: float) -> Tensor:
    """logits > threshold, bool, of the same shape."""
    if logits.device.type == "cpu":
        return torch.from_numpy(np.greater(logits.numpy(), threshold))  # vectorized, unlike torch
    return logits > threshold


def areas(masks: Tensor) -> Tensor:
    """masks: (M, H, W) bool. Returns (M,) int64 on the same device."""
    if masks.device.type == "cpu":
        # numpy counts booleans in whole words: 20 times faster than torch's sum for 12 megapixels.
        return torch.tensor([np.count_nonzero(mask) for mask in masks.numpy()], dtype=torch.int64)
    # On a GPU the sum stays there: reading it would wait for the work queued before.
    return masks.flatten(1).sum(dim=1)


def stability_scores(logits: Tensor, threshold: float, offset: float) -> Tensor:
    """IoU between the masks cut at threshold + offset and at threshold - offset.

    logits: (M, H, W) float, unthresholded. Returns (M,) float32 in [0, 1]; 0 if the lower cut is empty (the
    reference gives NaN). One cut contains the other, so the IoU is a ratio of areas. Source: SAM paper, section 5.
    """
    return stability_of(areas(above(logits, threshold + offset)), areas(above(logits, threshold - offset)))


def stability_of(upper: Tensor, lower: Tensor) -> Tensor:
    """The stability scores of masks with these areas above the upper and the lower cut."""
    # 0 / 1 if the lower cut is empty, because the upper one is empty, too.
    return upper / lower.clamp(min=1)


def mask_boxes(masks: Tensor) -> Tensor:
    """masks: (M, H, W) bool. Returns (M, 4) int64 xyxy, first and last pixel (inclusive); zeros for an empty mask."""
    as_bytes = masks.view(torch.uint8)  # on a CPU max() of bytes is several times faster than any() of booleans
    y0, y1 = _first_and_last(as_bytes.amax(dim=2))
    x0, x1 = _first_and_last(as_bytes.amax(dim=1))
    return torch.stack([x0, y0, x1, y1], dim=1)


def _first_and_last(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """occupied: (M, L) of 0 and 1. Returns the positions of each row's first and last 1, both 0 if there is none."""
    first = occupied.argmax(dim=1)
    # argmax gives the first maximum, here the first 1.
    last = occupied.shape[1] - 1 - occupied.flip(1).argmax(dim=1)
    return first, torch.where(occupied.amax(dim=1) > 0, last, 0)
