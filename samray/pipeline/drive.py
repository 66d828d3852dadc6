"""Follow a run in progress: count committed shards, show progress, and end the run on request.

A run ends in one of five ways: all shards are done; the pipeline fails; or after a signal, nothing is in flight any
more; or the time for that is up (`Drain`); or a second signal interrupts everything.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from samray.cluster.errors import plain_error
from samray.output.failures import SAVE_EVERY_S
from samray.pipeline.metrics import record
from samray.pipeline.stream import EventStream, ShardDone, ShardLeft, StreamEnded, StreamFailed

if TYPE_CHECKING:
    import ray.data

    from samray.cluster.control import StopRequest
    from samray.config import Config
    from samray.labels.ways import Inputs
    from samray.output.failures import FailureCounts
    from samray.output.plan import Plan
    from samray.pipeline.labeler import MakeLabeler
    from samray.pipeline.report import LabelReport
    from samray.pipeline.tiling import Size
    from samray.progress import ProgressView
    from samray.prompts import Prompt

POLL_S = 0.5

GIVE_UP_S = 20.0
"""Seconds, after the drain's time is up, for a labeler to finish a group of images and notice."""

LEAVE_S = 2.0
"""Seconds for the rest of the stream to end: quieter than interrupting it, but it may be a million shards."""

_ANSWER_S: Final = 5.0
"""Seconds to wait for the state actor before it counts as unreachable."""


@dataclass
class Run:
    """The work of a run, and its results so far."""

    plan: Plan
    config: Config
    todo: Mapping[int, bool]
    """Shard -> whether it is finished, and only some of its images must be labelled again."""
    prompts: Mapping[int, Mapping[int, list[Prompt]]] | None
    """User prompts: shard -> index of the image in it -> list. None to generate all masks."""
    credentials: Mapping[int, Mapping[str, str]]
    """Shard -> credentials in the URIs of its images, which the plan does not store."""
    retry_failed: bool
    report: LabelReport
    history: FailureCounts
    view: ProgressView
    labels: Inputs | None
    """Inputs for names; None to find masks without names."""
    make_labeler: MakeLabeler | None
    """None for the labeler of config's model."""
    reads_images: bool = True
    """Whether the fetch stage reads the images; if not, the labeler has them from elsewhere."""
    tiles: Mapping[int, Mapping[int, Size]] = field(default_factory=dict)
    """Shard -> index in it -> the images to label in tiles (`masks.tile`)."""
    committed: set[int] = field(default_factory=set)
    """Shards of todo committed so far."""


class Phase(enum.Enum):
    """Phases of stopping."""

    RUNNING = enum.auto()
    DRAINING = enum.auto()
    """No new shards are begun; those in flight are finished or, when the time is up, abandoned."""
    LEAVING = enum.auto()
    """Nothing is in flight, or it does not respond: give the stream a moment to end."""
    OVER = enum.auto()


class Drain:
    """The phases of a stop. Times are `time.monotonic()`, in seconds."""

    def __init__(self, timeout_s: float) -> None:
        self.phase = Phase.RUNNING
        self._timeout_s = timeout_s
        self._deadline = 0.0
        self._left_at = 0.0

    def begin(self, now: float) -> None:
        """A signal requested a stop; further calls have no effect."""
        if self.phase is Phase.RUNNING:
            self.phase, self._deadline = Phase.DRAINING, now + self._timeout_s

    def is_overdue(self, now: float) -> bool:
        """Whether to abandon the shards in flight."""
        return self.phase is not Phase.RUNNING and now > self._deadline

    def update(self, now: float, num_in_flight: int | None) -> None:
        """num_in_flight: shards begun but not committed; None if the state actor does not respond."""
        if self.phase is Phase.RUNNING:
            return
        # Without a response, shards may still be in flight: then only the time ends the drain.
        if num_in_flight != 0 and now <= self._deadline + GIVE_UP_S:
            self.phase = Phase.DRAINING  # also from LEAVING: a shard may begin before the stop reaches its actor
        elif self.phase is Phase.DRAINING:
            self.phase, self._left_at = Phase.LEAVING, now
        elif now > self._left_at + LEAVE_S:
            self.phase = Phase.OVER


