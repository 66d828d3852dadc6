"""Upsample only the window of a large image that can contain a mask, to measure it there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

_MARGIN = 1
"""Margin in low-res cells around those above the threshold: the reach of bilinear interpolation."""


@dataclass(frozen=True, slots=True)
class Span:
    """Pixels start to stop along one side of the image, and the pixels of the model's input to interpolate them
    from."""

    start: int
    stop: int
    input_start: int
    input_stop: int


def upsample_occupied(
    logits: Tensor, threshold: float, image_size: int, input_hw: tuple[int, int], original_hw: tuple[int, int]
) -> tuple[tuple[int, int], Tensor]:
    """Like `Sam.postprocess`, but only the window outside of which every logit is at most `threshold`.

    logits: (K, 4h, 4w). Returns the window's left top pixel (x0, y0) and its logits (K, h', w'), at least one period
    of the interpolation high and wide. Interpolation coordinates are rounded relative to the window, not to the image:
    logits differ by about 1e-4 of the step between neighbouring input pixels. Use them for measuring, not for output.
    """
    # One window for all K masks. Interpolation makes no value above the largest around it, so that what is
    # left out is at most `threshold`.
    above = (logits > threshold).any(dim=0)
    y = _span(above.any(dim=1), image_size, input_hw[0], original_hw[0])
    x = _span(above.any(dim=0), image_size, input_hw[1], original_hw[1])
    # A quarter of the encoder's stride; 1 for a frame that interpolates only once.
    scale = image_size // logits.shape[-1]
    rows, cols = (_cells(side, scale, logits.shape[-1]) for side in (y, x))
    part = logits[None, :, rows, cols]
    square = F.interpolate(part, (part.shape[2] * scale, part.shape[3] * scale), mode="bilinear", align_corners=False)
    top, left = rows.start * scale, cols.start * scale
    cut = square[..., y.input_start - top : y.input_stop - top, x.input_start - left : x.input_stop - left]
    size = (y.stop - y.start, x.stop - x.start)
    return (x.start, y.start), F.interpolate(cut, size, mode="bilinear", align_corners=False)[0]


def _cells(span: Span, scale: int, length: int) -> slice:
    """The low-res cells, out of `length`, to interpolate the input pixels of a span from."""
    return slice(max(span.input_start // scale - _MARGIN, 0), min(-(-span.input_stop // scale) + _MARGIN, length))


def _span(above: Tensor, image_size: int, input_length: int, original_length: int) -> Span:
    """above: (4h,) bool, which rows (or columns) of the low-res logits have any above the threshold.

    A crop interpolates like the whole only if it starts and ends where pixels of image and input are aligned: every
    `period` pixels of the image, which are `input_period` pixels of the input.
    """
    periods = math.gcd(input_length, original_length)
    input_period, period = input_length // periods, original_length // periods
    # On a GPU this waits for the queued work: the window's size must be known to allocate it.
    cells = above.nonzero()[:, 0].tolist()
    first, last = (cells[0] - _MARGIN, cells[-1] + _MARGIN) if cells else (0, 0)
    scale = image_size / len(above)  # input pixels per low-res cell
    # Rounded outwards to whole periods, within the image, and at least one.
    begin = min(max(math.floor(first * scale / input_period), 0), periods - 1)
    end = max(min(math.ceil((last + 1) * scale / input_period), periods), begin + 1)
    return Span(begin * period, end * period, begin * input_period, end * input_period)
