"""Ten labelled images, exports of them, and a filler of polygons to read these with."""

from __future__ import annotations

from typing import Any

import numpy as np

import samray
from samray.exports.export import ExportReport
from samray.output.plan import Plan
from tests.support.handmade import write_output

NAMES = [f"photo {i:02d}.png" for i in range(10)]


def ten_images(root: str) -> Plan:
    """Ten images in four shards, one of them failed, some without masks."""
    return write_output(root, NAMES, failed=(5,))


def export(plan: Plan, dest: object, format: str, **options: Any) -> ExportReport:
    return samray.export(plan.output, str(dest), format=format, progress=False, **options)


def fill(polygon: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre is inside by the even-odd rule. polygon: (N, 2) x, y."""
    filled = np.zeros(shape, dtype=bool)
    x, y = polygon.astype(float).T
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    for row in range(shape[0]):
        centre = row + 0.5
        hit = (y <= centre) != (next_y <= centre)
        crossings = x[hit] + (centre - y[hit]) * (next_x[hit] - x[hit]) / (next_y[hit] - y[hit])
        filled[row] = ((np.arange(shape[1]) + 0.5)[:, None] > crossings).sum(axis=1) % 2 == 1
    return filled
