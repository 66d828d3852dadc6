"""PerSAM: find what an example shows, without training (Zhang et al., arXiv 2305.03048).

1. The target is the mean of the features inside of the example's mask; its cosine with an image's features says where
   the target may be (`samray.labels.similarity`).
2. The most similar pixel becomes a foreground click, the least similar one a background click.
3. The decoder is guided: similarity is added to its attention, the target to its tokens (`Guidance`).
4. Two refinements: the mask goes in again, then the mask and its box.

For several instances 2 to 4 are repeated on what is left of the image, as in the authors' script for several objects.

Differences from the authors, each a setting: how similarity is measured (`labels.features`, `contrast`, `smooth`, see
`samray.labels.similarity`); a click has to be more similar than `score_thresh`, and than `relative_thresh` of the way
from the image's least similar pixel to its most similar one; `labels.pick=evidence` chooses among a click's three masks
by similarity, because the highest predicted IoU is often that of a small part. The paper solves the latter with two
weights trained on the example (PerSAM-F).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from samray.labels.records import named_records
from samray.labels.similarity import Encoded, FeatureTap, Image, Target, similarity_map, target_of
from samray.masks.images import check_images
from samray.masks.scores import MASK_THRESHOLD, above, mask_boxes
from samray.rle.records import MaskRecord
from samray.sam.frames import frame_of
from samray.sam.sam import Sam
from samray.sam.transformer import Guidance

if TYPE_CHECKING:
    from samray.config import Config
    from samray.labels.example import Example


_SAME_IOU: Final = 0.8
"""IoU from which two masks are one instance (`iou_threshold` of the authors' script for several objects)."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance."""

    logits: Tensor
    """(H, W) float32, original frame."""
    predicted_iou: float
    similarity: float
    """Mean similarity of its pixels to the target."""
    point_xy: tuple[int, int]
    """The foreground click."""


class PersamGenerator:
    """Masks of what an example shows. `stage_seconds` sums the time per stage: encode, decode.

    Safe to use in several threads only as one generator per thread, see `another`.
    """

    def __init__(self, model: Sam, config: Config, example: Example) -> None:
        """Raises: ConfigError if the encoder does not have the block that config names."""
        self.model, self.config, labels = model, config, config.labels
        self.is_first_version = labels.is_first_version
        levels = labels.features == "levels" and not self.is_first_version
        self.tap = FeatureTap(model, levels=levels, block=labels.block)
        (encoded,) = self.tap.encode([example.pixels])
        self.target = target_of(
            model, encoded, example.mask, contrast=labels.contrast, by_difference=self.is_first_version
        )
        self.stage_seconds = {"encode": 0.0, "decode": 0.0}

    def another(self) -> PersamGenerator:
        """A generator for another thread, with the same example."""
        twin = object.__new__(PersamGenerator)
        twin.__dict__ |= {**self.__dict__, "stage_seconds": dict.fromkeys(self.stage_seconds, 0.0)}
        return twin

    @torch.inference_mode()
    def generate(self, images: Sequence[Image]) -> list[list[MaskRecord]]:
        """The masks of each image, most similar first, with `label` and `label_score`: the mean similarity.

        images: RGB uint8 (H, W, 3), upright, of any sizes. Raises: ValueError for invalid images.
        """
        check_images(images)
        started = time.perf_counter()
        encoded = self.tap.encode(images)
        self.stage_seconds["encode"] += time.perf_counter() - started
        started = time.perf_counter()
        records = [self._records(image) for image in encoded]
        self.stage_seconds["decode"] += time.perf_counter() - started
        return records

    def _records(self, image: Encoded) -> list[MaskRecord]:
        labels = self.config.labels
        instances = find_instances(
            self.model,
            image,
            self.target,
            max_instances=labels.max_instances,
            threshold=self.target.floor if labels.score_thresh is None else labels.score_thresh,
            relative=0.0 if self.is_first_version else labels.relative_thresh,
            smooth=0 if self.is_first_version else labels.smooth,
            by_evidence=labels.pick == "evidence",
        )
        masks = [
            (instance.logits, instance.predicted_iou, instance.similarity, [instance.point_xy])
            for instance in instances
        ]
        return named_records(masks, self.config)


@torch.inference_mode()
def find_instances(
    model: Sam,
    image: Encoded,
    target: Target,
    *,
    max_instances: int,
    threshold: float,
    relative: float = 0.0,
    smooth: int = 0,
    by_evidence: bool = True,
) -> list[Instance]:
    """The instances of the target in an image, in the order of their clicks: the most similar first.

    threshold: least similarity of a click, and of a mask on average. relative: the same, from 0, the image's least
    similar pixel, to 1, its most similar one; the higher of the two counts. smooth: points per side of
    `samray.labels.similarity.smoothed`. by_evidence: see `segment`.
    """
    similarity = similarity_map(model, image, target, smooth)
    if relative > 0:
        lowest, highest = float(similarity.min()), float(similarity.max())
        threshold = max(threshold, lowest + relative * (highest - lowest))
    guidance = guidance_of(model, similarity, target)
    evidence = similarity - threshold if by_evidence else None
    least = _xy(int(similarity.argmin()), image)
    left = similarity.clone()
    instances: list[Instance] = []
    masks: list[Tensor] = []
    for _ in range(max_instances):
        most = int(left.argmax())
        if left.view(-1)[most] < threshold:
            break
        logits, iou = segment(model, image, _xy(most, image), least, guidance, evidence)
        inside = above(logits, MASK_THRESHOLD)
        left[inside] = -torch.inf
        left.view(-1)[most] = -torch.inf  # a mask need not contain its click
        score = float(similarity[inside].mean()) if inside.any() else -torch.inf
        if score >= threshold and not any(_iou(inside, other) >= _SAME_IOU for other in masks):
            masks.append(inside)
            instances.append(Instance(logits, iou, score, _xy(most, image)))
    return instances


def _iou(a: Tensor, b: Tensor) -> float:
    """a, b: (H, W) bool, not both empty."""
    return float((a & b).sum() / (a | b).sum())


def _xy(pixel: int, image: Encoded) -> tuple[int, int]:
    y, x = divmod(pixel, image.original_hw[1])
    return x, y


def guidance_of(model: Sam, similarity: Tensor, target: Target) -> Guidance:
    """Guidance from a similarity map (H, W): standardised, brought to the embedding's grid, squashed to 0..1.

    The authors stretch the map over the model's square. Here it covers what the image covers, and padding gets 0.
    """
    frame, grid = frame_of(model), model.spec.grid
    standard = (similarity - similarity.mean()) / similarity.std().clamp(min=1e-12)
    h, w = frame.input_hw((similarity.shape[0], similarity.shape[1]))
    rows, columns = (max(1, round(side * grid / frame.size)) for side in (h, w))
    cells = similarity.new_zeros(grid, grid)
    small = F.interpolate(standard[None, None], (rows, columns), mode="bilinear", align_corners=False)
    cells[:rows, :columns] = small[0, 0].sigmoid()
    return Guidance(cells.flatten(), target.embedding)


def segment(
    model: Sam,
    image: Encoded,
    foreground_xy: tuple[int, int],
    background_xy: tuple[int, int],
    guidance: Guidance,
    evidence: Tensor | None = None,
) -> tuple[Tensor, float]:
    """The guided pass and two refinements for one pair of clicks, in pixels. Returns logits (H, W), predicted IoU.

    evidence: (H, W), positive where the target may be, negative elsewhere; of three masks the one with the largest sum
    over its pixels is kept. None keeps the one with the highest predicted IoU.
    """
    frame, hw = frame_of(model), image.original_hw
    clicks = frame.points_in(np.array([[foreground_xy, background_xy]], dtype=np.float64), hw)
    points = torch.from_numpy(clicks).float().to(model.device)
    labels = torch.tensor([[1, 0]], device=model.device)

    def best(logits: Tensor, iou: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose one of M masks. Returns its low-resolution logits, its logits in the image, its predicted IoU.

        logits: (1, M, 4h, 4w), iou: (1, M). Returns (1, 1, 4h, 4w), (H, W), ().
        """
        full_size = frame.masks_out(logits[0], hw)
        scores = iou[0] if evidence is None else (above(full_size, MASK_THRESHOLD) * evidence).sum(dim=(1, 2))
        i = int(scores.argmax())
        return logits[:, i : i + 1], full_size[i], iou[0, i]

    logits, _ = model.predict(image.embedding, points, labels, multimask=False, guidance=guidance)
    logits, full_size, iou = best(*model.predict(image.embedding, points, labels, mask_input=logits))
    inside = above(full_size, MASK_THRESHOLD)
    if inside.any():
        corners = mask_boxes(inside[None]).cpu().numpy().reshape(1, 2, 2).astype(np.float64)
        boxes = torch.from_numpy(frame.points_in(corners, hw)).float().flatten(1).to(model.device)
        _, full_size, iou = best(*model.predict(image.embedding, points, labels, boxes, mask_input=logits))
    return full_size, float(iou)
