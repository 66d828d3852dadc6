"""The generator on a model whose masks are known: three discs around every click, larger on brighter images."""

from __future__ import annotations

import contextlib
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from samray.config import MaskConfig
from samray.masks import MaskGenerator, generator
from samray.masks.candidates import Candidates
from samray.sam.sam import Decoded, Sam

SIZE, LOW = 64, 16
RADII = (2.0, 4.0, 9.0)
"""Radii of the three masks of a click, in low-res pixels on a black image; a white image doubles them."""


class DiscSam:
    """As much of Sam as the generator uses. Logits fall by 200 a low-res pixel; small discs have the highest IoU."""

    image_size, dtype, device = SIZE, torch.float32, torch.device("cpu")
    spec = SimpleNamespace(name="disc")
    postprocess = Sam.postprocess

    def resize(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return image

    def normalize(self, resized: list[NDArray[np.uint8]]) -> Tensor:
        brightness = torch.tensor([image.mean() / 255 for image in resized], dtype=torch.float32)
        return brightness[:, None, None, None].expand(-1, 3, SIZE, SIZE)

    def encode_images(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, ::16, ::16]

    def prepare_decoder(self, embeddings: Tensor) -> Tensor:
        return embeddings

    def decode_points(self, context: Tensor, points: Tensor, labels: Tensor, *, min_iou: float | None) -> Decoded:
        assert points.shape[1:] == (1, 2)
        assert (labels == 1).all()
        clicks = points[:, 0] * LOW / SIZE
        y, x = torch.meshgrid(torch.arange(LOW) + 0.5, torch.arange(LOW) + 0.5, indexing="ij")
        distance = ((x - clicks[:, :1, None]) ** 2 + (y - clicks[:, 1:, None]) ** 2).sqrt()
        each = len(points) // len(context)
        radii = torch.tensor(RADII) * (1 + context.mean(dim=(1, 2, 3))).repeat_interleave(each)[:, None]
        logits = 200 * (radii[:, :, None, None] - distance[:, None])
        iou = torch.tensor([0.99, 0.95, 0.9]) - clicks.sum(dim=1, keepdim=True) / 1e4
        keep = iou > (-1 if min_iou is None else min_iou)
        prompt, mask = keep.nonzero(as_tuple=True)
        return Decoded(logits[keep], iou[keep], prompt, mask, iou)


def run(images: list[NDArray[np.uint8]], overlaps: bool = False, **settings: Any) -> list[list[dict[str, Any]]]:
    masks = MaskGenerator(DiscSam(), MaskConfig(**({"points_per_side": 4} | settings)))  # type: ignore[arg-type]
    masks.overlaps = overlaps
    return masks.generate(images)


def grey(height: int, width: int, value: int = 0) -> NDArray[np.uint8]:
    return np.full((height, width, 3), value, dtype=np.uint8)


def pixels_of(record: dict[str, Any]) -> NDArray[np.bool_]:
    return np.asarray(coco_mask.decode(record["segmentation"]), dtype=bool)


CROPS = {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2}


@pytest.mark.parametrize("settings", [{}, CROPS, {"min_mask_region_area": 30}])
def test_records_agree_with_their_pixels(settings: dict[str, Any]) -> None:
    (masks,) = run([grey(90, 120)], **settings)
    assert len(masks) > 10
    for mask in masks:
        assert set(mask) == {
            "segmentation", "bbox", "area", "predicted_iou", "stability_score", "point_coords", "crop_box"
        }  # fmt: skip
        assert mask["segmentation"]["size"] == [90, 120]
        assert mask["bbox"] == coco_mask.toBbox(mask["segmentation"]).tolist()
        assert mask["area"] == coco_mask.area(mask["segmentation"]) == pixels_of(mask).sum() > 0
        ((x, y),) = mask["point_coords"]
        assert pixels_of(mask)[int(y), int(x)], "a disc holds its click"
        assert 0.88 < mask["predicted_iou"] <= 1
        assert 0.95 <= mask["stability_score"] <= 1
    assert {type(value) for value in masks[0].values()} == {dict, list, int, float}


def test_order_is_by_zoom_then_predicted_iou() -> None:
    (masks,) = run([grey(90, 120)], **CROPS)
    keys = [(mask["crop_box"][2] * mask["crop_box"][3], -mask["predicted_iou"]) for mask in masks]
    assert [area for area, _ in keys] == sorted(area for area, _ in keys)
    by_crop: dict[tuple[float, ...], list[float]] = {}
    for mask in masks:
        by_crop.setdefault(tuple(mask["crop_box"]), []).append(-mask["predicted_iou"])
    assert len(by_crop) > 2
    assert all(scores == sorted(scores) for scores in by_crop.values())


def test_nothing_depends_on_how_work_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [grey(90, 120), grey(64, 50, 100), grey(33, 130, 255)]
    settings = CROPS | {"min_mask_region_area": 20}
    expected = run(images, **settings)
    assert all(len(masks) > 5 for masks in expected)
    assert [run([image], **settings)[0] for image in images] == expected
    for points_per_batch, masks_at_once, encode_batch in ((1, 2, 1), (7, 3, 4), (1000, 100, 100)):
        monkeypatch.setattr(generator, "_CPU_PIXEL_BYTES", masks_at_once * 4 * 90 * 120)
        monkeypatch.setattr(generator, "_MAX_ENCODE_BATCH", encode_batch)
        assert run(images, points_per_batch=points_per_batch, **settings) == expected
    assert run(images, overlaps=True, **settings) == expected  # as with a GPU


def test_large_images_are_measured_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same result; `test_masks_windows.py` says how closely."""
    image, settings = grey(600, 800), CROPS | {"min_mask_region_area": 20}
    (whole,) = run([image], **settings)
    monkeypatch.setattr(generator, "_CPU_PIXEL_BYTES", 1)
    (windowed,) = run([image], **settings)
    assert len(whole) > 10
    for ours, theirs in zip(windowed, whole, strict=True):
        assert ours.pop("stability_score") == pytest.approx(theirs.pop("stability_score"), abs=1e-4)
        assert ours == theirs


@pytest.mark.parametrize("image_hw", [(1, 1), (1, 5000), (5000, 1), (2, 3), (3, 700)])
@pytest.mark.parametrize("num_layers", [0, 2])
def test_degenerate_images(image_hw: tuple[int, int], num_layers: int) -> None:
    (masks,) = run([grey(*image_hw)], crop_n_layers=num_layers, min_mask_region_area=10)
    for mask in masks:
        assert mask["segmentation"]["size"] == list(image_hw)
        assert mask["area"] == coco_mask.area(mask["segmentation"]) > 0


def test_no_images_and_no_masks() -> None:
    assert run([]) == []
    for settings in ({}, CROPS, {"min_mask_region_area": 5, "non_overlapping": True, "mask_nms_thresh": 0.5}):
        assert run([grey(90, 120), grey(20, 20)], pred_iou_thresh=1.0, **settings) == [[], []]
    crops_only = run([grey(90, 120)], crop_n_layers=1, point_grids=((), ((0.5, 0.5),)))[0]
    assert {tuple(mask["crop_box"]) for mask in crops_only} & {(0.0, 0.0, 120.0, 90.0)} == set()
    assert crops_only


def test_own_points() -> None:
    (masks,) = run([grey(90, 120)], point_grids=(((0.5, 0.25),),))
    assert {tuple(mask["point_coords"][0]) for mask in masks} == {(60.0, 22.5)}
    assert len(masks) == len(RADII)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), grey(0, 5)]
)
def test_what_is_no_image_is_refused(image: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="uint8 array"):
        run([grey(5, 5), image])


def test_area_limits() -> None:
    image, num_pixels = grey(90, 120), 90 * 120
    all_areas = {mask["area"] for mask in run([image], box_nms_thresh=1.0)[0]}
    low, high = sorted(all_areas)[len(all_areas) // 3], sorted(all_areas)[2 * len(all_areas) // 3]
    settings = {"box_nms_thresh": 1.0, "min_mask_area": low, "max_mask_area_fraction": high / num_pixels}
    assert {mask["area"] for mask in run([image], **settings)[0]} == {a for a in all_areas if low <= a < high}


def test_max_masks_keeps_the_best_in_order() -> None:
    (everything,) = run([grey(90, 120)], **CROPS)
    (best,) = run([grey(90, 120)], max_masks=7, **CROPS)
    threshold = sorted((mask["predicted_iou"] for mask in everything), reverse=True)[6]
    assert best == [mask for mask in everything if mask["predicted_iou"] >= threshold]
    assert len(best) == 7


def test_mask_nms_drops_what_box_nms_keeps() -> None:
    (everything,) = run([grey(90, 120)], box_nms_thresh=0.95)
    (distinct,) = run([grey(90, 120)], box_nms_thresh=0.95, mask_nms_thresh=0.3)
    rles = [mask["segmentation"] for mask in distinct]
    overlap = coco_mask.iou(rles, rles, [0] * len(rles)) - np.eye(len(rles))
    assert overlap.max() <= 0.3
    assert 0 < len(distinct) < len(everything)
    assert distinct[0] == everything[0]


def test_non_overlapping() -> None:
    """Every pixel goes to the best-scored of its masks; records describe what is left of them."""
    (overlapping,) = run([grey(90, 120)], **CROPS)
    (disjoint,) = run([grey(90, 120)], non_overlapping=True, **CROPS)
    taken = np.zeros((90, 120), dtype=bool)
    expected = {}
    for mask in sorted(overlapping, key=lambda mask: -mask["predicted_iou"]):
        left = pixels_of(mask) & ~taken
        taken |= left
        if left.any():
            expected[mask["predicted_iou"], *mask["crop_box"], *mask["point_coords"][0]] = left
    assert 1 < len(expected) < len(overlapping), "some mask must vanish"
    assert len(disjoint) == len(expected)
    for mask in disjoint:
        left = expected[mask["predicted_iou"], *mask["crop_box"], *mask["point_coords"][0]]
        assert np.array_equal(pixels_of(mask), left)
        assert mask["area"] == left.sum()
        assert mask["bbox"] == coco_mask.toBbox(mask["segmentation"]).tolist()


def test_stage_seconds_add_up() -> None:
    masks = MaskGenerator(DiscSam(), MaskConfig(points_per_side=2))  # type: ignore[arg-type]
    assert masks.stage_seconds == dict.fromkeys(generator.STAGES, 0.0)
    masks.generate([grey(30, 40)])
    first = dict(masks.stage_seconds)
    masks.generate([grey(30, 40)])
    assert all(masks.stage_seconds[stage] > first[stage] > 0 for stage in generator.STAGES)


def test_candidates_hold_no_memory_but_their_own() -> None:
    """Or the logits of every mask of an image would stay until its last crop is done."""
    batches: list[Candidates] = []

    class Watched(MaskGenerator):
        def _process_image(self, candidates: Candidates, image_hw: tuple[int, int]) -> list[dict[str, Any]]:
            batches.append(candidates)
            return super()._process_image(candidates, image_hw)

    Watched(DiscSam(), MaskConfig(points_per_side=4)).generate([grey(60, 80)])  # type: ignore[arg-type]
    assert len(batches[0]) > 1
    for logits in batches[0].logits:
        assert logits.untyped_storage().nbytes() == logits.nbytes


def test_cat_then_index() -> None:
    def part(num: int, seed: int) -> Candidates:
        rng = np.random.default_rng(seed)
        return Candidates(
            logits=list(torch.from_numpy(rng.random((num, 3, 3), dtype=np.float32))),
            crop_index=rng.integers(0, 9, num),
            boxes_xyxy=rng.integers(0, 9, (num, 4)),
            predicted_iou=rng.random(num, dtype=np.float32),
            stability_score=rng.random(num, dtype=np.float32),
            points_xy=rng.random((num, 2)),
        )

    parts = [part(4, 0), part(0, 1), part(5, 2)]
    for index in (np.array([8, 0, 3, 4, 3]), np.array([], dtype=np.int64)):
        picked = Candidates.cat(parts)[index]
        assert len(picked) == len(picked.logits) == len(index)
        for field in Candidates.__slots__:
            rows = [row for one in parts for row in getattr(one, field)]
            expected = [rows[i] for i in index]
            assert all(np.array_equal(a, b) for a, b in zip(getattr(picked, field), expected, strict=True)), field


def test_a_thread_that_runs_out_of_memory_leaves_nothing_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[weakref.ref[Tensor]] = []

    def too_much(self: MaskGenerator, logits: Tensor, *_: Any) -> None:
        taken.append(weakref.ref(logits))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MaskGenerator, "_runs", too_much)
    gc.collect()
    gc.disable()  # with its cycles found at any time, this could pass by chance
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            run([grey(60, 60)] * 3, overlaps=True)
        assert taken
        assert [ref() for ref in taken] == [None] * len(taken)
    finally:
        gc.enable()


def test_frugal_is_the_same_masks_one_crop_and_one_mask_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    model = DiscSam()
    monkeypatch.setattr(model, "encode_images", lambda x: encoded.append(len(x)) or DiscSam.encode_images(model, x))
    config = MaskConfig(points_per_side=4, crop_n_layers=1)
    images = [grey(60, 64, 30), grey(64, 50, 90)]
    usual = MaskGenerator(model, config)  # type: ignore[arg-type]
    assert usual._masks_at_once(usual._crops((60, 64))[0]) > 1
    expected = usual.generate(images)
    assert max(encoded) > 1
    encoded.clear()
    frugal = MaskGenerator(model, config, frugal=True)  # type: ignore[arg-type]
    assert frugal._masks_at_once(frugal._crops((60, 64))[0]) == 1
    assert frugal.generate(images) == expected
    assert set(encoded) == {1}
