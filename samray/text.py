"""Format numbers, durations and costs, and the table that most commands print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def two_columns() -> Table:
    """A table of two columns without lines; the second column wraps."""
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def count(number: int, noun: str) -> str:
    """`1 shard`, `2,000 shards`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(num_bytes: float) -> str:
    """Bytes in words: "0.6 MB", "2.1 TB"."""
    units = ("kB", "MB", "GB", "TB", "PB")
    power = min(max(1, int(math.log10(max(1, num_bytes)) // 3)), len(units))
    value = num_bytes / 1000**power
    return f"{value:,.{1 if value < 100 else 0}f} {units[power - 1]}"


def abridged(words: Sequence[str], number: int, total: int | None = None) -> str:
    """`a, b, c, ...`: at most the first `number` words; the dots where `total`, or else `words`, holds more."""
    shown = ", ".join(words[:number])
    return f"{shown}, ..." if (len(words) if total is None else total) > number else shown


def duration(seconds: float) -> str:
    """`850 ms`, `12.3 s`, `4 min 5 s`, `3 h 2 min`."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def cost_in_words(gpu_seconds: float, price_per_hour: float, num_images: int) -> str:
    """`1.23, 45.60 per million images at 2.00 per GPU hour (0.62 GPU hours)`."""
    if gpu_seconds <= 0:
        return "none: no actor used a GPU"
    cost = gpu_seconds / 3600 * price_per_hour
    per_million = f"{_money(1e6 * cost / num_images)} per million images at {_money(price_per_hour)} per GPU hour"
    return f"{_money(cost)}, {per_million} ({gpu_seconds / 3600:.2g} GPU hours)"


def _money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 0.1 or amount == 0 else f"{amount:.2g}"


def plain(phrase: str) -> str:
    """A phrase as networks read it: lower case, single spaces, without the signs that end a phrase in a prompt."""
    return " ".join(phrase.lower().replace(".", " ").replace("?", " ").split())
