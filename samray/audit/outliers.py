"""Rank images by how far they are from the others of their prefix, and find those with few or many masks.

A distance is a robust z: from the median, in units of a normal distribution's sigma as the upper or the lower tenth of
the values shows it, which follows skewed distributions. A floor keeps values that hardly vary from making outliers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

FLOORS: Final = {
    "num_masks": 0.5,
    "covered": 0.15,
    "log_area": 0.05,
    "predicted_iou": 0.01,
    "stability_score": 0.01,
    "sharpness": 0.2,
    "brightness": 4.0,
    "contrast": 4.0,
}
"""Smallest sigma of a metric: of num_masks as square root, whose sigma is 0.5 for a Poisson distribution of any mean;
of covered and sharpness as natural logarithms."""
LOGARITHMIC: Final = ("covered", "sharpness")

GROUP_IMAGES: Final = 500
"""Prefixes with fewer images are compared with the whole output."""
MIN_Z: Final = 6.0
"""An image has few or many masks from this distance on."""
MIN_EXPECTED: Final = 5
"""An image without masks is suspicious if the median image has at least this many."""

_TENTH: Final = 1.2815515655446004
"""The normal distribution's quantile of 0.9."""


def distances(name: str, values: Values, group_of: npt.NDArray[np.int64], num_groups: int) -> tuple[Values, Values]:
    """(N,) signed distance of each image from those that it is compared with, and (N,) their median, in the metric's
    own unit; both NaN without a value."""
    scaled = np.sqrt(values) if name == "num_masks" else np.log1p(values) if name in LOGARITHMIC else values
    median = np.full(len(values), np.nan)
    low, high = median.copy(), median.copy()
    has = np.isfinite(scaled)
    if has.any():
        low[:], median[:], high[:] = np.quantile(scaled[has], [0.1, 0.5, 0.9])
    counts = np.bincount(group_of[has], minlength=num_groups)
    order = np.argsort(group_of, kind="stable")
    stops = np.cumsum(np.bincount(group_of, minlength=num_groups))
    for group in np.flatnonzero(counts >= GROUP_IMAGES).tolist():
        members = order[stops[group - 1] if group else 0 : stops[group]]
        quantiles = np.quantile(scaled[members][has[members]], [0.1, 0.5, 0.9])
        low[members], median[members], high[members] = quantiles[:, None]
    sigma = np.where(scaled >= median, high - median, median - low) / _TENTH
    z = (scaled - median) / np.maximum(sigma, FLOORS[name])
    if name == "num_masks":
        return z, median**2
    return z, np.expm1(median) if name in LOGARITHMIC else median


def unusual_counts(num_masks: Values, z: Values, median: Values) -> tuple[Bools, Bools]:
    """(N,) each: images with suspiciously few and many masks."""
    has_few = (z <= -MIN_Z) | ((num_masks == 0) & (median >= MIN_EXPECTED))
    return has_few, z >= MIN_Z


def worst(of_metrics: Mapping[str, Values]) -> tuple[Values, npt.NDArray[np.int64]]:
    """(N,) the largest distance of each image, and the index of its metric; 0 of the first without any value."""
    table = np.stack([np.nan_to_num(np.abs(z), nan=0.0) for z in of_metrics.values()])
    at = table.argmax(axis=0)
    return table[at, np.arange(table.shape[1])], at
