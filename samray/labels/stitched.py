"""Find what an example shows by asking about one picture, made of the example and the image side by side.

Source: "Segment Using Just One Example" (arXiv 2408.07393). SAM is asked to segment one thing that is in both halves.
Four designs, by what a run's clicks are:

- `stitched_points`: random points inside of the example's mask, nothing on the image.
- `stitched_grid`: the same, and every point of a grid on the image.
- `stitched_single`: the same, and one point of the grid, another one in each run.
- `stitched_negative`: the same as `stitched_single`, and as many background points around the example.

A run gives one mask. Runs with a low predicted IoU or stability are dropped: the product of both ranks them, and the
best `labels.keep` stay, because a threshold that suits whole pictures drops every run on a stitched one. The others are
averaged, weighted by predicted IoU, cut at `labels.vote_thresh` and closed morphologically. What is left of it on the
image is one mask.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as PillowImage
from scipy import ndimage
from torch import Tensor

from samray.labels.records import named_records
from samray.labels.similarity import Bool, Image
from samray.masks.images import check_images
from samray.masks.scores import MASK_THRESHOLD, above, stability_scores
from samray.rle.records import MaskRecord
from samray.sam.frames import frame_of
from samray.sam.sam import Sam

if TYPE_CHECKING:
    from samray.config import Config
    from samray.labels.example import Example

_RUNS_AT_ONCE: Final = 8
_CLOSING: Final = 0.01
"""Radius of the morphological closing, as a share of the image's longest side."""

Points = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]
"""(P, 2) xy in the stitched picture, and (P,) labels: 1 foreground, 0 background."""


