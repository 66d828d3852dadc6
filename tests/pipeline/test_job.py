"""`ray job submit --working-dir . -- python jobs/autolabel.py ...` on a real cluster head, and `ray job stop`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from samray import storage
from samray.output.shards import done_shards, shard_uri
from tests.support import standin
from tests.support.outputs import rows_of
from tests.support.ray_nodes import Head, running_head

NUM_IMAGES = 60  # some 13 s of two cores: a faster machine must not be done before the job is stopped


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    with running_head(tmp_path, num_cpus=2) as head:
        yield head


def test_a_job_is_stopped_and_the_same_job_again_finishes(head: Head, tiny_checkpoint: Path, tmp_path: Path) -> None:
    source, output = str(tmp_path / "in"), str(tmp_path / "out")
    for i in range(NUM_IMAGES):
        storage.put(storage.join(source, f"{i:03d}.png"), standin.make_image(i, (160, 120)))
    arguments = [source, output, f"model.checkpoint={tiny_checkpoint}", "masks.points_per_side=6"]
    arguments += ["output.images_per_shard=2"]

    first = head.submit(*arguments)
    head.wait_for(lambda: len(done_shards(output)) >= 1, first)
    head.ray("job", "stop", first)
    assert head.end_of(first) == "STOPPED"
    assert "run the same command to resume" in head.logs(first)
    done = done_shards(output)
    assert 1 <= len(done) < NUM_IMAGES // 2
    assert not storage.exists(storage.join(output, "_SUCCESS"))
    kept = {shard: Path(shard_uri(output, shard)).stat().st_mtime_ns for shard in done}

    second = head.submit(*arguments)
    head.wait_for(lambda: storage.exists(storage.join(output, "_SUCCESS")), second)
    assert head.end_of(second) == "SUCCEEDED", head.logs(second)
    assert len(rows_of(output)) == NUM_IMAGES
    assert {shard: Path(shard_uri(output, shard)).stat().st_mtime_ns for shard in done} == kept
