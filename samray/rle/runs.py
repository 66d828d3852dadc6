"""COCO's compressed run lengths as numbers, pixels, areas and boxes, and the runs of a mask's columns, without torch.

The only decoder for masks that samray did not just generate: from an import or from any OUTPUT, whose Parquet may be
damaged or malicious. pycocotools trusts its input: it reads past the end of a string that stops inside a number, and
writes past its memory for runs that sum to more than height * width. Every mask therefore passes `checked_runs` first,
which also limits its cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from samray.errors import StorageError

if TYPE_CHECKING:
    import pyarrow as pa

Runs = npt.NDArray[np.int64]

MAX_SIDE: Final = 2**20
"""Maximum side of a mask in pixels: some exports make a list of the columns that a mask spans."""
MAX_PIXELS: Final = 2**30
"""Maximum pixels of a mask. pycocotools counts them in 32 bits, signed from 2^31."""
MAX_CHARS: Final = 2**24
"""Maximum length of a run-length string. SAM's have hundreds to thousands of characters; decoding takes up to 60 bytes
each."""

_CHARS_AT_ONCE: Final = 2**17
"""Characters of run lengths checked together, unless one string is longer: they fit a CPU cache."""

_INTERVALS_AT_ONCE: Final = 2**19
"""Masks traced together, with at most 400 bytes each."""

_MAX_LETTERS: Final = 12
_MAX_RUN: Final = 2**32


def run_lengths(counts: str) -> Runs | None:
    """COCO's compressed run lengths as numbers; None if the string is malformed.

    Groups of five bits, lowest first, as characters from "0"; the sixth bit says that more follow; from the fourth run
    on, each number is the difference to the run before the previous one. Source: pycocotools, rleFrString.
    """
    if not 0 < len(counts) <= MAX_CHARS:
        return None
    # Bytes of other than ASCII characters become values above 63, and are refused.
    letters = np.frombuffer(counts.encode("utf-8", "replace"), dtype=np.uint8) - np.uint8(48)  # below "0" wraps: large
    # The last character must not say that another follows: pycocotools would read past the end.
    if letters.max() > 63 or letters[-1] & 32:
        return None
    runs = _numbers(letters)
    if runs is None:
        return None
    # Undo the differences: one sum over the second, fourth, ... run, and one over the third, fifth, ...
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    # Larger runs fit no mask.
    return runs if np.abs(runs).max() < _MAX_RUN else None


def _numbers(letters: npt.NDArray[np.uint8]) -> Runs | None:
    """The numbers as written, before summing differences; None if one is too large for a sum.

    letters: with six bits each, the last one ends a number.
    """
    last = np.flatnonzero(letters < 32)  # the last letter of each number
    first = np.append(0, last[:-1] + 1)
    num_letters = last - first + 1
    if (most := int(num_letters.max())) > _MAX_LETTERS:
        return None
    runs: Runs = (letters[first] & 31).astype(np.int64)
    for letter in range(1, most):  # most numbers have one or two letters
        longer = np.flatnonzero(num_letters > letter)
        runs[longer] |= (letters[first[longer] + letter] & 31).astype(np.int64) << 5 * letter
    # The highest of a number's bits is its sign, as in two's complement.
    negative = np.flatnonzero(letters[last] >= 16)
    runs[negative] -= np.int64(1) << 5 * num_letters[negative]
    return None if np.abs(runs).max() > 2 * _MAX_RUN else runs


def check_size(size: object) -> tuple[int, int]:
    """Height and width of an image or mask as integers. Raises: ValueError if they are invalid or too large."""
    sides: list[Any] = list(size) if isinstance(size, list | tuple) else [size]
    if len(sides) != 2 or not all(isinstance(side, int | np.integer) and side > 0 for side in sides):
        raise ValueError(f"the size {sides!r}: expected height and width in pixels")
    height, width = int(sides[0]), int(sides[1])
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise ValueError(
            f"the size {width}x{height}: at most {MAX_SIDE} pixels per side and {MAX_PIXELS} pixels in all are allowed"
        )
    return height, width


def checked_runs(counts: object, hw: tuple[int, int]) -> Runs:
    """The run lengths of a mask in an image of this height and width.

    counts: COCO's compressed string. Returns (N,) int64, none negative, with the sum height * width.
    Raises: ValueError, phrased as the end of a sentence, if it is not such a mask or a size is not supported.
    """
    height, width = check_size(hw)
    if not isinstance(counts, str):
        raise ValueError(f"run lengths of type {type(counts).__name__}: expected COCO's compressed string")
    if len(counts) > MAX_CHARS:
        raise ValueError(f"a run-length string of {len(counts)} characters: at most {MAX_CHARS} are supported")
    runs = run_lengths(counts)
    if runs is None:
        raise ValueError("a run-length string that cannot be decoded")
    if runs.min() < 0:
        raise ValueError("a run-length string with a negative run")
    if (total := int(runs.sum())) != height * width:
        raise ValueError(f"run lengths that sum to {total}, not to {height} * {width}")
    return runs


def all_sound(counts: pa.Array, num_pixels: npt.NDArray[np.int64]) -> bool:
    """Whether `checked_runs` accepts all of these strings; checks many at once, in a tenth of the time.

    counts: N strings, none null. num_pixels: (N,) height * width of each, as `check_size` allows them.
    """
    # The strings of an Arrow array are next to each other in one buffer, read here without copies.
    strings = counts.cast("large_binary")
    _, offset_buffer, text = strings.buffers()
    if len(strings) == 0:
        return True
    bounds = np.frombuffer(offset_buffer, np.int64)[strings.offset : strings.offset + len(strings) + 1]
    lengths = np.diff(bounds)
    # False is not final: the caller then asks `checked_runs` for each, which also says why.
    if lengths.min() == 0 or lengths.max() > MAX_CHARS:
        return False
    letters = np.frombuffer(text, np.uint8)
    start = 0
    while start < len(lengths):
        # As many whole strings as fit into the limit, but at least one, however long it is.
        end = max(start + 1, int(np.searchsorted(bounds, bounds[start] + _CHARS_AT_ONCE, side="right")) - 1)
        first, last = int(bounds[start]), int(bounds[end])
        if not _are_sound(letters[first:last], bounds[start : end + 1] - first, num_pixels[start:end]):
            return False
        start = end
    return True


def _are_sound(text: npt.NDArray[np.uint8], bounds: Runs, num_pixels: Runs) -> bool:
    """`all_sound` for concatenated strings. text: the strings. bounds: (N + 1,) the start of each, and the end."""
    letters = text - np.uint8(48)
    if letters.max() > 63 or (letters[bounds[1:] - 1] & 32).any():
        return False
    runs = _numbers(letters)
    if runs is None:
        return False
    # From the fourth run of a mask on, each number is the difference to the run before the previous one: take two
    # interleaved sums over all masks and subtract the total of the masks before. 2^24 numbers of 2^33 fit into 64 bits.
    begin = np.append(0, (letters < 32).cumsum()[bounds[1:] - 1])  # the first number of each mask
    num_runs = np.diff(begin)
    begin = begin[:-1]
    sums = np.zeros(len(runs) + 1, np.int64)
    sums[1::2], sums[2::2] = runs[0::2].cumsum(), runs[1::2].cumsum()
    is_odd = (np.arange(len(runs)) - np.repeat(begin, num_runs)) & 1
    values = sums[1:] - np.where(is_odd, np.repeat(sums[begin], num_runs), np.repeat(sums[begin + 1], num_runs))
    # The first run of a mask belongs to neither sum.
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
    """The smallest box around a mask of checked runs, as from pycocotools' toBbox; zeros for an empty mask."""
    start, end = spans(runs)
    if not len(start):
        return [0.0, 0.0, 0.0, 0.0]
    # Pixels are counted down the columns: x by division, y by remainder.
    last = end - 1
    x0, x1 = int(start[0]) // hw[0], int(last[-1]) // hw[0]
    one_column = start // hw[0] == last // hw[0]
    y0 = int(np.where(one_column, start % hw[0], 0).min())
    y1 = int(np.where(one_column, last % hw[0], hw[0] - 1).max())
    return [float(x0), float(y0), float(x1 - x0 + 1), float(y1 - y0 + 1)]


