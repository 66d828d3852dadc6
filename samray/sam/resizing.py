"""Pillow's bilinear filter, on a GPU with the same pixels: its host then only hands over the image.

Pillow resizes along both sides, one after the other, with weights of 22 bits, and rounds to bytes in between. Which
side is first depends on its version and on the sizes; the first image of each size shows it.
Source: `ImagingResample` of Pillow's Resample.c.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

RGB = NDArray[np.uint8]

_BITS: Final = 22
_PRODUCTS_AT_ONCE: Final = 2**24
"""Products in a device's memory at a time: 64 MB."""
_MAX_BYTES: Final = 2**28
"""Larger images stay on the host."""
_MAX_SIZES: Final = 10_000

_x_is_first: dict[tuple[int, int, int, int], bool | None] = {}
"""H, W, h, w -> which side Pillow resizes first; None if its pixels are not those of this module."""


def resize(image: RGB, hw: tuple[int, int], device: torch.device) -> RGB | Tensor:
    """image: (H, W, 3) RGB. Returns (h, w, 3), (h, w) = hw, with Pillow's pixels: on the device, or as an array."""
    sizes = image.shape[0], image.shape[1], *hw
    # On mps copies would have to be waited for.
    if device.type in ("cpu", "mps") or image.nbytes > _MAX_BYTES:
        return _by_pillow(image, hw)
    if (x_first := _x_is_first.get(sizes)) is not None:
        return resize_there(_put(image, device), hw, x_first)
    resized = _by_pillow(image, hw)
    if sizes not in _x_is_first:
        there = _put(image, device)
        ways = [first for first in (True, False) if np.array_equal(resize_there(there, hw, first).cpu(), resized)]
        if len(_x_is_first) >= _MAX_SIZES:
            _x_is_first.clear()
        # Both ways can agree by chance, as on a plain surface: the next image is then asked.
        if len(ways) < 2 or hw[0] == image.shape[0] or hw[1] == image.shape[1]:
            _x_is_first[sizes] = ways[0] if ways else None
    return resized


def resize_there(image: Tensor, hw: tuple[int, int], x_first: bool) -> Tensor:
    """image: (H, W, 3) uint8. Returns (h, w, 3) uint8 on its device. x_first: along x, then along y, or the reverse."""
    for dim in (1, 0) if x_first else (0, 1):
        if image.shape[dim] != hw[dim]:
            image = _resize_rows(image.transpose(0, dim), hw[dim]).transpose(0, dim)
    return image


def _by_pillow(image: RGB, hw: tuple[int, int]) -> RGB:
    resized = Image.fromarray(image).resize((hw[1], hw[0]), Image.Resampling.BILINEAR)
    return np.array(resized)  # writable, for torch


def _put(image: RGB, device: torch.device) -> Tensor:
    # From pinned memory, because the host would wait for a copy from any other.
    staged = torch.empty(image.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.copyto(staged.numpy(), image)
    return staged.to(device, non_blocking=True)


def _resize_rows(image: Tensor, num: int) -> Tensor:
    """image: (N, M, 3) uint8. Returns (num, M, 3)."""
    index, weights = (table.to(image.device, non_blocking=True) for table in _taps(image.shape[0], num))
    num_taps = index.shape[1]
    step = max(_PRODUCTS_AT_ONCE // (num_taps * image.shape[1] * image.shape[2]), 1)
    parts = []
    for first in range(0, num, step):
        rows = slice(first, first + step)
        taps = image[index[rows].flatten()].unflatten(0, (-1, num_taps))  # (n, T, M, 3)
        total = (taps * weights[rows, :, None, None]).sum(dim=1, dtype=torch.int32)
        parts.append(((total + (1 << (_BITS - 1))) >> _BITS).clamp(0, 255).to(torch.uint8))
    return torch.cat(parts)


@lru_cache(maxsize=256)
def _taps(length: int, resized: int) -> tuple[Tensor, Tensor]:
    """What each resized pixel is made of: (resized, T) int64 indices of pixels, and their int32 weights."""
    scale = length / resized
    support = max(scale, 1.0)
    center = (np.arange(resized) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    last = np.minimum((center + support + 0.5).astype(np.int64), length)  # exclusive
    pixel = first[:, None] + np.arange((last - first).max())
    weights = np.maximum(1.0 - np.abs((pixel - center[:, None] + 0.5) * (1.0 / support)), 0.0)
    weights[pixel >= last[:, None]] = 0.0
    # Added one after the other, as in Pillow; numpy's sum adds in another order.
    weights /= weights.cumsum(axis=1)[:, -1:]
    rounded = (weights * (1 << _BITS) + 0.5).astype(np.int32)
    return torch.from_numpy(np.minimum(pixel, length - 1)), torch.from_numpy(rounded)
