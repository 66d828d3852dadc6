"""kill -9 inside `samray name`: the same line finishes, and every image has its row, once, with its names."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samray.output.shards import done_shards
from tests.chaos.test_kill_everything import kill, start, started  # noqa: F401  (a fixture)
from tests.support.drivers import Driver, wait_until
from tests.support.labelled import image_bytes, make_output
from tests.support.naming import colour_namer
from tests.support.outputs import rows_of
from tests.support.tiny_clip import write_clip

NUM_IMAGES = 16


@pytest.mark.timeout(600)
def test_every_mask_is_named_once_whatever_is_killed(tmp_path: Path, started: list[Driver]) -> None:  # noqa: F811
    write_clip(tmp_path / "clip")
    make_output(str(tmp_path), number=NUM_IMAGES)
    before, dest = rows_of(str(tmp_path / "labels")), str(tmp_path / "named")
    for victim in ("driver", "actor"):  # the run whose actor is killed goes on to the end
        done = len(done_shards(dest)) if Path(dest).exists() else 0
        running = start(tmp_path, "name", f"{victim}.log", "0.4", on_ray=True)
        started.append(running)
        wait_until(lambda least=done: Path(dest).exists() and len(done_shards(dest)) > least, running)
        assert kill(running, victim) > 0
        assert len(done_shards(dest)) < NUM_IMAGES / 2, "killed before the end"
    assert started[-1].wait() == 0, started[-1].text()

    namer = colour_namer()
    after = rows_of(dest)
    assert [row["image"] for row in after] == [row["image"] for row in before]
    for old, new in zip(before, after, strict=True):
        assert new["error"] == old["error"]
        number = int(Path(old["uri"]).stem.removeprefix("img_"))
        if old["annotations"]:
            pixels = np.asarray(Image.open(io.BytesIO(image_bytes(number))).convert("RGB"))
            assert new["annotations"] == namer.name(pixels, old["annotations"])
    assert sum(len(row["annotations"]) for row in after) > NUM_IMAGES
