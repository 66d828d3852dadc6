"""Confusion matrix: names of known regions against names of the masks that cover them.

A mask and a region belong together if their IoU is at least 0.5. Pairs are formed from the highest IoU down, whatever
the names are; if equal, those of the same name first. Each mask and each region is in one pair. A region without a mask
was taken for the background, and a mask without a region is background that was taken for something.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np
from pycocotools import mask as coco_mask

from samray.rle.records import Rle

MIN_IOU: Final = 0.5


class Confusion:
    """The number of pairs of each two names."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        """Names of regions and masks, without the two below."""
        self.unnamed = _unlike("no name", self.names)
        """Stands for a region or a mask without a name."""
        self.background = _unlike("background", self.names)
        self.counts: Counter[tuple[str, str]] = Counter()
        """(name of the region, name of the mask) -> number."""

    def add(
        self,
        regions: Sequence[Rle],
        names: Sequence[str | None],
        masks: Sequence[Rle],
        mask_names: Sequence[str | None],
    ) -> None:
        """Match and count an image's masks."""
        region_of = match(regions, names, masks, mask_names)
        for mask, name in enumerate(mask_names):
            region = region_of.get(mask)
            of_region = self.background if region is None else self._word(names[region])
            self.counts[of_region, self._word(name)] += 1
        for region in set(range(len(regions))) - set(region_of.values()):
            self.counts[self._word(names[region]), self.background] += 1

    def _word(self, name: str | None) -> str:
        return self.unnamed if name is None else name

    @property
    def words(self) -> list[str]:
        """The names of rows and columns, in order: names, the one for no name if it occurs, and the background."""
        has_unnamed = any(self.unnamed in pair for pair in self.counts)
        return [*self.names, *[self.unnamed] * has_unnamed, self.background]

    def matrix(self, words: Sequence[str]) -> np.ndarray:
        """(N, N) int64: rows are regions, columns masks."""
        return np.array([[self.counts[row, column] for column in words] for row in words], np.int64).reshape(
            len(words), len(words)
        )

    def merged(self, number: int) -> Confusion:
        """With the first `number` names, and all further ones as one: "others"."""
        if len(self.names) <= number + 1:
            return self
        others = _unlike("others", self.names)
        merged = Confusion([*self.names[:number], others])
        merged.unnamed, merged.background = self.unnamed, self.background
        word_of = dict.fromkeys(self.names[number:], others)
        for (row, column), count in self.counts.items():
            merged.counts[word_of.get(row, row), word_of.get(column, column)] += count
        return merged

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Name of the region -> name of the mask -> number, without zeros."""
        words = self.words
        rows = {row: {column: n for column in words if (n := self.counts[row, column])} for row in words}
        return {row: columns for row, columns in rows.items() if columns}


def match(
    regions: Sequence[Rle], names: Sequence[str | None], masks: Sequence[Rle], mask_names: Sequence[str | None]
) -> dict[int, int]:
    """Index of a mask -> index of its region."""
    if not regions or not masks:
        return {}
    iou = np.asarray(coco_mask.iou(list(masks), list(regions), [0] * len(regions)), np.float64)
    pairs = [(int(mask), int(region)) for mask, region in np.argwhere(iou >= MIN_IOU)]
    # Sorted by position last, so that the same data always gives the same pairs.
    pairs.sort(key=lambda pair: (-iou[pair], mask_names[pair[0]] != names[pair[1]], pair))
    region_of: dict[int, int] = {}
    used: set[int] = set()
    for mask, region in pairs:
        if mask not in region_of and region not in used:
            region_of[mask] = region
            used.add(region)
    return region_of


def _unlike(word: str, names: Sequence[str]) -> str:
    while word in names:
        word = f"({word})"
    return word
