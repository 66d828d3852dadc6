"""Messages between driver and labelling actors during a run: progress, and "stop"."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
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
        self.stopping = False
        self.abandoning = False

    def begin(self, shard: int) -> bool:
        """A labeler is about to begin a shard; False: skip it, the run is stopping."""
        self.images_under_way.pop(shard, None)  # from an earlier attempt whose actor died
        if not self.stopping:
            self.images_under_way[shard] = 0
        return not self.stopping

    def advance(self, shard: int, num_images: int) -> bool:
        """Some images of a shard are labelled; False: abandon the rest of it."""
        self.images_under_way[shard] = self.images_under_way.get(shard, 0) + num_images
        return not self.abandoning

    def end(self, shard: int) -> None:
        """The shard is committed or abandoned."""
        self.images_under_way.pop(shard, None)

    def stop(self, abandon: bool) -> None:
        """Let no labeler begin another shard; abandon: nor finish its current one."""
        self.stopping = True
        self.abandoning = abandon

    def snapshot(self) -> dict[int, int]:
        """Number of images done so far in each shard that is in progress."""
        return self.images_under_way


def start_run_state() -> Any:
    """Start the actor on the driver's own node, without reserving a CPU. Returns its handle."""
    # Not soft: Ray might place it on another node even if this one is free, and lose it with that node.
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    # Restarted without limit; what it then has forgotten is sent again, or only shown.
    actor: Any = ray.remote(RunState)
    return actor.options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()


def end_run_state(state: Any) -> None:
    """End the actor of a run that is complete: where Ray outlives the run, its process would outlive it, too."""
    with contextlib.suppress(Exception):
        ray.kill(state)


@dataclass
class StopRequest:
    """What signals have requested of the driver."""

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
