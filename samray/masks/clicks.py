"""Masks of a grid's clicks, filtered by predicted IoU, and their refinement by a second look ("mask to mask")."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from samray.sam.sam import Decoded, Sam, to_device
from samray.sam.transformer import ImageTokens

_LOW_RES_LIMIT: Final = 32.0
"""Low-res logits are cut off here before they become a prompt, as in `sam2`."""
_CPU_MASKS: Final = 4
_GPU_MASKS: Final = 64


def decode_clicks(
    model: Sam, embeddings: Tensor, context: ImageTokens, clicks: Tensor, *, refine: str | None, pred_iou_thresh: float
) -> Decoded:
    """Masks of single foreground clicks with predicted IoU above the threshold.

    embeddings: (B, C, h, w), context: of the same B crops. clicks: (N, 2) float64 xy in the input frame, N / B per
    crop, crop by crop. Masks below the threshold are never upscaled, unless they are refined first. A threshold of 0
    keeps all, as in the reference.
    """
    points = to_device(clicks.float(), model.device)[:, None]  # (N, 1, 2)
    labels = torch.ones(points.shape[:2], dtype=torch.int64, device=points.device)
    min_iou = pred_iou_thresh or None
    if refine is None:
        return model.decode_points(context, points, labels, min_iou=min_iou)
    return refined(model, embeddings, model.decode_points(context, points, labels), points, labels, min_iou)


def refined(
    model: Sam, embeddings: Tensor, decoded: Decoded, points: Tensor, labels: Tensor, min_iou: float | None
) -> Decoded:
    """Every mask once more, from its click and itself as prompts; those with predicted IoU > min_iou, in their order.

    decoded: all masks of the clicks, points (N, 1, 2) and labels (N, 1), N / B for each of B embeddings.
    Source: `SAM2AutomaticMaskGenerator.refine_with_m2m`.
    """
    per_image = len(points) // max(len(embeddings), 1)
    size = _CPU_MASKS if model.device.type == "cpu" else _GPU_MASKS
    keeps, logits, ious = [], [], []
    for image, embedding in enumerate(embeddings):
        masks = (decoded.prompt_index // per_image == image).nonzero()[:, 0]
        for part in masks.split(size):
            prompt = decoded.prompt_index[part]
            earlier = decoded.logits[part].clamp(-_LOW_RES_LIMIT, _LOW_RES_LIMIT)[:, None]
            later, iou = model.predict(
                embedding[None], points[prompt], labels[prompt], mask_input=earlier, multimask=False
            )
            keep = torch.ones_like(iou[:, 0], dtype=torch.bool) if min_iou is None else iou[:, 0] > min_iou
            keeps.append(part[keep])
            logits.append(later[keep, 0])
            ious.append(iou[keep, 0])
    if not keeps:
        return decoded
    kept = torch.cat(keeps)
    return Decoded(
        torch.cat(logits), torch.cat(ious), decoded.prompt_index[kept], decoded.mask_index[kept], decoded.all_iou
    )
