"""Messages between driver and labelling actors during a run: progress, and "stop"."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray


class RunState:
    """A Ray actor of the driver. Correctness does not depend on it: the output is the same without it."""

    def __init__(self) -> None:
        self.images_under_way: dict[int, int] = {}
        self.num_tiles = 0
        self.stopping = False
        self.abandoning = False
        self._claims: dict[tuple[str, int], tuple[str, float]] = {}
        self._last: dict[str, list[tuple[str, int]]] = {}  # owner -> the tiles that it is at
        self._failed: set[str] = set()

    def begin(self, shard: int) -> bool:
        """A labeler is about to begin a shard; False: skip it, the run is stopping."""
        self.images_under_way.pop(shard, None)  # from an earlier attempt whose actor died
        if not self.stopping:
            self.images_under_way[shard] = 0
        return not self.stopping

    def advance(self, shard: int, num_images: int, num_tiles: int = 0) -> bool:
        """Some images of a shard, or tiles of its images, are labelled; False: abandon the rest of it."""
        self.num_tiles += num_tiles
        self.images_under_way[shard] = self.images_under_way.get(shard, 0) + num_images
        return not self.abandoning

    def claim(self, image: str, tiles: list[int], owner: str, lease_s: float, most: int) -> list[int]:
        """Which of these tiles of an image to label now, at most `most`: none that another owner has claimed, unless it
        gave no sign for lease_s seconds. An owner may claim its own again."""
        now = time.monotonic()
        self._claims = {key: claim for key, claim in self._claims.items() if claim[1] > now}
        free = [tile for tile in tiles if self._claims.get((image, tile), (owner, 0))[0] == owner][:most]
        # Earlier tiles are done. Their claims expire by themselves, because an older listing may still arrive.
        self._last[owner] = [(image, tile) for tile in free]
        self._claims |= dict.fromkeys(self._last[owner], (owner, now + lease_s))
        return free

    def has_free(self, image: str, tiles: list[int]) -> bool:
        """Whether one of these tiles is free: no actor labels it."""
        now = time.monotonic()
        return any(self._claims.get((image, tile), ("", 0.0))[1] <= now for tile in tiles)

    def fail(self, image: str) -> None:
        """A tile of an image cannot be labelled."""
        self._failed.add(image)

    def has_failed(self, image: str) -> bool:
        """Whether some tile of an image cannot be labelled: then the others need not be, either."""
        return image in self._failed

    def release(self, owner: str) -> None:
        """An owner has ended or was restarted: it is at none of its tiles."""
        self._claims = {key: claim for key, claim in self._claims.items() if claim[0] != owner}
        self._last.pop(owner, None)

    def renew(self, owner: str, lease_s: float) -> None:
        """An owner is still at the tiles that it claimed last."""
        until = time.monotonic() + lease_s
        for key in self._last.get(owner, ()):
            if self._claims.get(key, (owner,))[0] == owner:
                self._claims[key] = (owner, until)

    def end(self, shard: int) -> None:
        """The shard is committed or abandoned."""
        self.images_under_way.pop(shard, None)

    def stop(self, abandon: bool) -> None:
        """Let no labeler begin another shard; abandon: nor finish its current one."""
        self.stopping = True
        self.abandoning = abandon

    def snapshot(self) -> tuple[dict[int, int], int]:
        """Number of images done so far in each shard that is in progress, and number of tiles done in this run."""
        return self.images_under_way, self.num_tiles


def start_run_state() -> Any:
    """Start the actor on the driver's own node, without reserving a CPU. Returns its handle."""
    # Not soft: Ray might place it on another node even if this one is free, and lose it with that node.
    on_this_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    # Restarted without limit; what it then has forgotten is sent again, or only shown.
    actor: Any = ray.remote(RunState)
    return actor.options(num_cpus=0, max_restarts=-1, scheduling_strategy=on_this_node).remote()


def end_run_state(state: Any) -> None:
    """End the actor of a run that is complete: where Ray outlives the run, its process would outlive it, too."""
    with contextlib.suppress(Exception):
        ray.kill(state)


@dataclass
class StopRequest:
    """The stop that signals have requested."""

    signum: int | None = None
    """The first signal received."""
    num_signals: int = 0

    @property
    def exit_code(self) -> int:
        """As shells report a death by signal: 130 for Ctrl-C, 143 for SIGTERM."""
        assert self.signum is not None
        return 128 + self.signum

    def listen(self) -> None:
        """Handle the signals from here on; call again after `ray.init`, which sets its own handler for SIGTERM."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._on_signal)
            signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.num_signals += 1
        # Exactly the second: a third must not interrupt Ray while it shuts down.
        if self.num_signals == 2:
            raise KeyboardInterrupt
        self.signum = self.signum or signum

    def on_ignored(self, ignored: Any) -> None:
        """Python drops an interrupt inside a finalizer or lock; make the next signal raise again."""
        if ignored.exc_type is KeyboardInterrupt:
            self.num_signals = 1
        else:
            sys.__unraisablehook__(ignored)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM request a drain; the second one raises KeyboardInterrupt, which ends the run at once.

    Further signals are ignored to let Ray shut down completely. Outside the main thread Python allows no handlers:
    there, nothing is caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # Put back at the end: the caller may be a program with handlers of its own.
    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    request.listen()
    unraisable, sys.unraisablehook = sys.unraisablehook, request.on_ignored
    try:
        yield request
    finally:
        sys.unraisablehook = unraisable
        for signum, handler in previous.items():
            signal.signal(signum, handler)
