"""ODS, OIS, AP and R50 of edge maps, from their pixel counts by threshold.

Source: collect_eval_bdry of the BSDS500 benchmark (Arbelaez et al., 2011); R50 from the SAM paper, section 7.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from samray.evaluate.edge_matching import EdgeCounts, Float64

_STEPS_BETWEEN_THRESHOLDS = 100
_ROUNDING = 1e-12
"""Values of F that differ by less are equal, and differ only because sums are rounded."""


class Best(NamedTuple):
    """The point of a precision-recall curve with the best F."""

    threshold: float
    recall: float
    precision: float
    f: float


def f_measure(recall: Float64, precision: Float64) -> Float64:
    """Harmonic mean, elementwise; 0 if both are 0."""
    total = recall + precision
    return 2 * recall * precision / np.where(total == 0, 1, total)


def best_f(thresholds: Float64, counts: EdgeCounts) -> Best:
    """The best F of the curve, of equal ones the first; between neighbouring thresholds recall and precision are
    interpolated linearly."""
    recall, precision = counts.recall, counts.precision
    if len(thresholds) == 1:
        return Best(thresholds[0], recall[0], precision[0], float(f_measure(recall, precision)[0]))
    step = np.linspace(0, 1, _STEPS_BETWEEN_THRESHOLDS)
    # (T - 1, steps) each: from every threshold to the next.
    t, r, p = (np.outer(v[:-1], 1 - step) + np.outer(v[1:], step) for v in (thresholds, recall, precision))
    f = f_measure(r, p)
    # Thresholds that give the same map have the same F: without the margin, rounding would choose a point between them.
    index = np.unravel_index((f >= f.max() - _ROUNDING).argmax(), f.shape)
    return Best(float(t[index]), float(r[index]), float(p[index]), float(f[index]))


def edge_scores(thresholds: Float64, counts: Sequence[EdgeCounts]) -> dict[str, float]:
    """The figures over all images; there is at least one.

    ods: best F with one threshold for all images, and its ods_threshold, ods_recall, ods_precision. ois: F with the
    best threshold of each image, and its ois_recall, ois_precision. ap: area under the precision-recall curve, at
    recalls in steps of 0.01. r50: recall at a precision of 0.5.
    """
    total = EdgeCounts.total(counts)
    ods = best_f(thresholds, total)
    # As in the benchmark, each image's threshold is one of the given ones, not interpolated.
    at_best = [of_image.at(int(f_measure(of_image.recall, of_image.precision).argmax())) for of_image in counts]
    ois = best_f(thresholds[:1], EdgeCounts.total(at_best))
    return {
        "ods": ods.f,
        "ods_threshold": ods.threshold,
        "ods_recall": ods.recall,
        "ods_precision": ods.precision,
        "ois": ois.f,
        "ois_recall": float(ois.recall),
        "ois_precision": float(ois.precision),
        "ap": _average_precision(total.recall, total.precision),
        "r50": _recall_at_half(total.recall, total.precision),
    }


def _average_precision(recall: Float64, precision: Float64) -> float:
    """Area under the curve; outside its recalls the precision counts as 0."""
    # interp needs recalls that increase without repeats.
    values, places = np.unique(recall, return_index=True)
    if len(values) < 2:
        return 0.0
    return float(np.interp(np.linspace(0, 1, 101), values, precision[places], left=0, right=0).sum() * 0.01)


def _recall_at_half(recall: Float64, precision: Float64) -> float:
    """Recall at a precision of 0.5; at the lowest precision of the curve if that is higher, 0 if none is as high."""
    values, places = np.unique(precision, return_index=True)
    return float(np.interp(max(0.5, values[0]), values, recall[places], right=0))
