"""A Ray of our own: small ones label what a data set holds, nobody else gets in, and nothing is left."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from samray.cluster import session
from tests.support import REPOSITORY, standin

CPUS = ["1", "2"]


@pytest.fixture(scope="module")
def rays(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What on_small_rays.py says, with a home and a folder for temporary files of its own."""
    images = tmp_path_factory.mktemp("images")
    standin.write_images(str(images), 3)
    with tempfile.TemporaryDirectory(prefix="st-", dir="/tmp") as folder:  # short: Ray's sockets are in it
        home, temporary = Path(folder, "h"), Path(folder, "t")
        home.mkdir()
        temporary.mkdir()
        environment = {**os.environ, "HOME": str(home), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            environment.pop(name, None)
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.on_small_rays", str(images), *CPUS],
            cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-5000:]
        yield {**json.loads(done.stdout.splitlines()[-1]), "home": sorted(map(str, home.rglob("*")))}


@pytest.mark.parametrize("cpus", CPUS)
def test_a_data_set_is_labelled_however_few_cpus_there_are(rays: dict[str, Any], cpus: str) -> None:
    assert rays[cpus]["labelled"] == {"read_images": ["ok"] * 3, "read_binary_files": ["ok"] * 3}


@pytest.mark.parametrize("cpus", CPUS)
def test_ray_listens_on_loopback_only(rays: dict[str, Any], cpus: str) -> None:
    listening = rays[cpus]["listening"]
    assert {"gcs_server", "raylet"} <= {name for name, _, _ in listening}
    assert len(listening) >= 6, "the agents and the workers listen too"
    assert [one for one in listening if one[1] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")] == []


@pytest.mark.parametrize("cpus", CPUS)
def test_no_other_user_gets_at_its_files(rays: dict[str, Any], cpus: str) -> None:
    folders = rays[cpus]["folders"]
    root = min(folders, key=len)
    assert folders[root] == 0o700
    assert any(path.endswith("/sockets") for path in folders), "all that Ray keeps is below the private folder"
    assert rays[cpus]["token"] == [0o600, 64]


def test_nothing_is_left(rays: dict[str, Any]) -> None:
    for cpus in CPUS:
        assert rays[cpus]["processes_left"] == []
        assert rays[cpus]["files_left"] == []
        assert rays[cpus]["environment_left"] == []
    assert [path for path in rays["home"] if ".ray" in path] == [], "`ray start --head` would ask for that token"


def test_what_dead_runs_left_is_ended_and_removed_and_others_stay(tmp_path: Path) -> None:
    dead, alive, foreign, elsewhere = (tmp_path / name for name in ("samray-dead", "samray-alive", "samray-x", "kept"))
    for folder in (dead, alive, foreign, elsewhere):
        (folder / "ray" / "logs").mkdir(parents=True)
    for folder in (dead, alive, elsewhere):
        (folder / "lock").touch()
    (dead / "ray" / "link").symlink_to(elsewhere)
    (tmp_path / "samray-link").symlink_to(elsewhere)
    left, running = (
        subprocess.Popen(["sleep", "100"], env={**os.environ, "SAMRAY_RAY_FOLDER": str(folder)})
        for folder in (dead, alive)
    )
    with (alive / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        session._remove_folders_of_dead_runs(tmp_path)
    assert running.poll() is None
    running.kill()
    running.wait()
    assert left.poll() is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "samray-alive", "samray-link", "samray-x"]
    assert (elsewhere / "ray" / "logs").is_dir()


USED_AT_ITS_END = """
import contextlib
import sys
import threading

import ray

from samray.cluster.session import local_ray


def use_ray():
    with contextlib.suppress(BaseException):
        while True:
            ray.put(b"0" * 300_000)
            ray.wait([make.remote() for _ in range(4)], num_returns=4, timeout=0.05)


with local_ray(num_cpus=1):
    make = ray.remote(lambda: b"0" * 200_000)
    for _ in range(8):
        threading.Thread(target=use_ray, daemon=True).start()
    ray.get([make.remote() for _ in range(20)])
sys.exit(7)
"""


def test_threads_that_use_ray_at_its_end_do_not_end_the_process() -> None:
    # Without a moment for them to leave, Ray ended the process with 1 and without a word in 4 of 6 runs.
    with tempfile.TemporaryDirectory(prefix="st-", dir="/tmp") as folder:
        done = subprocess.run(
            [sys.executable, "-c", USED_AT_ITS_END], cwd=REPOSITORY, env={**os.environ, "TMPDIR": folder},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == 7, done.stderr[-5000:]
    # Where one of them started another Ray, Ray warns.
    assert done.stderr == ""
