"""The whole mask generator against `segment-anything` 1.0, the same seeded random weights, float32, on the CPU.

Two comparisons, each with and without crops, on images that are not square:

- *Given identical logits*: the published generator runs on samray's networks. Everything is identical: which masks are
  kept, their order, RLE, boxes (with `bbox_convention="sam"`), areas, scores, prompts, crop boxes.
- *Each with its own networks*, which round differently: the same masks in the same order; predicted IoU within 1e-4;
  RLE, boxes and areas identical; stability within 1e-4. A pixel whose logit meets a threshold but for rounding may fall
  on either side: one pixel a mask is allowed for, in the RLE and in the stability (1 / area, the masks are small), and
  nine in ten RLEs must be identical all the same. (Where this was written all were.)

`reference.py` says how the published package runs without torchvision, `weights.py` where masks come from.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from itertools import compress
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from jobs.benchmarks.reference import build_reference, reference_masks, segment_anything
from jobs.benchmarks.weights import blobs, random_sam
from samray.config import MaskConfig
from samray.masks import MaskGenerator, generator
from samray.sam.sam import Sam

WIDE, TALL = (150, 220), (210, 130)

CASES = {
    "one grid": (WIDE, {"points_per_side": 18}),
    "one layer of crops": (TALL, {"points_per_side": 9, "crop_n_layers": 1}),
    "two layers, fewer points": (
        WIDE,
        {"points_per_side": 12, "crop_n_layers": 2, "crop_n_points_downscale_factor": 2, "crop_nms_thresh": 0.5},
    ),
    "other thresholds": (
        TALL,
        {
            "points_per_side": 8,
            "crop_n_layers": 1,
            "crop_overlap_ratio": 0.6,
            "pred_iou_thresh": 0.8,
            "stability_score_thresh": 0.9,
            "stability_score_offset": 5.0,
            "box_nms_thresh": 0.9,
        },
    ),
    "no filter by predicted IoU": (WIDE, {"points_per_side": 11, "pred_iou_thresh": 0.0}),
    "own points": (
        WIDE,
        {
            "points_per_side": None,
            "point_grids": [np.random.default_rng(0).random((80, 2)), np.random.default_rng(1).random((40, 2))],
            "crop_n_layers": 1,
        },
    ),
    "small regions": (WIDE, {"points_per_side": 18, "min_mask_region_area": 30}),
    "small regions in crops": (TALL, {"points_per_side": 8, "min_mask_region_area": 200, "crop_n_layers": 1}),
}
MIN_MASKS = 20
"""Fewer would prove little; the thresholds are such that most cases keep 40 to 150."""


class SamrayPredictor:
    """Stands in for the published predictor, with samray's networks behind it."""

    mask_threshold = 0.0

    def __init__(self, sam: Sam, min_iou: float) -> None:
        segment_anything()
        self.transform = importlib.import_module("segment_anything.utils.transforms").ResizeLongestSide(sam.image_size)
        self.sam, self.min_iou, self.device, self.model = sam, min_iou or None, sam.device, self

    def set_image(self, image: NDArray[np.uint8]) -> None:
        pixels, (self.input_hw,) = self.sam.preprocess([image])
        self.context = self.sam.prepare_decoder(self.sam.encode_images(pixels))
        self.image_hw = (image.shape[0], image.shape[1])

    def reset_image(self) -> None:
        pass

    def predict_torch(self, points: Tensor, labels: Tensor, **_: Any) -> tuple[Tensor, Tensor, None]:
        decoded = self.sam.decode_points(self.context, points.float(), labels.long(), min_iou=self.min_iou)
        logits = torch.zeros(*decoded.all_iou.shape, *decoded.logits.shape[1:])  # what is zero will not be looked at
        logits[decoded.prompt_index, decoded.mask_index] = decoded.logits
        masks = [self.sam.postprocess(of_prompt, self.input_hw, self.image_hw) for of_prompt in logits]
        return torch.stack(masks), decoded.all_iou, None


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The networks are small: a second thread would mostly wait."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def sam() -> Sam:
    return random_sam()


