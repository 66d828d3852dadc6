"""Durable marks that let a run survive an image on which whole labelling processes die.

The memory of a dead process is lost, so its work in progress is recorded in storage: OUTPUT/_samray/attempts/ has one
mark per attempt at a shard. From the third attempt on, each image is labelled alone in a child (see `isolated`) whose
death identifies the image. The image in progress is marked, too: if attempts keep dying on the same image together with
the parent (as when a node runs out of memory), it becomes a failed row instead of being retried forever.
"""

from __future__ import annotations

import itertools
from collections import Counter

from samray import storage

CAREFUL_FROM_ATTEMPT = 3
"""The first attempts run at full speed: most dead actors were preempted or killed, not crashed by an image."""

STRIKES_TO_BLAME = 6
"""Attempts that must die on an image, labelled alone, before it is blamed. Preemption, a lost machine and kill -9 leave
the same mark, so a few prove nothing."""


class ShardAttempts:
    """The marks of one shard. run_id separates this driver's marks from those of earlier drivers.

    number: of the current attempt, if `begin` was called elsewhere. part: of some tiles of one image, with marks of
    their own, which go with those of the shard.
    """

    def __init__(self, output: str, shard: int, run_id: str, number: int = 0, part: str = "") -> None:
        self.dir = storage.join(output, "_samray", "attempts")
        self.prefix = f"shard-{shard:06d}." + (f"{part}." if part else "")
        self.run_id = run_id
        self.number = number
        self._marked: int | None = None
        self._strikes: Counter[int] = Counter()

    @property
    def careful(self) -> bool:
        """Whether images must be marked and labelled one at a time."""
        return self.number >= CAREFUL_FROM_ATTEMPT

    def begin(self) -> None:
        """Record this attempt durably, before any work is done."""
        # Conditional creates, counted up: two attempts at the same time get different numbers.
        for number in itertools.count(1):
            if storage.put_new(self._uri(f"attempt-{number:04d}"), self.run_id.encode()):
                self.number = number
                break
        # Each mark of an image that is left is an attempt that died on it.
        if self.careful:
            for name in self._names():
                kind, _, rest = name.removeprefix(self.prefix).partition("-")
                if kind == "image":
                    self._strikes[int(rest.partition(".")[0])] += 1

    def strikes(self, index: int) -> int:
        """Number of earlier attempts that died while this image of the shard was labelled alone."""
        return self._strikes[index]

    def is_poison(self, index: int) -> bool:
        """Whether that is enough to blame the image."""
        return self._strikes[index] >= STRIKES_TO_BLAME

    def mark(self, index: int) -> None:
        """Record that the image at this index is about to be labelled."""
        storage.put_new(self._image_uri(index), b"")
        self._marked = index

    def unmark(self, index: int) -> None:
        """Record that it did no harm."""
        storage.delete(self._image_uri(index))
        self._marked = None

    def forget(self) -> None:
        """Remove the marks of this attempt and its image: it was cancelled and proves nothing about the images."""
        if self._marked is not None:
            self.unmark(self._marked)
        storage.delete(self._uri(f"attempt-{self.number:04d}"))

    def clear(self, *, has_parts: bool = False) -> None:
        """Delete all marks, because the shard is committed. Skips the listing after a first attempt without parts."""
        # No earlier attempt, so no other mark: the usual case costs one request instead of a listing.
        if self.number == 1 and not has_parts:
            storage.delete(self._uri("attempt-0001"))
        else:
            for name in self._names():
                storage.delete(storage.join(self.dir, name))

    def _names(self) -> list[str]:
        return [name for name in storage.list_names(self.dir) if name.startswith(self.prefix)]

    def _image_uri(self, index: int) -> str:
        # One mark per attempt, so that strikes of several attempts add up.
        return self._uri(f"image-{index:05d}.{self.run_id}.{self.number}")

    def _uri(self, mark: str) -> str:
        return storage.join(self.dir, self.prefix + mark)


class TileMarks:
    """The marks of all tiles of a large image as those of one image of its shard."""

    def __init__(self, attempts: ShardAttempts, index: int) -> None:
        # Above the numbers of images without tiles, of which a shard has at most 10,000.
        self._attempts, self._index = attempts, 10_000 + index

    def strikes(self, index: int) -> int:
        """As in `ShardAttempts`, for any tile."""
        return self._attempts.strikes(self._index)

    def is_poison(self, index: int) -> bool:
        """As in `ShardAttempts`, for any tile."""
        return self._attempts.is_poison(self._index)

    def mark(self, index: int) -> None:
        """A tile is about to be labelled."""
        self._attempts.mark(self._index)

    def unmark(self, index: int) -> None:
        """It did no harm."""
        self._attempts.unmark(self._index)