class StitchedGenerator:
    """At most one mask per image: where the runs agree that the example's class is.

    `stage_seconds` sums the time per stage: encode, decode. Not thread-safe, see `another`.
    """

    def __init__(self, model: Sam, config: Config, example: Example) -> None:
        self.model, self.config, self.example = model, config, example
        self.stage_seconds = {"encode": 0.0, "decode": 0.0}

    def another(self) -> StitchedGenerator:
        """A generator for another thread, with the same example."""
        return StitchedGenerator(self.model, self.config, self.example)

    @torch.inference_mode()
    def generate(self, images: Sequence[Image]) -> list[list[MaskRecord]]:
        """At most one mask per image, with `label` and `label_score`: the mean vote of its pixels.

        images: RGB uint8 (H, W, 3), upright, of any sizes. Raises: ValueError for invalid images.
        """
        check_images(images)
        return [self._records(image) for image in images]

    def _records(self, image: Image) -> list[MaskRecord]:
        vote, iou = self.vote(image)
        inside = closed(vote > self.config.labels.vote_thresh)
        if not inside.any():
            return []
        # A vote is not a logit. The runs were chosen by their own stability, so the mask's counts as perfect.
        logits = torch.from_numpy(np.where(inside, 1.0, -1.0).astype(np.float32)) * 100
        return named_records([(logits, iou, float(vote[inside].mean()), [])], self.config)

    @torch.inference_mode()
    def vote(self, image: Image) -> tuple[npt.NDArray[np.float32], float]:
        """Share of the kept runs, weighted by predicted IoU, in which each pixel of the image is masked: (H, W) in
        [0, 1], and the weighted mean of their predicted IoUs. Zeros if no run is kept."""
        started = time.perf_counter()
        picture, left = stitched(self.example.pixels, image)
        hw = (picture.shape[0], picture.shape[1])
        pixels, _ = self.model.preprocess([picture])
        embedding = self.model.encode_images(pixels)
        self.stage_seconds["encode"] += time.perf_counter() - started
        started = time.perf_counter()
        total, weight, squares = torch.zeros(hw), 0.0, 0.0
        logits, iou = self._runs(embedding, hw, left)
        for low_res, confidence in zip(logits, iou.tolist(), strict=True):
            (logits_of_run,) = frame_of(self.model).masks_out(low_res[None], hw)  # one at a time: they may be large
            total += confidence * above(logits_of_run, MASK_THRESHOLD).cpu()
            weight += confidence
            squares += confidence**2
        votes = (total / max(weight, 1e-12)).numpy()[:, left:]
        self.stage_seconds["decode"] += time.perf_counter() - started
        return votes, squares / max(weight, 1e-12)

    def _runs(self, embedding: Tensor, hw: tuple[int, int], left: int) -> tuple[Tensor, Tensor]:
        """Low-res logits (n, 4h, 4w) and predicted IoUs (n,) of the runs that are kept, all above 0."""
        labels, frame = self.config.labels, frame_of(self.model)
        runs = list(self._clicks(hw, left))
        logits, ious = [], []
        for start in range(0, len(runs), _RUNS_AT_ONCE):
            batch = runs[start : start + _RUNS_AT_ONCE]
            xy = frame.points_in(np.stack([points for points, _ in batch]), hw)
            kinds = torch.from_numpy(np.stack([kinds_of_run for _, kinds_of_run in batch])).to(self.model.device)
            points = torch.from_numpy(xy).float().to(self.model.device)
            masks, iou = self.model.predict(embedding, points, kinds, multimask=False)
            logits.append(masks[:, 0])
            ious.append(iou[:, 0])
        low_res, iou = torch.cat(logits), torch.cat(ious).clamp(min=1e-3)
        stability = stability_scores(low_res, MASK_THRESHOLD, self.config.masks.stability_score_offset).to(iou.device)
        best = (iou * stability).argsort(descending=True)[: max(1, round(labels.keep * len(iou)))]
        return low_res[best], iou[best]

    def _clicks(self, hw: tuple[int, int], left: int) -> Iterator[Points]:
        """The clicks of each run. hw: of the stitched picture; left: where its image begins."""
        labels = self.config.labels
        rng = np.random.default_rng(labels.seed)
        scale = hw[0] / self.example.mask.shape[0]
        inside, outside = (_xy(mask) * scale for mask in (self.example.mask, ~self.example.mask))
        steps = (np.arange(labels.grid) + 0.5) / labels.grid
        grid = np.stack(np.meshgrid(left + steps * (hw[1] - left), steps * hw[0]), axis=-1).reshape(-1, 2)
        order = rng.permutation(len(grid))
        for run in range(labels.runs):
            parts = [rng.choice(inside, labels.points)]
            if labels.design == "stitched_grid":
                parts.append(grid)
            elif labels.design in ("stitched_single", "stitched_negative"):
                parts.append(grid[order[run % len(grid)]][None])
            num_foreground = sum(map(len, parts))
            if labels.design == "stitched_negative" and len(outside):
                parts.append(rng.choice(outside, labels.points))
            xy = np.concatenate(parts)
            yield np.minimum(xy, [hw[1] - 1, hw[0] - 1]), (np.arange(len(xy)) < num_foreground).astype(np.int64)


def _xy(mask: Bool) -> npt.NDArray[np.float64]:
    """(n, 2) centres of the pixels of a mask."""
    centres: npt.NDArray[np.float64] = np.argwhere(mask)[:, ::-1].astype(np.float64) + 0.5
    return centres


def stitched(example: Image, image: Image) -> tuple[Image, int]:
    """The example on the left, scaled to the image's height, and the image; and the x at which the image begins."""
    height = image.shape[0]
    example_width = max(1, round(example.shape[1] * height / example.shape[0]))
    size = (example_width, height)
    scaled = np.asarray(PillowImage.fromarray(example).resize(size, PillowImage.Resampling.BILINEAR))
    return np.concatenate([scaled, image], axis=1), example_width


def closed(mask: Bool) -> Bool:
    """The mask after a morphological closing with a disc."""
    radius = max(1, round(_CLOSING * max(mask.shape)))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    padded = np.pad(mask, radius)  # else the closing erodes what touches the border
    grown: Bool = ndimage.binary_closing(padded, x * x + y * y <= radius * radius)
    return grown[radius:-radius, radius:-radius]
