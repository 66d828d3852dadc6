"""Training in either frame: what an example shows, and where the masks of a model trained in a square one land."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pycocotools import mask as coco_mask

from samray.config import MaskConfig
from samray.masks.prompted import PromptedGenerator
from samray.prompts import Prompt
from samray.sam.frames import FRAMES, SquareFrame
from samray.sam.sam import Sam
from samray.scenes.scene import Scene
from samray.train.examples import Arrays, MaskExamples
from samray.train.learner import frame_of
from samray.train.settings import DataConfig
from tests.support.micro import learner_of
from tests.support.scene_outputs import write_scenes
from tests.toys.patch_model import SPEC

HW = (24, 96)
"""A wide image, so that a square frame stretches it and a padded one leaves three quarters of the square empty."""
WHOLE_VIEWS = DataConfig(prompts_per_image=8, scale_jitter=(1, 1), flip_fraction=0, colour_jitter=0, min_area=1)

Mask = npt.NDArray[np.bool_]


def two_sides() -> Scene:
    """A bright third at the left and a dark rest."""
    left = np.zeros(HW, bool)
    left[:, :32] = True
    image = np.where(left, np.uint8(230), np.uint8(20))[..., None].repeat(3, axis=2)
    return Scene(image=image, masks=np.stack([left, ~left]), kinds=["region", "region"])


@pytest.fixture
def examples(tmp_path: Path) -> MaskExamples:
    return MaskExamples(write_scenes(str(tmp_path), [two_sides()] * 2).output, WHOLE_VIEWS, seed=0)


def decode(record: Any) -> Mask:
    mask: Mask = coco_mask.decode(record["segmentation"]).astype(bool)
    return mask


def iou(one: Mask, other: Mask) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize("name", FRAMES)
def test_an_examples_clicks_and_targets_are_where_the_models_frame_has_them(examples: MaskExamples, name: str) -> None:
    spec = replace(SPEC, frame=name)
    frame = FRAMES[name](spec.image_size)
    example: Arrays = examples.example(0, frame_of(spec, spec.image_size))
    assert tuple(example["input_hw"]) == frame.input_hw(HW)
    h, w = frame.input_hw(HW)
    assert not example["image"][h:].any()
    assert example["image"][h - 1, : w // 4].min() > 200
    assert example["image"][h - 1, w // 2 : w].max() < 50
    logits = torch.from_numpy(example["targets"]).float() / 255 - 0.5
    for (x, y), mask in zip(example["points"], frame.masks_out(logits, HW).numpy() > 0, strict=True):
        right = max(two_sides().masks, key=lambda true: iou(true, mask))
        assert iou(right, mask) > 0.9
        original = np.array([x, y]) / frame.scale_xy(HW)
        assert right[tuple(original[::-1].astype(int))]


@pytest.mark.slow
@pytest.mark.usefixtures("micro_model")
def test_a_model_in_a_square_frame_learns_masks_that_land_on_a_wide_image(examples: MaskExamples) -> None:
    learner = learner_of("train.warmup_steps=5", "train.steps=10000", "train.learning_rate=3e-3", spec=SPEC)
    assert isinstance(learner.sam.frame, SquareFrame)
    pair = [examples.example(draw, frame_of(SPEC, SPEC.image_size)) for draw in range(2)]
    batch = {name: torch.from_numpy(np.stack([example[name] for example in pair])) for name in pair[0]}
    losses = [learner.step(batch)["mask_loss"] for _ in range(100)]
    assert losses[-1] < 0.5 * losses[0]
    model: Sam = learner.sam.eval()
    prompts = [Prompt(points=((10, 12),), labels=(1,)), Prompt(points=((70, 12),), labels=(1,))]
    [masks] = PromptedGenerator(model, MaskConfig()).generate([two_sides().image], [prompts])
    for mask, true in zip(masks, two_sides().masks, strict=True):
        assert mask["segmentation"]["size"] == list(HW)
        assert iou(decode(mask), true) > 0.8
