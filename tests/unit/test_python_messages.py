"""What the Python API says to a first wrong call: what was expected, what came, and what to write instead."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import samray
from samray.config import Config, load_config
from samray.errors import ConfigError
from samray.masks.images import check_images
from samray.prompts import Prompt

GREY = np.zeros((4, 6, 3), np.uint8)


def test_a_section_that_is_given_as_text() -> None:
    with pytest.raises(ConfigError, match=re.escape("""Config(model={"name": 'vit_b'})""")):
        Config(model="vit_b")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="masks is a section of settings"):
        Config(masks=[1] * 10_000)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"masks.points_per_side": 16}, "['masks.points_per_side=16']; got dict"),
        ({"masks": {"points_per_side": 16, "non_overlapping": True}}, "'masks.non_overlapping=true'"),
        ("masks.points_per_side=16", "['masks.points_per_side=16']; got str"),
        ([("masks.points_per_side", 16)], "got list"),
    ],
)
def test_overrides_that_are_not_a_list_of_texts(overrides: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(overrides=overrides)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (GREY, "got one array of shape (4, 6, 3): for one image write generate([image])"),
        (GREY[..., 0], "got one array of shape (4, 6)"),
        ([Image.fromarray(GREY)], 'images[0] is a PIL Image: pass numpy.asarray(image.convert("RGB"))'),
        (Image.fromarray(GREY), "write generate([image])"),
        ([GREY, "a.jpg"], "images[1] is a str: pass numpy.asarray(PIL.Image.open(path)"),
        ([GREY[..., 0]], "repeat grey"),
        ([np.zeros((4, 6, 4), np.uint8)], "image[..., :3]"),
        ([np.zeros((3, 4, 6), np.uint8)], "image.transpose(1, 2, 0)"),
        ([GREY.astype(np.float32)], "(255 * image).astype(numpy.uint8)"),
        ([GREY[:0]], "it is empty"),
    ],
)
def test_images_that_are_not_a_list_of_arrays(images: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        check_images(images)


def test_images_that_are() -> None:
    check_images([GREY])
    check_images((GREY, GREY))
    check_images(np.stack([GREY, GREY]))


def test_both_generators_check_their_images() -> None:
    model: Any = SimpleNamespace(spec=SimpleNamespace(name="none"), device=SimpleNamespace(type="cpu"), image_size=64)
    for generate in (samray.MaskGenerator(model).generate, lambda x: samray.PromptedGenerator(model).generate(x, [[]])):
        with pytest.raises(ValueError, match="one array"):
            generate(GREY)
    with pytest.raises(ValueError, match=re.escape("generate([image], [[prompt]])")):
        samray.PromptedGenerator(model).generate([GREY], [Prompt(box=(0, 0, 2, 2))])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ({"points": (120, 80)}, "(120, 80), not a list of points; write one point as points=((x, y),)"),
        ({"points": 5}, "not a list of points"),
        ({"points": ((1, 2),), "labels": 1}, "labels is 1, not a list; write one label as labels=(1,)"),
        ({"points": ((1, 2),)}, "points and labels differ in number: 1 and 0"),
    ],
)
def test_prompts_of_one_point(point: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        Prompt(**point)


def test_slices_of_a_data_set() -> None:
    dataset = samray.MaskDataset.__new__(samray.MaskDataset)
    with pytest.raises(TypeError, match=re.escape("torch.utils.data.Subset(dataset, range(*slice(0, 2, None)")):
        dataset[0:2]  # type: ignore[index]
