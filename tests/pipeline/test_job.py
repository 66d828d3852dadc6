"""`ray job submit --working-dir . -- python jobs/autolabel.py ...` on a real cluster head, and `ray job stop`."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import standin
from outputs import rows_of

from samray import storage
from samray.dataset.shards import done_shards, shard_uri

REPOSITORY = Path(__file__).resolve().parents[2]
RAY = [sys.executable, "-c", "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; sys.exit(main())"]
NUM_IMAGES = 24


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Head:
    """A cluster of one node, and how to reach it."""

    environment: dict[str, str]

    def ray(self, *arguments: str, cwd: Path = REPOSITORY) -> str:
        done = subprocess.run(
            [*RAY, *arguments], cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *arguments: str) -> str:
        """Submit the main job from the repository's root; returns its id."""
        job = f"job-{secrets.token_hex(4)}"
        runtime = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120", "OMP_NUM_THREADS": "1"}}
        options = ["--submission-id", job, "--no-wait", "--working-dir", ".", "--runtime-env-json", json.dumps(runtime)]
        self.ray("job", "submit", *options, "--", "python", "jobs/autolabel.py", *arguments)
        return job

    def wait_for(self, condition: Callable[[], bool], job: str, timeout_s: float = 400.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.ray("job", "logs", job)
            time.sleep(0.5)

    def end_of(self, job: str) -> str:
        """SUCCEEDED, STOPPED or FAILED, once it is one of them."""
        for _ in range(30):
            text = self.ray("job", "status", job).upper()
            found = [status for status in ("SUCCEEDED", "STOPPED", "FAILED") if status in text]
            if found:
                return found[0]
            time.sleep(1)
        raise AssertionError(text)


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """`ray start --head` on ports of its own, ended by pid: `ray stop` would end every Ray of the machine."""
    ports = {name: _free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard-port']}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    options = [f"--{name}={port}" for name, port in ports.items()]
    options += ["--num-cpus=2", "--object-store-memory=200000000", "--include-dashboard=true", "--disable-usage-stats"]
    with tempfile.TemporaryDirectory(prefix="head-", dir="/tmp") as temp_dir, (tmp_path / "head.log").open("wb") as log:
        process = subprocess.Popen(
            [*RAY, "start", "--head", "--block", *options, f"--temp-dir={temp_dir}"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with socket.socket() as probe:
                deadline = time.monotonic() + 120
                while probe.connect_ex(("127.0.0.1", ports["dashboard-port"])):
                    assert process.poll() is None, (tmp_path / "head.log").read_text()
                    assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()
                    time.sleep(0.5)
            yield Head(environment)
        finally:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            process.terminate()
            _, alive = psutil.wait_procs(family, timeout=5)
            for left in alive:
                left.kill()
            psutil.wait_procs(alive, timeout=10)


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
    assert "goes on from here" in head.ray("job", "logs", first)
    done = done_shards(output)
    assert 1 <= len(done) < NUM_IMAGES // 2
    assert not storage.exists(storage.join(output, "_SUCCESS"))
    kept = {shard: Path(shard_uri(output, shard)).stat().st_mtime_ns for shard in done}

    second = head.submit(*arguments)
    head.wait_for(lambda: storage.exists(storage.join(output, "_SUCCESS")), second)
    assert head.end_of(second) == "SUCCEEDED", head.ray("job", "logs", second)
    assert len(rows_of(output)) == NUM_IMAGES
    assert {shard: Path(shard_uri(output, shard)).stat().st_mtime_ns for shard in done} == kept
