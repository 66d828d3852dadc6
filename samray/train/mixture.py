"""Mix DATA by shares: example number i is a function of i alone, which lets a run begin anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from samray.errors import ConfigError
from samray.scenes.scene import Scene
from samray.train.examples import Arrays, Frame
from samray.train.order import Recent

CYCLE = 1024
"""Examples per cycle; in a cycle every DATA has its exact share, in a new random order."""


class Examples(Protocol):
    """One DATA."""

    @property
    def num_images(self) -> int | None:
        """Number of training images; None if unlimited."""

    def example(self, draw: int, frame: Frame) -> Arrays:
        """Draw number `draw`; always the same."""

    def validation(self, limit: int, frame: Frame) -> Iterator[Scene]:
        """At most `limit` images that are never drawn, always the same."""


class Mixture:
    """Examples of all DATA in one endless, fixed order."""

    def __init__(self, parts: Sequence[Examples], shares: Sequence[float] | None, seed: int) -> None:
        if shares is not None and len(shares) != len(parts):
            raise ConfigError(f"data.shares has {len(shares)} numbers, but there are {len(parts)} DATA")
        self.parts, self.seed = list(parts), seed
        wanted = np.array(root_shares(parts) if shares is None else shares, float)
        self.slots = _slots(wanted / wanted.sum())
        self._order = Recent(self._draw_order, 4)

    def locate(self, number: int) -> tuple[int, int]:
        """The DATA of example `number`, and the index of the draw within it."""
        cycle, at = divmod(number, CYCLE)
        order, before = self._order(cycle)
        part = int(order[at])
        # A DATA has the same number of draws in each cycle.
        return part, cycle * self.slots[part] + int(before[at])

    def example(self, number: int, frame: Frame) -> Arrays:
        part, draw = self.locate(number)
        return self.parts[part].example(draw, frame)

    def validation(self, limit: int, frame: Frame) -> Iterator[Scene]:
        """The same number of held-out images from each DATA used for training."""
        # A DATA with a share of 0 is not validated either.
        used = [part for part, slots in zip(self.parts, self.slots, strict=True) if slots]
        for i, part in enumerate(used):
            yield from part.validation(limit * (i + 1) // len(used) - limit * i // len(used), frame)

    def _draw_order(self, cycle: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(CYCLE,) each: an example's DATA, and the number of examples of that DATA before it in the cycle."""
        # Seeded by the cycle, so that an example is found without the ones before it.
        order = np.random.default_rng([self.seed, cycle]).permutation(np.repeat(np.arange(len(self.slots)), self.slots))
        before = np.zeros(CYCLE, np.int64)
        for part in range(len(self.slots)):
            is_of_part = order == part
            before[is_of_part] = np.arange(is_of_part.sum())
        return order, before


def root_shares(parts: Sequence[Examples]) -> list[float]:
    """Shares by the square root of the number of images: small DATA are seen more often than their size implies.

    Unlimited DATA get the mean of the others.
    """
    roots = [None if part.num_images is None else part.num_images**0.5 for part in parts]
    known = [root for root in roots if root is not None]
    mean = sum(known) / len(known) if known else 1.0
    return [mean if root is None else root for root in roots]


def _slots(shares: npt.NDArray[np.float64]) -> list[int]:
    """Number of CYCLE examples for each share, by largest remainders; at least one if the share is above 0."""
    exact = shares * CYCLE
    slots = np.maximum(np.floor(exact).astype(int), shares > 0)
    short = CYCLE - int(slots.sum())
    slots[np.argsort(slots - exact, kind="stable")[: max(short, 0)]] += 1
    # With many tiny shares there are too many slots: the largest share gives them up.
    slots[np.argmax(slots)] += min(short, 0)
    return [int(n) for n in slots]
