"""Masks on their way through the filters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """K masks of one image: low-res logits and values measured on their pixels, but no pixels.

    logits stay on the model's device; everything else is on the host.
    """

    logits: list[Tensor]
    """K tensors (4h, 4w) float32, low-res frame of the mask's crop; separately allocated, to be freed one by one."""
    crop_index: npt.NDArray[np.int64]
    """(K,) index of the crop."""
    boxes_xyxy: npt.NDArray[np.int64]
    """(K, 4) in the image frame, last pixel inclusive."""
    predicted_iou: npt.NDArray[np.float32]
    """(K,)"""
    stability_score: npt.NDArray[np.float32]
    """(K,)"""
    points_xy: npt.NDArray[np.float64]
    """(K, 2) the prompt, in the image frame."""

    def __len__(self) -> int:
        return len(self.crop_index)

    def __getitem__(self, index: npt.NDArray[np.int64]) -> Candidates:
        """The candidates at `index`, in that order; copies no logits."""
        return Candidates(
            logits=[self.logits[i] for i in index.tolist()],
            crop_index=self.crop_index[index],
            boxes_xyxy=self.boxes_xyxy[index],
            predicted_iou=self.predicted_iou[index],
            stability_score=self.stability_score[index],
            points_xy=self.points_xy[index],
        )

    @classmethod
    def cat(cls, parts: list[Candidates]) -> Candidates:
        """Concatenate at least one part, in order."""
        return cls(
            # A list is joined without copying logits; a tensor would need twice the memory for a moment.
            logits=[logits for p in parts for logits in p.logits],
            crop_index=np.concatenate([p.crop_index for p in parts]),
            boxes_xyxy=np.concatenate([p.boxes_xyxy for p in parts]),
            predicted_iou=np.concatenate([p.predicted_iou for p in parts]),
            stability_score=np.concatenate([p.stability_score for p in parts]),
            points_xy=np.concatenate([p.points_xy for p in parts]),
        )
