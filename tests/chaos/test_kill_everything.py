"""Driver, raylet, GCS, actors and whole process groups are killed in every operation; every image is there once.

SAMRAY_CHAOS_ROUNDS=100 kills a hundred times, SAMRAY_CHAOS_SEED=8 at other moments.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from samray.output.shards import done_shards
from tests.support import standin
from tests.support.drivers import Driver
from tests.support.operation import FAILS_AT_FIRST
from tests.support.outputs import expected_masks, rows_of

OPERATION = ("-m", "tests.support.operation")
OPERATIONS = ("label", "append", "retry", "compact", "export", "import")
ON_RAY = ("label", "append", "retry")
"""The others are done by the driver alone, or on Ray if they are asked to."""

PLAN = [
    *(("label", victim) for victim in ("driver", "raylet", "gcs", "actor")),
    ("append", "group"),
    ("retry", "actor"),
    *((name, victim) for name in ("compact", "export", "import") for victim in ("driver", "group")),
]
"""The kills of one output, and what CI does. An actor last: its run goes on and leaves nothing to be killed."""

ROUNDS = int(os.environ.get("SAMRAY_CHAOS_ROUNDS", len(PLAN)))
OUTPUTS = -(-ROUNDS // len(PLAN))
PROCESSES = {"raylet": "raylet/raylet", "gcs": "gcs/gcs_server", "actor": "MapWorker"}
SECONDS_PER_IMAGE = "0.3"
PATIENCE_S = 150.0
"""An agent of Ray that has lost its raylet looks a minute for the GCS, to report it, before it ends."""


VICTIMS = {
    **dict.fromkeys(("append", "retry"), ("driver", "group", "raylet", "gcs", "actor")),
    **dict.fromkeys(("label", "export", "import"), ("driver", "group", "raylet", "gcs")),
    "compact": ("driver", "group"),
}


def planned(output: int, rng: random.Random) -> list[tuple[str, str]]:
    """Operation and victim of each kill: the plan for the first output, other victims for the others."""
    kills = PLAN[: ROUNDS - output * len(PLAN)]
    if output == 0:
        return kills
    return [kill if kill == ("label", "actor") else (kill[0], rng.choice(VICTIMS[kill[0]])) for kill in kills]


def make_images(num_images: int) -> dict[str, bytes]:
    """Name -> image; every fifth one fails until retried."""
    first_pixels = [FAILS_AT_FIRST if i % 5 == 0 else None for i in range(num_images)]
    return {f"{i:04d}.png": standin.make_image(i, first_pixel=first_pixels[i]) for i in range(num_images)}


def write(folder: Path, images: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for name, data in images.items():
        (folder / name).write_bytes(data)


def start(root: Path, name: str, log: str, pace: str, *, on_ray: bool) -> Driver:
    """pace: as `tests.support.operation` takes it."""
    environment = {"RAY_gcs_rpc_server_reconnect_timeout_s": "3"}  # how long a driver waits for a GCS that is gone
    arguments = (name, str(root), pace, "ray" if on_ray else "alone")
    return Driver(root / log, *arguments, program=OPERATION, environment=environment)


def kill(running: Driver, victim: str) -> int:
    """Kill -9; returns how many processes were there to be killed."""
    if victim in ("driver", "group"):
        was_there = running.process.poll() is None
        running.look_around()
        if victim == "group" and was_there:
            os.killpg(running.process.pid, signal.SIGKILL)
        running.kill()
        return int(was_there)
    victims = running.workers(PROCESSES[victim])
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return len(victims)


def one_kill(running: Driver, root: Path, name: str, victim: str, number: int, rng: random.Random) -> int:
    """At a random moment of the work; of the driver and its group, half of the times while Ray starts.

    Returns how many processes were killed: 0 if the operation had ended by itself.
    """
    before = _num_shards(root)
    if not _on_ray(name, victim):
        _wait(running, (root / name).exists)
        time.sleep(rng.uniform(0.0, 0.3))
    elif victim in ("driver", "group") and number % 2 == 0:
        _wait(running, lambda: bool(running.workers("raylet/raylet")))
        time.sleep(rng.uniform(0.0, 1.5))
    else:
        title = PROCESSES.get(victim, "MapWorker")
        _wait(running, lambda: bool(running.workers(title)))
        if name in ("label", "append"):
            _wait(running, lambda: _num_shards(root) > before)
        time.sleep(rng.uniform(0.0, 0.5))
    killed = kill(running, victim)
    if victim in PROCESSES:
        exit_code = running.wait()  # with whatever exit code: it must not hang
        assert exit_code == 0 or victim != "actor", running.text()
    print(f"{name}: {victim} {'killed' if killed else 'was gone'}, exit code {running.process.returncode}")
    return killed


def _on_ray(name: str, victim: str) -> bool:
    return name in ON_RAY or victim in PROCESSES


def _wait(running: Driver, condition: Callable[[], bool]) -> None:
    """Until it holds or the driver has ended: what is to be killed may be done before."""
    deadline = time.monotonic() + 300
    while not condition() and running.process.poll() is None:
        assert time.monotonic() < deadline, running.text()
        running.look_around()  # reads the state of every process of the machine
        time.sleep(0.1)


def _num_shards(root: Path) -> int:
    return len(done_shards(str(root / "out"))) if (root / "out").exists() else 0


def check_every_image_once(output: Path, images: dict[str, bytes], failing: bool) -> None:
    rows = rows_of(str(output))
    assert sorted(row["image"]["file_name"] for row in rows) == sorted(images)
    for row in rows:
        data = images[row["image"]["file_name"]]
        is_hard = int(row["image"]["file_name"][:4]) % 5 == 0
        assert row["status"] == ("failed" if failing and is_hard else "ok"), row["error"]
        wanted = [] if failing and is_hard else expected_masks(data)
        assert [mask["segmentation"] for mask in row["annotations"]] == [mask["segmentation"] for mask in wanted]


@pytest.fixture
def started() -> Iterator[list[Driver]]:
    """Drivers that the test has started; at its end what each of them started is gone, too.

    It is looked at only then: an agent of Ray that has lost its raylet takes a minute to end.
    """
    drivers: list[Driver] = []
    yield drivers
    deadline = time.monotonic() + PATIENCE_S
    left = {one.log.name: one.clean_up(patience_s=max(0.0, deadline - time.monotonic())) for one in drivers}
    assert not any(left.values()), left


@pytest.mark.timeout(600 + 120 * len(PLAN))
@pytest.mark.parametrize("output", range(OUTPUTS))
def test_every_image_is_there_once_whatever_is_killed(output: int, tmp_path: Path, started: list[Driver]) -> None:
    rng = random.Random(f"{os.environ.get('SAMRAY_CHAOS_SEED', '7')}/{output}")
    kills = planned(output, rng)
    images = make_images(4 * (sum(name in ("label", "append") for name, _ in kills) + 12))
    first = dict(list(images.items())[: len(images) // 2])
    write(tmp_path / "in", first)
    num_hits = 0
    for name in OPERATIONS:
        if name == "append":
            write(tmp_path / "in", images)
        for number, (operation, victim) in enumerate(kills):
            if operation == name:
                on_ray = _on_ray(name, victim)
                started.append(start(tmp_path, name, f"{number}.log", SECONDS_PER_IMAGE, on_ray=on_ray))
                num_hits += one_kill(started[-1], tmp_path, name, victim, number, rng) > 0
        # A run whose actor was killed has gone on to the end.
        if [victim for operation, victim in kills if operation == name][-1:] != ["actor"]:
            started.append(start(tmp_path, name, f"{name}.log", "0", on_ray=name in ON_RAY))
            assert started[-1].wait() == 0, started[-1].text()
        if name in ON_RAY:
            check_every_image_once(tmp_path / "out", first if name == "label" else images, failing=name != "retry")
    for copy in ("compact", "import"):
        check_every_image_once(tmp_path / copy, images, failing=False)
    print(f"{num_hits} of {len(kills)} kills came before the end of their operation")
    assert num_hits > len(kills) / 2
