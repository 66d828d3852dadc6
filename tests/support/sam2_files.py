"""Checkpoints of SAM 2 as published, with random weights: Meta's names, with the parts for video."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from samray.sam.sam import Sam
from samray.sam.spec import ModelSpec

# Written the other way round from `samray.sam.layouts`, and checked against the package `sam2` by the parity tests.
_TO_META = (
    (r"^image_encoder\.fine\.", "sam_mask_decoder."),
    (r"^image_encoder\.no_mem_embed$", "no_mem_embed"),
    (r"^image_encoder\.neck\.(\d)\.", r"image_encoder.neck.convs.\1.conv."),
    (r"^image_encoder\.(patch_embed|pos_embed|pos_embed_window|blocks)\b", r"image_encoder.trunk.\1"),
    (r"^(prompt_encoder|mask_decoder)\.", r"sam_\1."),
    (r"\.mlp\.lin1\.", ".mlp.layers.0."),
    (r"\.mlp\.lin2\.", ".mlp.layers.1."),
)
VIDEO = (
    "maskmem_tpos_enc", "no_mem_pos_enc", "no_obj_ptr", "mask_downsample.weight", "obj_ptr_proj.layers.0.weight",
    "memory_attention.layers.0.self_attn.q_proj.weight", "memory_encoder.fuser.layers.0.gamma",
    "sam_mask_decoder.pred_obj_score_head.layers.2.bias",
)  # fmt: skip
VIDEO_2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight")


def meta_state(state: Mapping[str, Tensor], *, version: str = "2.1") -> dict[str, Tensor]:
    """Meta's names for samray's, with some of the parts for video of that version."""
    named = {}
    for name, tensor in state.items():
        for pattern, replacement in _TO_META:
            name = re.sub(pattern, replacement, name)
        named[name] = tensor
    return named | {name: torch.zeros(2) for name in (*VIDEO, *(VIDEO_2_1 if version == "2.1" else ()))}


def random_state(spec: ModelSpec, seed: int = 0) -> dict[str, Tensor]:
    """Seeded weights with samray's names, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in Sam(spec).state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator) / 8
            value = 1 + noise.abs() if name.endswith("running_var") else noise
        state[name] = value
    return state
