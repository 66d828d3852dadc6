"""A small world that no model has seen: blobs that differ from their surroundings only by the direction of stripes.

For the data engine in small (`samray demo --train`, jobs/data_engine.py): what the embedded model was trained on says
little about it, and a few minutes of training say much.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from samray.scenes.scene import Scene

SIDE = 256


def striped_scene(seed: int, side: int = SIDE) -> Scene:
    """The scene of a seed: (side, side, 3) stripes, and disjoint blobs as its objects."""
    rng = np.random.default_rng([seed, 77])
    ys, xs = np.mgrid[:side, :side]
    dark, light = rng.uniform(20, 110, 3), rng.uniform(140, 240, 3)
    period, angle = rng.uniform(6, 12), rng.uniform(0, np.pi)
    phase = _stripes(xs, ys, angle, period)
    masks: list[npt.NDArray[np.bool_]] = []
    taken = np.zeros((side, side), bool)
    for _ in range(int(rng.integers(5, 12))):
        noise = ndimage.gaussian_filter(rng.standard_normal((side, side)), side / 16)
        radius, cx, cy = rng.uniform(0.1, 0.22) * side, *rng.uniform(0.15 * side, 0.85 * side, 2)
        blob = np.hypot(xs - cx, ys - cy) < radius * (1 + 0.25 * noise / noise.std())
        if (blob & taken).any():
            continue
        pieces, _ = ndimage.label(blob)
        areas = np.bincount(pieces.ravel())[1:]
        if len(areas) == 0 or areas.max() < 600:
            continue
        blob = pieces == 1 + int(areas.argmax())
        taken |= ndimage.binary_dilation(blob, iterations=6)
        turned = _stripes(xs, ys, angle + rng.uniform(0.3, 0.7) * np.pi, period)
        phase = np.where(blob, turned, phase)
        masks.append(blob)
    picture = dark + (light - dark) * phase[..., None] + rng.normal(0, 6, (side, side, 3))
    return Scene(
        image=picture.clip(0, 255).astype(np.uint8),
        masks=np.stack(masks),
        kinds=["object"] * len(masks),
        names=[None] * len(masks),
    )


def _stripes(xs: npt.NDArray[Any], ys: npt.NDArray[Any], angle: float, period: float) -> npt.NDArray[np.float64]:
    wave = np.sin(2 * np.pi * (xs * np.cos(angle) + ys * np.sin(angle)) / period)
    return np.asarray(0.5 + 0.5 * wave.clip(-0.6, 0.6) / 0.6)
