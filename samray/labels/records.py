"""Records of masks with a name, for every way that works on logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from samray.config import Config
from samray.masks.crops import Crop
from samray.masks.records import Mask, apply_limits, to_record
from samray.masks.scores import MASK_THRESHOLD, above, stability_scores
from samray.rle import encode as rle
from samray.rle.records import MaskRecord

Named = tuple[Tensor, float, float, Sequence[tuple[int, int]]]
"""Logits (H, W) in the original frame, predicted IoU, label score, foreground clicks."""


def named_records(masks: Sequence[Named], config: Config) -> list[MaskRecord]:
    """Records of the masks of one image, named `labels.name`, without those that the limits of `masks` drop
    (`samray.masks.records.apply_limits`). Empty masks are dropped, too."""
    kept = []
    for logits, predicted_iou, score, points_xy in masks:
        height, width = logits.shape
        (counts,) = rle.encode_masks(above(logits[None], MASK_THRESHOLD), (0, 0), (height, width))
        kept.append(
            Mask(
                counts=counts,
                predicted_iou=predicted_iou,
                stability_score=float(
                    stability_scores(logits[None], MASK_THRESHOLD, config.masks.stability_score_offset)
                ),
                points_xy=np.asarray(points_xy, dtype=np.float64).reshape(-1, 2),
                crop=Crop(0, 0, width, height, layer=0),
                label=config.labels.name,
                label_score=score,
            )
        )
    if not kept:
        return []
    return [
        to_record(mask, (height, width), config.masks) for mask in apply_limits(kept, (height, width), config.masks)
    ]
