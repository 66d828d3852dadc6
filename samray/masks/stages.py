"""Seconds per stage, summed up by every generator."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def timed(stage_seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Add the block's seconds to a stage; on a GPU until its work is done, which costs little with few prompts."""
    started = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    stage_seconds[name] += time.perf_counter() - started


class StageClock:
    """Sums up `seconds` per stage, also of several threads, without waiting for a GPU."""

    def __init__(self, stages: Iterable[str], device: torch.device) -> None:
        self.seconds = dict.fromkeys(stages, 0.0)
        self._device = device
        self._booking = threading.Lock()  # finishing threads count time, too
        self._queued: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str, *, queued: bool = False) -> Iterator[None]:
        """Add the time to a stage. queued: for asynchronous GPU work, whose times are read at the end."""
        if queued and self._device.type == "cuda":
            marks = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            stream = torch.cuda.current_stream(self._device)
            marks[0].record(stream)  # queued behind earlier work; waits for nothing
            try:
                yield
            finally:
                marks[1].record(stream)
                self._queued.append((name, *marks))
            return
        start = time.perf_counter()
        try:
            yield
        finally:
            self._book(name, time.perf_counter() - start)

    def read_queued(self) -> None:
        """Add the times of queued work, and wait for it."""
        while self._queued:
            name, start, end = self._queued.pop()
            end.synchronize()  # an event has no time until the GPU reaches it
            self._book(name, start.elapsed_time(end) / 1000)

    def _book(self, name: str, seconds: float) -> None:
        with self._booking:
            self.seconds[name] += seconds
