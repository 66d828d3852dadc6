"""Grids of point prompts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


def point_grid(points_per_side: int) -> Float64:
    """(points_per_side ** 2, 2) xy in the unit square, row by row: the centres of equal cells."""
    half_cell = 1 / (2 * points_per_side)
    centres = np.linspace(half_cell, 1 - half_cell, points_per_side)
    # In the reference's order: it decides which of two equal masks is kept.
    x, y = np.meshgrid(centres, centres)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def point_grids(points_per_side: int, num_layers: int, downscale_factor: int) -> list[Float64]:
    """One grid per crop layer, the whole image first; each layer has downscale_factor times fewer points per side.

    Raises ValueError if a layer would have no points.
    """
    # int() rounds down, as in the reference.
    sides = [int(points_per_side / downscale_factor**layer) for layer in range(num_layers + 1)]
    if min(sides) < 1:
        raise ValueError(f"no point is left in crop layer {sides.index(0)}: points per side by layer are {sides}")
    return [point_grid(side) for side in sides]
