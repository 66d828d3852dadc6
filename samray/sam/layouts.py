"""The names of tensors in published checkpoints, and samray's for them: one row per layout.

samray's names are those of Meta's SAM. What a file has for other purposes (a classifier, video) is known by name and
left out; any other name that is not expected is an error when the model is built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

HF_SHARED_POSITIONS: Final = "shared_image_embedding.positional_embedding"
HF_TIED_POSITIONS: Final = "prompt_encoder.shared_embedding.positional_embedding"
"""The same tensor; some files have it twice."""

_GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_NOTHING: Final = re.compile(r"(?!)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The names in one project's files."""

    marker: re.Pattern[str]
    """Matches a name that only this layout has."""
    families: tuple[tuple[str, str], ...] = ()
    """(pattern, `ModelSpec.family`): the first whose pattern matches a name of the file is its family; none: the names
    do not tell."""
    prefixes: tuple[tuple[str, str], ...] = ()
    """Substitutions (pattern, replacement) before anything else."""
    unused: re.Pattern[str] = _NOTHING
    """Matches the names of what samray does not use."""
    renames: tuple[tuple[str, str], ...] = ()
    """Substitutions (pattern, replacement), applied in this order."""
    tables: tuple[tuple[str, str], ...] = ()
    """(name, prefix): a tensor whose rows are tensors of their own: `prefix`.0.weight of shape (1, C), and so on."""
    joined: tuple[tuple[str, str], ...] = ()
    """(pattern, name): the tensors whose names match are one, one after the other in the order of the names of `q`,
    `k`, `v`, which is the pattern's group `part`."""
    with_class_token: tuple[str, ...] = ()
    """(1, 1 + n, C) positions, of which the first is of a class token, and left out."""

    def family(self, state: Mapping[str, Tensor]) -> str | None:
        """The family of a file of this layout, if its names tell it."""
        for pattern, family in self.families:
            if any(map(re.compile(pattern).match, state)):
                return family
        return None

    def named(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """samray's names for what is used."""
        state = {renamed(key, self.prefixes): value for key, value in state.items()}
        state = {key: value for key, value in state.items() if not self.unused.search(key)}
        for name, prefix in self.tables:
            table = state.pop(name, None)
            if table is not None:
                state |= {f"{prefix}.{i}.weight": row[None] for i, row in enumerate(table)}
        for name in self.with_class_token:
            if name in state:
                state[name] = state[name][:, 1:]
        for pattern, name in self.joined:
            state = _joined(state, re.compile(pattern), name)
        return {renamed(key, self.renames): value for key, value in state.items()}


def _joined(state: Mapping[str, Tensor], pattern: re.Pattern[str], name: str) -> dict[str, Tensor]:
    """The state with matching tensors concatenated; those of which a part is missing stay, to be reported."""
    parts: dict[str, dict[str, str]] = {}
    for key in state:
        if match := pattern.match(key):
            parts.setdefault(match.expand(name), {})[match["part"]] = key
    joined = dict(state)
    for joined_key, keys in parts.items():
        if keys.keys() == {"q", "k", "v"}:
            joined[joined_key] = torch.cat([joined.pop(keys[part]) for part in "qkv"])
    return joined


def renamed(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    """The name after all substitutions (pattern, replacement), in their order."""
    for pattern, name in renames:
        key = re.sub(pattern, name, key)
    return key


# An MLP's `layers.0` is its second layer, so it is renamed first.
_HF_PROMPTS_AND_DECODER: Final = (
    (r"^shared_image_embedding\.positional_embedding$", _GAUSSIAN),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head)\.)layers\.0\.", r"\1layers.1."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head)\.)proj_in\.", r"\1layers.0."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head)\.)proj_out\.", r"\1layers.2."),
    (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
)

META_SAM: Final = Layout(
    marker=re.compile(r""),
    families=((r"^mask_decoder\.(hf_token|hq)\.", "SAM-HQ"),),
    # MobileSAM's: TinyViT's classifier, and tables derived from the window size.
    unused=re.compile(r"^image_encoder\.(norm_head|head)\.|\.attention_bias_idxs$"),
    renames=((r"^mask_decoder\.(hf_|compress_vit_feat|embedding_)", r"mask_decoder.hq.\1"),),
)
"""Meta's SAM, MobileSAM, SAM-HQ, and samray's own files."""

