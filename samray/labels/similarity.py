"""How alike each pixel of an image is to an example: features of an encoder, a target's mean, a similarity map.

Source: PerSAM (arXiv 2305.03048), section 3.1: the cosine between the encoder's last features and their mean over the
example. Differences, each a setting: features of three levels of the encoder; a discriminant instead of the mean alone
(`discriminant`); the map is averaged over masks (`smoothed`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from samray.errors import ConfigError
from samray.masks.points import point_grid
from samray.masks.scores import MASK_THRESHOLD, above
from samray.sam.frames import frame_of, interpolate
from samray.sam.sam import Sam

Image = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]

_IOU_POWER: Final = 4
"""Exponent of the predicted IoU in a mask's weight for `smoothed`."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encoder's outputs for one image."""

    embedding: Tensor
    """(1, C + ..., h, w) for `Sam.predict`."""
    features: Tensor
    """(D, h', w') float32, to be compared; of the whole square."""
    original_hw: tuple[int, int]


class FeatureTap:
    """Encodes images and keeps the features to compare. Several threads may use it at once."""

    def __init__(self, model: Sam, *, levels: bool, block: int | None = None) -> None:
        """levels: compare the outputs of three blocks, at the end of each third of the encoder; else that of one block,
        or the embedding. Raises: ConfigError if the encoder has fewer blocks.
        """
        self.model, self._joins = model, levels
        self._of_thread = threading.local()
        blocks = model.image_encoder.blocks_in_order()
        if block is not None and block >= len(blocks):
            raise ConfigError(f"labels.block = {block} is not allowed; {model.spec.name} has {len(blocks)} blocks")
        self._kept = [] if block is None else [block]
        if levels:
            self._kept = sorted({max(len(blocks) * third // 3 - 1, 0) for third in (1, 2, 3)})
        for index in self._kept:
            handle = blocks[index].register_forward_hook(_keeper(self._of_thread, index))
            weakref.finalize(self, handle.remove)  # the model outlives its taps

    @torch.inference_mode()
    def encode(self, images: Sequence[Image]) -> list[Encoded]:
        """Encode images (H, W, 3) uint8 RGB as one batch."""
        pixels, _ = self.model.preprocess(list(images))
        embeddings = self.model.encode_images(pixels)
        features = embeddings[:, : self.model.spec.embed_dim].float()
        if self._kept:
            maps = [_channels_first(self._of_thread.__dict__.pop(str(index))) for index in self._kept]
            features = joined(maps, self.model.spec.grid) if self._joins else maps[0].float()
        return [
            Encoded(embeddings[i : i + 1], features[i], (image.shape[0], image.shape[1]))
            for i, image in enumerate(images)
        ]


def _keeper(store: threading.local, index: int) -> Any:
    """A hook that does not keep the tap alive."""
    return lambda module, inputs, output: store.__dict__.__setitem__(str(index), output)


def joined(maps: Sequence[Tensor], grid: int) -> Tensor:
    """Unit features of several levels as one unit feature. maps: (B, D_i, h_i, w_i). Returns (B, sum of D_i, h', h').

    h' is the finest level's side, but at most twice the embedding's, which bounds the memory.
    """
    side = min(max(feature_map.shape[-1] for feature_map in maps), 2 * grid)
    units = []
    for feature_map in maps:
        if feature_map.shape[-1] > side:
            feature_map = F.adaptive_avg_pool2d(feature_map.float(), side)
        elif feature_map.shape[-1] < side:
            feature_map = F.interpolate(feature_map.float(), (side, side), mode="bilinear", align_corners=False)
        units.append(F.normalize(feature_map.float(), dim=1))
    features: Tensor = torch.cat(units, dim=1) / len(units) ** 0.5
    return features


def _channels_first(features: Tensor) -> Tensor:
    """(B, D, h, w) from a block's output: a plain ViT's has its channels last."""
    maps: Tensor = features.permute(0, 3, 1, 2) if features.shape[1] == features.shape[2] else features
    return maps


@dataclass(frozen=True, slots=True)
class Target:
    """The class of an example. The similarity of a unit feature x is direction . x - offset."""

    direction: Tensor
    """(D,) float32."""
    offset: float
    embedding: Tensor
    """(C,) mean of the decoder's embedding over the example, for target-semantic prompting."""
    floor: float
    """Least similarity by default: the mean of what surrounds the example; -2 if it has no surroundings."""


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


