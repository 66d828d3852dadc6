"""kill -9 inside `labels.by=example`: every image once, with its masks and their name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samray.output.shards import done_shards
from samray.output.verify import verify
from tests.chaos.test_kill_everything import kill, start, started, write  # noqa: F401  (a fixture)
from tests.support import standin
from tests.support.drivers import Driver, wait_until
from tests.support.outputs import expected_masks, rows_of

NUM_IMAGES = 12


@pytest.mark.timeout(600)
def test_every_image_is_named_once_whatever_is_killed(tmp_path: Path, started: list[Driver]) -> None:  # noqa: F811
    images = {f"{i:04d}.png": standin.make_image(i) for i in range(NUM_IMAGES)}
    write(tmp_path / "in", images)
    write(tmp_path, {name: standin.make_image(99) for name in ("key.png", "mask.png")})
    output = str(tmp_path / "named")
    for victim in ("driver", "actor"):  # the run whose actor is killed goes on to the end
        before = len(done_shards(output)) if Path(output).exists() else 0
        running = start(tmp_path, "example", f"{victim}.log", "0.4", on_ray=True)
        started.append(running)
        wait_until(lambda least=before: Path(output).exists() and len(done_shards(output)) > least, running)
        assert kill(running, victim) > 0
        assert len(done_shards(output)) < NUM_IMAGES / 2, "killed before the end"
    assert started[-1].wait() == 0, started[-1].text()

    rows = rows_of(output)
    assert sorted(row["image"]["file_name"] for row in rows) == sorted(images)
    for row in rows:
        wanted = expected_masks(images[row["image"]["file_name"]])
        assert [mask["segmentation"] for mask in row["annotations"]] == [mask["segmentation"] for mask in wanted]
        assert {mask["label"] for mask in row["annotations"]} == {"thing"}
    assert json.loads((tmp_path / "named/_samray/run.json").read_text())["categories"] == ["thing"]
    assert verify(output, deep=True).ok
