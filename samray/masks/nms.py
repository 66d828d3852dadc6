"""Greedy non-maximum suppression on boxes and on masks."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from samray.rle.records import Rle

Indices = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

_BOXES_AT_ONCE: Final = 64
"""Boxes compared with all others together."""


def box_nms(boxes_xyxy: npt.ArrayLike, scores: npt.ArrayLike, iou_thresh: float) -> Indices:
    """Indices of the boxes to keep, best score first; if scores are equal, the earlier box comes first.

    Drops a box if its IoU with a better kept box is above iou_thresh. boxes_xyxy: (M, 4), scores: (M,); computed in
    float32. Boxes without area have no IoU: they neither suppress nor are dropped. Equal to `torchvision.ops.nms`.
    Runs on the host: a few thousand boxes do not need an accelerator.
    """
    # Stable: without it the order of equal scores would depend on numpy.
    order: Indices = np.argsort(-np.asarray(scores, dtype=np.float32), kind="stable")
    # float32 like torchvision, so that ties and boxes at the threshold come out the same.
    boxes = np.asarray(boxes_xyxy, dtype=np.float32).reshape(-1, 4)[order]
    thresh = _float32_at_most(iou_thresh)
    keep: list[np.int64] = []
    rest = np.arange(len(order))
    while len(rest):
        # A block of boxes against all others that are left: one pass per kept box would be many small ones.
        num = min(len(rest), _BOXES_AT_ONCE)
        overlaps = _overlaps(boxes[rest[:num]], boxes[rest], thresh)
        dropped = np.zeros(len(rest), dtype=bool)
        for i in range(num):
            if not dropped[i]:
                keep.append(rest[i])
                dropped |= overlaps[i]
        rest = rest[num:][~dropped[num:]]
    return order[np.array(keep, dtype=np.int64)]


def _overlaps(boxes: Float32, others: Float32, thresh: np.float32) -> npt.NDArray[np.bool_]:
    """(B, M) whether the IoU of two boxes xyxy, of (B, 4) and (M, 4), is above thresh."""
    x0, y0, x1, y1 = boxes.T[:, :, None]
    u0, v0, u1, v1 = others.T[:, None]
    width = np.maximum(np.minimum(x1, u1) - np.maximum(x0, u0), np.float32(0))
    height = np.maximum(np.minimum(y1, v1) - np.maximum(y0, v0), np.float32(0))
    intersection = width * height
    # 0 / 0, of boxes without area, is NaN: the comparison is false, and they must not drop a box.
    with np.errstate(invalid="ignore"):
        iou = intersection / ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - intersection)
    above: npt.NDArray[np.bool_] = iou > thresh
    return above


def mask_nms(rles: list[Rle], iou_thresh: float) -> Indices:
    """Indices of the masks to keep, in order: drops a mask if its IoU with an earlier kept one is above iou_thresh.

    rles: COCO run-length encodings of one image, best first. Decodes no masks.
    """
    keep: list[int] = []
    for index, rle in enumerate(rles):
        kept = [rles[k] for k in keep]
        # The zeros say that no mask is a crowd, for which pycocotools has another IoU.
        if not kept or not (coco_mask.iou([rle], kept, [0] * len(kept)) > iou_thresh).any():
            keep.append(index)
    return np.asarray(keep, dtype=np.int64)


def _float32_at_most(value: float) -> np.float32:
    """The largest float32 <= value: float32 x > value, compared exactly, is x > this."""
    rounded = np.float32(value)
    return rounded if float(rounded) <= value else np.nextafter(rounded, np.float32(-np.inf))
