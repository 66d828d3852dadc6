"""Things are killed in the middle; the finished output is that of a run in which nothing was."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from samray import storage
from samray.output.shards import done_shards
from tests.support import standin
from tests.support.drivers import driver, has_shards, wait_until
from tests.support.outputs import check_every_image_once

ROUNDS = int(os.environ.get("SAMRAY_CHAOS_ROUNDS", "1"))


BREAK_WRITES = '''
"""Loaded by every process of the run: the write of one shard fails, once or always."""
import os, sys
import importlib.abc, importlib.util

class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "samray.output.shards":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            put = module.put_shard
            def put_shard(output, shard, data):
                if shard == int(os.environ["BROKEN_SHARD"]):
                    raise RuntimeError("the disk is on fire")
                return put(output, shard, data)
            module.put_shard = put_shard
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, _Finder())
'''


def test_kill_9_of_the_driver_and_an_exception_inside_a_write(s3_root: str, tmp_path: Path) -> None:
    """On S3; `test_kill_everything` kills on disk. SAMRAY_CHAOS_ROUNDS=10 kills ten times."""
    num_shards = 4 * ROUNDS + 4
    source, output = storage.join(s3_root, "in"), storage.join(s3_root, "out")
    uris = standin.write_images(source, 4 * num_shards)
    images = {Path(uri).name: standin.make_image(i) for i, uri in enumerate(uris)}
    rng = random.Random(os.environ.get("SAMRAY_CHAOS_SEED", "7"))
    num_done = []
    hold = tmp_path / "hold"  # each run is held after its first shard, see `standin.Pace`
    hold.touch()
    for i in range(ROUNDS):
        with driver(tmp_path / f"{i}.log", source, output, str(hold)) as running:
            # Planning takes a moment in which nothing interesting can die: from then on, at any time.
            wait_until(lambda: storage.exists(storage.join(output, "_samray", "run.json")), running)
            if i % 2 == 0:
                wait_until(has_shards(output, min(len(done_shards(output)) + 1, num_shards)), running)
            deadline = time.monotonic() + rng.uniform(0.0, 0.6)
            while time.monotonic() < deadline and running.process.poll() is None:
                running.look_around()
                time.sleep(0.05)
            running.kill()
            num_done.append(len(done_shards(output)))
            # Ray's processes end with their driver, as a rule; one that was just starting may stay, and is ended here.
            running.clean_up(patience_s=5)
    assert 0 < num_done[0] < num_shards, "the first kill was to leave a part done and a part not"
    assert num_done[-1] < num_shards, "the last kill was to come in the middle too"

    broken = num_shards - 1
    assert broken not in done_shards(output)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(BREAK_WRITES)
    environment = {"PYTHONPATH": str(tmp_path / "broken"), "BROKEN_SHARD": str(broken)}
    with driver(tmp_path / "broken.log", source, output, "0", environment=environment) as failing:
        assert failing.wait() == 1, failing.text()
        assert "the disk is on fire" in failing.text()
    num_done.append(len(done_shards(output)))
    assert broken not in done_shards(output)
    assert not storage.exists(storage.join(output, "_SUCCESS"))

    with driver(tmp_path / "last.log", source, output, "0") as last:
        assert last.wait() == 0, last.text()
    check_every_image_once(output, images)
    assert num_done == sorted(num_done)
    print(f"shards done at each stop: {num_done}")
