"""How many images the mask generator gets at once, and what to do when they take too much memory."""

from __future__ import annotations

import math
from typing import Final

from samray.pipeline.faults import DeviceFault

GPU_GROUP_IMAGES: Final = 16
"""Images per group, at most. On a CPU a batch gains nothing: there a group is one image, and there are several
threads."""

GROUP_PIXELS: Final = 100_000_000
"""A group is closed at this many pixels: decoded images are three bytes per pixel."""

GROW_AFTER_GROUPS: Final = 8
"""After so many groups that fit, groups that memory had made smaller become twice as large again."""

MAX_CONSECUTIVE_OUT_OF_MEMORY: Final = 3
"""When more images in a row do not fit, it is the device that is short of memory, not the images that are large."""


class GroupSize:
    """The number of images per group: halved when a group does not fit into memory, doubled after many that did.

    Memory that runs out is often not this process's doing, as when another one shares the GPU, so it may come back.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.num_images = largest
        """Of the next group, at most."""
        self._num_groups_that_fit = 0

    def fitted(self, num_images: int) -> None:
        """A group of this many images fitted."""
        # Smaller ones say nothing about whether larger ones would fit: the last group of a shard is often short.
        if num_images == self.num_images:
            self._num_groups_that_fit += 1
        if self._num_groups_that_fit >= GROW_AFTER_GROUPS:
            self._set(min(2 * self.num_images, self.largest))

    def too_large(self, num_images: int) -> None:
        """A group of this many images, two at least, did not fit."""
        self._set(num_images // 2)

    def room(self, num_images: int) -> int:
        """What the groups for this many images could hold at their largest: by it the use of the device is measured."""
        return self.largest * math.ceil(num_images / self.num_images)

    def _set(self, num_images: int) -> None:
        self.num_images, self._num_groups_that_fit = num_images, 0


class OutOfMemoryCount:
    """Images in a row that did not fit into memory, not even alone and with one point at a time."""

    def __init__(self) -> None:
        self._number = 0

    def fitted(self) -> None:
        """Some image did."""
        self._number = 0

    def add(self) -> None:
        """One more did not. Raises: DeviceFault if they are too many to blame the images."""
        self._number += 1
        if self._number > MAX_CONSECUTIVE_OUT_OF_MEMORY:
            raise DeviceFault(f"{self._number} images in a row did not fit into memory")
