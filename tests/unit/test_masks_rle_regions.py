"""Run lengths against pycocotools and plain pixels; cleaning of regions against OpenCV where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from samray.masks.regions import remove_small_regions
from samray.rle import encode as rle
from samray.rle.runs import pixels

Bool = NDArray[np.bool_]


def some_masks(seed: int, num: int, hw: tuple[int, int]) -> Bool:
    """Empty, full, sparse, dense, and masks that start or end with a 1."""
    rng = np.random.default_rng(seed)
    masks = rng.random((num, *hw)) < rng.random((num, 1, 1)) ** 2
    masks[0], masks[1] = False, True
    masks[2, 0, 0], masks[3, -1, -1] = True, True
    masks[4], masks[4, :, hw[1] // 2 :] = False, True  # whole columns: runs that go on from one to the next
    return masks


@pytest.mark.parametrize("runs_at_once", [1, 100, 2**13])
@pytest.mark.parametrize("window", [(9, 7, 0, 0), (9, 3, 0, 2), (4, 7, 5, 0), (4, 3, 2, 1), (1, 1, 8, 6)])
def test_encode_masks(monkeypatch: pytest.MonkeyPatch, window: tuple[int, int, int, int], runs_at_once: int) -> None:
    """Windows as large as the image, as high, as wide, inside, and a single pixel in its corner."""
    monkeypatch.setattr(rle, "_RUNS_AT_ONCE", runs_at_once)
    h, w, y0, x0 = window
    image_hw = (9, 7)
    masks = some_masks(1, 30, (h, w))
    encoded = rle.encode_masks(torch.from_numpy(masks), (x0, y0), image_hw)
    assert len(encoded) == len(masks)
    boxes, areas = rle.boxes_xyxy(encoded, image_hw).tolist(), rle.areas(encoded).tolist()
    for mask, counts, xyxy, area in zip(masks, encoded, boxes, areas, strict=True):
        full = np.zeros(image_hw, dtype=bool)
        full[y0 : y0 + h, x0 : x0 + w] = mask
        expected = coco_mask.encode(np.asfortranarray(full, dtype=np.uint8))
        assert rle.compress(counts, image_hw) == {"size": [9, 7], "counts": expected["counts"].decode()}
        assert counts.sum() == 63
        assert rle.area(counts) == area == full.sum()
        y, x = np.nonzero(full)
        box = [x.min(), y.min(), x.max(), y.max()] if len(x) else [0, 0, 0, 0]
        assert xyxy == box


def test_encode_no_masks() -> None:
    assert rle.encode_masks(torch.zeros(0, 4, 5, dtype=torch.bool), (0, 0), (4, 5)) == []
    assert rle.boxes_xyxy([], (4, 5)).shape == (0, 4)
    assert rle.areas([]).shape == (0,)


def test_make_disjoint() -> None:
    masks = some_masks(2, 9, (11, 6))
    masks[1] = False
    counts = rle.make_disjoint(rle.encode_masks(torch.from_numpy(masks), (0, 0), (11, 6)), (11, 6))
    taken = np.zeros((11, 6), dtype=bool)
    for mask, ours in zip(masks, counts, strict=True):
        expected = coco_mask.encode(np.asfortranarray(mask & ~taken, dtype=np.uint8))
        assert rle.compress(ours, (11, 6))["counts"] == expected["counts"].decode()
        taken |= mask
    assert rle.make_disjoint([], (3, 3)) == []


def plain_clean(mask: Bool, min_area: int) -> tuple[Bool, bool]:
    """Holes, then islands, by flooding from pixel to pixel."""

    def regions_of(of: Bool) -> list[list[tuple[int, int]]]:
        left = {(int(y), int(x)) for y, x in zip(*np.nonzero(of), strict=True)}
        components = []
        while left:
            stack = [min(left)]
            left.remove(stack[0])
            region = []
            while stack:
                y, x = stack.pop()
                region.append((y, x))
                near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
                left -= near
                stack += near
            components.append(region)
        return sorted(components, key=min)

    mask, changed = mask.copy(), False
    for hole in regions_of(~mask):
        if len(hole) < min_area:
            changed = True
            for pixel in hole:
                mask[pixel] = True
    islands = regions_of(mask)
    largest = max(islands, key=len) if islands else []
    any_large = len(largest) >= min_area
    for island in islands:
        if len(island) < min_area and (any_large or island is not largest):
            for pixel in island:
                mask[pixel] = False
        changed |= len(island) < min_area
    return mask, changed


def ours(masks: list[Bool], min_area: int) -> list[Bool | None]:
    hw = (masks[0].shape[0], masks[0].shape[1])
    cleaned: list[Bool | None] = []
    for counts in remove_small_regions([rle.encode_array(mask) for mask in masks], hw, min_area):
        cleaned.append(None if counts is None else pixels(counts, hw))
        if counts is not None:
            assert counts.tolist() == rle.encode_array(pixels(counts, hw)).tolist(), "the shortest form"
    return cleaned


def region_cases() -> list[tuple[list[Bool], int]]:
    """Masks that lie inside, touch one border, or reach from border to border (background in several pieces), with the
    area below which their regions are small."""
    rng = np.random.default_rng(4)
    cases: dict[int, list[Bool]] = {}
    for number in range(150):
        mask = np.zeros((14, 11), dtype=bool)
        y0, y1 = sorted(rng.choice(15, 2, replace=False))
        x0, x1 = sorted(rng.choice(12, 2, replace=False))
        if number % 3 == 0:
            y0, y1 = 0, 14
        mask[y0:y1, x0:x1] = rng.random((y1 - y0, x1 - x0)) < rng.choice([0.2, 0.5, 0.8, 1.0])
        if mask.any():
            mask[:, 3:6] |= number % 7 == 0  # whole columns
            cases.setdefault(int(rng.choice([1, 3, 8, 30, 200])), []).append(mask)
    return [(masks, min_area) for min_area, masks in cases.items()]


@pytest.mark.parametrize("runs_at_once", [1, 50, 2**13])
def test_remove_small_regions(monkeypatch: pytest.MonkeyPatch, runs_at_once: int) -> None:
    """One mask at a time, some, and all together."""
    monkeypatch.setattr(rle, "_RUNS_AT_ONCE", runs_at_once)
    num_changed = 0
    for masks, min_area in region_cases():
        for mask, cleaned in zip(masks, ours(masks, min_area), strict=True):
            expected, changed = plain_clean(mask, min_area)
            assert (cleaned is not None) == changed
            if cleaned is not None:
                assert np.array_equal(cleaned, expected)
                num_changed += 1
    assert 30 < num_changed < 140


@pytest.mark.parametrize("min_area", [6, 30, 100, 400])
def test_remove_small_regions_of_blobs(min_area: int) -> None:
    """Smooth shapes with thin ends, in taller images: columns shorter and longer than the limit, chains of short ones,
    and limits above the height of the image."""
    rng = np.random.default_rng(min_area)
    masks = []
    for smoothness in (1, 2, 4):
        noise = rng.normal(size=(12, 74, 52))
        for axis in (1, 2):
            for _ in range(smoothness):
                noise += np.roll(noise, 1, axis)
        masks += [
            field > np.quantile(field, share) for field, share in zip(noise, np.linspace(0.1, 0.97, 12), strict=True)
        ]
    expected = [plain_clean(mask, min_area) for mask in masks]
    for cleaned, (of_plain, changed) in zip(ours(masks, min_area), expected, strict=True):
        assert (cleaned is not None) == changed
        assert cleaned is None or np.array_equal(cleaned, of_plain)
    # One mask alone gives the same as many together.
    for mask, (of_plain, changed) in list(zip(masks, expected, strict=True))[::7]:
        (cleaned,) = ours([mask], min_area)
        assert np.array_equal(mask if cleaned is None else cleaned, of_plain if changed else mask)
    assert any(changed for _, changed in expected)


def test_boxes_and_areas_of_runs_that_end_in_every_way() -> None:
    """Empty and full masks, masks that begin or end with a run of 1, and columns that runs cross."""
    rng = np.random.default_rng(3)
    masks = [rng.random((5, 4)) < share for share in (0.0, 0.1, 0.5, 0.9, 1.0) for _ in range(20)]
    masks += [np.zeros((5, 4), bool), np.ones((5, 4), bool)]
    counts = [rle.encode_array(mask) for mask in masks]
    assert rle.areas(counts).tolist() == [int(mask.sum()) for mask in masks]
    for box, mask in zip(rle.boxes_xyxy(counts, (5, 4)).tolist(), masks, strict=True):
        y, x = np.nonzero(mask)
        assert box == ([x.min(), y.min(), x.max(), y.max()] if len(x) else [0, 0, 0, 0])
    assert rle.areas([]).tolist() == []
    assert rle.boxes_xyxy([], (5, 4)).shape == (0, 4)


def test_remove_small_regions_of_no_masks() -> None:
    assert remove_small_regions([], (3, 4), 5) == []


def test_regions_that_join_far_to_the_right_are_one() -> None:
    """Combs, whose teeth only the spine at the right end joins, and a spiral."""
    comb = np.zeros((41, 30), dtype=bool)
    comb[::2], comb[:, -1] = True, True
    spiral = np.zeros((41, 30), dtype=bool)
    top, bottom, left, right = 0, 40, 0, 29
    while bottom > top and right > left:
        spiral[top, left : right + 1] = spiral[top:bottom, right] = spiral[bottom, left + 2 : right + 1] = True
        spiral[top + 2 : bottom + 1, left + 2] = True
        top, bottom, left, right = top + 2, bottom - 2, left + 2, right - 2
    for mask in (comb, comb[:, ::-1].copy(), spiral, ~spiral):
        expected, changed = plain_clean(mask, 25)
        (cleaned,) = ours([mask], 25)
        assert (cleaned is not None) == changed
        assert np.array_equal(mask if cleaned is None else cleaned, expected)


def test_remove_small_regions_as_the_reference_does() -> None:
    """With OpenCV, as the published code calls it; of equally large islands that are all small it may keep another."""
    cv2 = pytest.importorskip("cv2", reason="the comparison with OpenCV needs opencv-python-headless")
    for mask, min_area in [(mask, min_area) for masks, min_area in region_cases() for mask in masks]:
        num, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=8)
        small = [i for i in range(1, num) if stats[i, -1] < min_area]
        filled = mask | np.isin(labels, small)
        num, labels, stats, _ = cv2.connectedComponentsWithStats(filled.astype(np.uint8), connectivity=8)
        sizes = stats[1:, -1]
        large = [i for i in range(1, num) if sizes[i - 1] >= min_area]
        if not large and np.count_nonzero(sizes == sizes.max()) > 1:
            continue
        expected = np.isin(labels, large or [1 + int(np.argmax(sizes))])
        (cleaned,) = ours([mask], min_area)
        assert np.array_equal(mask if cleaned is None else cleaned, expected)
