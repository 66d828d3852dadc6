"""Masks of a person's prompts against `segment_anything.SamPredictor.predict`, the same seeded random weights, float32.

The reference is asked as its documentation advises: three masks of a single click, of which the best-scored counts, and
one mask of several clicks, a box, or both. Each side has its own networks, which round differently: predicted IoUs are
within 1e-4, and of a mask one pixel, whose logit meets the threshold but for rounding, may differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from jobs.benchmarks.reference import build_reference, segment_anything
from jobs.benchmarks.weights import blobs, random_sam
from samray.config import MaskConfig
from samray.errors import ImageError
from samray.masks.prompted import PromptedGenerator
from samray.prompts import Prompt
from samray.sam.sam import Sam

WIDE, TALL = (150, 220), (210, 130)


@pytest.fixture(scope="module")
def sam() -> Sam:
    return random_sam()


def prompts_in(image_hw: tuple[int, int], seed: int) -> list[Prompt]:
    """Every kind, mixed, so that those decoded together are not next to each other."""
    rng = np.random.default_rng(seed)
    height, width = image_hw

    def clicks(number: int) -> tuple[tuple[float, float], ...]:
        xy = rng.random((number, 2)) * [width, height]
        return tuple((float(x), float(y)) for x, y in np.minimum(xy, [width - 1, height - 1]))

    def box() -> tuple[float, float, float, float]:
        x, y = rng.random(2) * [width / 2, height / 2]
        return float(x), float(y), float(width / 3), float(height / 4)

    kinds = [
        lambda: Prompt(points=clicks(1), labels=(1,)),
        lambda: Prompt(box=box()),
        lambda: Prompt(points=clicks(3), labels=(1, 0, 1)),
        lambda: Prompt(points=clicks(1), labels=(1,), box=box()),
        lambda: Prompt(points=clicks(2), labels=(0, 1), box=box()),
        lambda: Prompt(points=clicks(1), labels=(0,), box=box()),
    ]
    return [kind() for _ in range(4) for kind in kinds]


def reference_mask(predictor: Any, prompt: Prompt) -> tuple[NDArray[np.bool_], float]:
    """The mask that the published predictor gives, and its predicted IoU."""
    x, y, w, h = prompt.box or (0, 0, 0, 0)
    masks, scores, _ = predictor.predict(
        point_coords=np.array(prompt.points) if prompt.points else None,
        point_labels=np.array(prompt.labels) if prompt.points else None,
        box=np.array([x, y, x + w, y + h]) if prompt.box else None,
        multimask_output=len(prompt.points) == 1 and prompt.box is None,
    )
    return masks[scores.argmax()], float(scores.max())


@pytest.mark.parametrize("points_per_batch", [None, 5])
def test_masks_are_those_of_the_published_predictor(sam: Sam, points_per_batch: int | None) -> None:
    images = [blobs(20, WIDE), blobs(21, TALL), blobs(22, TALL)]
    prompts = [prompts_in(WIDE, 1), [], prompts_in(TALL, 2)]
    predictor = segment_anything().SamPredictor(build_reference(sam.spec, sam.state_dict()))
    wanted: list[list[tuple[NDArray[np.bool_], float]]] = []
    for image, user_prompts in zip(images, prompts, strict=True):
        predictor.set_image(image)
        wanted.append([reference_mask(predictor, prompt) for prompt in user_prompts])
    areas = [int(pixels.sum()) for pairs in wanted for pixels, _ in pairs]
    assert min(areas) > 0
    assert len(set(areas)) > len(areas) / 2, "masks that are all alike prove little"

    records = PromptedGenerator(sam, MaskConfig(points_per_batch=points_per_batch)).generate(images, prompts)

    assert [len(masks) for masks in records] == [len(user_prompts) for user_prompts in prompts]
    num_same = 0
    for masks, user_prompts, pairs in zip(records, prompts, wanted, strict=True):
        for mask, prompt, (pixels, score) in zip(masks, user_prompts, pairs, strict=True):
            decoded = coco_mask.decode(mask["segmentation"]).astype(bool)
            assert np.count_nonzero(decoded != pixels) <= 1
            num_same += np.array_equal(decoded, pixels)
            assert mask["predicted_iou"] == pytest.approx(score, abs=1e-4)
            assert mask["area"] == decoded.sum()
            assert mask["bbox"] == coco_mask.toBbox(mask["segmentation"]).tolist()
            on_object = [list(xy) for xy, label in zip(prompt.points, prompt.labels, strict=True) if label]
            assert mask["point_coords"] == on_object
            assert mask["crop_box"] == [0.0, 0.0, float(pixels.shape[1]), float(pixels.shape[0])]
            assert 0 < mask["stability_score"] <= 1
    assert num_same >= 0.9 * sum(map(len, prompts))


def test_a_prompt_that_gives_no_pixel_is_named() -> None:
    sam = random_sam()
    for parameter in sam.mask_decoder.output_hypernetworks_mlps[0].layers[-1].parameters():
        parameter.zero_()  # the single mask's logits are 0 all over, which is not above 0
    prompts = [Prompt(points=((100, 70),), labels=(1,)), Prompt(box=(10, 10, 120, 90))]
    with pytest.raises(ImageError, match=r"^bad_prompt: prompts\[1\]: the model finds no mask there$"):
        PromptedGenerator(sam).generate([blobs(20, WIDE)], [prompts])


def test_what_lies_outside_of_its_image_is_named_before_anything_is_encoded(sam: Sam) -> None:
    image = blobs(20, WIDE)
    generator = PromptedGenerator(sam)
    outside = {
        Prompt(points=((220.0, 10.0),), labels=(1,)): r"point \[220, 10\] is outside the image of 220x150 pixels",
        Prompt(points=((1.0, 150.0),), labels=(1,)): r"point \[1, 150\] is outside",
        Prompt(points=((-0.25, 1.0),), labels=(1,)): r"point \[-0.25, 1\] is outside",
        Prompt(box=(3, -1, 20, 10)): r"box \[3, -1, 20, 10\] extends beyond",
        Prompt(box=(200, 0, 20.5, 10)): r"box \[200, 0, 20.5, 10\] extends beyond the image of 220x150 pixels",
        Prompt(box=(0, 100, 10, 51)): r"box \[0, 100, 10, 51\] extends beyond",
    }
    for prompt, problem in outside.items():
        with pytest.raises(ImageError, match=rf"^bad_prompt: prompts\[1\]: the {problem}"):
            generator.generate([image, image], [[], [Prompt(box=(0, 0, 220, 150)), prompt]])
    assert not any(generator.stage_seconds.values())


def test_images_that_are_none_and_lists_that_do_not_fit(sam: Sam) -> None:
    generator = PromptedGenerator(sam)
    with pytest.raises(ValueError, match=r"uint8 arrays \(H, W, 3\); images\[0\] is float32 \(4, 4\)"):
        generator.generate([np.zeros((4, 4), np.float32)], [[]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="1 images, but prompts for 0"):
        generator.generate([blobs(20, WIDE)], [])
    assert generator.generate([], []) == []


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """The networks are small: a second thread would mostly wait."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
