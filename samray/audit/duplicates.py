"""Groups of equal and of nearly equal images, by hashes."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse import csgraph

from samray.audit.hashing import Hashes

MAX_DISTANCE: Final = 3
"""Perceptual hashes of 64 bits that differ in at most this many are near duplicates."""
_BANDS: Final = 4
"""One band more than bits that may differ: two near duplicates agree in a whole band (the pigeonhole principle)."""
_MOST_IN_BAND: Final = 5000
"""Different hashes that share a band, beyond which only neighbours in the order of the hashes are compared."""

Ints = npt.NDArray[np.int64]


def first_equal(hashes: Hashes, has: npt.NDArray[np.bool_]) -> Ints:
    """(N,) index of the first image with the same hash; -1 if there is none before, or without a hash."""
    first = np.full(len(hashes), -1)
    at = np.flatnonzero(has)
    _, index, inverse = np.unique(hashes[at], return_index=True, return_inverse=True)
    firsts = at[index][inverse]
    first[at] = np.where(firsts == at, -1, firsts)
    return first


def first_match(hashes: Hashes, has: npt.NDArray[np.bool_], others: Hashes) -> Ints:
    """(N,) index of the first of `others` with the same hash; -1 if there is none."""
    values, index = np.unique(others, return_index=True)
    position = np.searchsorted(values, hashes).clip(max=max(len(values) - 1, 0))
    if not len(values):
        return np.full(len(hashes), -1)
    return np.where(has & (values[position] == hashes), index[position], -1)


def first_near(hashes: Hashes, has: npt.NDArray[np.bool_]) -> Ints:
    """(N,) index of the first image of the group of near duplicates; -1 if there is none before, or without a hash.

    A group is connected: two of its images may differ in more than MAX_DISTANCE bits.
    """
    at = np.flatnonzero(has)
    values, index, inverse = np.unique(hashes[at], return_index=True, return_inverse=True)
    left, right = _near_pairs(values)
    ones = np.ones(len(left), np.int8)
    graph = sparse.coo_array((ones, (left, right)), shape=(len(values), len(values)))
    _, component = csgraph.connected_components(graph, directed=False)
    first_of = np.full(component.max(initial=-1) + 1, len(hashes))
    np.minimum.at(first_of, component, at[index])
    firsts = first_of[component[inverse]]
    first = np.full(len(hashes), -1)
    first[at] = np.where(firsts == at, -1, firsts)
    return first


def _near_pairs(values: Hashes) -> tuple[Ints, Ints]:
    """Pairs of indices of different hashes at most MAX_DISTANCE bits apart; a pair may be there several times."""
    lefts, rights = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for band in range(_BANDS):
        keys = (values >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(keys, kind="stable")
        stops = np.flatnonzero(np.diff(keys[order], append=np.uint64(0x10000)) != 0) + 1
        lengths = np.diff(stops, prepend=0)
        # Pairs at distance 1, 2, ... in the order of the bands, of all that reach so far at once.
        end = np.repeat(stops, lengths)
        start = np.arange(len(values))
        for step in range(1, _MOST_IN_BAND):
            start = start[start + step < end[start]]
            if not len(start):
                break
            first, other = order[start], order[start + step]
            near = np.bitwise_count(values[first] ^ values[other]) <= MAX_DISTANCE
            lefts.append(first[near])
            rights.append(other[near])
    return np.concatenate(lefts), np.concatenate(rights)
