"""Signals: what is in flight is committed, the rest is left for the next run."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from pathlib import Path

import pytest

from samray import storage
from samray.output.shards import done_shards
from tests.support import standin
from tests.support.drivers import DRIVE, driver, has_shards, send, wait_until
from tests.support.outputs import attempts_left, check_every_image_once

NUM_IMAGES = 120  # half a minute and more: much longer than the first shard takes to be committed


@pytest.mark.parametrize(
    ("signum", "exit_code", "group"), [(signal.SIGTERM, 143, False), (signal.SIGINT, 130, True)], ids=["term", "int"]
)
def test_a_signal_drains_and_the_same_command_goes_on(
    signum: signal.Signals, exit_code: int, group: bool, tmp_path: Path
) -> None:
    source, output = str(tmp_path / "in"), str(tmp_path / "out")
    images = {Path(uri).name: standin.make_image(i) for i, uri in enumerate(standin.write_images(source, NUM_IMAGES))}

    with driver(tmp_path / "first.log", source, output, "0.5") as first:
        wait_until(has_shards(output, 1), first)
        send(first, signum, group=group)
        assert first.wait() == exit_code, first.text()
        done = done_shards(output)
        assert 1 <= len(done) < NUM_IMAGES // 4, first.text()
        assert "run the same command to resume" in first.text()
        assert not storage.exists(storage.join(output, "_SUCCESS"))
        assert attempts_left(output) == {}  # nothing was left half done
        assert not first.clean_up(patience_s=120)

    if group:
        return  # one resumed run is enough
    kept = {
        shard: (tmp_path / "out" / "annotations" / f"shard-{shard:06d}.parquet").stat().st_mtime_ns for shard in done
    }
    with driver(tmp_path / "second.log", source, output, "0") as second:
        assert second.wait() == 0, second.text()
    for shard, written_at in kept.items():
        assert (tmp_path / "out" / "annotations" / f"shard-{shard:06d}.parquet").stat().st_mtime_ns == written_at
    check_every_image_once(output, images)


def test_a_shard_that_takes_longer_than_the_drain_is_given_up(tmp_path: Path) -> None:
    source, output = str(tmp_path / "in"), str(tmp_path / "out")
    standin.write_images(source, 40)
    settings = ("output.images_per_shard=20", "cluster.drain_timeout_s=0.5")

    with driver(tmp_path / "log", source, output, "1.0", *settings) as running:
        wait_until(lambda: bool(attempts_left(output)), running)
        assert running.workers("MapWorker")
        # Each would be a Python process that takes seconds of CPU time to start.
        unused = ("_StatsActor", "_AutoscalingCoordinatorActor", "ActorLocationTracker", "DashboardAgent")
        for helper in (*unused, "RuntimeEnvAgent"):
            assert not running.workers(helper)
        send(running, signal.SIGTERM)
        assert running.wait() == 143, running.text()

    assert done_shards(output) == set()
    assert attempts_left(output) == {}  # called off, so it does not count against the images


@pytest.mark.parametrize("moment", ["starting Ray", "labelling"])
def test_ctrl_c_again_and_again_prints_no_traceback(moment: str, tmp_path: Path) -> None:
    source, output = str(tmp_path / "in"), str(tmp_path / "out")
    standin.write_images(source, NUM_IMAGES)
    program = DRIVE if moment == "labelling" else ("-m", "samray", "label")
    arguments = (source, output, "1.0") if moment == "labelling" else (source, output, "model.device=cpu")

    with driver(tmp_path / "log", *arguments, program=program) as running:
        if moment == "labelling":
            wait_until(lambda: moment in running.text(), running)
        else:
            wait_until(lambda: bool(running.workers("gcs/gcs_server")), running)
        while running.process.poll() is None:
            running.look_around()
            send(running, signal.SIGINT, group=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(0.3)
        assert running.process.returncode in (130, -signal.SIGINT), running.text()
        assert "Traceback" not in running.text()
        assert "KeyboardInterrupt" not in running.text()
        assert not running.clean_up(patience_s=120)
