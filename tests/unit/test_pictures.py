"""Pictures of masks on photographs: what is drawn, and where."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from samray.cli.demo_train import encode
from samray.report.pictures import MAX_DRAWN, draw_masks, mask_colours, masks_to_draw, picture, plain

GREY = np.full((100, 200, 3), 128, np.uint8)


def record(rows: slice, columns: slice) -> dict[str, Any]:
    mask = np.zeros(GREY.shape[:2], bool)
    mask[rows, columns] = True
    return {"segmentation": encode(mask), "area": int(mask.sum())}


def test_the_largest_masks_are_drawn_first_and_specks_are_not() -> None:
    speck, small, large = record(slice(6), slice(6)), record(slice(7), slice(7)), record(slice(50), slice(50))
    assert masks_to_draw([speck, small, large]) == [large["segmentation"], small["segmentation"]]
    assert masks_to_draw([]) == []
    many = [record(slice(50), slice(columns)) for columns in range(10, 10 + MAX_DRAWN + 5)]
    assert masks_to_draw(many) == [one["segmentation"] for one in reversed(many[5:])]


def test_a_mask_is_filled_and_outlined_and_later_ones_lie_on_top() -> None:
    left, part = record(slice(None), slice(100)), record(slice(40, 60), slice(40, 60))
    drawn = np.asarray(draw_masks(GREY, masks_to_draw([part, left]), 100), np.float32)
    colours = mask_colours(2)
    np.testing.assert_allclose(drawn[20, 20], 64 + colours[0] / 2, atol=1)
    np.testing.assert_allclose(drawn[50, 50], 64 + colours[1] / 2, atol=1)
    np.testing.assert_array_equal(drawn[:, 101:], 128.0)
    # Both sides of an edge inside the picture, but only the mask's own of one towards the background.
    np.testing.assert_allclose(drawn[20, 99], colours[0] + 0.35 * (255 - colours[0]), atol=1)
    np.testing.assert_allclose(drawn[50, 40], colours[1] + 0.35 * (255 - colours[1]), atol=1)
    np.testing.assert_allclose(drawn[50, 39], colours[0] + 0.35 * (255 - colours[0]), atol=1)


def test_masks_are_scaled_with_their_image() -> None:
    drawn = np.asarray(draw_masks(GREY, masks_to_draw([record(slice(None), slice(100))]), 50))
    assert drawn.shape == (50, 100, 3)
    tinted = (drawn != 128).any(axis=2)
    assert tinted[:, :50].all()
    assert not tinted[:, 50:].any()


def test_neighbouring_colours_differ() -> None:
    colours = mask_colours(MAX_DRAWN)
    assert colours.min() >= 0
    assert colours.max() <= 255
    assert np.abs(np.diff(colours, axis=0)).max(axis=1).min() > 60


def test_a_picture_has_a_title_above_each_row_that_has_one() -> None:
    image = plain(GREY, 50)
    size = Image.open(io.BytesIO(picture([("", [image, image]), ("below", [image, image])]))).size
    assert size == (2 * 100 + 10, 50 + 10 + 26 + 50)
