"""Number of images per call of the mask generator, and how it adapts to the memory."""

from __future__ import annotations

import math
from typing import Final

from samray.pipeline.faults import DeviceFault

GPU_GROUP_IMAGES: Final = 16
"""Maximum images per group. On a CPU batching gains nothing: a group is one image, and several threads run in
parallel."""

GROUP_PIXELS: Final = 100_000_000
"""Maximum pixels per group: decoded images take three bytes per pixel."""

GROW_AFTER_GROUPS: Final = 8
"""After this many groups that fit, reduced groups are doubled again."""

MAX_CONSECUTIVE_OUT_OF_MEMORY: Final = 3
"""If this many images in a row do not fit, the device is short of memory, rather than the images too large."""


class GroupSize:
    """The number of images per group: halved if a group does not fit into memory, doubled after many that did.

    Memory often runs out because of another process, for example one that shares the GPU, and may become free again.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.num_images = largest
        """Maximum for the next group."""
        self._num_groups_that_fit = 0

    def fitted(self, num_images: int) -> None:
        """Record that a group of this size fit."""
        # Smaller groups say nothing about larger ones: the last group of a shard is often short.
        if num_images == self.num_images:
            self._num_groups_that_fit += 1
        if self._num_groups_that_fit >= GROW_AFTER_GROUPS:
            # The count starts again with each size.
            self._set(min(2 * self.num_images, self.largest))

    def too_large(self, num_images: int) -> None:
        """Record that a group of this size, at least two, did not fit."""
        # Half of what failed, which may have been less than the maximum.
        self._set(num_images // 2)

    def room(self, num_images: int) -> int:
        """Capacity of the groups for this many images at the maximum size, to measure device utilization."""
        return self.largest * math.ceil(num_images / self.num_images)

    def _set(self, num_images: int) -> None:
        self.num_images, self._num_groups_that_fit = num_images, 0


class OutOfMemoryCount:
    """Consecutive images that did not fit into memory, even alone and with one point at a time."""

    def __init__(self) -> None:
        self._number = 0

    def fitted(self) -> None:
        """Record that an image fit."""
        self._number = 0

    def add(self) -> None:
        """Record that an image did not fit. Raises: DeviceFault if there are too many to blame the images."""
        self._number += 1
        if self._number > MAX_CONSECUTIVE_OUT_OF_MEMORY:
            raise DeviceFault(f"{self._number} images in a row did not fit into memory")
