"""The speed of a run, estimated only from the times at which its shards were written."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Final, NamedTuple

PAUSE_S: Final = 1800.0
"""A shorter gap between two shards does not count as a pause."""

Written = tuple[float, int]
"""When a shard was written, in seconds since 1970, and its number of images."""


class Pace(NamedTuple):
    """None if the shards do not allow an estimate."""

    images_per_s: float | None = None
    usual_gap_s: float | None = None
    """Usual seconds from one shard to the next."""
    longest_gap_s: float | None = None


def pace_of(written: Sequence[Written], wait_s: float = 0.0) -> Pace:
    """Estimate the pace. written: oldest first. Gaps long enough to be a pause of the run are left out.

    wait_s: seconds since the last shard; the part beyond the usual gap counts, too. Actors that work in step finish
    their shards in bursts, and a burst alone would look like a very fast run.
    """
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(written)]
    if not gaps:
        return Pace()
    usual_s = statistics.median(gaps)
    # A run that was stopped overnight is not a slow run.
    pause_s = max(PAUSE_S, 20 * usual_s)
    came = [(gap, at, number) for gap, (at, number) in zip(gaps, written[1:], strict=True) if gap <= pause_s]
    span_s = sum(gap for gap, _, _ in came) + (wait_s - usual_s if usual_s < wait_s <= pause_s else 0.0)
    # Object stores give whole seconds: shards of the first second were made before the span begins.
    num_images = sum(number for _, at, number in came if at > written[0][0])
    rate = num_images / span_s if span_s > 0 else None
    return Pace(rate, usual_s, max((gap for gap, _, _ in came), default=None))
