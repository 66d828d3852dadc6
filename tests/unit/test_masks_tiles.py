"""Masks computed in open tiles only, against the pixels of whole masks: everything is identical."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from jobs.benchmarks.weights import blobs, random_sam
from samray.config import MaskConfig
from samray.masks import MaskGenerator, bilinear, pixels, tiles
from samray.masks.scores import above, areas, mask_boxes, stability_scores
from samray.rle import encode as rle
from samray.sam.frames import Frame, PadFrame, SquareFrame

SIZE, LOW = 128, 32
FRAMES = (PadFrame(SIZE), SquareFrame(SIZE))
SIZES = [(300, 400), (401, 299), (64, 128), (65, 129), (63, 127), (128, 128), (13, 640), (640, 11), (2, 128), (130, 90)]
"""Smaller and larger than the input, whole tiles and one pixel more or less, and narrow strips."""


def smooth(seed: int, num: int = 4, step: int = 8) -> Tensor:
    """(num, LOW, LOW) blobs with logits from about -10 to 10."""
    noise = torch.randn(num, 1, LOW // step, LOW // step, generator=torch.Generator().manual_seed(seed))
    return 5 * F.interpolate(noise, (LOW, LOW), mode="bicubic")[:, 0]


def adversarial(threshold: float, offset: float) -> Tensor:
    """Masks whose logits are at the cuts, but for a few units in the last place, or far beyond them next to it."""
    generator = torch.Generator().manual_seed(5)
    cuts = torch.tensor([threshold - offset, threshold, threshold + offset])
    cut = cuts[torch.randint(3, (3, LOW, LOW), generator=generator)]
    ulps = torch.randint(-3, 4, cut.shape, generator=generator)
    near = cut * (1 + ulps * 2.0**-23) + ulps * 2.0**-40
    huge = torch.where(torch.rand(near.shape, generator=generator) < 0.02, 1e30 * torch.sign(near), near)
    constant = torch.stack([torch.full((LOW, LOW), float(value)) for value in (*cuts, threshold + 2.0**-24, 1e-44, 0)])
    flat = torch.nextafter(constant, torch.full_like(constant, torch.inf))
    return torch.cat([near, huge, constant, flat, -flat, smooth(0) * 1e-42])


def whole(frame: Frame, logits: Tensor, hw: tuple[int, int]) -> Tensor:
    """One at a time: torch interpolates a batch of exactly three on one thread with another kernel, which rounds
    differently."""
    return torch.cat([frame.masks_out(one[None], hw) for one in logits])


def check(frame: Frame, logits: Tensor, hw: tuple[int, int], threshold: float = 0.0, offset: float = 1.0) -> None:
    grid = tiles.tile_grid(LOW, *frame.mask_steps(LOW, hw), hw)
    assert grid is not None
    upscaled = whole(frame, logits, hw)
    expected = above(upscaled, threshold)
    upper, masks, lower = tiles.measure(grid, logits.numpy(), threshold, offset)
    assert masks.areas().tolist() == areas(expected).tolist()
    assert masks.boxes().tolist() == mask_boxes(expected).tolist()
    stability = pixels.stability_of(torch.from_numpy(upper), torch.from_numpy(lower))
    assert torch.equal(stability, stability_scores(upscaled, threshold, offset))
    for cut in (masks, tiles.cut(grid, logits.numpy(), threshold)):
        runs = rle.encode_changes(*cut.changes(), len(logits), (3, 2), (hw[0] + 5, hw[1] + 4))
        plain = rle.encode_masks(expected, (3, 2), (hw[0] + 5, hw[1] + 4))
        assert [counts.tolist() for counts in runs] == [counts.tolist() for counts in plain]


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("hw", SIZES)
def test_tiles_give_the_same_as_whole_masks(frame: Frame, hw: tuple[int, int]) -> None:
    check(frame, torch.cat([smooth(0), 3 * smooth(1) - 8, smooth(2, step=1), smooth(3) + 30, smooth(4) - 30]), hw)
    check(frame, smooth(1), hw, threshold=0.3, offset=0.7)


@pytest.mark.parametrize("cuts", [(0.0, 1.0), (0.1, 0.3), (-7.7, 1e-6), (1000.1, 0.0)])
def test_logits_at_the_thresholds(cuts: tuple[float, float]) -> None:
    for frame, hw in product(FRAMES, [(200, 300), (65, 129), (90, 60), (13, 300)]):
        check(frame, adversarial(*cuts), hw, *cuts)


def test_random_sizes_and_logits() -> None:
    rng = np.random.default_rng(0)
    for seed in range(25):
        hw = (int(rng.integers(3, 300)), int(rng.integers(128, 300)))
        scale, shift = 10.0 ** rng.uniform(-6, 3), rng.normal()
        logits = smooth(seed, step=int(rng.choice([1, 2, 8]))) * scale + shift * scale
        check(FRAMES[seed % 2], logits, hw, threshold=float(rng.normal() * scale), offset=float(scale * rng.random()))


def test_closed_tiles_are_the_larger_part_and_hold_what_they_say() -> None:
    frame, hw = FRAMES[0], (600, 900)
    grid = tiles.tile_grid(LOW, *frame.mask_steps(LOW, hw), hw)
    assert grid is not None
    logits = smooth(0)
    masks = tiles.cut(grid, logits.numpy(), 0.0)
    assert len(masks.words) < 0.5 * masks.filled.size
    # Bounds are those of what a tile's pixels depend on, neither more nor less.
    low, high = tiles._bounds(grid, logits.numpy())
    upscaled = whole(frame, logits, hw).numpy()
    for mask, ty, tx in product(range(len(logits)), range(grid.shape[0]), range(grid.shape[1])):
        tile = upscaled[mask, 64 * ty : 64 * ty + 64, 64 * tx : 64 * tx + 64]
        assert low[mask, ty, tx] - 1e-5 <= tile.min() <= tile.max() <= high[mask, ty, tx] + 1e-5


def test_not_a_number() -> None:
    """Such logits leave a tile open: its pixels are then as of the whole mask."""
    logits = smooth(0)
    logits[0, 5, 7], logits[1, 20, 3], logits[2, 9, 9] = torch.nan, torch.inf, -torch.inf
    for hw in SIZES:
        check(FRAMES[0], logits, hw)


@pytest.mark.parametrize(("length", "num"), [(128, 400), (400, 128), (96, 384), (85, 85), (1, 7), (683, 1500)])
def test_axis(length: int, num: int) -> None:
    axis = bilinear.axis(length, num)
    assert axis is not None
    column = torch.randn(length, 130)
    expected = F.interpolate(column[None, None], (num, 130), mode="bilinear")[0, 0]
    assert torch.equal(bilinear.mix_rows(column, axis.index, axis.weights), expected)


def test_other_rounding_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that adds the neighbours the other way round: whole masks are interpolated, with the same result."""
    frame, hw, logits = FRAMES[0], (300, 400), smooth(0)
    expected = pixels.run_lengths(frame, logits, hw, (0, 0), hw, 1)
    assert pixels.tile_grid_of(frame, logits, hw) is not None
    add = bilinear.mix_rows

    def other_order(table: Tensor, index: NDArray[np.int32], weights: NDArray[np.float32]) -> Tensor:
        return add(table, np.ascontiguousarray(index[:, ::-1]), np.ascontiguousarray(weights[:, ::-1]))

    caches = (bilinear.axis, bilinear._rounds_alike, tiles.tile_grid)
    monkeypatch.setattr(bilinear, "mix_rows", other_order)
    try:
        for cache in caches:
            cache.cache_clear()
        assert bilinear.axis(128, 400) is None
        assert pixels.tile_grid_of(frame, logits, hw) is None
        runs = pixels.run_lengths(frame, logits, hw, (0, 0), hw, 1)
    finally:
        for cache in caches:
            cache.cache_clear()
    assert [counts.tolist() for counts in runs] == [counts.tolist() for counts in expected]


