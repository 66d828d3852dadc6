"""Finished masks: the choices that go beyond the reference, and the records users get."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from samray.config import MaskConfig
from samray.masks.crops import Crop
from samray.masks.nms import mask_nms
from samray.rle import encode as rle
from samray.rle.records import MaskRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """One mask of an image, as runs."""

    counts: rle.Counts
    predicted_iou: float
    stability_score: float
    points_xy: npt.NDArray[np.float64]
    """(P, 2) the foreground clicks of the prompt, in the image frame."""
    crop: Crop
    was_cleaned: bool = False
    """Small regions were removed from it."""
    label: str | None = None
    """Its name, in runs that name."""
    label_score: float | None = None
    tiles: tuple[tuple[int, int, int, int], ...] = ()
    """xyxy of the tiles that it was found in, of an image that was labelled in tiles."""


def apply_limits(masks: list[Mask], image_hw: tuple[int, int], config: MaskConfig) -> list[Mask]:
    """Apply the options that the reference does not have to an image's masks, in their order.

    First near-duplicates go (the earlier mask stays), then all but the best `max_masks` by predicted IoU, then pixels
    that better masks claim. Limits on the area hold for the masks as they come out.
    """
    # Before the NMS: a mask that is not wanted must not remove one that is.
    masks = _with_wanted_areas(masks, image_hw, config)
    if config.mask_nms_thresh is not None:
        # pycocotools computes IoUs on run lengths: no mask is decoded.
        compressed = [rle.compress(mask.counts, image_hw) for mask in masks]
        masks = [masks[i] for i in mask_nms(compressed, config.mask_nms_thresh)]
    # Stable: of equal scores the earlier mask stays.
    best_first = sorted(range(len(masks)), key=lambda i: -masks[i].predicted_iou)
    if config.max_masks is not None:
        best_first = best_first[: config.max_masks]
    if config.non_overlapping:
        disjoint = rle.make_disjoint([masks[i].counts for i in best_first], image_hw)
        for i, counts in zip(best_first, disjoint, strict=True):
            masks[i] = replace(masks[i], counts=counts)
    masks = [masks[i] for i in sorted(best_first)]  # back in the given order
    # Masks may have lost pixels to better ones since the first check.
    return _with_wanted_areas(masks, image_hw, config) if config.non_overlapping else masks


def _with_wanted_areas(masks: list[Mask], image_hw: tuple[int, int], config: MaskConfig) -> list[Mask]:
    wanted = wanted_areas(rle.areas([mask.counts for mask in masks]), image_hw, config)
    return [masks[i] for i in np.flatnonzero(wanted)]


def wanted_areas(areas: npt.NDArray[Any], image_hw: tuple[int, int], config: MaskConfig) -> npt.NDArray[np.bool_]:
    """Which areas, in pixels, are neither zero nor outside the configured limits."""
    wanted: npt.NDArray[np.bool_] = areas >= max(config.min_mask_area, 1)
    if config.max_mask_area_fraction is not None:
        wanted = wanted & (areas / (image_hw[0] * image_hw[1]) < config.max_mask_area_fraction)
    return wanted


def to_records(masks: list[Mask], image_hw: tuple[int, int], config: MaskConfig) -> list[MaskRecord]:
    """The masks as SA-1B writes them. bbox: COCO's, or with bbox_convention "sam" one pixel narrower and lower."""
    counts = [mask.counts for mask in masks]
    boxes, areas = rle.boxes_xyxy(counts, image_hw).tolist(), rle.areas(counts).tolist()
    # x1 and y1 are the last pixels, and the reference subtracts without adding one.
    inclusive = 1 if config.bbox_convention == "coco" else 0
    records: list[MaskRecord] = []
    for mask, (x0, y0, x1, y1), area in zip(masks, boxes, areas, strict=True):
        crop = mask.crop
        record: MaskRecord = {
            "segmentation": rle.compress(mask.counts, image_hw),
            "bbox": [float(x0), float(y0), float(x1 - x0 + inclusive), float(y1 - y0 + inclusive)],
            "area": area,
            "predicted_iou": mask.predicted_iou,
            "stability_score": mask.stability_score,
            "point_coords": mask.points_xy.tolist(),
            "crop_box": [float(crop.x0), float(crop.y0), float(crop.x1 - crop.x0), float(crop.y1 - crop.y0)],
        }
        if mask.label is not None:
            record = {**record, "label": mask.label, "label_score": mask.label_score}
        records.append(record)
    return records
