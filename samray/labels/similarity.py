"""How alike each place of an image is to an example: features of an encoder, a target's mean, a cosine map.

Source: PerSAM (arXiv 2305.03048), section 3.1. The paper compares the encoder's last features; here any block's may be
compared, because which block tells classes apart differs between encoders.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from samray.errors import ConfigError
from samray.sam.frames import frame_of, interpolate
from samray.sam.sam import Sam

Image = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Encoded:
    """What an encoder makes of one image."""

    embedding: Tensor
    """(1, C + ..., h, w) for `Sam.predict`."""
    features: Tensor
    """(D, h', w') float32, to be compared; of the whole square."""
    original_hw: tuple[int, int]


class FeatureTap:
    """Encodes images and keeps the features of one block. Several threads may use it at once."""

    def __init__(self, model: Sam, block: int | None) -> None:
        """block: index into the encoder's blocks; None keeps the image embedding.

        Raises: ConfigError if the encoder has fewer blocks.
        """
        self.model = model
        self._of_thread = threading.local()
        if block is not None:
            blocks = model.image_encoder.blocks_in_order()
            if block >= len(blocks):
                raise ConfigError(f"labels.block = {block} is not allowed; {model.spec.name} has {len(blocks)} blocks")
            blocks[block].register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, output: Tensor) -> None:
        self._of_thread.features = output

    @torch.inference_mode()
    def encode(self, images: Sequence[Image]) -> list[Encoded]:
        """Encode images (H, W, 3) uint8 RGB as one batch."""
        pixels, _ = self.model.preprocess(list(images))
        embeddings = self.model.encode_images(pixels)
        kept = self._of_thread.__dict__.pop("features", None)
        features = embeddings[:, : self.model.spec.embed_dim] if kept is None else _channels_first(kept)
        return [
            Encoded(embeddings[i : i + 1], features[i].float(), (image.shape[0], image.shape[1]))
            for i, image in enumerate(images)
        ]


def _channels_first(features: Tensor) -> Tensor:
    """(B, D, h, w) from a block's output: a plain ViT's has its channels last."""
    maps: Tensor = features.permute(0, 3, 1, 2) if features.shape[1] == features.shape[2] else features
    return maps


@dataclass(frozen=True, slots=True)
class Target:
    """What an example says of its class."""

    direction: Tensor
    """(D,) float32: its product with an image's unit features is their similarity."""
    embedding: Tensor
    """(C,) mean of the decoder's embedding over the example, for target-semantic prompting."""
    threshold: float
    """Similarity that best tells the example from its background."""


def cells_of(model: Sam, mask: Bool, side: int) -> Tensor:
    """mask: (H, W). Returns (side, side) float32 in [0, 1]: how much of each cell of the square it covers."""
    frame = frame_of(model)
    hw = (mask.shape[0], mask.shape[1])
    h, w = frame.input_hw(hw)
    square = torch.zeros(1, 1, frame.size, frame.size)
    square[..., :h, :w] = F.interpolate(torch.from_numpy(mask).float()[None, None], (h, w), mode="area")
    return F.adaptive_avg_pool2d(square, side)[0, 0].to(model.device)


def unit(features: Tensor) -> Tensor:
    """(D, h, w) with columns of length 1."""
    lengths: Tensor = features.norm(dim=0, keepdim=True)
    return features / lengths.clamp(min=1e-12)


def target_of(model: Sam, example: Encoded, mask: Bool, *, contrast: bool) -> Target:
    """The target embedding of an example (PerSAM, equation 2), by the share of each cell that is in the mask.

    mask: (H, W), not empty. contrast: subtract the mean of what surrounds the example, so that what the two have in
    common does not count. Raises ValueError for an empty mask.
    """
    features = example.features
    inside = cells_of(model, mask, features.shape[-1])
    if not inside.any():
        raise ValueError("the example's mask is empty")
    outside = cells_of(model, np.ones_like(mask), features.shape[-1]) - inside
    mean = _mean(features, inside)
    direction = mean / mean.norm()
    if contrast and outside.sum() > 1:
        around = _mean(features, outside)
        direction = direction - around / around.norm()
    embedding = example.embedding[0, : model.spec.embed_dim].float()
    target = _mean(embedding, cells_of(model, mask, embedding.shape[-1]))
    similarity = torch.einsum("d,dhw->hw", direction, unit(features))
    threshold = _best_threshold(similarity[inside + outside > 0.5], inside[inside + outside > 0.5] > 0.5)
    return Target(direction, target, threshold)


def _mean(features: Tensor, weights: Tensor) -> Tensor:
    return (features * weights).sum(dim=(1, 2)) / weights.sum()


def _best_threshold(similarity: Tensor, inside: Tensor) -> float:
    """The threshold at which similarity (n,) agrees best, by IoU, with inside (n,) bool."""
    values, order = similarity.sort(descending=True)
    hits = inside[order].cumsum(0)
    iou = hits / (torch.arange(1, len(values) + 1, device=values.device) + inside.sum() - hits)
    return float(values[iou.argmax()])


def similarity_map(model: Sam, image: Encoded, target: Target) -> Tensor:
    """Similarity of each pixel to the target, (H, W) float32, by the reference's three bilinear steps."""
    cells = torch.einsum("d,dhw->hw", target.direction, unit(image.features))
    finer = F.interpolate(cells[None, None], scale_factor=4, mode="bilinear", align_corners=False)
    frame = frame_of(model)
    return interpolate(finer[0], *frame.mask_steps(finer.shape[-1], image.original_hw), image.original_hw)[0]
