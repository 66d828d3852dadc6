"""Stability, boxes, areas and non-maximum suppression, against plain versions written here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from samray.masks import nms, pixels, prompted
from samray.masks.nms import box_nms, mask_nms
from samray.masks.scores import MASK_THRESHOLD, areas, mask_boxes, stability_scores


def some_masks(seed: int, num: int = 12, hw: tuple[int, int] = (23, 17)) -> NDArray[np.bool_]:
    """Masks of every density, an empty and a full one among them."""
    rng = np.random.default_rng(seed)
    masks = rng.random((num, *hw)) < np.linspace(0, 1, num)[:, None, None] ** 3
    masks[1] = False
    masks[1, 5:9, 3] = True
    return masks


def test_masks_of_a_grid_and_of_prompts_are_cut_at_one_threshold() -> None:
    assert pixels.MASK_THRESHOLD is prompted.MASK_THRESHOLD is MASK_THRESHOLD  # not just of the same value


def test_areas_and_boxes() -> None:
    masks = some_masks(0)
    assert areas(torch.from_numpy(masks)).tolist() == masks.sum(axis=(1, 2)).tolist()
    for mask, box in zip(masks, mask_boxes(torch.from_numpy(masks)).tolist(), strict=True):
        y, x = np.nonzero(mask)
        assert box == ([x.min(), y.min(), x.max(), y.max()] if len(x) else [0, 0, 0, 0])
    nothing = torch.zeros(0, 4, 5, dtype=torch.bool)
    assert areas(nothing).shape == (0,)
    assert mask_boxes(nothing).shape == (0, 4)


def test_stability_is_the_iou_of_the_two_cuts() -> None:
    logits = torch.randn(20, 9, 13, generator=torch.Generator().manual_seed(0)) * torch.arange(20)[:, None, None]
    scores = stability_scores(logits, 0.25, 1.0)
    assert scores.dtype == torch.float32
    for one, score in zip(logits, scores, strict=True):
        high, low = one > 1.25, one > -0.75
        union = (high | low).sum()
        assert score == ((high & low).sum() / union if union else 0)


def test_stability_of_an_empty_mask_is_zero() -> None:
    """Not NaN, as in the reference."""
    assert stability_scores(torch.full((1, 4, 4), -9.0), 0.0, 1.0).tolist() == [0.0]


def plain_nms(boxes: NDArray[np.float32], scores: NDArray[np.float32], thresh: float) -> list[int]:
    def iou(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
        w = max(np.float32(0), min(a[2], b[2]) - max(a[0], b[0]))
        h = max(np.float32(0), min(a[3], b[3]) - max(a[1], b[1]))
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
        return float(w * h / union) if union else float("nan")

    keep: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if not any(iou(boxes[k], boxes[i]) > thresh for k in keep):
            keep.append(i)
    return keep


@pytest.mark.parametrize("seed", range(8))
def test_box_nms(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Small integer boxes: many duplicates, many equal scores, boxes without area, IoUs exactly at the threshold."""
    monkeypatch.setattr(nms, "_BOXES_AT_ONCE", 1 + 13 * seed)
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 8, (80, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
    scores = (rng.integers(0, 6, 80) / 5).astype(np.float32)
    for thresh in (0.0, 0.3, 0.5, 0.6, 0.7, 1.0):
        keep = box_nms(boxes, scores, thresh).tolist()
        assert keep == plain_nms(boxes, scores, thresh)
        assert len(keep) < 80 or thresh == 1


def test_box_nms_compares_exactly_at_the_threshold() -> None:
    """3/5 in float32 is above 0.6: torchvision, which compares in double, drops such a box."""
    boxes = [[0, 0, 5, 1], [0, 0, 3, 1]]
    assert box_nms(boxes, [1, 0.5], 0.6).tolist() == [0]
    assert box_nms(boxes, [1, 0.5], float(np.float32(0.6))).tolist() == [0, 1]


def test_box_nms_of_nothing() -> None:
    keep = box_nms(np.zeros((0, 4)), np.zeros(0), 0.5)
    assert keep.dtype == np.int64
    assert keep.shape == (0,)


def test_mask_nms() -> None:
    masks = some_masks(3, num=30, hw=(8, 8))
    rles = [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    expected: list[int] = []
    for i, mask in enumerate(masks):
        if not any((mask & masks[k]).sum() > 0.4 * (mask | masks[k]).sum() for k in expected):
            expected.append(i)
    assert mask_nms(rles, 0.4).tolist() == expected
    assert 1 < len(expected) < 29
    assert mask_nms([], 0.4).tolist() == []
