"""Records of masks with a name, for every way that works on logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from samray.config import Config
from samray.masks.crops import Crop
from samray.masks.records import Mask, apply_limits, to_records
from samray.masks.scores import MASK_THRESHOLD, above, stability_scores
from samray.rle import encode as rle
from samray.rle.records import MaskRecord

Named = tuple[Tensor, float, float, Sequence[tuple[int, int]]]
"""Logits (H, W) in the original frame, predicted IoU, label score, foreground clicks."""


def named_records(masks: Sequence[Named], config: Config) -> list[MaskRecord]:
    """Records of the masks of one image, named `labels.name`, without those that the limits of `masks` drop
    (`samray.masks.records.apply_limits`). Empty masks are dropped, too."""
    if not masks:
        return []
    label = config.labels.name
    kept = [
        named_mask(logits, config, predicted_iou=iou, label=label, label_score=score, points_xy=points)
        for logits, iou, score, points in masks
    ]
    height, width = masks[0][0].shape
    return limited_records(kept, (height, width), config)


def named_mask(
    logits: Tensor,
    config: Config,
    *,
    predicted_iou: float,
    label: str | None,
    label_score: float | None,
    points_xy: npt.ArrayLike = (),
) -> Mask:
    """One mask from its logits (H, W) in the original frame. points_xy: (P, 2) foreground clicks."""
    height, width = logits.shape
    (counts,) = rle.encode_masks(above(logits[None], MASK_THRESHOLD), (0, 0), (height, width))
    return Mask(
        counts=counts,
        predicted_iou=predicted_iou,
        stability_score=float(stability_scores(logits[None], MASK_THRESHOLD, config.masks.stability_score_offset)),
        points_xy=np.asarray(points_xy, dtype=np.float64).reshape(-1, 2),
        crop=Crop(0, 0, width, height, layer=0),
        label=label,
        label_score=label_score,
    )


def limited_records(masks: list[Mask], image_hw: tuple[int, int], config: Config) -> list[MaskRecord]:
    """The records of an image's masks, without empty ones and those that the limits of `masks` drop."""
    return to_records(apply_limits(masks, image_hw, config.masks), image_hw, config.masks)