HF_SAM: Final = Layout(
    marker=re.compile(r"^(vision_encoder|shared_image_embedding)\."),
    families=((r"^mask_decoder\.hq_token\.", "SAM-HQ"),),
    renames=(
        (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
        (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
        (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
        (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
        (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
        (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
        (r"^vision_encoder\.", "image_encoder."),
        (r"^mask_decoder\.hq_token\.", "mask_decoder.hq.hf_token."),
        (r"^mask_decoder\.hq_mask_mlp\.layers\.0\.", "mask_decoder.hq.hf_mlp.layers.1."),
        (r"^mask_decoder\.hq_mask_mlp\.proj_in\.", "mask_decoder.hq.hf_mlp.layers.0."),
        (r"^mask_decoder\.hq_mask_mlp\.proj_out\.", "mask_decoder.hq.hf_mlp.layers.2."),
        (r"^mask_decoder\.compress_vit_", "mask_decoder.hq.compress_vit_feat."),
        (r"^mask_decoder\.encoder_", "mask_decoder.hq.embedding_encoder."),
        (r"^mask_decoder\.mask_(conv|norm)", r"mask_decoder.hq.embedding_maskfeature.\1"),
        (r"^(mask_decoder\.hq\.\w+\.)conv1\.", r"\g<1>0."),
        (r"^(mask_decoder\.hq\.\w+\.)norm\.", r"\g<1>1."),
        (r"^(mask_decoder\.hq\.\w+\.)conv2\.", r"\g<1>3."),
        *_HF_PROMPTS_AND_DECODER,
    ),
)
"""Hugging Face's SAM and SAM-HQ."""

# Video: memory, object pointers, and the score of an object's presence, which an image's masks do not depend on.
META_SAM2: Final = Layout(
    marker=re.compile(r"^image_encoder\.trunk\."),
    families=((r"^no_obj_embed_spatial$", "SAM 2.1"), (r"^maskmem_tpos_enc$", "SAM 2")),
    unused=re.compile(
        r"^(memory_attention|memory_encoder|mask_downsample|obj_ptr_proj|obj_ptr_tpos_proj"
        r"|sam_mask_decoder\.pred_obj_score_head)\."
        r"|^(maskmem_tpos_enc|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial)$"
    ),
    renames=(
        (r"^sam_(prompt_encoder|mask_decoder)\.", r"\1."),
        (r"^image_encoder\.trunk\.", "image_encoder."),
        (r"^image_encoder\.neck\.convs\.(\d)\.conv\.", r"image_encoder.neck.\1."),
        (r"^mask_decoder\.conv_s", "image_encoder.fine.conv_s"),
        (r"^no_mem_embed$", "image_encoder.no_mem_embed"),
        (r"^(mask_decoder\.transformer\.layers\.\d\.mlp)\.layers\.0\.", r"\1.lin1."),
        (r"^(mask_decoder\.transformer\.layers\.\d\.mlp)\.layers\.1\.", r"\1.lin2."),
    ),
)

HF_SAM2: Final = Layout(
    marker=re.compile(r"^vision_encoder\.backbone\."),
    families=(
        (r"^occlusion_spatial_embedding_parameter$", "SAM 2.1"),
        (r"^memory_temporal_positional_encoding$", "SAM 2"),
    ),
    unused=re.compile(
        r"^(memory_attention|memory_encoder|mask_downsample|object_pointer_proj"
        r"|temporal_positional_encoding_projection_layer|mask_decoder\.pred_obj_score_head)\."
        r"|^(memory_temporal_positional_encoding|no_memory_positional_encoding|no_object_pointer"
        r"|occlusion_spatial_embedding_parameter)$"
    ),
    renames=(
        (r"^vision_encoder\.backbone\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
        (r"^(vision_encoder\.backbone\.blocks\.\d+\.mlp)\.proj_in\.", r"\1.layers.0."),
        (r"^(vision_encoder\.backbone\.blocks\.\d+\.mlp)\.proj_out\.", r"\1.layers.1."),
        (r"^vision_encoder\.backbone\.", "image_encoder."),
        (r"^vision_encoder\.neck\.convs\.", "image_encoder.neck."),
        (r"^mask_decoder\.conv_s", "image_encoder.fine.conv_s"),
        (r"^no_memory_embedding$", "image_encoder.no_mem_embed"),
        (r"^(mask_decoder\.transformer\.layers\.\d\.mlp)\.proj_in\.", r"\1.lin1."),
        (r"^(mask_decoder\.transformer\.layers\.\d\.mlp)\.proj_out\.", r"\1.lin2."),
        (r"^(mask_decoder\.transformer\..*)\.o_proj\.", r"\1.out_proj."),
        *_HF_PROMPTS_AND_DECODER,
    ),
    tables=(("prompt_encoder.point_embed.weight", "prompt_encoder.point_embeddings"),),
)

_EDGETAM = (
    (r"^image_encoder\.stem\.", "image_encoder.patch_embed."),
    (r"^image_encoder\.stages_", "image_encoder.stages."),
)

META_EDGETAM: Final = replace(
    META_SAM2,
    marker=re.compile(r"^image_encoder\.trunk\.body\."),
    families=((r"", "EdgeTAM"),),
    unused=re.compile(rf"{META_SAM2.unused.pattern}|^spatial_perceiver\."),
    renames=((r"^image_encoder\.trunk\.body\.", "image_encoder."), *_EDGETAM, *META_SAM2.renames),
)

HF_EDGETAM: Final = replace(
    HF_SAM2,
    marker=re.compile(r"^vision_encoder\.backbone\.timm_model\."),
    families=((r"", "EdgeTAM"),),
    unused=re.compile(rf"{HF_SAM2.unused.pattern}|^spatial_perceiver\."),
    renames=((r"^vision_encoder\.backbone\.timm_model\.", "image_encoder."), *_EDGETAM, *HF_SAM2.renames),
)

_SAM3_BLOCKS = (
    (r"^image_encoder\.patch_embed\.proj\.", "image_encoder.patch_embed."),
    (r"^(image_encoder\.blocks\.\d+\.mlp)\.fc(\d)\.", r"\1.lin\2."),
)

META_SAM3: Final = Layout(
    marker=re.compile(r"^(tracker|detector)\."),
    families=((r"", "SAM 3"),),
    prefixes=(
        (r"^detector\.backbone\.vision_backbone\.trunk\.", "image_encoder."),
        (r"^detector\.backbone\.vision_backbone\.sam2_convs\.", "image_encoder.neck."),
        (r"^tracker\.", ""),
    ),
    # The detector, of which the tracker only shares the trunk; tables of rotations; the coarsest level; video.
    unused=re.compile(
        r"^detector\.|\.freqs_cis$|^image_encoder\.neck\.3\."
        r"|^(transformer|maskmem_backbone|mask_downsample|obj_ptr_proj|obj_ptr_tpos_proj"
        r"|sam_mask_decoder\.pred_obj_score_head)\."
        r"|^(maskmem_tpos_enc|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial)$"
    ),
    renames=(
        *_SAM3_BLOCKS,
        (r"^(image_encoder\.neck\.\d)\.dconv_2x2(_0)?\.", r"\1.scale_layers.0."),
        (r"^(image_encoder\.neck\.\d)\.dconv_2x2_1\.", r"\1.scale_layers.2."),
        (r"^(image_encoder\.neck\.\d)\.conv_1x1\.", r"\1.proj1."),
        (r"^(image_encoder\.neck\.\d)\.conv_3x3\.", r"\1.proj2."),
        *META_SAM2.renames,
    ),
    with_class_token=("image_encoder.pos_embed",),
)

HF_SAM3: Final = Layout(
    marker=re.compile(r"^(tracker_model|tracker_neck|detector_model)\.|^vision_encoder\.neck\.fpn_layers\."),
    families=((r"", "SAM 3"),),
    prefixes=(
        (r"^tracker_model\.", ""),
        (r"^tracker_neck\.", "vision_encoder.neck."),
        (r"^detector_model\.vision_encoder\.backbone\.", "vision_encoder.backbone."),
    ),
    unused=re.compile(rf"{HF_SAM2.unused.pattern}|^detector_model\.|^vision_encoder\.neck\.fpn_layers\.3\."),
    renames=(
        (r"^vision_encoder\.neck\.fpn_layers\.", "image_encoder.neck."),
        (r"^vision_encoder\.backbone\.embeddings\.position_embeddings$", "image_encoder.pos_embed"),
        (r"^vision_encoder\.backbone\.embeddings\.patch_embeddings\.projection\.", "image_encoder.patch_embed."),
        (r"^vision_encoder\.backbone\.layer_norm\.", "image_encoder.ln_pre."),
        (r"^vision_encoder\.backbone\.layers\.(\d+)\.attention\.o_proj\.", r"image_encoder.blocks.\1.attn.proj."),
        (r"^vision_encoder\.backbone\.layers\.(\d+)\.", r"image_encoder.blocks.\1."),
        *_SAM3_BLOCKS,
        *HF_SAM2.renames,
    ),
    tables=HF_SAM2.tables,
    joined=(
        (
            r"^vision_encoder\.backbone\.layers\.(\d+)\.attention\.(?P<part>[qkv])_proj\.(weight|bias)$",
            r"image_encoder.blocks.\1.attn.qkv.\3",
        ),
    ),
)

_LAYOUTS: Final = (META_SAM3, HF_SAM3, META_EDGETAM, HF_EDGETAM, META_SAM2, HF_SAM2, HF_SAM, META_SAM)


def layout_of(state: Mapping[str, Tensor]) -> Layout:
    """The layout of a file with these names; that of Meta's SAM for names that no other layout has."""
    return next((layout for layout in _LAYOUTS if any(map(layout.marker.match, state))), META_SAM)
