"""Windows of large images against the whole image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from samray.masks.windows import upsample_occupied
from samray.sam.sam import input_size

SIZE, LOW = 64, 16


@pytest.mark.parametrize("image_hw", [(300, 400), (400, 300), (301, 400), (64, 48), (500, 500), (7, 640), (1, 1)])
@pytest.mark.parametrize("window", [(3, 5, 4, 9), (0, 2, 0, 1), (14, 16, 13, 16), (0, 16, 0, 16), (9, 9, 9, 9)])
def test_windows_hold_all_that_is_above_the_threshold(
    image_hw: tuple[int, int], window: tuple[int, int, int, int]
) -> None:
    y0, y1, x0, x1 = window
    generator = torch.Generator().manual_seed(0)
    logits = -5 - torch.rand(2, LOW, LOW, generator=generator)
    logits[:, y0:y1, x0:x1] = 10 * torch.randn(2, y1 - y0, x1 - x0, generator=generator)
    input_hw = input_size(*image_hw, SIZE)
    square = F.interpolate(logits[None], (SIZE, SIZE), mode="bilinear")
    whole = F.interpolate(square[..., : input_hw[0], : input_hw[1]], image_hw, mode="bilinear")[0]

    (left, top), part = upsample_occupied(logits, -1.0, SIZE, input_hw, image_hw)
    inside = torch.zeros(image_hw, dtype=torch.bool)
    inside[top : top + part.shape[1], left : left + part.shape[2]] = True
    assert (whole[:, ~inside] <= -1.0).all()
    difference = (part - whole[:, inside].view(part.shape)).abs()
    # Where the window cuts through the input its border is interpolated without the pixels beyond it, far below -1.
    assert difference[whole[:, inside].view(part.shape) > -1.0].numel() == (whole > -1.0).sum()
    assert (difference[whole[:, inside].view(part.shape) > -1.0] <= 1e-3).all()
    assert ((part > -1.0) == (whole[:, inside].view(part.shape) > -1.0)).all()


def test_windows_are_small_where_sizes_allow_it() -> None:
    logits = torch.full((1, LOW, LOW), -5.0)
    logits[0, 8, 8] = 5.0
    _, part = upsample_occupied(logits, 0.0, SIZE, (48, 64), (3000, 4000))
    assert part.shape[1] * part.shape[2] < 3000 * 4000 / 10
    _, part = upsample_occupied(logits, 0.0, SIZE, (47, 64), (3001, 4000))
    assert part.shape[1] == 3001, "no shorter piece of this side is interpolated like the whole"
