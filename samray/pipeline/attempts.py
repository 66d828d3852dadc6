"""Durable marks that let a shard outlive an image at which whole labelling processes die.

A process that dies takes its memory along, so what it was doing must be in storage: OUTPUT/_samray/attempts/ holds
one mark per attempt at a shard. From the third attempt on every image is labelled alone, in a child (see `alone`) whose
death names the image. The image under way is marked, too: if attempts die again and again at the same one, with the
parent (as when a node runs out of memory), it becomes a failed row instead of being tried for ever.
"""

from __future__ import annotations

import itertools
from collections import Counter

from samray import storage

CAREFUL_FROM_ATTEMPT = 3
"""The first attempts run at full speed: most dead actors were pre-empted or killed, not poisoned."""

STRIKES_TO_BLAME = 6
"""Attempts that must have died at an image, alone, before it is blamed. Pre-emption, a lost machine and kill -9 leave
the same mark, so a few are no proof."""


class ShardAttempts:
    """The marks of one shard. run_id keeps this driver's marks apart from those of drivers before it.

    number: of the attempt under way, where `begin` was called elsewhere.
    """

    def __init__(self, output: str, shard: int, run_id: str, number: int = 0) -> None:
        self.dir = storage.join(output, "_samray", "attempts")
        self.prefix = f"shard-{shard:06d}."
        self.run_id = run_id
        self.number = number
        self._marked: int | None = None
        self._strikes: Counter[int] = Counter()

    @property
    def careful(self) -> bool:
        """Whether images have to be marked and labelled one at a time."""
        return self.number >= CAREFUL_FROM_ATTEMPT

    def begin(self) -> None:
        """Count this attempt, durably, before any work is done."""
        for number in itertools.count(1):
            if storage.put_new(self._uri(f"attempt-{number:04d}"), self.run_id.encode()):
                self.number = number
                break
        if self.careful:
            for name in self._names():
                kind, _, rest = name.removeprefix(self.prefix).partition("-")
                if kind == "image":
                    self._strikes[int(rest.partition(".")[0])] += 1

    def strikes(self, place: int) -> int:
        """Earlier attempts that died while the image at this place of the shard was under way, alone."""
        return self._strikes[place]

    def is_poison(self, place: int) -> bool:
        """Whether those are enough to blame the image."""
        return self._strikes[place] >= STRIKES_TO_BLAME

    def mark(self, place: int) -> None:
        """Say that the image at this place is about to be run."""
        storage.put_new(self._image_uri(place), b"")
        self._marked = place

    def unmark(self, place: int) -> None:
        """Say that it did no harm."""
        storage.delete(self._image_uri(place))
        self._marked = None

    def forget(self) -> None:
        """Uncount this attempt, and the image it was at: it was called off, and says nothing about the images."""
        if self._marked is not None:
            self.unmark(self._marked)
        storage.delete(self._uri(f"attempt-{self.number:04d}"))

    def clear(self) -> None:
        """Forget all attempts: the shard is committed. A listing is saved after a first attempt."""
        if self.number == 1:
            storage.delete(self._uri("attempt-0001"))
        else:
            for name in self._names():
                storage.delete(storage.join(self.dir, name))

    def _names(self) -> list[str]:
        return [name for name in storage.list_names(self.dir) if name.startswith(self.prefix)]

    def _image_uri(self, place: int) -> str:
        return self._uri(f"image-{place:05d}.{self.run_id}.{self.number}")

    def _uri(self, mark: str) -> str:
        return storage.join(self.dir, self.prefix + mark)
