"""The part of a large image that a mask can be in, so that only that part is upsampled to be measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

_MARGIN = 1
"""Low-res cells around those above the threshold: bilinear interpolation reaches no further."""


@dataclass(frozen=True, slots=True)
class Span:
    """Pixels start to stop along one side of the image, and those of the model's input they are interpolated from."""

    start: int
    stop: int
    input_start: int
    input_stop: int


def upsample_occupied(
    logits: Tensor, threshold: float, image_size: int, input_hw: tuple[int, int], original_hw: tuple[int, int]
) -> tuple[tuple[int, int], Tensor]:
    """As `Sam.postprocess`, but only the window outside of which every logit is at most `threshold`.

    logits: (K, 4h, 4w). Returns the window's left top pixel (x0, y0) and its logits (K, h', w'), at least one period
    of the interpolation high and wide. Its coordinates are rounded from the window's corner, not from the image's:
    logits differ by about 1e-4 of the step between neighbouring input pixels, so these are to measure, not to keep.
    """
    above = (logits > threshold).any(dim=0)
    y = _span(above.any(dim=1), image_size, input_hw[0], original_hw[0])
    x = _span(above.any(dim=0), image_size, input_hw[1], original_hw[1])
    scale = image_size // logits.shape[-1]
    rows, cols = (_cells(side, scale, logits.shape[-1]) for side in (y, x))
    few = logits[None, :, rows, cols]
    square = F.interpolate(few, (few.shape[2] * scale, few.shape[3] * scale), mode="bilinear", align_corners=False)
    top, left = rows.start * scale, cols.start * scale
    cut = square[..., y.input_start - top : y.input_stop - top, x.input_start - left : x.input_stop - left]
    size = (y.stop - y.start, x.stop - x.start)
    return (x.start, y.start), F.interpolate(cut, size, mode="bilinear", align_corners=False)[0]


def _cells(span: Span, scale: int, length: int) -> slice:
    """The low-res cells, of `length`, that the input pixels of a span are interpolated from."""
    return slice(max(span.input_start // scale - _MARGIN, 0), min(-(-span.input_stop // scale) + _MARGIN, length))


def _span(above: Tensor, image_size: int, input_length: int, original_length: int) -> Span:
    """above: (4h,) bool, which rows (or columns) of the low-res logits have any above the threshold.

    A crop is interpolated like the whole only if it starts and ends where pixels of the image and of the input begin
    together: every `period` pixels of the image, for every `input_period` of the input.
    """
    periods = math.gcd(input_length, original_length)
    input_period, period = input_length // periods, original_length // periods
    cells = above.nonzero()[:, 0].tolist()
    first, last = (cells[0] - _MARGIN, cells[-1] + _MARGIN) if cells else (0, 0)
    scale = image_size / len(above)  # input pixels a low-res cell
    begin = min(max(math.floor(first * scale / input_period), 0), periods - 1)
    end = max(min(math.ceil((last + 1) * scale / input_period), periods), begin + 1)
    return Span(begin * period, end * period, begin * input_period, end * input_period)
