"""kill -9 inside a large image: the next run goes on with the tiles that are missing, and its row is there once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samray.output.verify import verify
from tests.chaos.test_kill_everything import PROCESSES, kill, start, started  # noqa: F401  (a fixture)
from tests.support import standin
from tests.support.drivers import Driver, wait_until
from tests.support.outputs import rows_of
from tests.support.tile_operation import TILE

SIZE = (420, 300)
"""Width and height of the image: 9 x 6 windows and the overview."""
NUM_TILES = 55
IN_WORK = 2
"""Tiles that a killed run may have labelled without having written their files: one per actor."""


def large_image(path: Path) -> np.ndarray:
    """A red, a green and a blue ellipse, each over several tiles, in dark noise that tells the tiles apart."""
    pixels = np.random.default_rng(4).integers(0, 100, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    y, x = np.ogrid[: SIZE[1], : SIZE[0]]
    for channel, (cx, cy, rx, ry) in enumerate([(110, 130, 80, 100), (280, 90, 120, 60), (250, 200, 150, 70)]):
        pixels[((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1, channel] = 255
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_at_tiles(tmp_path: Path, started: list[Driver]) -> None:  # noqa: F811
    (tmp_path / "in").mkdir()
    pixels = large_image(tmp_path / "in" / "large.png")
    (tmp_path / "in" / "small.png").write_bytes(standin.make_image(1))
    log, output = tmp_path / "labelled", tmp_path / "tiles"

    def files() -> list[Path]:
        return list(output.glob("_samray/tiles/**/tile-*.parquet"))

    victims = ("driver", "actor")  # the run whose actor is killed goes on to the end
    for victim in victims:
        hold = tmp_path / victim / "tiles"
        hold.parent.mkdir()
        hold.touch()
        running = start(tmp_path, "tiles", f"{victim}.log", str(hold.parent), on_ray=True)
        started.append(running)
        wait_until(lambda hold=hold: standin.held_mark(hold).exists() and len(files()) > 5, running)
        assert kill(running, victim) > 0
        if victim in PROCESSES:
            hold.unlink()
            assert running.wait() == 0, running.text()
        else:
            assert 0 < len(files()) < NUM_TILES, "killed inside of the image"
    times = Counter(line.split()[0] for line in log.read_text().splitlines())
    assert len(times) == NUM_TILES, "every tile was labelled"
    assert sum(times.values()) - NUM_TILES <= IN_WORK * len(victims), "and none again whose file was there"
    assert not files(), "the files of tiles are gone once the shard is there"

    assert verify(str(output), deep=True).ok
    rows = rows_of(str(output))
    assert [row["image"]["file_name"] for row in rows] == ["large.png", "small.png"]
    assert (rows[0]["image"]["width"], rows[0]["image"]["height"]) == SIZE
    assert all(one["boxes"] for one in rows[0]["tiles"])
    assert rows[1]["tiles"] == []
    # What the stand-in finds in the whole image, joined from the windows to the last pixel.
    counts = {mask["segmentation"]["counts"] for mask in rows[0]["annotations"]}
    assert counts >= {mask["segmentation"]["counts"] for mask in standin.masks_of(pixels)}
    assert max(SIZE) > TILE
