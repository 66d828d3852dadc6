"""PerSAM as its paper and its authors' script have it, step by step, on the plain decoder: the oracle of samray's.

One instance, the highest predicted IoU of three masks, the cosine with the example alone. Images have the model's size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity import plain_decoder


def persam(model: Any, example: Tensor, example_mask: Tensor, image: Tensor) -> dict[str, Any]:
    """example, image: (C, h, w) embeddings; example_mask: (S, S) of 0 and 1. Returns every step's result."""
    side, grid = model.image_size, example.shape[-1]
    inside = F.interpolate(example_mask[None, None], (grid, grid), mode="bilinear")[0, 0] > 0
    features = example.permute(1, 2, 0)[inside]
    target = features.mean(0)

    unit = image / image.norm(dim=0, keepdim=True)
    cosine = ((target / target.norm()) @ unit.flatten(1)).view(1, 1, grid, grid)
    cosine = F.interpolate(cosine, scale_factor=4, mode="bilinear")
    cosine = F.interpolate(cosine, (side, side), mode="bilinear")[0, 0]
    most, least = divmod(int(cosine.argmax()), side), divmod(int(cosine.argmin()), side)
    points = torch.tensor([[most[::-1], least[::-1]]], dtype=torch.float32)
    labels = torch.tensor([[1, 0]])

    standard = (cosine - cosine.mean()) / torch.std(cosine)
    similarity = F.interpolate(standard[None, None], (grid, grid), mode="bilinear").sigmoid().flatten()

    first, _ = _predict(model, image, points, labels, similarity=similarity, target=target)
    second, iou = _predict(model, image, points, labels, mask=first[:, :1])
    best = 1 + int(iou[0, 1:].argmax())
    rows, columns = (_upscaled(second[0, best], side) > 0).nonzero().unbind(1)
    box = torch.stack([columns.min(), rows.min(), columns.max(), rows.max()])[None].float()
    third, iou = _predict(model, image, points, labels, mask=second[:, best : best + 1], box=box)
    best = 1 + int(iou[0, 1:].argmax())
    return {
        "target": target,
        "cosine": cosine,
        "points": points,
        "similarity": similarity,
        "first": first[0, 0],
        "logits": _upscaled(third[0, best], side),
        "iou": iou[0, best],
    }


def _predict(
    model: Any,
    image: Tensor,
    points: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    box: Tensor | None = None,
    **guidance: Tensor,
) -> tuple[Tensor, Tensor]:
    encoder, spec = model.prompt_encoder, model.spec
    sparse = encoder.encode_points(points, labels, pad=box is None)
    if box is not None:
        sparse = torch.cat([sparse, encoder.encode_boxes(box)], dim=1)
    dense = encoder.no_mask_embed.weight[0, :, None, None].expand(1, -1, spec.grid, spec.grid)
    dense = dense if mask is None else encoder.encode_masks(mask)
    positions = encoder.dense_positions().T.unflatten(1, (spec.grid, spec.grid))
    state = dict(model.state_dict())
    return plain_decoder.decode(state, spec.decoder_heads, image, positions, sparse, dense, **guidance)


def _upscaled(logits: Tensor, side: int) -> Tensor:
    return F.interpolate(logits[None, None], (side, side), mode="bilinear")[0, 0]
