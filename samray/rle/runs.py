"""COCO's compressed run lengths as numbers, pixels, areas and boxes, and the runs of a mask's columns, without torch.

The one decoder of masks that samray did not just make itself: of an import, and of any OUTPUT, whose Parquet may be
damaged or made to do harm. pycocotools trusts what it is given: it reads behind the end of a string that stops in the
middle of a number, and writes behind its memory for runs that sum to more than height * width. So every mask passes
`checked_runs` first, which also bounds what it may cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from samray.errors import StorageError

Runs = npt.NDArray[np.int64]

MAX_SIDE: Final = 2**20
"""Longest side of a mask, pixels: one step of some exports is a list of the columns that a mask spans."""
MAX_PIXELS: Final = 2**30
"""Most pixels of a mask. pycocotools counts them in 32 bits, from 2^31 on with a sign."""
MAX_CHARS: Final = 2**24
"""Longest string of run lengths: SAM's have hundreds to thousands of characters. Decoding takes up to 60 bytes each."""

_CHARS_AT_ONCE: Final = 2**17
"""Characters of run lengths that are checked together, unless one string is longer: they fit into a CPU's cache."""

_INTERVALS_AT_ONCE: Final = 2**19
"""Masks that are traced together: 400 bytes each, at most."""

_MAX_LETTERS: Final = 12
_MAX_RUN: Final = 2**32


def run_lengths(counts: str) -> Runs | None:
    """COCO's compressed run lengths as numbers; None where the string is not well-formed.

    Groups of five bits, lowest first, as characters from "0" on; the sixth bit says that more follow; from the fourth
    run on each is the difference to the run before the last. Source: pycocotools, rleFrString.
    """
    if not 0 < len(counts) <= MAX_CHARS:
        return None
    letters = np.frombuffer(counts.encode("utf-8", "replace"), dtype=np.uint8) - np.uint8(48)  # below "0" wraps: large
    if letters.max() > 63 or letters[-1] & 32:
        return None
    runs = _numbers(letters)
    if runs is None:
        return None
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs if np.abs(runs).max() < _MAX_RUN else None


def _numbers(letters: npt.NDArray[np.uint8]) -> Runs | None:
    """The numbers as they are written, before differences are summed; None if one is too large for a sum.

    letters: of six bits each, the last one of a number.
    """
    last = np.flatnonzero(letters < 32)  # of each number
    first = np.append(0, last[:-1] + 1)
    num_letters = last - first + 1
    if (most := int(num_letters.max())) > _MAX_LETTERS:
        return None
    runs: Runs = (letters[first] & 31).astype(np.int64)
    for place in range(1, most):  # of most numbers one or two letters
        longer = np.flatnonzero(num_letters > place)
        runs[longer] |= (letters[first[longer] + place] & 31).astype(np.int64) << 5 * place
    negative = np.flatnonzero(letters[last] >= 16)
    runs[negative] -= np.int64(1) << 5 * num_letters[negative]
    return None if np.abs(runs).max() > 2 * _MAX_RUN else runs


def check_size(size: object) -> tuple[int, int]:
    """Height and width of an image or mask, as whole numbers. Raises: ValueError where they are none or too large."""
    sides: list[Any] = list(size) if isinstance(size, list | tuple) else [size]
    if len(sides) != 2 or not all(isinstance(side, int | np.integer) and side > 0 for side in sides):
        raise ValueError(f"the size {sides!r}: expected height and width in pixels")
    height, width = int(sides[0]), int(sides[1])
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise ValueError(
            f"the size {width}x{height}: at most {MAX_SIDE} pixels a side and {MAX_PIXELS} pixels in all can be handled"
        )
    return height, width


def checked_runs(counts: object, hw: tuple[int, int]) -> Runs:
    """The run lengths of a mask of an image of this height and width.

    counts: COCO's compressed string. Returns (N,) int64, none negative, with the sum height * width.
    Raises: ValueError, a sentence's end, where it is no such mask or a size that cannot be handled.
    """
    height, width = check_size(hw)
    if not isinstance(counts, str):
        raise ValueError(f"run lengths of type {type(counts).__name__}: expected COCO's compressed string")
    if len(counts) > MAX_CHARS:
        raise ValueError(f"a run-length string of {len(counts)} characters: at most {MAX_CHARS} can be handled")
    runs = run_lengths(counts)
    if runs is None:
        raise ValueError("a run-length string that cannot be decoded")
    if runs.min() < 0:
        raise ValueError("a run-length string with a negative run")
    if (total := int(runs.sum())) != height * width:
        raise ValueError(f"run lengths that sum to {total}, not to {height} * {width}")
    return runs