def spans(runs: Runs) -> tuple[Runs, Runs]:
    """Starts and ends (exclusive) of the runs of 1, as column-major positions: none empty, none adjacent."""
    ends = runs.cumsum()
    start, end = ends[0::2][: len(runs) // 2], ends[1::2]
    # Drop empty runs, then join those with nothing between them.
    filled = end > start
    start, end = start[filled], end[filled]
    apart = np.ones(len(start) + 1, dtype=bool)
    apart[1:-1] = start[1:] > end[:-1]
    return start[apart[:-1]], end[apart[1:]]


def union_area(masks: list[Runs]) -> int:
    """Number of pixels in the union of masks, given as run lengths of the same image."""
    pairs = [spans(runs) for runs in masks]
    if not pairs:
        return 0
    starts = np.concatenate([start for start, _ in pairs])
    order = np.argsort(starts, kind="stable")
    # In order of their starts, each span adds what is beyond the furthest end so far.
    reach = np.maximum.accumulate(np.concatenate([end for _, end in pairs])[order])
    before = np.append(0, reach[:-1])
    return int(np.maximum(reach - np.maximum(starts[order], before), 0).sum())


def batches(masks: list[Runs], height: int) -> Iterator[list[Runs]]:
    """The masks in order, in lists whose `column_intervals` fit into memory; no list for no masks."""
    batch: list[Runs] = []
    size = 0
    for runs in masks:
        start, end = spans(runs)
        # Each column that a run touches becomes an interval.
        num_intervals = int(((end - 1) // height - start // height + 1).sum())
        if batch and size + num_intervals > _INTERVALS_AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append(runs)
        size += num_intervals
    if batch:
        yield batch


class Intervals(NamedTuple):
    """The columns of several masks as intervals of 1, sorted by mask, column and top; (N,) int64 each."""

    mask: Runs
    column: Runs
    top: Runs
    bottom: Runs
    """Exclusive."""


def column_intervals(masks: list[Runs], height: int) -> Intervals:
    """masks: run lengths of masks with this `height`. Runs that span columns are split at them."""
    pairs = [spans(runs) for runs in masks]
    number = np.repeat(np.arange(len(masks)), [len(start) for start, _ in pairs])
    # concatenate needs at least one array, and an empty list of masks gives none.
    none = np.zeros(0, dtype=np.int64)
    start = np.concatenate([none, *(start for start, _ in pairs)])
    last = np.concatenate([none, *(end for _, end in pairs)]) - 1
    num_columns = last // height - start // height + 1
    # One entry per run and column: which run, and its how many-eth column.
    run_of = np.repeat(np.arange(len(start)), num_columns)
    step = np.arange(len(run_of)) - np.repeat(num_columns.cumsum() - num_columns, num_columns)
    # Only in its first column does a run start below the top; only in its last one does it end above the bottom.
    top = np.where(step == 0, start[run_of] % height, 0)
    bottom = np.where(step == num_columns[run_of] - 1, last[run_of] % height + 1, height)
    return Intervals(number[run_of], start[run_of] // height + step, top, bottom)


def slices_of(owners: Runs, num_owners: int) -> list[slice]:
    """Where the entries of each owner are. owners: (N,) the owner of each entry, from 0 on, in ascending order.

    Returns a slice per owner, empty ones included: slices of tensors and arrays share their memory, lists of indices do
    not.
    """
    ends = np.bincount(owners, minlength=num_owners).cumsum().tolist()
    return [slice(first, last) for first, last in pairwise([0, *ends])]


def runs_of_image(image_id: int, counts: list[str], hw: tuple[int, int]) -> list[Runs]:
    """The run lengths of an image's masks. Raises: StorageError if one does not fit its height and width."""
    masks = []
    try:
        check_size(hw)
    except ValueError as error:
        raise StorageError(f"image {image_id} has {error}; `samray verify --deep` finds all such problems") from error
    for index, text in enumerate(counts):
        try:
            masks.append(checked_runs(text, hw))
        except ValueError as error:
            raise StorageError(
                f"image {image_id}, annotation {index} does not fit its image: it has {error}; "
                "`samray verify --deep` finds all such problems"
            ) from error
    return masks