def run_samray(sam: Sam, image: NDArray[np.uint8], settings: dict[str, Any]) -> list[dict[str, Any]]:
    settings = {key: value for key, value in settings.items() if value is not None}
    masks = MaskGenerator(sam, MaskConfig(bbox_convention="sam", **settings)).generate([image])[0]
    assert len(masks) >= MIN_MASKS
    assert len({tuple(mask["bbox"]) for mask in masks}) > len(masks) / 2, "masks that are all alike prove little"
    if settings.get("crop_n_layers"):
        assert len({tuple(mask["crop_box"]) for mask in masks}) > 2
    return masks


@pytest.mark.parametrize("case", CASES)
def test_identical_given_identical_logits(case: str, sam: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    # Crops encoded together round differently from crops encoded one by one, as the published generator does.
    monkeypatch.setattr(generator, "_MAX_ENCODE_BATCH", 1)
    image_hw, settings = CASES[case]
    image = blobs(20, image_hw)
    predictor = SamrayPredictor(sam, settings.get("pred_iou_thresh", 0.88))
    expected = reference_masks(build_reference(sam.spec, sam.state_dict()), image, settings, predictor)
    assert run_samray(sam, image, settings) == expected


@pytest.mark.parametrize("case", CASES)
def test_whole_generator(case: str, sam: Sam) -> None:
    image_hw, settings = CASES[case]
    image = blobs(20, image_hw)
    expected = reference_masks(build_reference(sam.spec, sam.state_dict()), image, settings)
    masks = run_samray(sam, image, settings)
    assert len(masks) == len(expected)
    for ours, theirs in zip(masks, expected, strict=True):
        assert (ours["point_coords"], ours["crop_box"]) == (theirs["point_coords"], theirs["crop_box"])
        assert ours["predicted_iou"] == pytest.approx(theirs["predicted_iou"], abs=1e-4)
        assert ours["stability_score"] == pytest.approx(theirs["stability_score"], abs=1e-4 + 1 / ours["area"])
        pixels = coco_mask.decode(ours["segmentation"]) != coco_mask.decode(theirs["segmentation"])
        assert np.count_nonzero(pixels) <= 1
    same = [ours["segmentation"] == theirs["segmentation"] for ours, theirs in zip(masks, expected, strict=True)]
    assert sum(same) >= 0.9 * len(masks)
    for ours, theirs in zip(compress(masks, same), compress(expected, same), strict=True):
        assert (ours["bbox"], ours["area"]) == (theirs["bbox"], theirs["area"])


def test_box_convention(sam: Sam) -> None:
    """Ours is COCO's by default: the reference's boxes are one pixel short of it on both sides."""
    image = blobs(20, WIDE)
    coco = MaskGenerator(sam, MaskConfig(points_per_side=12)).generate([image])[0]
    published = MaskGenerator(sam, MaskConfig(points_per_side=12, bbox_convention="sam")).generate([image])[0]
    for ours, theirs in zip(coco, published, strict=True):
        assert ours["bbox"] == coco_mask.toBbox(ours["segmentation"]).tolist()
        assert np.subtract(ours["bbox"], theirs["bbox"]).tolist() == [0, 0, 1, 1]


def test_known_faults_are_not_copied(sam: Sam) -> None:
    """Where the published generator fails or returns NaN, ours gives valid rows."""
    image = blobs(20, WIDE)
    nothing = {"points_per_side": 4, "crop_n_layers": 1, "stability_score_thresh": 1.0, "stability_score_offset": 1e6}
    published = build_reference(sam.spec, sam.state_dict())
    with pytest.raises(IndexError):
        reference_masks(published, image, nothing)
    assert MaskGenerator(sam, MaskConfig(**nothing)).generate([image]) == [[]]

    everything = {"points_per_side": 8, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    expected = reference_masks(published, image, everything)
    masks = MaskGenerator(sam, MaskConfig(bbox_convention="sam", **everything)).generate([image])[0]
    assert any(np.isnan(mask["stability_score"]) for mask in expected), "no empty mask: the test proves nothing"
    assert len(masks) == sum(mask["area"] > 0 for mask in expected)
    assert all(0 <= mask["stability_score"] <= 1 for mask in masks)
