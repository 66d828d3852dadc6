"""COCO's compressed run lengths as numbers, and the runs of a mask's columns; numpy only."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from samray.errors import StorageError

Runs = npt.NDArray[np.int64]

_MAX_BITS: Final = 60
_MAX_RUN: Final = 2**32


def run_lengths(counts: str) -> Runs | None:
    """COCO's compressed run lengths as numbers; None where the string is not well-formed.

    Groups of five bits, lowest first, as characters from "0" on; the sixth bit says that more follow; from the fourth
    run on each is the difference to the run before the last. Source: pycocotools, rleFrString.
    """
    groups = np.frombuffer(counts.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64) - 48
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        return None
    last = np.flatnonzero(groups < 32)  # of each number
    first = np.append(0, last[:-1] + 1)
    num_bits = 5 * (last - first + 1)
    if num_bits.max() > _MAX_BITS:
        return None
    shift = 5 * (np.arange(len(groups)) - np.repeat(first, last - first + 1))
    runs: Runs = np.add.reduceat((groups & 31) << shift, first)
    runs -= (groups[last] >= 16).astype(np.int64) << num_bits
    if np.abs(runs).max() > 2 * _MAX_RUN:  # before they are summed, which might overflow
        return None
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs if np.abs(runs).max() < _MAX_RUN else None


def spans(runs: Runs) -> tuple[Runs, Runs]:
    """Starts and ends (exclusive) of the runs of 1, as column-major positions: none empty, none touching the next."""
    ends = runs.cumsum()
    start, end = ends[0::2][: len(runs) // 2], ends[1::2]
    filled = end > start
    start, end = start[filled], end[filled]
    apart = np.ones(len(start) + 1, dtype=bool)
    apart[1:-1] = start[1:] > end[:-1]
    return start[apart[:-1]], end[apart[1:]]


def union_area(masks: list[Runs]) -> int:
    """How many pixels lie in any of the masks, given as run lengths of the same image."""
    pairs = [spans(runs) for runs in masks]
    if not pairs:
        return 0
    starts = np.concatenate([start for start, _ in pairs])
    order = np.argsort(starts, kind="stable")
    reach = np.maximum.accumulate(np.concatenate([end for _, end in pairs])[order])
    before = np.append(0, reach[:-1])
    return int(np.maximum(reach - np.maximum(starts[order], before), 0).sum())


class Intervals(NamedTuple):
    """The columns of several masks, each as its intervals of 1: sorted by mask, column and top; (N,) int64 each."""

    mask: Runs
    column: Runs
    top: Runs
    bottom: Runs
    """Exclusive."""


def column_intervals(masks: list[Runs], height: int) -> Intervals:
    """masks: the run lengths of masks that are `height` pixels high. A run that spans columns is cut between them."""
    pairs = [spans(runs) for runs in masks]
    number = np.repeat(np.arange(len(masks)), [len(start) for start, _ in pairs])
    none = np.zeros(0, dtype=np.int64)
    start = np.concatenate([none, *(start for start, _ in pairs)])
    last = np.concatenate([none, *(end for _, end in pairs)]) - 1
    num_columns = last // height - start // height + 1
    which = np.repeat(np.arange(len(start)), num_columns)
    step = np.arange(len(which)) - np.repeat(num_columns.cumsum() - num_columns, num_columns)
    top = np.where(step == 0, start[which] % height, 0)
    bottom = np.where(step == num_columns[which] - 1, last[which] % height + 1, height)
    return Intervals(number[which], start[which] // height + step, top, bottom)


def runs_of_image(image_id: int, counts: list[str], num_pixels: int) -> list[Runs]:
    """The run lengths of an image's masks. Raises: StorageError where one is no mask of so many pixels."""
    found = []
    for place, text in enumerate(counts):
        runs = run_lengths(text)
        if runs is None or runs.min() < 0 or runs.sum() != num_pixels:
            raise StorageError(
                f"image {image_id}, annotation {place} is no mask of the image's {num_pixels} pixels; "
                "`samray verify --deep` finds all such faults"
            )
        found.append(runs)
    return found
