"""Bilinear interpolation of chosen pixels on a CPU, to the bit as torch interpolates whole images.

torch adds up a pixel in two steps: the second neighbour times its weight, rounded; then the first times its weight,
added without rounding the product. `embedding_bag` adds weighted rows of a table in this way, too. Coordinates are
rounded by torch's own formula. Both are compared with torch's interpolation where they are used: if another build of
torch rounds differently, `axis` returns None, and whole images have to be interpolated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

_OTHER_KERNEL = 128
"""torch uses another kernel, which rounds differently, for results whose sides sum to at most this."""


@dataclass(frozen=True, slots=True)
class Axis:
    """The two inputs, along one side, that each of N outputs is a mixture of."""

    index: Int32
    """(N, 2) the second neighbour, then the first: the order in which they are added."""
    weights: Float32
    """(N, 2) their weights."""


def same_kernel(input_hw: tuple[int, int], output_hw: tuple[int, int]) -> bool:
    """Whether torch interpolates between these sizes by the kernel that `axis` describes."""
    # Single rows and columns are interpolated by yet another kernel.
    return min(*input_hw, *output_hw) > 1 and sum(output_hw) > _OTHER_KERNEL


@lru_cache(maxsize=256)
def axis(length: int, num: int) -> Axis | None:
    """How `F.interpolate(mode="bilinear", align_corners=False)` gets num outputs from length inputs, float32.

    None if torch's results differ from it, so that it cannot be used.
    """
    computed = _axis(length, num)
    width = max(8, _OTHER_KERNEL + 1 - num)
    table = torch.randn(length, width, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(table[None, None], (num, width), mode="bilinear", align_corners=False)[0, 0]
    is_equal = torch.equal(mix_rows(table, computed.index, computed.weights), expected)
    return computed if is_equal and _rounds_alike() else None


@lru_cache(maxsize=1)
def _rounds_alike() -> bool:
    """Whether both sides of an image are interpolated in the order described above, the horizontal one first."""
    image = torch.randn(31, 37, generator=torch.Generator().manual_seed(0))
    y, x = _axis(31, 97), _axis(37, 113)
    across = mix_rows(image.T.contiguous(), x.index, x.weights).T.contiguous()
    expected = F.interpolate(image[None, None], (97, 113), mode="bilinear", align_corners=False)[0, 0]
    return torch.equal(mix_rows(across, y.index, y.weights), expected)


def _axis(length: int, num: int) -> Axis:
    # In float32 as torch: the ratio is rounded, and the coordinate once, after the subtraction. In float64 the product
    # of a float32 and a half-integer is exact.
    ratio = float(np.float32(length) / np.float32(num))
    at = np.maximum((np.arange(num) + 0.5) * ratio - 0.5, 0).astype(np.float32)
    first = np.minimum(at.astype(np.int32), length - 1)
    second = np.minimum(first + 1, length - 1)
    share = np.clip(at - first.astype(np.float32), 0, 1).astype(np.float32)
    if length == num:  # torch copies
        first = second = np.arange(num, dtype=np.int32)
        share = np.zeros(num, dtype=np.float32)
    return Axis(np.stack([second, first], axis=1), np.stack([share, 1 - share], axis=1))


def mix_rows(table: Tensor, index: Int32, weights: Float32) -> Tensor:
    """Weighted sums of pairs of rows, rounded as described above.

    table: (R, D) float32, contiguous. index, weights: (N, 2), or of more dimensions. Returns (N, D).
    """
    flat, per_row = torch.from_numpy(index).flatten(), torch.from_numpy(weights).flatten()
    mixed: Tensor = torch.embedding_bag(table, flat, _pairs(len(flat) // 2), False, 0, False, per_row)[
        0
    ]  # mode 0: the sum
    return mixed


@lru_cache(maxsize=32)
def _pairs(num: int) -> Tensor:
    """Where each of num pairs starts."""
    return torch.arange(0, 2 * num, 2, dtype=torch.int32)