def all_sound(counts: pa.Array, num_pixels: npt.NDArray[np.int64]) -> bool:
    """Whether `checked_runs` takes every one of these strings; many are checked at once, in a tenth of the time.

    counts: N strings, none null. num_pixels: (N,) height * width of each, as `check_size` allows them.
    """
    strings = counts.cast(pa.large_binary())
    _, offset_buffer, text = strings.buffers()
    if len(strings) == 0:
        return True
    bounds = np.frombuffer(offset_buffer, np.int64)[strings.offset : strings.offset + len(strings) + 1]
    lengths = np.diff(bounds)
    if lengths.min() == 0 or lengths.max() > MAX_CHARS:
        return False
    letters = np.frombuffer(text, np.uint8)
    start = 0
    while start < len(lengths):
        end = max(start + 1, int(np.searchsorted(bounds, bounds[start] + _CHARS_AT_ONCE, side="right")) - 1)
        first, last = int(bounds[start]), int(bounds[end])
        if not _are_sound(letters[first:last], bounds[start : end + 1] - first, num_pixels[start:end]):
            return False
        start = end
    return True


def _are_sound(text: npt.NDArray[np.uint8], bounds: Runs, num_pixels: Runs) -> bool:
    """As `all_sound`. text: the strings, one after the other. bounds: (N + 1,) where each begins, and the end."""
    letters = text - np.uint8(48)
    if letters.max() > 63 or (letters[bounds[1:] - 1] & 32).any():
        return False
    runs = _numbers(letters)
    if runs is None:
        return False
    # From the fourth run of a mask on, each is the difference to the run before the last: summed over all masks, in
    # two interleaved sums, less what the masks before had summed up to. 2^24 numbers of 2^33 fit into 64 bits.
    begin = np.append(0, (letters < 32).cumsum()[bounds[1:] - 1])  # the first number of each mask
    num_runs = np.diff(begin)
    begin = begin[:-1]
    sums = np.zeros(len(runs) + 1, np.int64)
    sums[1::2], sums[2::2] = runs[0::2].cumsum(), runs[1::2].cumsum()
    is_odd = (np.arange(len(runs)) - np.repeat(begin, num_runs)) & 1
    values = sums[1:] - np.where(is_odd, np.repeat(sums[begin], num_runs), np.repeat(sums[begin + 1], num_runs))
    values[begin] = runs[begin]
    if values.min() < 0 or values.max() >= _MAX_RUN:
        return False
    return bool((np.add.reduceat(values, begin) == num_pixels).all())


def pixels(runs: Runs, hw: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """(H, W) bool of checked runs, column by column in memory."""
    flat = np.zeros(hw[0] * hw[1], dtype=bool)
    for start, end in zip(*(side.tolist() for side in spans(runs)), strict=True):
        flat[start:end] = True
    return flat.reshape(hw[1], hw[0]).T


def area(runs: Runs) -> int:
    """Pixels of a mask."""
    return int(runs[1::2].sum())


def bbox_xywh(runs: Runs, hw: tuple[int, int]) -> list[float]:
    """The smallest box around a mask of checked runs, as pycocotools' toBbox; zeros for an empty one."""
    start, end = spans(runs)
    if not len(start):
        return [0.0, 0.0, 0.0, 0.0]
    last = end - 1
    x0, x1 = int(start[0]) // hw[0], int(last[-1]) // hw[0]
    one_column = start // hw[0] == last // hw[0]
    y0 = int(np.where(one_column, start % hw[0], 0).min())
    y1 = int(np.where(one_column, last % hw[0], hw[0] - 1).max())
    return [float(x0), float(y0), float(x1 - x0 + 1), float(y1 - y0 + 1)]


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


def batches(masks: list[Runs], height: int) -> Iterator[list[Runs]]:
    """The masks in their order, in lists whose `column_intervals` fit into memory; none for no mask."""
    batch: list[Runs] = []
    size = 0
    for runs in masks:
        start, end = spans(runs)
        own = int(((end - 1) // height - start // height + 1).sum())
        if batch and size + own > _INTERVALS_AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append(runs)
        size += own
    if batch:
        yield batch


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


def runs_of_image(image_id: int, counts: list[str], hw: tuple[int, int]) -> list[Runs]:
    """The run lengths of an image's masks. Raises: StorageError if one does not fit that height and width."""
    masks = []
    try:
        check_size(hw)
    except ValueError as error:
        raise StorageError(f"image {image_id} has {error}; `samray verify --deep` finds all such faults") from error
    for place, text in enumerate(counts):
        try:
            masks.append(checked_runs(text, hw))
        except ValueError as error:
            raise StorageError(
                f"image {image_id}, annotation {place} is no mask of its image: it has {error}; "
                "`samray verify --deep` finds all such faults"
            ) from error
    return masks
