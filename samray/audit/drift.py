"""Drift: whether the images of a group are distributed differently from all others.

Groups are prefixes (folders) of the file names, and windows of consecutive images in the order of the output: its
shards, and time if images were planned or appended in the order in which they were taken. Each group is compared with
all other images, in one number per image and metric (masks of an image are not independent of each other):

- Kolmogorov-Smirnov's D with its asymptotic p-value. Distributions are compared at the 1,024-quantiles of all images,
  which makes D smaller than the exact one by at most 0.001.
- The population stability index (PSI) over the tenths of the other images, 0.2 being the usual mark of a shift.

A group that drifts is among the others of every other group, which would then seem to drift the other way. Groups that
drift are therefore found first, and left out (at most half of them) of the others with which the groups are compared.

Drift is reported if p < 0.01 after Holm's correction for all tests of the call, and D >= 0.15, and PSI >= 0.2: with
millions of images a test alone finds differences that do not matter, and an index alone has no error rate.
Source: Holm, 1979; Siddiqi, Credit Risk Scorecards, 2006 (PSI).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import special

Values = npt.NDArray[np.float64]

MIN_IMAGES: Final = 100
"""Groups with fewer images are not tested."""
MAX_P: Final = 0.01
MIN_D: Final = 0.15
MIN_PSI: Final = 0.2
MAX_WINDOWS: Final = 50
_WINDOW_IMAGES: Final = 1000
_QUANTILES: Final = 1024
_PARTS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """One group compared with all others in one metric."""

    kind: str
    """prefix or window."""
    group: str
    metric: str
    num_images: int
    """In the group, with a value."""
    median: float
    median_of_others: float
    d: float
    psi: float
    p: float
    """After Holm's correction."""
    drifts: bool


