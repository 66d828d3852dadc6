"""Stability, area and box of masks from their low-res logits: full-resolution pixels are never stored.

The plain code (`Sam.postprocess`, then `samray.masks.scores`) writes every mask at two resolutions and reads it five
times. Here a pixel is computed from the 16 low-res logits of its two bilinear steps, compared, counted and
discarded. Counts and boxes are integers: the order in which blocks add to them does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_HW = (32, 64)
LAUNCH = {"num_warps": 8}
_FIELDS = 7


def measure(
    logits: Tensor, image_size: int, input_hw: tuple[int, int], hw: tuple[int, int], threshold: float, offset: float
) -> Tensor:
    """The result of `MaskGenerator._measure`: (M, 6) float64 of stability score, area, box xyxy (inclusive).

    logits: (M, 4h, 4w) float32, of the model's square input with side image_size; the crop is its (h, w) = input_hw,
    with original size hw. Empty masks give zeros. Pixels within rounding of a threshold may fall on either side.
    """
    (low_h, low_w), (height, width) = logits.shape[1:], hw
    # Pixels above the lower cut, the threshold and the upper cut; x0, y0, x1, y1: neutral for sum, min and max.
    neutral = torch.tensor([0, 0, 0, width, height, -1, -1], dtype=torch.int32, device=logits.device)
    figures = neutral.repeat(len(logits), 1)
    tiles_x = triton.cdiv(width, BLOCK_HW[1])
    tiles = triton.cdiv(height, BLOCK_HW[0]) * tiles_x
    with torch.cuda.device_of(logits):  # Triton uses the current GPU, which may not be the tensors'
        kernel[(tiles, len(logits))](
            logits.contiguous(),
            figures,
            tiles_x,
            low_h,
            low_w,
            low_h / image_size,
            low_w / image_size,
            *input_hw,
            input_hw[0] / height,
            input_hw[1] / width,
            height,
            width,
            threshold - offset,
            threshold,
            threshold + offset,
            FIELDS=_FIELDS,
            BLOCK_H=BLOCK_HW[0],
            BLOCK_W=BLOCK_HW[1],
            **LAUNCH,
        )
    # An empty mask has its neutral values still: zeros, as `mask_boxes` gives them.
    lower, area, upper, *box = figures.unbind(dim=1)
    stability = upper / lower.clamp(min=1)  # like `stability_scores`
    return torch.stack(
        [x.double() for x in (stability, area, *(torch.where(area > 0, side, 0) for side in box))], dim=1
    )


@triton.jit
def kernel(
    logits,
    figures,
    tiles_x,
    low_h,
    low_w,
    low_scale_y,
    low_scale_x,
    input_h,
    input_w,
    scale_y,
    scale_x,
    height,
    width,
    lower,
    threshold,
    upper,
    FIELDS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One tile of one mask. Computes the first bilinear step only at the four input pixels that the second one
    needs."""
    # int64, because the offset of a mask in the logits can exceed int32.
    tile, mask = tl.program_id(0), tl.program_id(1).to(tl.int64)
    y = (tile // tiles_x * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    x = (tile % tiles_x * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    y0, y1, share_y = _source(tl.minimum(y, height - 1), scale_y, input_h)  # reads nothing beyond the crop
    x0, x1, share_x = _source(tl.minimum(x, width - 1), scale_x, input_w)
    logits += mask * low_h * low_w
    # The second step reads the input pixels y0, y1 and x0, x1; each is a mixture of four low-res logits.
    top0, bottom0, low_y0 = _source(y0, low_scale_y, low_h)
    top1, bottom1, low_y1 = _source(y1, low_scale_y, low_h)
    left0, right0, low_x0 = _source(x0, low_scale_x, low_w)
    left1, right1, low_x1 = _source(x1, low_scale_x, low_w)
    pixel = _mix(
        _read(logits, low_w, top0, bottom0, low_y0, left0, right0, low_x0),
        _read(logits, low_w, top0, bottom0, low_y0, left1, right1, low_x1),
        _read(logits, low_w, top1, bottom1, low_y1, left0, right0, low_x0),
        _read(logits, low_w, top1, bottom1, low_y1, left1, right1, low_x1),
        share_y,
        share_x,
    )
    inside = (y < height) & (x < width)
    masked = inside & (pixel > threshold)
    figures += mask * FIELDS
    # One atomic per figure and tile, after sums within the tile.
    tl.atomic_add(figures, tl.sum((inside & (pixel > lower)).to(tl.int32)))
    tl.atomic_add(figures + 1, tl.sum(masked.to(tl.int32)))
    tl.atomic_add(figures + 2, tl.sum((inside & (pixel > upper)).to(tl.int32)))
    tl.atomic_min(figures + 3, tl.min(tl.where(masked, x, width)))
    tl.atomic_min(figures + 4, tl.min(tl.where(masked, y, height)))
    tl.atomic_max(figures + 5, tl.max(tl.where(masked, x, -1)))
    tl.atomic_max(figures + 6, tl.max(tl.where(masked, y, -1)))


@triton.jit
def _source(i, scale, length):
    """Source of pixel i in torch's bilinear interpolation (align_corners False): two neighbours, weight of the
    second."""
    at = tl.maximum(scale * (i.to(tl.float32) + 0.5) - 0.5, 0.0)
    first = at.to(tl.int32)
    return first, tl.minimum(first + 1, length - 1), at - first.to(tl.float32)


@triton.jit
def _read(logits, low_w, top, bottom, share_y, left, right, share_x):
    """The first step's value: low-res logits at rows top and bottom, columns left and right, interpolated."""
    return _mix(
        tl.load(logits + top * low_w + left),
        tl.load(logits + top * low_w + right),
        tl.load(logits + bottom * low_w + left),
        tl.load(logits + bottom * low_w + right),
        share_y,
        share_x,
    )


@triton.jit
def _mix(top_left, top_right, bottom_left, bottom_right, share_y, share_x):
    """In the summation order of torch's CUDA kernel."""
    top = (1 - share_x) * top_left + share_x * top_right
    bottom = (1 - share_x) * bottom_left + share_x * bottom_right
    return (1 - share_y) * top + share_y * bottom
