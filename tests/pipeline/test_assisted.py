"""`samray label ... input.prompts=FILE` on a real Ray, with a real model of random weights: what a person asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samray.config import Config
from samray.errors import ConfigError
from samray.evaluate.proposals import best_ious
from samray.masks.prompted import PromptedGenerator
from samray.output.shards import shard_uri
from samray.pipeline import run as run_module
from samray.pipeline.run import label_with
from samray.prompts import Prompt
from samray.sam.checkpoints import load_model
from tests.support.here import use_no_ray
from tests.support.outputs import rows_of

HEIGHT, WIDTH = 96, 128
PROMPTS: dict[str, list[dict[str, Any]]] = {
    "0.png": [{"points": [[60, 20]], "labels": [1]}, {"box": [10, 10, 60, 50]}],
    "1.png": [{"points": [[40, 40], [100, 80]], "labels": [1, 0]}],
    "3.png": [{"points": [[60, 70]], "labels": [1]}, {"points": [[WIDTH + 1, 5]], "labels": [1]}],
    "4.png": [{"points": [[70, 20], [60, 60]], "labels": [1, 1], "box": [0, 0, WIDTH, HEIGHT]}] * 3,
    "gone.png": [{"box": [1, 1, 2, 2]}],
}


@pytest.fixture
def images(tmp_path: Path, tiny_checkpoint: Path) -> dict[str, np.ndarray]:
    from jobs.benchmarks.weights import blobs  # images on which the random weights find masks

    pixels = {f"{i}.png": blobs(i, (HEIGHT, WIDTH)) for i in range(5)}
    (tmp_path / "in").mkdir()
    for name, image in pixels.items():
        Image.fromarray(image).save(tmp_path / "in" / name)
    return pixels


def write_prompts(path: Path, prompts: dict[str, list[dict[str, Any]]]) -> Path:
    path.write_text(
        "".join(json.dumps({"file_name": name, "prompts": of_image}) + "\n" for name, of_image in prompts.items())
    )
    return path


def test_each_prompt_is_a_mask_in_order_and_a_rerun_finishes_what_is_missing(
    tmp_path: Path,
    images: dict[str, np.ndarray],
    tiny_checkpoint: Path,
    local_ray: None,
    config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = str(tmp_path / "out")

    def label(prompts: Path, **options: Any) -> Any:
        settings = [f"model.checkpoint={tiny_checkpoint}", f"input.prompts={prompts}", "output.images_per_shard=2"]
        return label_with(str(tmp_path / "in"), output, config(*settings), progress=False, **options)

    prompts = write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    report = label(prompts)

    assert (report.exit_code, report.num_images, report.num_masks) == (0, 5, 6)
    assert (report.failures, report.num_images_not_found) == ({"bad_prompt": 1}, 1)
    rows = {row["image"]["file_name"]: row for row in rows_of(output)}  # verifies, too
    assert rows["3.png"]["error"] == (
        "bad_prompt: prompts[1]: the point [129, 5] is outside the image of 128x96 pixels"
    )
    assert (rows["2.png"]["status"], rows["2.png"]["annotations"]) == ("ok", [])  # nobody asked for a mask of it
    generator = PromptedGenerator(load_model("tiny", str(tiny_checkpoint)), config().masks)
    for name in ("0.png", "1.png", "4.png"):
        (wanted,) = generator.generate([images[name]], [[Prompt.parse(value) for value in PROMPTS[name]]])
        first_id = rows[name]["image"]["image_id"] * 65536
        assert len(rows[name]["annotations"]) == len(wanted) == len(PROMPTS[name])
        for i, (mask, alone) in enumerate(zip(rows[name]["annotations"], wanted, strict=True)):
            assert mask["id"] == first_id + i
            assert mask["point_coords"] == alone["point_coords"]
            # Not to the last digit: sums depend on the number of threads, which the actor has its own of.
            assert best_ious([mask["segmentation"]], [alone["segmentation"]])[0] > 0.99
            for score in ("predicted_iou", "stability_score"):
                assert mask[score] == pytest.approx(alone[score], abs=1e-2)
    clicks = [mask["point_coords"] for mask in rows["0.png"]["annotations"]]
    assert clicks == [[[60.0, 20.0]], []]

    Path(shard_uri(output, 0)).unlink()
    use_no_ray(monkeypatch)
    moved = prompts.rename(tmp_path / "moved.jsonl")  # the content counts
    again = label(moved)
    assert (again.num_labelled, again.num_shards_skipped) == (2, 2), again
    assert {row["image"]["file_name"]: row for row in rows_of(output)} == rows

    retried = label(moved, retry_failed=True)
    assert (retried.num_labelled, retried.failures) == (0, {"bad_prompt": 1})

    monkeypatch.setattr(run_module, "_run_on_ray", lambda run: pytest.fail("Ray was wanted"))
    other = write_prompts(tmp_path / "other.jsonl", {**PROMPTS, "2.png": [{"box": [1, 1, 5, 5]}]})
    with pytest.raises(ConfigError, match=r'prompts\.sha256: "[0-9a-f]{64}" there, "[0-9a-f]{64}" now'):
        label(other)
    with pytest.raises(ConfigError, match=r'prompts\.sha256: "[0-9a-f]{64}" there, not set now'):
        label_with(str(tmp_path / "in"), output, config(f"model.checkpoint={tiny_checkpoint}",
                   "output.images_per_shard=2"), progress=False)  # fmt: skip
