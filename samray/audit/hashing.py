"""64-bit hashes of rows of numbers, vectorised. For finding equal rows, not against an adversary."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

_STEP: Final = np.uint64(0x9E3779B97F4A7C15)


def mixed(bits: Hashes) -> Hashes:
    """Spread the bits of each number over all 64. Source: the finaliser of SplitMix64 (Steele et al., 2014)."""
    # Products wrap around, as a hash may; on arrays NumPy does that silently.
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def hash_rows(values: npt.NDArray[Any]) -> Hashes:
    """(M,) hash of each row. values: (M, K) of any 64-bit type, compared bit by bit."""
    hashes = np.full(len(values), _STEP, np.uint64)
    for column in values.T:
        hashes = mixed(hashes ^ np.ascontiguousarray(column).view(np.uint64)) + _STEP
    return hashes


def hash_groups(hashes: Hashes, parents: npt.NDArray[np.int64], num: int) -> Hashes:
    """(num,) hash of the set of hashes of each parent, in any order. parents: (M,), ascending."""
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed(hashes), dtype=np.uint64)])
    ends = np.cumsum(np.bincount(parents, minlength=num))
    return mixed(sums[ends] - sums[ends - np.bincount(parents, minlength=num)])
