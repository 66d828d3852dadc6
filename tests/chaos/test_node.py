"""A cluster as KubeRay makes it: a job is submitted and stopped; then one of its two workers is taken away."""

from __future__ import annotations

import functools
import http.server
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from samray import storage
from samray.output.shards import done_shards, shard_uri
from tests.support import standin
from tests.support.outputs import rows_of
from tests.support.ray_nodes import Node, running_head

NUM_IMAGES = 60
NUM_SHARDS = 30
SECONDS_PER_IMAGE = 0.5
ALL = 1_000_000
NUM_ALLOWED = 20
"""Images that a job gets before it is disturbed: it must not be done by then on any machine."""
LABELER = "MapWorker(MapBatches(LabelActor))"


class Gate:
    """A web server's: it answers so many requests, each after a while, and holds the others until more are allowed."""

    def __init__(self) -> None:
        self.url = ""
        self._changed = threading.Condition()
        self._num_allowed = 0

    def allow(self, number: int) -> None:
        """So many from now on; what waits comes first."""
        with self._changed:
            self._num_allowed = number
            self._changed.notify_all()

    def wait(self) -> None:
        """For one request."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_allowed > 0)
            self._num_allowed -= 1
        time.sleep(SECONDS_PER_IMAGE)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A web server of the images, with a gate."""
    gate = Gate()

    class Held(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            gate.wait()
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Held, directory=tmp_path / "in")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        gate.url = f"http://127.0.0.1:{server.server_port}"
        yield gate
        gate.allow(ALL)
        server.shutdown()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("min_actors", [1, 2] if "SAMRAY_CHAOS_ROUNDS" in os.environ else [2])
def test_a_job_is_stopped_and_the_same_job_again_finishes_on_one_node_less(
    min_actors: int, tiny_checkpoint: Path, tmp_path: Path, gate: Gate
) -> None:
    """With a pool that will never be whole again; SAMRAY_CHAOS_ROUNDS=1: and one that may do with the actor left."""
    source, output = str(tmp_path / "list.txt"), str(tmp_path / "out")
    names = {f"{i:03d}.png" for i in range(NUM_IMAGES)}
    for i, name in enumerate(sorted(names)):
        storage.put(str(tmp_path / "in" / name), standin.make_image(i, (160, 120)))
    Path(source).write_text("".join(f"{gate.url}/{name}\n" for name in sorted(names)))
    arguments = [source, output, f"model.checkpoint={tiny_checkpoint}", "masks.points_per_side=2"]
    arguments += ["output.images_per_shard=2", "cluster.num_fetch_tasks=1", f"cluster.min_actors={min_actors}"]

    with running_head(tmp_path, num_cpus=0) as head:
        workers = head.add_nodes(2, num_cpus=1)
        gate.allow(NUM_ALLOWED)
        first = head.submit(*arguments)
        head.wait_for(lambda: len(done_shards(output)) >= 1, first)
        assert head.has_worker("RunState"), "what driver and actors tell each other was to stay with the driver"
        assert not head.has_worker(LABELER), "the head was to be left alone"
        head.stop(first)
        gate.allow(ALL)  # what is in flight is finished, and what is not is not begun
        assert head.end_of(first) == "STOPPED"
        assert "run the same command to resume" in head.logs(first)
        stopped_at = done_shards(output)
        assert 1 <= len(stopped_at) < NUM_SHARDS // 2
        assert not storage.exists(storage.join(output, "_SUCCESS"))

        gate.allow(NUM_ALLOWED)
        job = head.submit(*arguments)
        head.wait_for(lambda: done_shards(output) > stopped_at and len(_labelling(workers)) >= min_actors, job)
        victim = _labelling(workers)[0]
        (survivor,) = (node for node in workers if node is not victim)
        victim.kill()
        done = done_shards(output)
        assert len(stopped_at) < len(done) < NUM_SHARDS, "the node was to be lost in the middle"
        gate.allow(ALL)
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
