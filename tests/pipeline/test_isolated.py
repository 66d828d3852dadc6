"""Images that end the process which labels them: each is found and blamed with proof, and nothing else is lost."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from samray.config import Config, load_config
from samray.errors import SamrayError
from samray.inputs.child import ChildNotStarted
from samray.output.shards import done_shards
from samray.pipeline.attempts import STRIKES_TO_BLAME, ShardAttempts
from samray.pipeline.isolated import IsolatedLabeler
from samray.pipeline.labeler import EncodedImage, ShardLabeler
from samray.pipeline.report import Labelled, LabelReport
from tests.support import standin
from tests.support.outputs import attempts_left, rows_of

Label = Callable[..., LabelReport]
POISON = standin.make_image(7, first_pixel=standin.POISON)


class Preempted(standin.StandIn):
    """Gets its actor killed, as from outside, `times` in all."""

    def __init__(self, log: Path, times: int) -> None:
        super().__init__()
        self.log, self.times = log, times

    def generate(self, images: list[NDArray[np.uint8]]) -> list[list[dict[str, Any]]]:
        if not self.log.exists() or len(self.log.read_bytes()) < self.times:
            with self.log.open("ab") as log:
                log.write(b".")
            mine = psutil.Process()
            in_child = "samray.inputs.child" in " ".join(mine.cmdline())
            os.kill(mine.ppid() if in_child else mine.pid, signal.SIGKILL)
            signal.pause()
        return super().generate(images)


def make_preempted(config: Config, num_threads: int, log: Path, times: int) -> ShardLabeler:
    return ShardLabeler(lambda _: Preempted(log, times), max_pixels=config.input.max_pixels, num_threads=num_threads)


def _image(seed: int, data: bytes | None = None) -> EncodedImage:
    return EncodedImage(seed, f"{seed}.png", f"/in/{seed}.png", data or standin.make_image(seed))


def _alone(make_labeler: Callable[[Config, int], ShardLabeler]) -> IsolatedLabeler:
    return IsolatedLabeler(load_config(), make_labeler, standin.make_labeler(load_config(), 1).decode)


def _attempts(tmp_path: Path) -> ShardAttempts:
    attempts = ShardAttempts(str(tmp_path), 0, "run")
    attempts.begin()
    return attempts


def test_images_are_labelled_as_ever_and_one_that_kills_the_child_is_a_failed_row(tmp_path: Path) -> None:
    images = [_image(0), _image(1, POISON), _image(2), _image(3, b"no image")]
    seen: list[Labelled] = []
    alone = _alone(standin.make_crashing_labeler)
    done = alone.label(images, _attempts(tmp_path), seen.append)
    alone.close()
    expected = standin.make_labeler(load_config(), 1).label([images[0], images[2], images[3]]).records
    assert [done.records[i] for i in (0, 2, 3)] == expected
    assert done.records[1].error is not None
    assert done.records[1].error.startswith("quarantined: labelling only this image ended the process 2 times")
    assert "SIGABRT" in done.records[1].error
    assert len(seen) == 4
    assert not [name for name in attempts_left(str(tmp_path)) if "image" in name]


def test_a_machine_on_which_no_picture_can_be_labelled_blames_no_image(tmp_path: Path) -> None:
    with pytest.raises(ChildNotStarted):
        _alone(standin.make_sick_labeler).label([_image(0)], _attempts(tmp_path))


def test_an_image_at_which_whole_attempts_died_again_and_again_is_left_out(tmp_path: Path) -> None:
    for _ in range(STRIKES_TO_BLAME + 2):
        attempts = _attempts(tmp_path)
        if attempts.careful:
            attempts.mark(1)
    alone = _alone(standin.make_labeler)
    done = alone.label([_image(0), _image(1), _image(2)], _attempts(tmp_path))
    alone.close()
    assert [record.error is None for record in done.records] == [True, False, True]
    assert f"the labelling processes of {STRIKES_TO_BLAME} attempts died on this image" in str(done.records[1].error)


def test_five_images_that_crash_in_one_shard_are_five_failed_rows(tmp_path: Path, label: Label) -> None:
    (tmp_path / "in").mkdir()
    for i in range(9):
        (tmp_path / "in" / f"{i}.png").write_bytes(POISON if i % 2 == 0 else standin.make_image(i))
    overrides = ("output.images_per_shard=9",)
    report = label(tmp_path / "in", tmp_path / "out", *overrides, make_labeler=standin.make_crashing_labeler)
    failed = {r["image"]["file_name"]: r["error"] for r in rows_of(str(tmp_path / "out")) if r["status"] == "failed"}
    assert sorted(failed) == [f"{i}.png" for i in range(0, 9, 2)]
    assert all(error.startswith("quarantined: ") for error in failed.values())
    assert report.failures == {"quarantined": 5}
    assert report.num_labelled == 4
    assert attempts_left(str(tmp_path / "out")) == {}


def test_kills_from_outside_blame_no_image(tmp_path: Path, label: Label) -> None:
    """The labelling process is killed again and again at the only image of its shard, as by pre-emption."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "sound.png").write_bytes(standin.make_image(0))
    make = functools.partial(make_preempted, log=tmp_path / "log", times=5)
    report = label(tmp_path / "in", tmp_path / "out", make_labeler=make)
    assert (tmp_path / "log").read_bytes() == b"....."
    assert report.failures == {}
    assert [row["status"] for row in rows_of(str(tmp_path / "out"))] == ["ok"]


def test_a_sick_machine_ends_the_run_with_a_sentence(tmp_path: Path, label: Label) -> None:
    (tmp_path / "in").mkdir()
    standin.write_images(str(tmp_path / "in"), 3)
    with pytest.raises(SamrayError, match="the machine is at fault"):
        label(tmp_path / "in", tmp_path / "out", make_labeler=standin.make_sick_labeler)
    assert done_shards(str(tmp_path / "out")) == set()
