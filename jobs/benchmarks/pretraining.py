"""`jobs/benchmark.py pretrain`: fine-tuning from a masked autoencoder and training from scratch, after equal steps."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from jobs.benchmarks.measuring import progress
from samray.config.model_specs import ModelSpec, VitSpec
from samray.config.models import MODELS
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
    """Loss and IoU of both starts after the same steps: same model, examples and settings, one click.

    One autoencoder (seed 0) is trained on painted scenes written as PNG files, without their masks; each seed trains on
    masks from it and from scratch. `mask_loss` and `iou_scored` are means of the last 50 steps: scenes never repeat, so
    these are unseen. miou is of one click on held-out scenes. folder: keeps the runs.
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
        autoencoder = _pretrained(root, str(unlabelled), pretrain_steps, validation_images)
        for seed in range(seeds):
            rows.append(_one_seed(root, seed, steps, validation_images))
    gains = [row["from_scratch"]["mask_loss"] - row["from_mae"]["mask_loss"] for row in rows]
    return {
        "model": dataclasses.asdict(SMALL_VIT.encoder),  # type: ignore[call-overload]
        "images": images,
        "pretrain_steps": pretrain_steps,
        "steps": steps,
        "autoencoder": autoencoder,
        "seeds": rows,
        "mean_reduction_of_loss": statistics.mean(gains),
        "smallest_reduction_of_loss": min(gains),
    }


def _common(seed: int, validation_images: int) -> list[str]:
    return [
        f"model.name={SMALL_VIT.name}", f"train.seed={seed}", "train.from_scratch=true", "train.layer_decay=1",
        f"data.validation_images={validation_images}", "train.validate_every=1000000",
    ]  # fmt: skip


def _pretrained(root: Path, unlabelled: str, steps: int, validation_images: int) -> dict[str, Any]:
    """Train the autoencoder; returns its error on held-out images before and after."""
    lines = train_here(SMALL_VIT, unlabelled, root / "mae", [
        *_common(0, validation_images), "train.objective=mae", f"train.steps={steps}", "train.batch_size=32",
        "train.learning_rate=1e-3", "mae.decoder_dim=64", "mae.decoder_depth=2", "mae.decoder_heads=4",
    ])  # fmt: skip
    assert (root / "mae" / PICTURE_FILE).exists()
    errors = [line["reconstruction_loss"] for line in lines if line["kind"] == "validation"]
    return {"first_reconstruction_loss": errors[0], "reconstruction_loss": errors[-1]}


def _one_seed(root: Path, seed: int, steps: int, validation_images: int) -> dict[str, Any]:
    common = [
        *_common(seed, validation_images), f"train.steps={steps}", "train.batch_size=4", "train.learning_rate=5e-4",
        "train.warmup_steps=30", "train.schedule=constant", "train.box_fraction=0", "train.interaction_steps=1",
        "train.log_every=50", "data.prompts_per_image=8",
    ]  # fmt: skip
    row: dict[str, Any] = {"seed": seed}
    starts: dict[str, list[str]] = {
        "from_scratch": [],
        "from_mae": [f"train.encoder_checkpoint={root / 'mae' / WEIGHTS_FILE}"],
    }
    for name, start in starts.items():
        lines = train_here(SMALL_VIT, "scenes", root / f"{name}-{seed}", [*common, *start])
        trained, validated = ([line for line in lines if line["kind"] == kind][-1] for kind in ("train", "validation"))
        row[name] = {key: trained[key] for key in ("mask_loss", "iou_scored")} | {"miou": validated["miou"]}
    return row


def train_here(spec: ModelSpec, data: str, output: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """Train as `samray train` does, in this process; returns the lines of metrics.jsonl. spec: is in MODELS."""
    settings = objective_of(load_train_settings(None, overrides)).adjusted()
    mixture, frame = open_data([data], settings), frame_of(spec, spec.image_size)
    learner = Learner(settings, spec, image_size=spec.image_size, device=torch.device("cpu"))
    maker, store = ExampleMaker(mixture, frame), Store(str(output))
    worker = Worker(
        config=settings.train,
        store=store,
        validation=lambda: mixture.validation(settings.data.validation_images, frame),
    )
    numbers = blocks(0, settings.train.steps or 0, settings.train.batch_size)
    shown = progress(list(numbers), f"training {spec.name}")
    run_leg(learner, ({k: torch.from_numpy(v) for k, v in maker({"number": n}).items()} for n in shown), worker)
    return store.read_metrics()
