"""The training loss of SAM: focal and dice on the best of three masks, squared error on the predicted IoUs.

Source: SAM paper, section 3, "Efficiency and training", and appendix A, "Losses" (focal to dice 20 : 1).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FOCAL_WEIGHT = 20.0
FOCAL_GAMMA = 2.0
RANKING_TEMPERATURE = 0.03
"""Scale of score differences: scores closer than this count as equal, because small errors could swap them."""


@dataclass(slots=True)
class Losses:
    """total: scalar with gradients; everything else is detached. iou: (K, 4) of each mask with its target.
    iou_scored, iou_oracle: mean actual IoU of the mask with the highest score and of the best of the three masks;
    iou_single: of the single mask."""

    total: Tensor
    iou: Tensor
    mask: Tensor
    score: Tensor
    iou_scored: Tensor
    iou_oracle: Tensor
    iou_single: Tensor


def mask_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """20 focal + dice. logits, targets: broadcastable to (..., R, R), targets in 0..1, float32. Returns (...)."""
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets.expand_as(logits), reduction="none")
    # At a mask's edge, targets are covered fractions: the focal weight is the distance to the target.
    focal = ((probability - targets).abs() ** FOCAL_GAMMA * cross_entropy).mean(dim=(-2, -1))
    overlap = (probability * targets).sum(dim=(-2, -1))
    # + 1 defines it for empty masks.
    dice = 1 - (2 * overlap + 1) / (probability.sum(dim=(-2, -1)) + targets.sum(dim=(-2, -1)) + 1)
    return FOCAL_WEIGHT * focal + dice


def actual_iou(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU of the thresholded masks, (...), without gradient; 0 if both are empty. Shapes as in `mask_losses`."""
    mask, wanted = logits.detach() > 0, targets > 0.5
    union = (mask | wanted).sum(dim=(-2, -1))
    return (mask & wanted).sum(dim=(-2, -1)) / union.clamp(min=1)


def ranking_loss(predicted_iou: Tensor, iou: Tensor) -> Tensor:
    """1 - IoU of the mask with the highest score, smoothed: masks weighted by a softmax of their scores.

    predicted_iou, iou: (K, 3), masks of an ambiguous prompt. Returns (K,) in [0, 1]. The squared error alone would
    spend most of the head's capacity on prompts whose three masks are alike.
    """
    chosen = (predicted_iou / RANKING_TEMPERATURE).softmax(dim=1)
    return 1 - (chosen * iou).sum(dim=1)


def trust(best_iou: Tensor, doubt: Tensor) -> Tensor:
    """Weight of each prompt's loss, (K,), without gradient; 1 if `doubt` is 0.

    Unchecked labels are often wrong, and the model rarely predicts a wrong one: a doubted prompt gets the weight 0.1 +
    IoU^doubt of its best mask, normalized to a mean of 1 over the doubted prompts. (The small-loss trick; Han et al.,
    "Co-teaching", NeurIPS 2018.) best_iou, doubt: (K,).
    """
    doubted = doubt > 0
    raw = 0.1 + best_iou.clamp(min=1e-6) ** doubt
    mean = (raw * doubted).sum() / doubted.sum().clamp(min=1)
    return torch.where(doubted, raw / mean, torch.ones_like(raw))


def sam_loss(
    logits: Tensor,
    predicted_iou: Tensor,
    targets: Tensor,
    *,
    single_weight: float,
    multi_weight: float = 1.0,
    ranking_weight: float = 0.0,
    doubt: Tensor | None = None,
) -> Losses:
    """The loss of K prompts.

    logits: (K, 4, R, R), mask 0 the single mask and 1 to 3 those of an ambiguous prompt. predicted_iou: (K, 4).
    targets: (K, R, R) in 0..1. multi_weight: for the best of the three; single_weight: for mask 0. Only the best of the
    three gets a gradient, which lets them become different answers; all four scores learn their mask's actual IoU.
    ranking_weight: for `ranking_loss`, part of the loss of the scores, which SAM does not have.
    doubt: (K,), see `trust`; None weights all prompts alike.
    """
    # In float32 also under autocast; targets become (K, 1, R, R).
    logits, predicted_iou, targets = logits.float(), predicted_iou.float(), targets.float().unsqueeze(1)
    iou = actual_iou(logits, targets)
    multi = iou[:, 1:]
    weight = torch.ones_like(multi[:, 0]) if doubt is None else trust(multi.max(dim=1).values, doubt)
    per_mask = mask_losses(logits, targets)
    best = (weight * per_mask[:, 1:].min(dim=1).values).mean()
    mask = multi_weight * best + single_weight * (weight * per_mask[:, 0]).mean()
    errors = (predicted_iou - iou).square().sum(dim=1)
    if ranking_weight > 0:
        errors = errors + ranking_weight * ranking_loss(predicted_iou[:, 1:], multi)
    score = (weight * errors).mean()
    scored = multi.gather(1, predicted_iou[:, 1:].argmax(dim=1, keepdim=True))
    oracle = multi.max(dim=1).values.mean()
    return Losses(mask + score, iou, mask.detach(), score.detach(), scored.mean(), oracle, iou[:, 0].mean())
