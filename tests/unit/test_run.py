"""The driver of a run without Ray: what it does when a signal ends it, and when it cannot hear of its actors."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from samray import storage
from samray.cluster.control import StopRequest
from samray.config import load_config
from samray.output.plan import Plan
from samray.pipeline import drive, plan_run, run
from samray.pipeline.drive import GIVE_UP_S, Drain, Phase
from samray.sam import checkpoints, fetch
from tests.support import handmade, standin


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan of a finished output of three shards, in two of which an image has failed."""
    monkeypatch.setattr(plan_run, "run_identity", lambda config, weights: config.identity())
    return handmade.write_output(str(tmp_path), [f"{i}.png" for i in range(9)], failed=(1, 4))


def _label(plan: Plan, **options: Any) -> run.LabelReport:
    config = load_config("default", overrides=["output.images_per_shard=3", "output.max_failed_fraction=1.0"])
    where = storage.join(storage.parent(plan.output), "in")
    return run.label_with(where, plan.output, config, progress=False, make_labeler=lambda config, n: None, **options)


def test_a_retry_that_a_signal_ends_keeps_what_failed(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[int]] = []

    def stopped_at_once(one: drive.Run) -> StopRequest:
        asked.append(set(one.todo))
        return StopRequest(signal.SIGTERM)

    monkeypatch.setattr(run, "_run_on_ray", stopped_at_once)
    for _ in range(2):
        report = _label(plan, retry_failed=True)
        assert (report.num_failed, report.exit_code) == (2, 143)
        assert report.problem == "interrupted with the failed images of 2 shards left to retry"
        assert json.loads(storage.read_bytes(storage.join(plan.output, "_SUCCESS")))["num_failed"] == 2
    assert asked == [{0, 1}, {0, 1}]


def test_a_retry_that_a_signal_ends_after_its_last_shard_is_done(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped_at_the_end(one: drive.Run) -> StopRequest:
        one.committed |= set(one.todo)
        return StopRequest(signal.SIGINT)

    monkeypatch.setattr(run, "_run_on_ray", stopped_at_the_end)
    assert _label(plan, retry_failed=True).exit_code == 0


class _Stream:
    """A data set that gives nothing until the test ends."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def iter_internal_ref_bundles(self) -> Iterator[Any]:
        self.ended.wait(30)
        yield from ()


def test_a_state_actor_that_does_not_answer_is_no_sign_that_nothing_is_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, seconds in (("POLL_S", 0.01), ("LEAVE_S", 0.1), ("GIVE_UP_S", 0.1)):
        monkeypatch.setattr(drive, name, seconds)
    began = time.monotonic()
    asked: list[float] = []

    def snapshot(ref: object, timeout: float) -> tuple[dict[int, int], int]:
        at = time.monotonic() - began
        asked.append(at)
        if at < 1.0 and len(asked) % 3 == 0:  # later each answer counts, or the drain would begin again
            raise ray.exceptions.GetTimeoutError("slow")
        return ({7: 3} if at < 1.0 else {}), 0

    def does(answer: object = None) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *args, **options: answer)

    monkeypatch.setattr(ray, "get", snapshot)
    view = SimpleNamespace(num_done=0, update=lambda **figures: None)
    cluster = SimpleNamespace(cluster=SimpleNamespace(drain_timeout_s=60.0))
    history = SimpleNamespace(save=lambda every_s=0.0: None)
    one: Any = SimpleNamespace(
        view=view, todo={7: False}, config=cluster, history=history, plan=SimpleNamespace(num_images=3), tiles={}
    )
    stream: Any = _Stream()
    drive.drive(stream, one, SimpleNamespace(end=does(), stop=does(), snapshot=does()), StopRequest(signal.SIGTERM))
    stream.ended.set()
    assert asked[-1] > 1.0  # while shard 7 was in flight it was waited for


def test_the_driver_reads_and_hashes_the_weights_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = shutil.copy(checkpoints.resolve_checkpoint("tiny"), tmp_path / "weights.safetensors")
    standin.write_images(str(tmp_path / "in"), 3)
    config = load_config(None, overrides=[f"model.checkpoint={weights}"])
    calls: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        body = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **options: calls.update([name]) or body(*args, **options))

    counted(checkpoints, "read_state_dict")
    counted(fetch, "file_sha256")
    monkeypatch.setattr(run, "_run_on_ray", lambda one: None)
    for _ in range(2):  # to begin with, and when the run is resumed
        run.label(tmp_path / "in", tmp_path / "out", config, progress=False)
        assert calls == {"read_state_dict": 1, "file_sha256": 1}
        calls.clear()


def test_the_phases_of_a_stop() -> None:
    drain = Drain(10.0)
    drain.update(0.0, 0)
    assert (drain.phase, drain.is_overdue(99.0)) == (Phase.RUNNING, False)
    drain.begin(100.0)
    drain.begin(105.0)  # asked again: the deadline stays
    seen = []
    for now, num_in_flight in [(101.0, 2), (102.0, None), (103.0, 0), (104.0, 1), (105.0, 0), (107.1, 0)]:
        drain.update(now, num_in_flight)
        seen.append(drain.phase.name)
    assert seen == ["DRAINING", "DRAINING", "LEAVING", "DRAINING", "LEAVING", "OVER"]
    assert (drain.is_overdue(110.0), drain.is_overdue(110.1)) == (False, True)

    silent = Drain(10.0)
    silent.begin(0.0)
    for now in (10.0 + GIVE_UP_S, 10.1 + GIVE_UP_S, 10.2 + GIVE_UP_S, 12.2 + GIVE_UP_S):
        silent.update(now, None)
        seen.append(silent.phase.name)
    assert seen[-4:] == ["DRAINING", "LEAVING", "LEAVING", "OVER"]
