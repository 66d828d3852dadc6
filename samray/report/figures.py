"""Charts of the report: histograms as bars of an inline SVG, and a heat map of points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[Any]

MAX_BARS = 40
MAX_CELLS = 32
MAX_LABELS = 4
"""Bars with names below them."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a histogram, in SVG units: 100 wide, 40 high, y downwards."""

    x: float
    width: float
    height: float
    words: str
    """`0.8 to 0.9: 12`."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A histogram ready to draw."""

    title: str
    note: str
    bars: list[Bar]
    ticks: list[tuple[float, str]]
    """(x, label) along the lower edge."""
    marker: tuple[float, str] | None = None
    """Position of a vertical line, for a threshold."""


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Counts of points over the unit square, ready to draw."""

    num_cells: int
    """Number of cells along each side."""
    cells: list[tuple[int, int, float, str]]
    """(column, row, strength above 0 to 1, label) of the non-empty cells."""
    most: int
    """Number of points in the fullest cell."""


def histogram(
    title: str,
    note: str,
    values: Values,
    *,
    show: Callable[[float], str] = "{:.3g}".format,
    marker: float | None = None,
    whole_numbers: bool = False,
) -> Chart:
    """At most MAX_BARS bars from the smallest to the largest value, extended to the marker.

    values: (N,) numbers. show: formats a value as a label. whole_numbers: a bar represents integers, and has its label
    in the middle if it represents one.
    """
    if len(values) == 0:
        return Chart(title, "no values", [], [])
    low, high = float(values.min()), float(values.max())
    if marker is not None:  # visible even if the bars end before it
        low, high = min(low, marker), max(high, marker)
    width: float
    if whole_numbers:
        width = max(1, math.ceil((high - low + 1) / MAX_BARS))
        num = max(1, math.ceil((high - low + 1) / width))
    else:
        width = _round_width((high - low) / MAX_BARS) if high > low else max(abs(low), 1.0) / MAX_BARS
        # Bars begin at multiples of a round width, so that labels are short; 1e-9 absorbs rounding.
        low = math.floor(low / width + 1e-9) * width
        num = max(1, math.ceil((high - low) / width - 1e-9))
    # The largest value belongs to the last bar, whose end is exclusive.
    bar_of = ((values - low) / width + 1e-9).astype(np.int64).clip(0, num - 1)
    counts = np.bincount(bar_of, minlength=num)
    single = whole_numbers and width == 1
    bars = []
    for i, count in enumerate(counts.tolist()):
        start, end = low + i * width, low + (i + 1) * width - whole_numbers
        span = show(start) if single else f"{show(start)} to {show(end)}"
        bars.append(Bar(100 * i / num, 100 / num, 40 * count / int(counts.max()), f"{span}: {count:,}"))
    # About five ticks; in the middle of a bar that represents one number, else at its start.
    shift = 0.5 if single else 0.0
    at = sorted({round(i * (num - 2 * shift) / 4) for i in range(5)})
    ticks = [(100 * (position + shift) / num, show(low + position * width)) for position in at]
    line = None if marker is None else (100 * (marker - low) / (num * width), show(marker))
    return Chart(title, note, bars, ticks, line)


def bar_chart(title: str, note: str, counts: Sequence[tuple[str, int]]) -> Chart:
    """A bar for each name, in this order; those after MAX_BARS share the last one. counts: of names, above 0."""
    shown = list(counts[:MAX_BARS])
    if len(counts) > MAX_BARS:
        rest = counts[MAX_BARS - 1 :]
        shown[-1] = (f"{len(rest):,} other names", sum(number for _, number in rest))
    most = max((number for _, number in shown), default=1)
    width = 100 / max(len(shown), 1)
    bars = [Bar(width * i, width, 40 * number / most, f"{name}: {number:,}") for i, (name, number) in enumerate(shown)]
    # Labels of many bars would overlap; the tip of a bar has its name.
    ticks = [(width * (i + 0.5), name[:12]) for i, (name, _) in enumerate(shown)] if len(shown) <= MAX_LABELS else []
    return Chart(title, note, bars, ticks)


def _round_width(least: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is not smaller than `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= least * (1 - 1e-9))


def heat_map(points: Values, points_per_side: int | None) -> HeatMap:
    """points: (N, 2) x and y from 0 to 1, N at least 1.

    The cells follow the grid of the points, to avoid aliasing, and are larger if there are few points.
    """
    side = points_per_side or MAX_CELLS
    most_cells = min(MAX_CELLS, max(8, math.isqrt(len(points) // 3)))
    # The most cells that divide the grid evenly; if only very few do, any number.
    num = next((n for n in range(most_cells, 0, -1) if side % n == 0 and (n >= 4 or n == side)), most_cells)
    at = (points * num).astype(np.int64).clip(0, num - 1)
    counts = np.bincount(at[:, 1] * num + at[:, 0], minlength=num * num).reshape(num, num)
    most = int(counts.max())
    rows, columns = counts.nonzero()
    cells = []
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        count = int(counts[row, column])
        cells.append((column, row, count / most, f"{count:,} mask{'' if count == 1 else 's'}"))
    return HeatMap(num, cells, most)