def test_small_results_of_another_kernel_are_not_tiled() -> None:
    for hw in ((64, 64), (1, 500), (500, 1), (1, 1)):
        assert all(tiles.tile_grid(LOW, *frame.mask_steps(LOW, hw), hw) is None for frame in FRAMES)
    assert tiles.tile_grid(LOW, SIZE, (1, SIZE), (2, 500)) is None
    assert tiles.tile_grid(LOW, 64, (64, 64), (300, 400)) is None


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_measure_and_run_lengths(at_once: int) -> None:
    logits, hw = torch.cat([smooth(0), smooth(1) - 9, smooth(2) - 90]), (211, 317)
    for frame in FRAMES:
        tiled = pixels.measure(frame, logits, hw, 1.0, at_once)
        plain = pixels.measure_whole(frame, logits, hw, 1.0, 100)
        assert torch.equal(tiled, plain)
        # Today's windows round coordinates differently.
        assert (tiled - pixels.measure_whole(frame, logits, hw, 1.0, 1))[:, 0].abs().max() < 1e-4
        arguments = (frame, logits, hw, (5, 6), (300, 400), at_once)
        runs, expected = pixels.run_lengths(*arguments), pixels.run_lengths_whole(*arguments)
        assert [counts.tolist() for counts in runs] == [counts.tolist() for counts in expected]
        assert pixels.measure(frame, logits[:0], hw, 1.0, at_once).shape == (0, 6)
        assert pixels.run_lengths(frame, logits[:0], hw, (0, 0), hw, at_once) == []


@pytest.mark.parametrize("settings", [{}, {"crop_n_layers": 1, "min_mask_region_area": 20}])
def test_the_generator_gives_the_same_without_tiles(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_sam(image=blobs(20, (300, 400)))
    masks = MaskGenerator(model, MaskConfig(points_per_side=8, stability_score_thresh=0.5, **settings))
    grids = []
    tiled = pixels.tile_grid_of

    def recorded(*arguments: Any) -> tiles.Grid | None:
        grids.append(tiled(*arguments))
        return grids[-1]

    monkeypatch.setattr(pixels, "tile_grid_of", recorded)
    records = masks.generate([blobs(20, (300, 400))])[0]
    assert any(grids), "no tiles: the test proves nothing"
    monkeypatch.setattr(pixels, "tile_grid_of", lambda *_: None)
    assert len(records) > 10
    assert masks.generate([blobs(20, (300, 400))])[0] == records