def target_of(model: Sam, example: Encoded, mask: Bool, *, contrast: bool, by_difference: bool = False) -> Target:
    """The target embedding of an example (PerSAM, equation 2), by the share of each cell that is in the mask.

    mask: (H, W), not empty. contrast: compare with the example and its surroundings (`discriminant`), not with the
    example alone. by_difference: as the first version did, see `difference`. Raises ValueError for an empty mask.
    """
    features = example.features
    inside = cells_of(model, mask, features.shape[-1])
    if not inside.any():
        raise ValueError("the example's mask is empty")
    outside = (cells_of(model, np.ones_like(mask), features.shape[-1]) - inside).clamp(min=0)
    mean = _mean(features, inside)
    direction, offset, floor = mean / mean.norm(), 0.0, -2.0
    if by_difference:
        direction, floor = difference(features, inside, outside, contrast=contrast)
    elif outside.sum() > 1:
        if contrast:
            direction, offset = discriminant(unit(features), inside, outside)
        floor = float(direction @ _mean(unit(features), outside)) - offset
    embedding = example.embedding[0, : model.spec.embed_dim].float()
    return Target(direction, offset, _mean(embedding, cells_of(model, mask, embedding.shape[-1])), floor)


def discriminant(features: Tensor, inside: Tensor, outside: Tensor) -> tuple[Tensor, float]:
    """The direction (D,), and the offset, in which features (D, h, w) inside have the mean 1 and those outside 0.

    inside, outside: (h, w) weights. The difference of the means is divided by the scatter around the outside's mean, so
    that what varies within the example's image anyway counts less. The mean variance is added to each, because there
    are few cells. Source: exemplar LDA (Hariharan et al., ECCV 2012), with the statistics of the example's own image.
    """
    weights = (inside + outside).flatten()
    middle = _mean(features, outside)
    centred = features.flatten(1) - middle[:, None]
    scatter = (centred * weights) @ centred.T / weights.sum()
    scatter.diagonal().add_(scatter.diagonal().mean() + 1e-12)
    difference = _mean(features, inside) - middle
    direction = torch.linalg.solve(scatter, difference)
    direction = direction / (direction @ difference).clamp(min=1e-12)
    return direction, float(direction @ middle)


def difference(features: Tensor, inside: Tensor, outside: Tensor, *, contrast: bool) -> tuple[Tensor, float]:
    """The direction (D,) and threshold of samray's first version, with which its outputs are finished.

    The mean inside, of length 1, minus the same of the outside if contrast; and the similarity that agrees best with
    the example, by IoU.
    """
    mean = _mean(features, inside)
    direction = mean / mean.norm()
    if contrast and outside.sum() > 1:
        around = _mean(features, outside)
        direction = direction - around / around.norm()
    shown = inside + outside > 0.5
    similarity = torch.einsum("d,dhw->hw", direction, unit(features))[shown]
    is_inside = inside[shown] > 0.5
    values, order = similarity.sort(descending=True)
    hits = is_inside[order].cumsum(0)
    iou = hits / (torch.arange(1, len(values) + 1, device=values.device) + is_inside.sum() - hits)
    return direction, float(values[iou.argmax()])


def _mean(features: Tensor, weights: Tensor) -> Tensor:
    return (features * weights).sum(dim=(1, 2)) / weights.sum()


def similarity_map(model: Sam, image: Encoded, target: Target, points_per_side: int = 0) -> Tensor:
    """Similarity of each pixel to the target, (H, W) float32, by the reference's three bilinear steps.

    points_per_side: see `smoothed`; 0 does not smooth.
    """
    cells = torch.einsum("d,dhw->hw", target.direction, unit(image.features)) - target.offset
    side = 4 * (model.spec.grid if points_per_side else cells.shape[-1])
    finer = F.interpolate(cells[None, None], (side, side), mode="bilinear", align_corners=False)[0]
    if points_per_side:
        finer = smoothed(model, image, finer[0], points_per_side)[None]
    return interpolate(finer, *frame_of(model).mask_steps(side, image.original_hw), image.original_hw)[0]


@torch.inference_mode()
def smoothed(model: Sam, image: Encoded, similarity: Tensor, points_per_side: int) -> Tensor:
    """The mean of a similarity map and of the same map averaged over masks: one thing in the image, one similarity.

    similarity: (4h, 4w), low-res frame; so is the result. The masks are all three of each point of a grid, weighted by
    predicted IoU, large ones less. A pixel in no mask stays as it is.
    """
    frame, hw, low_res = frame_of(model), image.original_hw, similarity.shape[-1]
    xy = frame.points_in(point_grid(points_per_side) * np.array(hw[::-1]), hw)
    points = torch.from_numpy(xy).float()[:, None].to(model.device)
    context = model.prepare_decoder(image.embedding)
    decoded = model.decode_points(context, points, points.new_ones(points.shape[:2], dtype=torch.long))
    masks = above(decoded.logits, MASK_THRESHOLD).float()
    rows, columns = (max(1, round(side * low_res / frame.size)) for side in frame.input_hw(hw))
    masks[:, rows:], masks[:, :, columns:] = 0, 0  # what is in the padding
    masks = masks.flatten(1)
    areas = masks.sum(dim=1).clamp(min=1)
    means = masks @ similarity.flatten() / areas
    weights = decoded.iou.clamp(min=0.01) ** _IOU_POWER / areas.sqrt()
    total = weights @ masks
    average = (weights * means) @ masks / total.clamp(min=1e-12)
    return torch.where(total > 0, (similarity.flatten() + average) / 2, similarity.flatten()).view_as(similarity)
