"""Checkpoints of the later families as published, with random weights.

Written the other way round from `samray.sam.layouts`; the names are those that the public code and the converters of
`transformers` read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tests.support import sam2_files

_HQ = ((r"^mask_decoder\.hq\.", "mask_decoder."),)
_EDGETAM = (
    (r"^image_encoder\.patch_embed\.", "image_encoder.trunk.body.stem."),
    (r"^image_encoder\.stages\.(\d)\.", r"image_encoder.trunk.body.stages_\1."),
)
_TRUNK, _CONVS = "detector.backbone.vision_backbone.trunk", "detector.backbone.vision_backbone.sam2_convs"
_SAM3 = (
    (r"^image_encoder\.patch_embed\.", f"{_TRUNK}.patch_embed.proj."),
    (r"^image_encoder\.(pos_embed|ln_pre|blocks)\b", rf"{_TRUNK}.\1"),
    (r"(trunk\.blocks\.\d+\.mlp)\.lin(\d)\.", r"\1.fc\2."),
    (r"^image_encoder\.neck\.0\.scale_layers\.0\.", f"{_CONVS}.0.dconv_2x2_0."),
    (r"^image_encoder\.neck\.0\.scale_layers\.2\.", f"{_CONVS}.0.dconv_2x2_1."),
    (r"^image_encoder\.neck\.1\.scale_layers\.0\.", f"{_CONVS}.1.dconv_2x2."),
    (r"^image_encoder\.neck\.(\d)\.proj1\.", rf"{_CONVS}.\1.conv_1x1."),
    (r"^image_encoder\.neck\.(\d)\.proj2\.", rf"{_CONVS}.\1.conv_3x3."),
    (r"^image_encoder\.fine\.", "tracker.sam_mask_decoder."),
    (r"^image_encoder\.no_mem_embed$", "tracker.no_mem_embed"),
    (r"^(prompt_encoder|mask_decoder)\.", r"tracker.sam_\1."),
)
UNUSED = {
    "EdgeTAM": ("spatial_perceiver.latents_2d", "memory_attention.layers.0.norm1.weight", "no_obj_ptr"),
    "SAM 3": (
        "detector.backbone.language_backbone.resizer.weight", f"{_TRUNK}.blocks.0.attn.freqs_cis",
        f"{_CONVS}.3.conv_1x1.weight", "detector.transformer.decoder.norm.weight", "tracker.maskmem_tpos_enc",
        "tracker.transformer.encoder.norm.weight", "tracker.maskmem_backbone.fuser.layers.0.gamma",
        "tracker.no_obj_embed_spatial", "tracker.sam_mask_decoder.pred_obj_score_head.layers.2.bias",
    ),
}  # fmt: skip


def published(family: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names in a family's own file for samray's, with some of what only other tasks need."""
    if family == "SAM-HQ":
        return {_renamed(name, _HQ): value for name, value in state.items()}
    if family == "SAM 2.1":
        return sam2_files.meta_state(state)
    extras = {name: torch.zeros(2) for name in UNUSED[family]}
    if family == "EdgeTAM":
        named = {_renamed(name, _EDGETAM): value for name, value in state.items()}
        named = sam2_files.meta_state(named)
        return {name: value for name, value in named.items() if name not in sam2_files.VIDEO_2_1} | extras
    named = {_renamed(name, _SAM3): value for name, value in state.items()}
    positions = f"{_TRUNK}.pos_embed"
    named[positions] = torch.cat([torch.full_like(named[positions][:, :1], 9), named[positions]], dim=1)
    return named | extras


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name
