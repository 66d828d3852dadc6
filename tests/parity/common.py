"""What the parity tests share: weights and inputs that leave nothing flat, and the bound."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samray.sam.checkpoints import build
from samray.sam.formats import to_meta_names
from samray.sam.sam import Sam
from samray.sam.spec import MODELS, ModelSpec, VitSpec

TOLERANCE = 1e-4


def assert_close(ours: Tensor, reference: Tensor) -> None:
    """Equal shapes, values that vary, and the largest difference within 1e-4 of the largest value."""
    assert ours.shape == reference.shape
    scale = reference.abs().max().item()
    assert reference.std().item() > 1e-3 * scale, "a flat reference proves nothing"
    assert (ours - reference).abs().max().item() <= TOLERANCE * scale


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> None:
    """Seeded weights under which every part of the network matters: no zeros, no ones, logits of several units."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(module.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(1 + 0.3 * noise.abs())
        elif tensor.dim() == 1 and name.endswith("weight"):
            tensor.copy_(1 + 0.2 * noise)
        elif tensor.dim() == 1:
            tensor.copy_(0.2 * noise)
        elif "rel_pos" in name or "pos_embed" in name or "attention_biases" in name:
            tensor.copy_(0.3 * noise)
        elif name.endswith(("_token.weight", "_tokens.weight")) or ("embed" in name and tensor.shape[0] <= 2):
            tensor.copy_(noise)  # learned tokens, and the table of positions
        else:
            tensor.copy_(noise * 1.4 / math.sqrt(tensor[0].numel()))


def smaller(name: str, image_size: int, depth: int = 2) -> ModelSpec:
    """A row with its true widths, at another image size; with fewer blocks, the last one is the global one."""
    spec = MODELS[name]
    encoder = spec.encoder
    assert isinstance(encoder, VitSpec)
    if depth != encoder.depth:
        encoder = dataclasses.replace(encoder, depth=depth, global_blocks=(depth - 1,))
    return dataclasses.replace(spec, image_size=image_size, encoder=encoder)


def pixels_of(spec: ModelSpec, batch: int, seed: int = 0) -> Tensor:
    """Normalised pixels with edges and a padded border, as real input has."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, 16, 16, generator=generator)
    pixels = nn.functional.interpolate(coarse, (spec.image_size, spec.image_size), mode="nearest")
    pixels = pixels + 0.2 * torch.randn(pixels.shape, generator=generator)
    pixels[..., spec.image_size * 3 // 4 :] = 0
    return pixels


def prompts_of(kinds: str, num_prompts: int, size: int, grid: int, seed: int = 4) -> dict[str, Tensor]:
    """kinds: any of "points", "padded" (points, some of them absent), "boxes", "masks"."""
    generator = torch.Generator().manual_seed(seed)
    prompts: dict[str, Tensor] = {}
    if "points" in kinds or "padded" in kinds:
        prompts["points"] = torch.rand(num_prompts, 3, 2, generator=generator) * size
        prompts["labels"] = torch.randint(0, 2, (num_prompts, 3), generator=generator)
    if "padded" in kinds:
        prompts["labels"][::2, 1:] = -1
    if "boxes" in kinds:
        corners = torch.rand(num_prompts, 2, 2, generator=generator) * size
        prompts["boxes_xyxy"] = torch.cat([corners.min(dim=1).values, corners.max(dim=1).values], dim=1)
    if "masks" in kinds:
        prompts["mask_input"] = 4 * torch.randn(num_prompts, 1, 4 * grid, 4 * grid, generator=generator)
    return prompts


@torch.no_grad()
def tie_positions(model: Any) -> Any:
    """A model of transformers with its two copies of the table of positions alike, and nothing of it zero."""
    model.prompt_encoder.shared_embedding.positional_embedding.copy_(model.shared_image_embedding.positional_embedding)
    generator = torch.Generator().manual_seed(9)
    for name, value in model.named_parameters():
        if "pos_embed" in name or "position_embeddings" in name or name == "no_memory_embedding":
            value.normal_(generator=generator)
    return model


@torch.no_grad()
def assert_prompts(
    kinds: str, multimask: bool, ours: Sam, packed: Tensor, reference: Any, embeddings: list[Tensor]
) -> None:
    """Six prompts on one image: samray's masks and scores are those of a model like transformers' Sam2Model.

    packed: samray's embedding; embeddings: transformers' list of them.
    """
    num = 6
    prompts = prompts_of(kinds, num, ours.spec.image_size, ours.spec.grid)
    points, labels, boxes = prompts.get("points"), prompts.get("labels"), prompts.get("boxes_xyxy")
    # transformers takes a mask per image, so its prompts become a batch of one prompt each.
    expected = reference(
        image_embeddings=[x.expand(num, -1, -1, -1) for x in embeddings],
        input_points=None if points is None else points[:, None],
        input_labels=None if labels is None else labels[:, None],
        input_boxes=None if boxes is None else boxes[:, None],
        input_masks=prompts.get("mask_input"),
        multimask_output=multimask,
    )
    logits, iou = ours.predict(packed, **prompts, multimask=multimask)
    assert_close(logits, expected.pred_masks[:, 0])
    assert_close(iou, expected.iou_scores[:, 0])


def from_transformers(spec: ModelSpec, model: Any) -> Sam:
    """The same weights, by the names in transformers' files."""
    return build(spec, to_meta_names(dict(model.state_dict()), Path("transformers")), "transformers")
