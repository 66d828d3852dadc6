"""The code paths of a GPU, on a stand-in for one: the same masks as on the CPU, and how often the host waits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import samray
from jobs.benchmarks.device_standin import DEVICE, DeviceStandIn, to_device
from jobs.benchmarks.weights import blobs, random_sam
from samray.rle import encode as rle
from samray.sam import resizing


def on_standin(
    images: list[np.ndarray], config: samray.MaskConfig
) -> tuple[list[list[dict[str, object]]], DeviceStandIn]:
    with torch.inference_mode(), DeviceStandIn() as device:
        generator = samray.MaskGenerator(to_device(random_sam()), config)  # type: ignore[arg-type]
        generator.overlaps = False  # the stand-in is one thread's
        return generator.generate(images), device


@pytest.mark.slow
@pytest.mark.parametrize("crop_n_layers", [0, 1])
def test_the_masks_are_those_of_the_cpu(crop_n_layers: int) -> None:
    images = [blobs(1, (150, 210)), blobs(2, (256, 256)), blobs(3, (240, 190))]
    config = samray.MaskConfig(points_per_side=6, points_per_batch=16, crop_n_layers=crop_n_layers)
    expected = samray.MaskGenerator(random_sam(), config).generate(images)
    assert sum(map(len, expected)) > 10
    assert on_standin(images, config)[0] == expected


@pytest.mark.slow
def test_the_host_waits_twice_for_each_batch_of_prompts_and_for_each_of_masks() -> None:
    config = samray.MaskConfig(points_per_side=8, points_per_batch=16)  # four batches
    masks, device = on_standin([blobs(1, (150, 210))], config)
    assert masks[0]
    # The IoU filter, then what was measured; then run lengths, for which the number of changes must be known.
    assert device.syncs == {"to the host": 4 + 4 + 1, "nonzero": 1}


@pytest.mark.parametrize("hw", [(1, 1), (1, 9), (9, 1), (7, 11)])
def test_run_lengths_of_whole_images(hw: tuple[int, int]) -> None:
    masks = torch.rand(6, *hw, generator=torch.Generator().manual_seed(0)) > 0.5
    masks[0], masks[1] = False, True
    masks[2, -1], masks[2, 0] = True, True  # runs that go on in the next column
    expected = rle.encode_masks(masks, (0, 0), hw)
    with DeviceStandIn():
        encoded = rle.encode_masks(masks.to(DEVICE), (0, 0), hw)
    assert len(encoded) == len(expected)
    for one, other in zip(encoded, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def pillow(image: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(hw[::-1], Image.Resampling.BILINEAR))


@pytest.mark.parametrize(
    ("original_hw", "hw"),
    [
        ((300, 450), (51, 77)),
        ((90, 61), (64, 43)),
        ((21, 200), (40, 382)),  # enlarged
        ((64, 300), (64, 41)),  # along one side only
        ((300, 64), (41, 64)),
        ((30, 2), (128, 9)),
        ((1, 999), (1, 64)),
        ((40, 50), (40, 50)),
    ],
)
def test_the_device_resizes_as_pillow_does(
    monkeypatch: pytest.MonkeyPatch, original_hw: tuple[int, int], hw: tuple[int, int]
) -> None:
    """From the second image of a size on; the first one shows in which order Pillow resizes the sides."""
    monkeypatch.setattr(resizing, "_x_is_first", {})
    monkeypatch.setattr(resizing, "_PRODUCTS_AT_ONCE", 1000)  # many parts
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, *original_hw, 3), dtype=np.uint8)
    second[second < 40], second[second > 200] = 0, 255
    with DeviceStandIn() as device:
        by_pillow = resizing.resize(first, hw, DEVICE)
        assert isinstance(by_pillow, np.ndarray)
        monkeypatch.setattr(resizing, "_by_pillow", None)
        device.syncs.clear()
        there = resizing.resize(second, hw, DEVICE)
        assert isinstance(there, torch.Tensor)
        assert not device.syncs
        pixels = there.cpu().numpy()
    np.testing.assert_array_equal(by_pillow, pillow(first, hw))
    np.testing.assert_array_equal(pixels, pillow(second, hw))


def test_pillow_resizes_until_an_image_shows_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resizing, "_x_is_first", {})
    plain, image = np.full((50, 70, 3), 9, np.uint8), np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    with DeviceStandIn():
        resizing.resize(plain, (20, 28), DEVICE)
        assert not resizing._x_is_first
        resizing.resize(image, (20, 28), DEVICE)
        assert resizing._x_is_first[50, 70, 20, 28] is not None


def test_a_pillow_that_resizes_otherwise_is_used_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resizing, "_x_is_first", {})
    by_pillow = resizing._by_pillow
    monkeypatch.setattr(resizing, "_by_pillow", lambda image, hw: by_pillow(image, hw) // 2)
    images = np.random.default_rng(0).integers(0, 256, (3, 50, 70, 3), np.uint8)
    with DeviceStandIn():
        for image in images:
            np.testing.assert_array_equal(resizing.resize(image, (20, 28), DEVICE), pillow(image, (20, 28)) // 2)
    assert resizing._x_is_first == {(50, 70, 20, 28): None}
