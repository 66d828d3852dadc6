"""The later families in `transformers`, without torchvision, which has no CPU build for every torch.

EdgeTAM's backbone is timm's, of which only RepViT is imported, past timm's own `__init__`, which imports every model.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from samray.sam.spec import ModelSpec, RepVitSpec, RopeVitSpec

TIMM = "timm==1.0.31"


@functools.cache
def timm_repvit() -> Any:
    """timm's module of RepViT; the test is skipped if timm is not installed."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        pytest.skip(f"NOTHING is compared with timm, which is not installed: pip install --no-deps {TIMM}")
    root = Path(found.origin).parent
    packages = {"timm": root, "timm.models": root / "models"}
    stand_ins = {name: types.ModuleType(name) for name in (*packages, "timm.data", "torchvision", "torchvision.ops")}
    for name, folder in packages.items():
        stand_ins[name].__path__ = [str(folder)]
    vars(stand_ins["timm"])["__version__"] = TIMM
    vars(stand_ins["timm.data"]).update(IMAGENET_DEFAULT_MEAN=None, IMAGENET_DEFAULT_STD=None)
    for name, taken in (
        ("torchvision.ops.misc", {"FrozenBatchNorm2d": torch.nn.Module}),
        ("torchvision.models", {}),
        ("torchvision.models.feature_extraction", {"create_feature_extractor": None, "get_graph_node_names": None}),
    ):
        stand_ins[name] = types.ModuleType(name)
        vars(stand_ins[name]).update(taken)
    with mock.patch.dict(sys.modules, stand_ins):
        return importlib.import_module("timm.models.repvit")


def _transformers() -> Any:
    return pytest.importorskip("transformers", reason="NOTHING is compared with transformers, which is not installed")


def _sizes(spec: ModelSpec) -> list[list[int]]:
    return [[spec.grid * scale] * 2 for scale in (4, 2, 1)]


def transformers_edgetam(spec: ModelSpec) -> Any:
    """transformers' EdgeTamModel of this row, with weights as it makes them."""
    transformers = _transformers()
    repvit = timm_repvit()
    wrapper = importlib.import_module("transformers.models.timm_wrapper.modeling_timm_wrapper")
    encoder = spec.encoder
    assert isinstance(encoder, RepVitSpec)
    backbone = repvit._create_repvit(
        "repvit_m1", features_only=True, out_indices=(0, 1, 2, 3), embed_dim=encoder.dims, depth=encoder.depths,
        legacy=True,
    )  # fmt: skip
    config = transformers.EdgeTamConfig(
        vision_config={
            "backbone_config": transformers.TimmWrapperConfig(
                architecture="repvit_m1", model_args={"features_only": True}
            ),
            "backbone_channel_list": list(encoder.dims[::-1]),
            "backbone_feature_sizes": _sizes(spec),
        },
        prompt_encoder_config={"image_size": spec.image_size},
    )
    config._attn_implementation = "eager"
    with (
        mock.patch.object(wrapper, "requires_backends"),
        mock.patch.object(wrapper, "_create_timm_model_with_error_handling", return_value=backbone),
    ):
        return transformers.EdgeTamModel(config).eval()


def transformers_sam3_tracker(spec: ModelSpec) -> Any:
    """transformers' Sam3TrackerModel of this row, with weights as it makes them; its plain attention."""
    transformers = _transformers()
    encoder = spec.encoder
    assert isinstance(encoder, RopeVitSpec)
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": encoder.dim,
        "intermediate_size": encoder.mlp_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.num_heads,
        "image_size": spec.image_size,
        "patch_size": encoder.patch,
        "window_size": encoder.window,
        "global_attn_indexes": list(encoder.global_blocks),
        "pretrain_image_size": encoder.positions * encoder.patch,
    }
    config = transformers.Sam3TrackerConfig(
        vision_config={
            "model_type": "sam3_vision_model",
            "backbone_config": backbone,
            "backbone_feature_sizes": _sizes(spec),
        },
        prompt_encoder_config={"image_size": spec.image_size, "patch_size": encoder.patch},
    )
    config._attn_implementation = "eager"
    return transformers.Sam3TrackerModel(config).eval()
