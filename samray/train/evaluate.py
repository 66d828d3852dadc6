"""One click at each target's centre: how well the answer fits."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samray.sam.sam import Sam
from samray.scene_paint import Source, Split
from samray.scenes import Scene, make_scene
from samray.train.clicks import centre


def heldout_scenes(
    num_scenes: int, size: int = 256, source: Source | None = None, *, first_seed: int = 0, split: Split = "heldout"
) -> Iterator[Scene]:
    """The fixed scenes that models are compared on: seeds from `first_seed` on, objects that training never shows."""
    for seed in range(first_seed, first_seed + num_scenes):
        yield make_scene(seed, size, source, split)


@torch.inference_mode()
def evaluate_clicks(model: Sam, scenes: Iterable[Scene]) -> dict[str, Any]:
    """Mean IoU of one centre click per target, at the scenes' own resolution.

    Returns miou (the mask that the model scores best of its three), miou_oracle (the best of the three) and num_regions
    over the whole objects, and by_kind with the same three figures for each kind. NaN where there is no target.
    """
    figures: dict[str, list[tuple[float, float]]] = {"object": []}
    for scene in scenes:
        if not scene.kinds:
            continue
        for kind, scored, oracle in zip(scene.kinds, *_scene_ious(model, scene), strict=True):
            figures.setdefault(kind, []).append((scored, oracle))
    by_kind = {kind: _summary(values) for kind, values in figures.items()}
    return {**by_kind["object"], "by_kind": by_kind}


def _summary(values: list[tuple[float, float]]) -> dict[str, float | int]:
    scored, oracle = np.mean(values, axis=0) if values else (float("nan"), float("nan"))
    return {"miou": float(scored), "miou_oracle": float(oracle), "num_regions": len(values)}


def _scene_ious(model: Sam, scene: Scene) -> tuple[list[float], list[float]]:
    """IoU of the best-scored and of the best mask, target by target."""
    original_hw = (scene.image.shape[0], scene.image.shape[1])
    pixels, [input_hw] = model.preprocess([scene.image])
    context = model.prepare_decoder(model.encode_images(pixels))
    clicks = torch.tensor([centre(mask) for mask in scene.masks], dtype=torch.float32, device=model.device)
    # The centre of a pixel stays the centre of what it is scaled to; the prompt encoder adds the half pixel back.
    scale = torch.tensor([input_hw[1] / original_hw[1], input_hw[0] / original_hw[0]], device=model.device)
    points = (clicks + 0.5) * scale - 0.5
    labels = torch.ones(len(clicks), 1, dtype=torch.int64, device=model.device)
    decoded = model.decode_points(context, points[:, None], labels)
    masks = model.postprocess(decoded.logits, input_hw, original_hw) > 0
    targets = torch.from_numpy(scene.masks).to(masks.device)
    iou = _iou(masks.view(*decoded.all_iou.shape, *original_hw), targets[:, None])
    scored = iou.gather(1, decoded.all_iou.argmax(dim=1, keepdim=True))[:, 0]
    return scored.tolist(), iou.max(dim=1).values.tolist()


def _iou(masks: Tensor, targets: Tensor) -> Tensor:
    """(N, M, H, W) and (N, 1, H, W) bool -> (N, M)."""
    union = (masks | targets).flatten(2).sum(dim=2)
    return (masks & targets).flatten(2).sum(dim=2) / union.clamp(min=1)