def windows(num_images: int) -> tuple[npt.NDArray[np.int64], list[str]]:
    """(N,) window of each image, and the windows' names. Windows of equal size, of at least _WINDOW_IMAGES images."""
    number = max(1, min(MAX_WINDOWS, num_images // _WINDOW_IMAGES))
    edges = [i * num_images // number for i in range(number + 1)]
    window_of = np.repeat(np.arange(number), np.diff(edges))
    return window_of, [f"images {low:,} to {high - 1:,}" for low, high in pairwise(edges)]


def find_drift(
    metrics: Mapping[str, Values], groupings: Mapping[str, tuple[npt.NDArray[np.int64], list[str]]]
) -> list[Test]:
    """All tests, the strongest drift first.

    metrics: name -> (N,) values, NaN for an image without. groupings: kind -> (N,) group of each image, and the names.
    """
    rows_of_all: list[dict[str, Any]] = []
    for metric, values in metrics.items():
        has = np.isfinite(values)
        if has.sum() < 2 * MIN_IMAGES:
            continue
        edges = np.unique(np.quantile(values[has], np.linspace(0, 1, _QUANTILES + 1)))
        bin_of = np.searchsorted(edges, values[has])
        for kind, (group_of, names) in groupings.items():
            tables = _Tables(group_of[has], bin_of, len(names), edges)
            first = tables.compare(np.zeros(len(names), bool))
            suspects = [comparison for comparison in first if _is_shift(comparison)]
            # The strongest half of the tested groups at most: something must be left to compare with.
            suspects = sorted(suspects, key=lambda comparison: -comparison["psi"])[: len(first) // 2]
            apart = np.zeros(len(names), bool)
            apart[[comparison["group"] for comparison in suspects]] = True
            rows = tables.compare(apart) if apart.any() else first
            rows_of_all += [
                {**comparison, "kind": kind, "metric": metric, "group": names[comparison["group"]]}
                for comparison in rows
            ]
    corrected = holm(np.array([comparison["p"] for comparison in rows_of_all]))
    tests = [
        Test(**{**comparison, "p": float(p)}, drifts=bool(p < MAX_P and _is_shift(comparison)))
        for comparison, p in zip(rows_of_all, corrected, strict=True)
    ]
    return sorted(tests, key=lambda test: (not test.drifts, -test.psi, test.kind, test.group, test.metric))


def _is_shift(comparison: Mapping[str, Any]) -> bool:
    """Whether the difference is large enough to matter."""
    return bool(comparison["d"] >= MIN_D and comparison["psi"] >= MIN_PSI)


class _Tables:
    """How often each value occurs in each group, for one metric and kind."""

    def __init__(
        self, group_of: npt.NDArray[np.int64], bin_of: npt.NDArray[np.int64], num_groups: int, edges: Values
    ) -> None:
        """group_of: (M,). bin_of: (M,) index of the smallest edge that is not below each value."""
        self.edges, self.num_groups = edges, num_groups
        self._counts = np.bincount(group_of, minlength=num_groups)
        # Not a table of thousands of groups by a thousand edges, but the values of each group, one after another.
        self._bins = bin_of[np.argsort(group_of, kind="stable")]
        self._stops = np.cumsum(self._counts)
        self._total = np.bincount(bin_of, minlength=len(edges)).astype(np.float64)

    def _of(self, group: int) -> npt.NDArray[np.int64]:
        stop = self._stops[group]
        return np.bincount(self._bins[stop - self._counts[group] : stop], minlength=len(self.edges))

    def compare(self, apart: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
        """Each group that is large enough against all others, without those that are set apart. apart: (G,)."""
        others = self._total - sum((self._of(group) for group in np.flatnonzero(apart).tolist()), np.zeros(1))
        rows = []
        for group in np.flatnonzero(self._counts >= MIN_IMAGES).tolist():
            counts = self._of(group)
            rest = others if apart[group] else others - counts
            n, m = float(counts.sum()), float(rest.sum())
            if m < MIN_IMAGES:
                continue
            d = float(np.abs(np.cumsum(counts) / n - np.cumsum(rest) / m).max())
            rows.append(
                {
                    "group": group,
                    "num_images": int(n),
                    "median": _median(counts, self.edges),
                    "median_of_others": _median(rest, self.edges),
                    "d": d,
                    "psi": _psi(counts, rest),
                    "p": float(special.kolmogorov(d * np.sqrt(n * m / (n + m)))),
                }
            )
        return rows


def _median(counts: npt.NDArray[Any], edges: Values) -> float:
    sums = np.cumsum(counts)
    return float(edges[np.searchsorted(sums, sums[-1] / 2)])


def _psi(group: npt.NDArray[Any], rest: npt.NDArray[Any]) -> float:
    """PSI over about tenths of the rest. Half an image more in each part, so that none is empty."""
    sums = np.cumsum(rest)
    cuts = np.unique(np.searchsorted(sums, sums[-1] * np.arange(1, _PARTS) / _PARTS, side="left")) + 1
    starts = np.concatenate([[0], cuts[cuts < len(rest)]])
    p, q = (np.add.reduceat(counts, starts) + 0.5 for counts in (group, rest))
    p, q = p / p.sum(), q / q.sum()
    return float(((p - q) * np.log(p / q)).sum())


@dataclass(frozen=True, slots=True)
class Picture:
    """The distributions of a test, for a chart."""

    test: Test
    edges: Values
    """(B + 1,)"""
    group: Values
    """(B,) fraction of the group's images in each bar."""
    others: Values


def picture(test: Test, values: Values, in_group: npt.NDArray[np.bool_], num_bars: int = 32) -> Picture:
    """values: (N,) of the test's metric; in_group: (N,)."""
    has = np.isfinite(values)
    low, high = np.quantile(values[has], [0.005, 0.995])
    edges = np.linspace(low, max(high, low + 1e-6), num_bars + 1)
    # Bars at the ends hold what is beyond them.
    bar_of = np.searchsorted(edges, values[has], side="right").clip(1, num_bars) - 1
    group, others = (
        np.bincount(bar_of[is_counted], minlength=num_bars) for is_counted in (in_group[has], ~in_group[has])
    )
    return Picture(test, edges, group / max(group.sum(), 1), others / max(others.sum(), 1))


def holm(ps: Values) -> Values:
    """Holm's corrected p-values, in the order given: a p below a bound bounds the chance of any false alarm."""
    order = np.argsort(ps, kind="stable")
    scaled = np.maximum.accumulate(ps[order] * np.arange(len(ps), 0, -1))
    corrected = np.empty(len(ps))
    corrected[order] = np.minimum(scaled, 1.0)
    return corrected
