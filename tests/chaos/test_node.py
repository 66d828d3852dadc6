"""A cluster as KubeRay makes it: `ray job submit` and `ray job stop`; then one of its two workers is taken away."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from samray import storage
from samray.output.shards import done_shards, shard_uri
from tests.support import standin
from tests.support.outputs import rows_of
from tests.support.ray_nodes import Node, running_head

NUM_IMAGES = 60  # some 13 s of two cores: a faster machine must not be done before the job is stopped
NUM_SHARDS = 30
LABELER = "MapWorker(MapBatches(LabelActor))"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("min_actors", [1, 2] if "SAMRAY_CHAOS_ROUNDS" in os.environ else [2])
def test_a_job_is_stopped_and_the_same_job_again_finishes_on_one_node_less(
    min_actors: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """With a pool that will never be whole again; SAMRAY_CHAOS_ROUNDS=1: and one that may do with the actor left."""
    source, output = str(tmp_path / "in"), str(tmp_path / "out")
    names = {f"{i:03d}.png" for i in range(NUM_IMAGES)}
    for i, name in enumerate(sorted(names)):
        storage.put(storage.join(source, name), standin.make_image(i, (160, 120)))
    arguments = [source, output, f"model.checkpoint={tiny_checkpoint}", "masks.points_per_side=6"]
    arguments += ["output.images_per_shard=2", f"cluster.min_actors={min_actors}"]

    with running_head(tmp_path, num_cpus=0) as head:
        workers = head.add_nodes(2, num_cpus=1)
        first = head.submit(*arguments)
        head.wait_for(lambda: len(done_shards(output)) >= 1, first)
        assert head.has_worker("RunState"), "what driver and actors tell each other was to stay with the driver"
        assert not head.has_worker(LABELER), "the head was to be left alone"
        head.ray("job", "stop", first)
        assert head.end_of(first) == "STOPPED"
        assert "run the same command to resume" in head.logs(first)
        stopped_at = done_shards(output)
        assert 1 <= len(stopped_at) < NUM_SHARDS // 2
        assert not storage.exists(storage.join(output, "_SUCCESS"))

        job = head.submit(*arguments)
        head.wait_for(lambda: done_shards(output) > stopped_at and len(_labelling(workers)) >= min_actors, job)
        victim = _labelling(workers)[0]
        (survivor,) = (node for node in workers if node is not victim)
        victim.kill()
        done = done_shards(output)
        assert len(stopped_at) < len(done) < NUM_SHARDS, "the node was to be lost in the middle"
        kept = {shard: _written_at(output, shard) for shard in done}

        head.wait_for(lambda: storage.exists(storage.join(output, "_SUCCESS")), job)
        assert head.end_of(job) == "SUCCEEDED", head.logs(job)
        assert survivor.process.poll() is None
        assert not victim.family()

    assert sorted(row["image"]["file_name"] for row in rows_of(output)) == sorted(names)
    assert {shard: _written_at(output, shard) for shard in done} == kept, "a shard was written twice"
    print(f"{len(stopped_at)} of {NUM_SHARDS} shards were done at the stop, {len(done)} when the node was lost")


def _labelling(nodes: list[Node]) -> list[Node]:
    return [node for node in nodes if node.has_worker(LABELER)]


def _written_at(output: str, shard: int) -> int:
    return Path(shard_uri(output, shard)).stat().st_mtime_ns
