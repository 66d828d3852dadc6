"""`samray train train.trainable=lora` on a real Ray, killed and resumed, and `samray label model.adapter=` with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from samray.cli.main import main
from samray.config import MaskConfig
from samray.masks import MaskGenerator
from samray.sam.checkpoints import load_model
from samray.sam.fetch import file_sha256
from samray.sam.spec import MODELS
from samray.scenes.scene import make_scene
from samray.train.run import train
from samray.train.settings import load_train_settings
from samray.train.store import ADAPTER_FILE, WEIGHTS_FILE
from tests.pipeline.test_train_on_ray import SETTINGS, death_of_a_worker, lines_of, train_in_this_process
from tests.support.outputs import rows_of

LORA = [
    *(setting for setting in SETTINGS if not setting.startswith("train.first_")), "train.trainable=lora",
    "train.from_scratch=false", "train.steps=2", "train.log_every=1", "train.learning_rate=1e-2", "train.batch_size=1",
    "train.interaction_steps=1", "train.warmup_steps=1", "data.prompts_per_image=1",
]  # fmt: skip
MASKS = ["masks.points_per_side=4", "masks.pred_iou_thresh=0.3", "masks.stability_score_thresh=0.5"]


@pytest.mark.timeout(900)
def test_an_adapter_is_trained_killed_resumed_and_labels(tmp_path: Path, local_ray: None) -> None:
    settings = load_train_settings(None, LORA)
    resumed, whole = tmp_path / "resumed", tmp_path / "whole"
    with death_of_a_worker(resumed, 1) as killed:
        report = train(["scenes"], resumed, settings, progress=False)
    assert killed
    assert (report.exit_code, report.step) == (0, 2)
    train_in_this_process(["scenes"], whole, settings, MODELS["tiny"].image_size)
    assert lines_of(resumed) == lines_of(whole)
    adapter = load_file(resumed / ADAPTER_FILE)
    for name, value in load_file(whole / ADAPTER_FILE).items():
        assert torch.equal(adapter[name], value), name
    assert not (resumed / WEIGHTS_FILE).exists()

    images = [make_scene(seed, 96).image for seed in range(2)]
    (tmp_path / "in").mkdir()
    for seed, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "in" / f"{seed}.png")
    out = tmp_path / "out"
    command = ["label", str(tmp_path / "in"), str(out), f"model.adapter={resumed}", "model.dtype=float32", *MASKS]
    assert main([*command, "cluster.max_actors=1", "cluster.num_cpus_per_actor=1", "--no-progress"]) == 0
    assert main(["verify", str(out), "--deep"]) == 0
    model = json.loads((out / "_samray" / "run.json").read_text())["identity"]["model"]
    assert model["adapter_sha256"] == file_sha256(resumed / ADAPTER_FILE)
    labelled = [[mask["segmentation"] for mask in row["annotations"]] for row in rows_of(str(out))]
    assert labelled == expected_masks(images, resumed)
    assert labelled != expected_masks(images, None), "the adapter changes the masks"


def expected_masks(images: list[np.ndarray], adapter: Path | None) -> list[list[object]]:
    """By the bare generator."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = load_model("tiny", device="cpu", dtype="float32", adapter=adapter)
        settings = MaskConfig(points_per_side=4, pred_iou_thresh=0.3, stability_score_thresh=0.5)
        return [
            [mask["segmentation"] for mask in MaskGenerator(model, settings).generate([image])[0]] for image in images
        ]
    finally:
        torch.set_num_threads(threads)