class _Progress:
    """Counts the results of the stream, for the report, the progress bar and the metrics."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.num_before = self.num_committed = run.view.num_done
        self.num_failed = 0
        self.num_tiles, self.num_tiles_before = _count_tiles(run)

    def add(self, done: ShardDone) -> None:
        run = self.run
        run.report.add(done.summary)
        run.committed.add(done.shard)
        # Saved from time to time: a later run then knows the failed images without reading the shards.
        run.history.set(done.shard, done.version, done.failures, done.digest)
        self.num_failed += sum(done.summary.failures.values())
        # num_before already includes the images of a shard that was finished before.
        if not run.todo[done.shard]:
            self.num_committed += run.plan.num_images_of(done.shard)

    def show(self, in_flight: Mapping[int, int] | None = None) -> None:
        """in_flight: shard -> labelled images that are not committed."""
        run = self.run
        # Images of finished shards are counted already, also while some are labelled again.
        ahead = sum(number for shard, number in (in_flight or {}).items() if not run.todo.get(shard))
        num_done = self.num_committed + ahead
        run.view.update(num_done=num_done, num_failed=self.num_failed)
        record("samray_run_images", run.plan.num_images)
        record("samray_run_images_done", num_done)
        record("samray_run_images_failed", self.num_failed)

    def note(self, phase: Phase, in_flight: Mapping[int, int]) -> str:
        """The current activity, for the progress bar."""
        if phase is not Phase.RUNNING:
            return f"stopping, {len(in_flight)} shard{'' if len(in_flight) == 1 else 's'} in flight"
        return "labelling" if in_flight or self.num_committed > self.num_before else "loading the model"

    def tiles(self, num_tiles: int) -> str:
        """Tiles of large images, for the progress bar. num_tiles: those that this run has labelled."""
        if not num_tiles:
            return ""
        # If an actor died, some are labelled twice.
        num_done = min(self.num_tiles_before + num_tiles, self.num_tiles)
        return f"{num_done:,} of {self.num_tiles:,} tiles"


def drive(dataset: ray.data.Dataset, run: Run, state: Any, stop: StopRequest) -> None:
    """Count committed shards until all are, or until a stop is requested and the shards in flight are committed.

    state: handle of `samray.cluster.control.RunState`. Raises: the error of the pipeline, unwrapped.
    """
    stream, drain, progress = EventStream(dataset), Drain(run.config.cluster.drain_timeout_s), _Progress(run)
    stream.start()
    try:
        while drain.phase is not Phase.OVER:
            for event in stream.waiting(POLL_S):
                match event:
                    case StreamFailed(error):
                        # Raised here, in the main thread, and not in the one that runs the pipeline.
                        raise plain_error(error)
                    case StreamEnded():
                        progress.show()
                        return
                    case ShardDone():
                        # Not awaited: a state actor that does not respond must not stop the counting.
                        state.end.remote(event.shard)
                        progress.add(event)
                    case ShardLeft(shard):
                        state.end.remote(shard)
            _poll(run, state, stop, drain, progress)
        # Only after a stop: the rest of the stream is shards that no actor begins any more.
        stream.halt()
        stream.join(GIVE_UP_S)  # if Ray were gone, the thread would start another
    finally:
        stream.halt()
        # Also after an error or Ctrl-C: the shards counted so far are committed.
        run.history.save()


def _poll(run: Run, state: Any, stop: StopRequest, drain: Drain, progress: _Progress) -> None:
    """Pass a stop on to the actors, ask what is in flight, and show it."""
    if stop.signum is not None:
        drain.begin(time.monotonic())
        # Repeated each time, because a restarted state actor has forgotten it.
        state.stop.remote(abandon=drain.is_overdue(time.monotonic()))
    in_flight, num_tiles = _in_flight(state)
    drain.update(time.monotonic(), None if in_flight is None else len(in_flight))
    # Once over, the bar keeps its last state.
    if drain.phase is not Phase.OVER:
        run.view.update(note=progress.note(drain.phase, in_flight or {}), detail=progress.tiles(num_tiles))
        run.history.save(SAVE_EVERY_S)
        progress.show(in_flight)


def _in_flight(state: Any) -> tuple[dict[int, int] | None, int]:
    """Shards begun but not committed -> images labelled, and tiles labelled; None and 0 if the state actor does not
    respond."""
    import ray

    try:
        snapshot: tuple[dict[int, int], int] = ray.get(state.snapshot.remote(), timeout=_ANSWER_S)
        return snapshot
    except ray.exceptions.RayError:
        return None, 0


def _count_tiles(run: Run) -> tuple[int, int]:
    """Tiles of the large images of a run, and those of them that are there already, from a run that was killed."""
    from samray.output.tile_files import list_tiles
    from samray.pipeline.large_images import too_large_for_tiles
    from samray.pipeline.tiling import tiling_of

    if not run.tiles:
        return 0, 0
    sizes = [size for of_shard in run.tiles.values() for size in of_shard.values()]
    total = sum(len(tiling_of(size, run.config)) for size in sizes if too_large_for_tiles(size, run.config) is None)
    done = sum(
        tiles_of_shard.num_tiles for shard, tiles_of_shard in list_tiles(run.plan.output).items() if shard in run.tiles
    )
    return total, min(done, total)
