"""Greedy non-maximum suppression on boxes and on masks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from samray.rle.records import Rle

Indices = npt.NDArray[np.int64]


def box_nms(boxes_xyxy: npt.ArrayLike, scores: npt.ArrayLike, iou_thresh: float) -> Indices:
    """Indices of the boxes to keep, best score first; if scores are equal, the earlier box comes first.

    Drops a box if its IoU with a better kept box is above iou_thresh. boxes_xyxy: (M, 4), scores: (M,); computed in
    float32. Boxes without area have no IoU: they neither suppress nor are dropped. Equal to `torchvision.ops.nms`.
    Runs on the host: a few thousand boxes do not need an accelerator, and only kept boxes cost a pass (O(kept * M)).
    """
    # float32 like torchvision, so that ties and boxes at the threshold come out the same.
    x0, y0, x1, y1 = np.asarray(boxes_xyxy, dtype=np.float32).reshape(-1, 4).T
    areas = (x1 - x0) * (y1 - y0)
    thresh = _float32_at_most(iou_thresh)
    # Stable: without it the order of equal scores would depend on numpy.
    rest: Indices = np.argsort(-np.asarray(scores, dtype=np.float32), kind="stable")
    keep = []
    while len(rest):
        best, rest = rest[0], rest[1:]
        keep.append(best)
        width = np.minimum(x1[best], x1[rest]) - np.maximum(x0[best], x0[rest])
        height = np.minimum(y1[best], y1[rest]) - np.maximum(y0[best], y0[rest])
        intersection = np.maximum(width, np.float32(0)) * np.maximum(height, np.float32(0))
        with np.errstate(invalid="ignore"):
            iou = intersection / (areas[best] + areas[rest] - intersection)
        # Not `iou <= thresh`: 0 / 0, of boxes without area, is NaN and must not drop a box.
        rest = rest[~(iou > thresh)]
    return np.asarray(keep, dtype=np.int64)


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
