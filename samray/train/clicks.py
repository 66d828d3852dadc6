"""Scenes to training examples: which mask is asked for, where it is clicked, and what the decoder should answer.

Shape letters as in `samray.sam.spec`: B images, N prompts of an image, S the square input side, R = 4h = 4w the side of
the decoder's low-res logits.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from samray.evaluate.points import centre
from samray.scene_paint import Source, Split
from samray.scenes import Bool, Scene, make_scene

KIND_WEIGHTS = {"object": 0.8, "part": 0.14, "region": 0.06}
"""How often a click asks for each kind, where the scene has it. A click on a part is also one on its whole: with more
parts than these the model would score a part above the whole that is mostly meant."""
CENTRE_FRACTION = 0.5
"""How many clicks are at the target's centre; the rest are uniform over the target."""
SHAPES = (1.0, 1.0, 3 / 4, 2 / 3, 9 / 16)
"""Short over long side of training scenes: photographs are rarely square, and padding must be met in training."""
_CENTRE_SIDE = 64  # masks are thinned to this side before a training click's distance transform, which is slow

Collated = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Example:
    """One scene and N prompts, numpy on the side of the data loader.

    image: (S, S, 3) uint8, zero where padded. input_hw: (2,) int64. points: (N, 2) float32 xy, input frame.
    boxes_xyxy: (N, 4) float32, input frame. masks: (N, S, S) bool.
    """

    image: npt.NDArray[np.uint8]
    input_hw: npt.NDArray[np.int64]
    points: npt.NDArray[np.float32]
    boxes_xyxy: npt.NDArray[np.float32]
    masks: Bool


def make_example(scene: Scene, image_size: int, num_prompts: int, rng: np.random.Generator) -> Example:
    """Draw N prompts on a scene whose longest side is `image_size` and that has at least one mask."""
    h, w = scene.image.shape[:2]
    assert max(h, w) == image_size, "a scene of the input size"
    assert scene.kinds, "a scene with a target"
    weights = np.array([KIND_WEIGHTS[kind] / scene.kinds.count(kind) for kind in scene.kinds])
    chosen = rng.choice(len(scene.kinds), num_prompts, p=weights / weights.sum())
    points = np.zeros((num_prompts, 2), np.float32)
    boxes = np.zeros((num_prompts, 4), np.float32)
    masks = np.zeros((num_prompts, image_size, image_size), bool)
    for i, target in enumerate(chosen):
        mask = scene.masks[target]
        ys, xs = np.nonzero(mask)
        if rng.random() < CENTRE_FRACTION:
            points[i] = centre(mask, _CENTRE_SIDE)
        else:
            pick = rng.integers(len(ys))
            points[i] = xs[pick], ys[pick]
        tight = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        sides = np.tile(tight[2:] - tight[:2], 2)
        # As in the paper's training: noise of a tenth of the side, at most 20 pixels.
        boxes[i] = tight + np.clip(rng.normal(0, 0.1, 4) * sides, -20, 20)
        masks[i, :h, :w] = mask
    image = np.zeros((image_size, image_size, 3), np.uint8)
    image[:h, :w] = scene.image
    return Example(image, np.array([h, w]), points, boxes, masks)


class SceneExamples(Dataset[Collated]):
    """Example number i is made from scene seed i, on the fly: training never sees a scene twice."""

    def __init__(
        self, source: Source | None, image_size: int, low_res: int, num_prompts: int, split: Split = "train"
    ) -> None:
        self.source, self.split = source, split
        self.image_size, self.low_res, self.num_prompts = image_size, low_res, num_prompts

    def __getitem__(self, seed: int) -> Collated:
        rng = np.random.default_rng([seed, 1])
        short = int(rng.choice(SHAPES) * self.image_size)
        size = (short, self.image_size) if rng.random() < 0.65 else (self.image_size, short)
        scene = make_scene(seed, size, self.source, self.split)
        retry = 0
        while not scene.kinds:  # everything hidden or too small: rare
            retry += 1
            scene = make_scene(seed + (retry << 48), size, self.source, self.split)
        example = make_example(scene, self.image_size, self.num_prompts, rng)
        return {
            "image": torch.from_numpy(example.image),
            "input_hw": torch.from_numpy(example.input_hw),
            "points": torch.from_numpy(example.points),
            "boxes_xyxy": torch.from_numpy(example.boxes_xyxy),
            "targets": torch.from_numpy(area_downsample(example.masks, self.low_res)),
        }


def area_downsample(masks: Bool, side: int) -> npt.NDArray[np.uint8]:
    """masks: (N, S, S) with S a multiple of `side`. Returns (N, side, side) uint8, 255 times the covered share."""
    n, size, _ = masks.shape
    cell = size // side
    assert cell * side == size, "the input side is a multiple of the low-res side"
    cells = masks.reshape(n, side, cell, side, cell).sum(axis=(2, 4), dtype=np.uint16)
    share: npt.NDArray[np.uint8] = (cells * 255 // (cell * cell)).astype(np.uint8)
    return share


def corrective_clicks(
    logits: Tensor, targets: Tensor, stride: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One more click on each mask, uniform over where it is wrong (over everything where it is right).

    logits: (K, R, R). targets: (K, R, R) in 0..1. stride: input pixels per low-res pixel.
    Returns points (K, 1, 2) float xy, input frame, and labels (K, 1): 1 where the target was missed, 0 where exceeded.
    """
    wanted = targets > 0.5
    wrong = (logits > 0) != wanted
    wrong |= ~wrong.any(dim=(1, 2), keepdim=True)
    pick = torch.multinomial(wrong.flatten(1).float(), 1, generator=generator)
    labels = wanted.flatten(1).gather(1, pick).long()
    side = logits.shape[-1]
    xy = torch.stack([pick % side, pick // side], dim=-1).float()
    return xy * stride + (stride - 1) / 2, labels
