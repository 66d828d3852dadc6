"""Crops of an image: overlapping windows in which mask generation runs again, zoomed in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

EDGE_TOLERANCE = 20
"""Pixels within which a box counts as touching an edge (as in the reference)."""


@dataclass(frozen=True, slots=True)
class Crop:
    """A window of an image, in its pixels; x1 and y1 are exclusive."""

    x0: int
    y0: int
    x1: int
    y1: int
    layer: int
    """0 is the whole image; layer n splits it 2**n times along each side."""

    @property
    def hw(self) -> tuple[int, int]:
        return self.y1 - self.y0, self.x1 - self.x0

    @property
    def area(self) -> int:
        return (self.y1 - self.y0) * (self.x1 - self.x0)


def make_crops(image_hw: tuple[int, int], num_layers: int, overlap_ratio: float) -> list[Crop]:
    """The whole image, then for each layer n its 2**n x 2**n overlapping windows, column by column.

    overlap_ratio: overlap of layer 1, as a fraction of the image's shorter side; deeper layers overlap by as much
    relative to their size. Windows that would be empty on images a few pixels wide are left out (the reference fails).
    Source: `segment_anything.utils.amg.generate_crop_boxes`.
    """
    height, width = image_hw
    crops = [Crop(0, 0, width, height, 0)]
    for layer in range(1, num_layers + 1):
        per_side = 2**layer
        # Rounding and order, columns first, are the reference's.
        overlap = int(overlap_ratio * min(height, width) * (2 / per_side))
        # Sides such that per_side windows with these overlaps cover the image.
        crop_w, crop_h = (math.ceil((overlap * (per_side - 1) + side) / per_side) for side in (width, height))
        for column in range(per_side):
            for row in range(per_side):
                x0, y0 = (crop_w - overlap) * column, (crop_h - overlap) * row
                crop = Crop(x0, y0, min(x0 + crop_w, width), min(y0 + crop_h, height), layer)
                if crop.x1 > crop.x0 and crop.y1 > crop.y0:
                    crops.append(crop)
    return crops


def touches_crop_edge(
    boxes_xyxy: npt.NDArray[np.int64], crop: Crop, image_hw: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """Which boxes end at an inner edge of the crop: the object probably continues beyond it.

    boxes_xyxy: (M, 4) in the image frame, last pixel inclusive. Edges of the image itself do not count. Returns (M,).
    """
    height, width = image_hw
    # A last pixel compared with an exclusive end: one off, as in the reference.
    near_crop = np.abs(boxes_xyxy - [crop.x0, crop.y0, crop.x1, crop.y1]) <= EDGE_TOLERANCE
    near_image = np.abs(boxes_xyxy - [0, 0, width, height]) <= EDGE_TOLERANCE
    touches: npt.NDArray[np.bool_] = np.any(near_crop & ~near_image, axis=1)
    return touches
