"""Prompts from masks: first clicks and boxes, and clicks that correct a wrong mask.

Shape letters as in `samray.sam.spec`: N prompts of an image, S the square input side, R = 4h = 4w the side of the
decoder's low-res logits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from samray.evaluate.points import centre
from samray.scenes.scene import Bool

BOX_NOISE = 0.1
MAX_BOX_NOISE_PIXELS = 20
"""Noise on a box's sides, as in the paper's training: a tenth of the side, at most 20 pixels (appendix A)."""
_CENTRE_SIDE = 64  # masks are subsampled to this side for a training click's distance transform, which is slow


def first_prompts(
    masks: Bool, centre_fraction: float, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """A click in each mask, and a jittered box around it.

    masks: (N, H, W), none empty. Returns points (N, 2) xy and boxes_xyxy (N, 4), both float32, pixels of the masks.
    """
    points, boxes = np.zeros((len(masks), 2), np.float32), np.zeros((len(masks), 4), np.float32)
    for i, mask in enumerate(masks):
        ys, xs = np.nonzero(mask)
        if rng.random() < centre_fraction:
            points[i] = centre(mask, _CENTRE_SIDE)
        else:
            pick = rng.integers(len(ys))
            points[i] = xs[pick], ys[pick]
        # x0 y0 x1 y1; the right and lower side are exclusive.
        tight = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        # (4,): width, height, width, height, to scale the noise of each side.
        sides = np.tile(tight[2:] - tight[:2], 2)
        noise = rng.normal(0, BOX_NOISE, 4) * sides
        boxes[i] = tight + np.clip(noise, -MAX_BOX_NOISE_PIXELS, MAX_BOX_NOISE_PIXELS)
    return points, boxes


def corrective_clicks(
    logits: Tensor, targets: Tensor, stride: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One more click on each mask, uniform over the wrong pixels (over all pixels if none is wrong).

    logits: (K, R, R). targets: (K, R, R) in 0..1. stride: input pixels per low-res pixel. generator: on their device.
    Returns points (K, 1, 2) float xy, input frame, and labels (K, 1): 1 where the target is missing, 0 where not.
    """
    wanted = targets > 0.5
    wrong = (logits > 0) != wanted
    # multinomial needs a weight above 0 in each row.
    wrong |= ~wrong.any(dim=(1, 2), keepdim=True)
    pick = torch.multinomial(wrong.flatten(1).float(), 1, generator=generator)
    labels = wanted.flatten(1).gather(1, pick).long()
    side = logits.shape[-1]
    xy = torch.stack([pick % side, pick // side], dim=-1).float()
    # The centre of the low-res pixel, in the input frame.
    return xy * stride + (stride - 1) / 2, labels
