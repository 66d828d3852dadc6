"""The random orders of a training, drawn when they are needed: a seed and a number find any example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")


class Recent(Generic[T]):
    """A function of an integer whose last `size` results are kept. Picklable, without them, if `compute` is."""

    def __init__(self, compute: Callable[[int], T], size: int) -> None:
        self.compute, self.size = compute, size
        self._cached = lru_cache(size)(compute)

    def __call__(self, number: int) -> T:
        return self._cached(number)

    def __getstate__(self) -> tuple[Callable[[int], T], int]:
        return self.compute, self.size

    def __setstate__(self, state: tuple[Callable[[int], T], int]) -> None:
        self.compute, self.size = state
        self._cached = lru_cache(self.size)(self.compute)


class EpochOrder:
    """Each epoch has all items once, in an order of its own; draw i is item i % n of epoch i // n."""

    def __init__(self, items: npt.NDArray[np.int64], seed: Sequence[int]) -> None:
        self.items, self.seed = items, list(seed)
        # Two, because around the end of an epoch draws come from both.
        self.epoch = Recent(self._draw, 2)

    def __getitem__(self, draw: int) -> int:
        epoch, at = divmod(draw, len(self.items))
        return int(self.epoch(epoch)[at])

    def _draw(self, epoch: int) -> npt.NDArray[np.int64]:
        order: npt.NDArray[np.int64] = np.random.default_rng([*self.seed, epoch]).permutation(self.items)
        return order
