"""kill -9 inside `samray edges`: every image has its map, once, and it is the right one."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samray.output.shards import done_shards
from samray.output.verify import verify
from tests.chaos.test_kill_everything import PROCESSES, kill, start, started, write  # noqa: F401  (a fixture)
from tests.support import standin
from tests.support.drivers import Driver, wait_until
from tests.support.outputs import rows_of

NUM_IMAGES = 16


@pytest.mark.timeout(900)
def test_every_image_has_one_map_whatever_is_killed(tmp_path: Path, started: list[Driver]) -> None:  # noqa: F811
    images = {f"{i % 3}/{i:04d}.png": standin.make_image(i) for i in range(NUM_IMAGES)}
    for folder in range(3):
        of_folder = {name[2:]: data for name, data in images.items() if name.startswith(f"{folder}/")}
        (tmp_path / "in").mkdir(exist_ok=True)
        write(tmp_path / "in" / str(folder), of_folder)
    for victim in ("driver", "actor"):  # the run whose actor is killed goes on to the end
        hold = tmp_path / victim / "edges"
        hold.parent.mkdir()
        hold.touch()
        running = start(tmp_path, "edges", f"{victim}.log", str(hold.parent), on_ray=True)
        started.append(running)
        wait_until(lambda hold=hold: standin.held_mark(hold).exists() and num_maps(tmp_path) > 0, running)
        assert kill(running, victim) > 0
        if victim in PROCESSES:
            hold.unlink()
            assert running.wait() == 0, running.text()
        else:
            assert len(done_shards(str(tmp_path / "edges"))) < NUM_IMAGES / 2, "killed before the end"

    output = str(tmp_path / "edges")
    assert sorted(row["image"]["file_name"] for row in rows_of(output)) == sorted(images)
    assert verify(output, deep=True).ok
    files = sorted(path.relative_to(tmp_path / "edges" / "edges").as_posix() for path in _files(tmp_path / "edges"))
    assert files == sorted(images), "no map twice, and nothing unfinished"
    for name, data in images.items():
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(np.asarray(Image.open(tmp_path / "edges" / "edges" / name)), pixels[..., 0])


def num_maps(root: Path) -> int:
    return len(list(root.glob("edges/edges/**/*.png")))


def _files(output: Path) -> list[Path]:
    return [path for path in (output / "edges").rglob("*") if path.is_file()]
