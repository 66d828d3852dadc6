"""kill -9 inside `samray label` with names, by each way, and inside `samray name`: every image has its row, once; and
inside `samray embed` and `samray label --from`, which share the start of Ray: every embedding is there once, too."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import samray
from samray.output.shards import done_shards
from samray.output.verify import verify
from tests.chaos.test_kill_everything import kill, start, started, write  # noqa: F401  (a fixture)
from tests.support import standin
from tests.support.drivers import Driver, wait_until
from tests.support.labelled import image_bytes, make_output
from tests.support.name_operation import ASKED_ALONE, TEXTS, write_inputs
from tests.support.naming import colour_namer
from tests.support.outputs import expected_masks, rows_of

NUM_IMAGES = 10
KILLS = (
    ("grounding_dino", "driver"),
    ("clip_labels", "actor"),  # a run whose actor is killed goes on to the end, and the next one begins
    ("sam3", "actor"),
    ("fastsam", "actor"),
    ("sam_text", "actor"),
    ("example", "actor"),
    ("embedded", "actor"),
    ("relabelled", "driver"),
    ("named", "driver"),
    ("named", "actor"),
)


@pytest.mark.timeout(900)
def test_every_image_is_named_once_whatever_is_killed(tmp_path: Path, started: list[Driver]) -> None:  # noqa: F811
    images = {f"{i:04d}.png": standin.make_image(i) for i in range(NUM_IMAGES)}
    write(tmp_path / "in", images)
    write_inputs(tmp_path)
    make_output(str(tmp_path / "before"), number=NUM_IMAGES)
    (tmp_path / "before" / "labels").rename(tmp_path / "labels")
    running, hold = None, tmp_path
    for number, (folder, victim) in enumerate(KILLS):
        if running is None:
            hold = tmp_path / f"hold-{number}"
            hold.mkdir()
            for later, _ in KILLS[number:]:  # what is before them has been killed, and goes on to the end
                (hold / later).touch()
            running = start(tmp_path, "names", f"{number}.log", str(hold), on_ray=True)
            started.append(running)
        output, held = tmp_path / folder, standin.held_mark(hold / folder)
        wait_until(lambda output=output, held=held: held.exists() and done(output) > 0, running)
        assert kill(running, victim) > 0
        assert done(output) < NUM_IMAGES / 2, "killed before the end"
        if victim == "driver":
            running = None
        else:
            (hold / folder).unlink()
    assert started[-1].wait() == 0, started[-1].text()

    for folder in ("grounding_dino", "clip_labels", "sam3", "fastsam", "sam_text", "example"):
        check_labelled(tmp_path / folder, images, TEXTS if folder in ASKED_ALONE else {})
    check_named(tmp_path)
    check_embedded(tmp_path, images)


def done(output: Path) -> int:
    return len(done_shards(str(output))) if output.exists() else 0


def check_labelled(output: Path, images: dict[str, bytes], texts: dict[str, str]) -> None:
    rows = rows_of(str(output))
    assert sorted(row["image"]["file_name"] for row in rows) == sorted(images)
    for row in rows:
        name = row["image"]["file_name"]
        wanted = [mask["segmentation"] for mask in expected_masks(images[name])]
        assert [mask["segmentation"] for mask in row["annotations"]] == wanted
        phrases = [texts[name].lower()] if name in texts else []
        assert {mask["label"] for mask in row["annotations"]} == {*(phrases or ["thing"])}
        assert row.get("phrases", []) == phrases
        if output.name == "sam3":
            assert [one["phrase"] for one in row["presence"]] == ["thing", *phrases]
    categories = json.loads((output / "_samray" / "run.json").read_text())["categories"]
    assert categories == ["thing", *(["other"] if output.name == "clip_labels" else []), *(["own"] if texts else [])]
    assert verify(str(output), deep=True).ok


def check_embedded(root: Path, images: dict[str, bytes]) -> None:
    output = str(root / "embedded")
    assert verify(output, deep=True).ok
    # One file per shard, each named by the plan: no image is in two of them.
    assert len(list((root / "embedded" / "embeddings").iterdir())) == NUM_IMAGES / 2
    for row in rows_of(output):
        pixels = np.asarray(Image.open(io.BytesIO(images[row["image"]["file_name"]])).convert("RGB"))
        stored = samray.read_embedding(output, row["image"]["image_id"]).image_embeddings
        assert np.array_equal(stored[0], pixels.transpose(2, 0, 1))
    rows = rows_of(str(root / "relabelled"))
    assert sorted(row["image"]["file_name"] for row in rows) == sorted(images)
    for row in rows:
        wanted = expected_masks(images[row["image"]["file_name"]])
        assert [mask["segmentation"] for mask in row["annotations"]] == [mask["segmentation"] for mask in wanted]
    assert verify(str(root / "relabelled"), deep=True).ok


def check_named(root: Path) -> None:
    namer = colour_namer()
    before, after = rows_of(str(root / "labels")), rows_of(str(root / "named"))
    assert [row["image"] for row in after] == [row["image"] for row in before]
    for old, new in zip(before, after, strict=True):
        assert new["error"] == old["error"]
        number = int(Path(old["uri"]).stem.removeprefix("img_"))
        if old["annotations"]:
            pixels = np.asarray(Image.open(io.BytesIO(image_bytes(number))).convert("RGB"))
            assert new["annotations"] == namer.name(pixels, old["annotations"])
    assert sum(len(row["annotations"]) for row in after) > NUM_IMAGES
