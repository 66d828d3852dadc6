"""The results of the pipeline as typed events, from the thread that runs it to the thread that follows the run."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from samray.pipeline.report import ShardSummary

if TYPE_CHECKING:
    import ray.data


@dataclass(frozen=True, slots=True)
class ShardDone:
    """A shard's file is committed."""

    shard: int
    version: str | None
    """Version of its file, as in `samray.output.shards.shard_versions`."""
    digest: str | None
    """Its checksum (`samray.output.seals`)."""
    failures: dict[str, int]
    """Reason -> number of its images that failed, earlier runs included."""
    summary: ShardSummary
    """This run's share of it."""


@dataclass(frozen=True, slots=True)
class ShardLeft:
    """A shard was abandoned, or never begun, because the run is stopping."""

    shard: int


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """All shards are done."""


@dataclass(frozen=True, slots=True)
class StreamFailed:
    """The pipeline failed; no more events follow."""

    error: BaseException


Event = ShardDone | ShardLeft | StreamEnded | StreamFailed


class EventStream:
    """Runs the pipeline in a separate thread, which keeps the caller's thread free for signals and the progress bar."""

    def __init__(self, dataset: ray.data.Dataset) -> None:
        self._dataset = dataset
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._halt = threading.Event()
        # A daemon: blocked inside of Ray, it must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="samray-stream", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def waiting(self, timeout_s: float) -> Iterator[Event]:
        """The available events; waits up to timeout_s for the first."""
        try:
            yield self._events.get(timeout=timeout_s)
            # What came in the meantime, without waiting again.
            while True:
                yield self._events.get_nowait()
        except queue.Empty:
            return

    def halt(self) -> None:
        """Ask the thread to end after its current block."""
        self._halt.set()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to end."""
        self._thread.join(timeout=timeout_s)

    def _run(self) -> None:
        """The thread's body."""
        try:
            for row in self._rows():
                self._events.put(_event_of(row))
            # After `halt` rows may be missing, so that is not the end of the stream.
            if not self._halt.is_set():
                self._events.put(StreamEnded())
        except BaseException as error:  # the main thread raises it
            self._events.put(StreamFailed(error))

    def _rows(self) -> Iterator[dict[str, Any]]:
        """The rows of `samray.pipeline.write.write_shard`, until there are no more or `halt` was called."""
        import ray

        bundle: Any
        # Not iter_batches: its three threads would only pass along one row per shard.
        for bundle in self._dataset.iter_internal_ref_bundles():
            for block in ray.get([entry.ref for entry in bundle.blocks]):
                yield from block.to_pylist()
            if self._halt.is_set():
                return


def _event_of(row: dict[str, Any]) -> Event:
    if row["summary"] is None:
        return ShardLeft(row["shard"])
    return ShardDone(
        row["shard"], row["version"], row["digest"], json.loads(row["failures"]), ShardSummary.from_json(row["summary"])
    )
