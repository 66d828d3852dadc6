"""`jobs/benchmark.py pretrain`: fine-tuning from a masked autoencoder and training from scratch, after equal steps."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from samray.config.models import MODELS, VitSpec
from samray.scenes.scene import make_scene
from samray.train.data import ExampleMaker, blocks, open_data
from samray.train.learner import Learner, frame_of
from samray.train.loop import Worker, run_leg
from samray.train.mae import PICTURE_FILE
from samray.train.objectives import objective_of
from samray.train.settings import load_train_settings
from samray.train.store import WEIGHTS_FILE, Store

SMALL_VIT = dataclasses.replace(
    MODELS["tiny"],
    name="small_vit",
    image_size=64,
    encoder=VitSpec(dim=64, depth=4, num_heads=4, global_blocks=(1, 3), window=4, patch=8),
    embed_dim=64,
    decoder_heads=4,
    decoder_mlp_dim=128,
    iou_hidden_dim=64,
)
"""The shape of SAM's ViTs, small enough for a CPU."""
FIRST_SCENE = 2**50
"""Seed of the first unlabelled image: fine-tuning sees none of these."""


def pretrain(
    seeds: int, images: int, pretrain_steps: int, steps: int, validation_images: int, folder: Path | None
) -> dict[str, Any]:
    """Mean IoU of one click on held-out scenes, with both starts: same model, examples, steps and settings.

    The autoencoder is trained on painted scenes written as PNG files, without their masks. folder: keeps the runs.
    """
    MODELS[SMALL_VIT.name] = SMALL_VIT
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = folder or Path(temporary)
        unlabelled = root / "images"
        unlabelled.mkdir(parents=True, exist_ok=True)
        for i in range(images):
            scene = make_scene(FIRST_SCENE + i, SMALL_VIT.image_size)
            Image.fromarray(scene.image).save(unlabelled / f"{i:06d}.png")
        for seed in range(seeds):
            rows.append(_one_seed(root, str(unlabelled), seed, pretrain_steps, steps, validation_images))
    gains = [row["from_mae"]["miou"] - row["from_scratch"]["miou"] for row in rows]
    return {
        "model": dataclasses.asdict(SMALL_VIT.encoder),  # type: ignore[call-overload]
        "images": images,
        "pretrain_steps": pretrain_steps,
        "steps": steps,
        "seeds": rows,
        "mean_gain_miou": statistics.mean(gains),
        "lowest_gain_miou": min(gains),
    }


def _one_seed(
    root: Path, unlabelled: str, seed: int, pretrain_steps: int, steps: int, validation_images: int
) -> dict[str, Any]:
    common = [
        f"model.name={SMALL_VIT.name}", f"train.seed={seed}", "train.from_scratch=true", "train.layer_decay=1",
        "train.learning_rate=1e-3", f"data.validation_images={validation_images}", "train.validate_every=1000000",
    ]  # fmt: skip
    outputs = {name: root / f"{name}-{seed}" for name in ("mae", "from_scratch", "from_mae")}
    own = {"mae": [
        "train.objective=mae", f"train.steps={pretrain_steps}", "train.batch_size=32", "mae.decoder_dim=64",
        "mae.decoder_depth=2", "mae.decoder_heads=4",
    ]}  # fmt: skip
    own["from_scratch"] = [f"train.steps={steps}", "train.batch_size=8", "data.prompts_per_image=8",
        "train.interaction_steps=1", "train.warmup_steps=20"]  # fmt: skip
    own["from_mae"] = [*own["from_scratch"], f"train.encoder_checkpoint={outputs['mae'] / WEIGHTS_FILE}"]
    row: dict[str, Any] = {"seed": seed}
    for name, output in outputs.items():
        started = time.perf_counter()
        first, last = _run(unlabelled if name == "mae" else "scenes", output, [*common, *own[name]])
        kept = ("reconstruction_loss", "miou", "miou_oracle", "num_regions", "num_images")
        row[name] = {key: last[key] for key in kept if key in last} | {"seconds": time.perf_counter() - started}
        if name == "mae":
            row[name]["first_reconstruction_loss"] = first["reconstruction_loss"]
            assert (output / PICTURE_FILE).exists()
    return row


def _run(data: str, output: Path, overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train as `samray train` does, in this process; returns the first and the last validation."""
    settings = objective_of(load_train_settings(None, overrides)).adjusted()
    mixture, frame = open_data([data], settings), frame_of(SMALL_VIT, SMALL_VIT.image_size)
    learner = Learner(settings, SMALL_VIT, image_size=SMALL_VIT.image_size, device=torch.device("cpu"))
    maker, store = ExampleMaker(mixture, frame), Store(str(output))
    worker = Worker(
        config=settings.train,
        store=store,
        validation=lambda: mixture.validation(settings.data.validation_images, frame),
    )
    numbers = blocks(0, settings.train.steps or 0, settings.train.batch_size)
    run_leg(learner, ({k: torch.from_numpy(v) for k, v in maker({"number": n}).items()} for n in numbers), worker)
    validations = [line for line in store.read_metrics() if line["kind"] == "validation"]
    return validations[0], validations[-1]
