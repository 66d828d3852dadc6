"""The tiles of a large image: overlapping windows of one size, and an overview of the whole image.

Tiles are labelled one by one, each like an image of its own, and `samray.masks.seams` joins their masks. Objects that
are larger than a few tiles are found in the overview: the whole image, scaled to the size of a tile, as the first crop
of SAM's own crops is the whole image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image as PillowImage

RGBArray = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels of the image; the ends are exclusive."""

OVERVIEW: Final = 0
"""Number of the overview; the windows are numbered from 1, row by row."""

_PIXELS_AT_ONCE: Final = 2**23
"""Pixels of the image that are read together to scale it: 24 MB."""


class Windows(Protocol):
    """An image of which windows can be read (`samray.inputs.rasters.Raster`)."""

    height: int
    width: int

    def read(self, x0: int, y0: int, x1: int, y1: int) -> RGBArray:
        """(y1 - y0, x1 - x0, 3) uint8 RGB."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tiles of one image."""

    hw: tuple[int, int]
    tile: int
    xs: tuple[int, ...]
    """Left edges of the columns of windows."""
    ys: tuple[int, ...]
    """Top edges of the rows."""

    def __len__(self) -> int:
        """Number of windows, and one for the overview; 1 if the image fits into one window."""
        num_windows = len(self.xs) * len(self.ys)
        return num_windows + 1 if num_windows > 1 else 1

    def box(self, number: int) -> Box:
        """The part of the image that a tile shows."""
        height, width = self.hw
        if number == OVERVIEW:
            return 0, 0, width, height
        row, column = divmod(number - 1, len(self.xs))
        x0, y0 = self.xs[column], self.ys[row]
        return x0, y0, min(x0 + self.tile, width), min(y0 + self.tile, height)

    def tile_hw(self, number: int) -> tuple[int, int]:
        """Height and width of a tile's pixels."""
        if number == OVERVIEW:
            height, width = self.hw
            scale = self.tile / max(self.hw)
            return max(1, round(height * scale)), max(1, round(width * scale))
        x0, y0, x1, y1 = self.box(number)
        return y1 - y0, x1 - x0

    def neighbours(self, number: int) -> list[tuple[int, int]]:
        """The windows to the right and below: (number, axis), axis 0 for the one to the right, 1 for the one below."""
        row, column = divmod(number - 1, len(self.xs))
        right = [(number + 1, 0)] if column + 1 < len(self.xs) else []
        return right + ([(number + len(self.xs), 1)] if row + 1 < len(self.ys) else [])

    def read(self, image: Windows, number: int) -> RGBArray:
        """The pixels of a tile."""
        if number == OVERVIEW:
            return scaled(image, self.tile_hw(number))
        return image.read(*self.box(number))


def make_tiling(hw: tuple[int, int], tile: int, overlap: float) -> Tiling:
    """Spread windows of tile x tile pixels evenly over an image, so that neighbours overlap by at least this share.

    A side shorter than a tile has one window. overlap: 0 to 0.5, relative to the tile.
    """
    height, width = hw
    return Tiling(hw, tile, _starts(width, tile, overlap), _starts(height, tile, overlap))


def _starts(length: int, tile: int, overlap: float) -> tuple[int, ...]:
    if length <= tile:
        return (0,)
    step = max(1, math.floor(tile * (1 - overlap)))
    num_gaps = math.ceil((length - tile) / step)
    return tuple(round(i * (length - tile) / num_gaps) for i in range(num_gaps + 1))


def scaled(image: Windows, hw: tuple[int, int]) -> RGBArray:
    """The whole image at a smaller size, each pixel the mean of those that it covers; reads a few rows at a time."""
    pixels = np.empty((*hw, 3), dtype=np.uint8)
    ratio_y, ratio_x = image.height / hw[0], image.width / hw[1]
    # Each block of output pixels is made of its own part of the image: nothing is read twice, except shared edges.
    columns = min(hw[1], max(1, int(_PIXELS_AT_ONCE / 64 / ratio_x)))
    for left in range(0, hw[1], columns):
        right = min(left + columns, hw[1])
        x0, x1 = math.floor(left * ratio_x), min(math.ceil(right * ratio_x), image.width)
        rows = max(1, int(_PIXELS_AT_ONCE / (x1 - x0) / ratio_y))
        for top in range(0, hw[0], rows):
            bottom = min(top + rows, hw[0])
            y0, y1 = math.floor(top * ratio_y), min(math.ceil(bottom * ratio_y), image.height)
            part = PillowImage.fromarray(image.read(x0, y0, x1, y1))
            box = (left * ratio_x - x0, top * ratio_y - y0, right * ratio_x - x0, bottom * ratio_y - y0)
            size = (right - left, bottom - top)
            pixels[top:bottom, left:right] = np.asarray(part.resize(size, PillowImage.Resampling.BOX, box=box))
    return pixels
