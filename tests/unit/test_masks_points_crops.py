"""Point grids and crops."""

from __future__ import annotations

import numpy as np
import pytest

from samray.masks.crops import Crop, make_crops, touches_crop_edge
from samray.masks.points import point_grid, point_grids


def test_point_grid_is_cell_centres_row_by_row() -> None:
    assert point_grid(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    assert point_grid(1).tolist() == [[0.5, 0.5]]


def test_point_grids_shrink_with_the_layer() -> None:
    assert [len(grid) for grid in point_grids(32, 2, 2)] == [32 * 32, 16 * 16, 8 * 8]
    assert [len(grid) for grid in point_grids(10, 2, 3)] == [100, 9, 1]
    with pytest.raises(ValueError, match="crop layer 2"):
        point_grids(2, 2, 2)


@pytest.mark.parametrize("image_hw", [(100, 100), (321, 481), (1500, 1000), (7, 5), (1, 1), (1, 5000), (3, 64)])
@pytest.mark.parametrize("overlap_ratio", [0.0, 512 / 1500, 0.9])
def test_crops_cover_the_image_and_lie_in_it(image_hw: tuple[int, int], overlap_ratio: float) -> None:
    crops = make_crops(image_hw, 2, overlap_ratio)
    assert crops[0] == Crop(0, 0, image_hw[1], image_hw[0], 0)
    for layer in (0, 1, 2):
        covered = np.zeros(image_hw, dtype=bool)
        for crop in (c for c in crops if c.layer == layer):
            assert 0 <= crop.x0 < crop.x1 <= image_hw[1]
            assert 0 <= crop.y0 < crop.y1 <= image_hw[0]
            covered[crop.y0 : crop.y1, crop.x0 : crop.x1] = True
        assert covered.all()


def test_crop_numbers_and_overlap() -> None:
    crops = make_crops((1500, 1500), 2, 512 / 1500)
    assert [sum(c.layer == layer for c in crops) for layer in range(3)] == [1, 4, 16]
    first, below, right = crops[1], crops[2], crops[3]  # column by column
    assert first.y1 - below.y0 == 512
    assert first.x1 - right.x0 == 512
    assert crops[5].y1 - crops[6].y0 == 256


def test_touches_crop_edge() -> None:
    crop = Crop(100, 0, 300, 200, 1)  # its top is the image's top
    boxes = np.array(
        [
            [150, 50, 200, 100],  # inside
            [119, 50, 200, 100],  # 19 pixels from the left edge
            [120, 50, 200, 100],  # 20: still near
            [121, 50, 200, 100],
            [150, 0, 200, 100],  # at the image's own edge
            [150, 50, 280, 100],
            [150, 50, 200, 180],
        ]
    )
    assert touches_crop_edge(boxes, crop, (400, 400)).tolist() == [False, True, True, False, False, True, True]
    assert not touches_crop_edge(boxes, Crop(0, 0, 400, 400, 0), (400, 400)).any()
    assert touches_crop_edge(np.zeros((0, 4), dtype=np.int64), crop, (400, 400)).shape == (0,)
