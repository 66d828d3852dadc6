"""The smallest Sams that can be trained, their settings and learners, and batches of painted scenes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from samray.sam.spec import MODELS, DecoderVariant, HieraSpec, RepVitSpec, RopeVitSpec, TinyVitSpec, VitSpec
from samray.train.data import ExampleMaker, blocks, open_data
from samray.train.examples import Frame
from samray.train.learner import Learner
from samray.train.settings import TrainSettings, load_train_settings

MICRO = replace(
    MODELS["tiny"],
    name="micro",
    image_size=64,
    encoder=TinyVitSpec(dims=(8, 16, 32), depths=(1, 1, 1), num_heads=(1, 1, 2), windows=(8, 8, 4), strides=(2, 2)),
    embed_dim=32,
    decoder_heads=2,
    decoder_mlp_dim=32,
    iou_hidden_dim=32,
)
MICRO_VIT = replace(MICRO, encoder=VitSpec(dim=16, depth=4, num_heads=2, global_blocks=(1, 3), window=2))
MICRO_SAM2 = replace(
    MODELS["sam2.1_t"],
    name="micro_sam2",
    image_size=64,
    encoder=HieraSpec(dim=8, num_heads=1, depths=(1, 1, 2, 1), global_blocks=(3,), windows=(4, 4, 2, 2), positions=3),
    embed_dim=32,
    decoder_heads=2,
    decoder_mlp_dim=32,
    iou_hidden_dim=32,
)
"""SAM 2.1 with all of its parts."""
MICRO_HQ = replace(
    MICRO_VIT,
    name="micro_sam_hq",
    decoder=DecoderVariant(hq_dim=16),
    family="SAM-HQ",
)
MICRO_HQ_TINY = replace(
    MICRO,
    name="micro_sam_hq_tiny",
    encoder=TinyVitSpec(
        dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), windows=(8, 8, 4, 4), strides=(2, 2, 1)
    ),
    decoder=DecoderVariant(hq_dim=24),
    family="SAM-HQ",
)
MICRO_EDGETAM = replace(
    MICRO_SAM2,
    name="micro_edgetam",
    encoder=RepVitSpec(dims=(8, 16, 24, 32), depths=(1, 1, 2, 1)),
    family="EdgeTAM",
)
MICRO_SAM3 = replace(
    MICRO_SAM2,
    name="micro_sam3",
    image_size=56,
    pixel_mean=MODELS["sam3"].pixel_mean,
    pixel_std=MODELS["sam3"].pixel_std,
    encoder=RopeVitSpec(dim=16, depth=3, num_heads=2, mlp_dim=24, global_blocks=(1,), window=3, patch=14, positions=3),
    family="SAM 3",
)
"""A grid of 4 x 4: windows and learned positions do not divide it."""
FAMILIES = (MICRO_SAM2, MICRO_HQ, MICRO_HQ_TINY, MICRO_EDGETAM, MICRO_SAM3)
FRAME = Frame(64, 16)
CPU = torch.device("cpu")


def settings_of(*overrides: str) -> TrainSettings:
    """For the micro model, which has no checkpoint: small steps from random weights."""
    base = [
        "train.from_scratch=true", "train.steps=4", "train.batch_size=2", "data.prompts_per_image=4",
        "data.validation_images=2", "train.interaction_steps=1", "train.box_fraction=0", "train.learning_rate=8e-4",
        "train.warmup_steps=200", "train.layer_decay=1", "train.log_every=1",
    ]  # fmt: skip
    resolved = load_train_settings(None, [*base, *overrides])
    return resolved.model_copy(update={"model": resolved.model.model_copy(update={"name": "micro"})})


def learner_of(*overrides: str, spec: Any = MICRO, **options: Any) -> Learner:
    return Learner(settings_of(*overrides), spec, image_size=spec.image_size, device=CPU, **options)


def batches_of(settings: TrainSettings, frame: Frame = FRAME, first: int = 0, count: int = 10_000) -> Iterator[Any]:
    """Painted scenes as the stream gives them, from a step on."""
    maker = ExampleMaker(open_data(["scenes"], settings), frame)
    for numbers in blocks(first, count, settings.train.batch_size):
        yield {name: torch.from_numpy(array) for name, array in maker({"number": numbers}).items()}
