"""Published implementations of the later families, without torchvision, which has no CPU build for every torch.

Only a few modules of timm and of SAM-HQ's own package are imported, without their `__init__`, which would import all.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from samray.sam.spec import ModelSpec, RepVitSpec, RopeVitSpec

TIMM = "timm==1.0.31"
SAM_HQ = "segment_anything_hq==0.3"


@contextlib.contextmanager
def installed(requirement: str, folder: Path) -> Iterator[None]:
    """A package without its dependencies, if it is not installed: in this folder, for as long as the block runs.

    The test is skipped if it cannot be installed.
    """
    if importlib.util.find_spec(requirement.partition("==")[0]) is not None:
        yield
        return
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(folder),
            requirement,
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"{requirement} cannot be installed, so NOTHING is compared with it: {done.stderr[-500:]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def _past_init(package: str, parts: tuple[str, ...], modules: tuple[str, ...]) -> list[Any]:
    """Modules of an installed package, without running the `__init__` of the package and of these parts of it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    stand_ins = {name: types.ModuleType(name) for name in (package, *(f"{package}.{part}" for part in parts))}
    for name, module in stand_ins.items():
        module.__path__ = [str(Path(spec.origin).parent / name.partition(".")[2].replace(".", "/"))]
    vars(stand_ins[package])["__version__"] = ""
    with mock.patch.dict(sys.modules, stand_ins | _taken()):
        return [importlib.import_module(f"{package}.{module}") for module in modules]


def _taken() -> dict[str, types.ModuleType]:
    """Stand-ins for what is imported and not used."""
    modules: dict[str, dict[str, Any]] = {
        "timm.data": {"IMAGENET_DEFAULT_MEAN": None, "IMAGENET_DEFAULT_STD": None},
        "torchvision": {},
        "torchvision.ops": {},
        "torchvision.ops.misc": {"FrozenBatchNorm2d": torch.nn.Module},
        "torchvision.models": {},
        "torchvision.models.feature_extraction": {"create_feature_extractor": None, "get_graph_node_names": None},
    }
    stand_ins = {}
    for name, taken in modules.items():
        stand_ins[name] = types.ModuleType(name)
        vars(stand_ins[name]).update(taken)
    return stand_ins


def authors_decoder(spec: ModelSpec) -> Any:
    """The mask decoder of SAM-HQ's authors for this row."""
    decoder, transformer = _past_init(
        "segment_anything_hq", ("modeling",), ("modeling.mask_decoder_hq", "modeling.transformer")
    )
    two_way = transformer.TwoWayTransformer(
        depth=2, embedding_dim=spec.embed_dim, mlp_dim=spec.decoder_mlp_dim, num_heads=spec.decoder_heads
    )
    made = decoder.MaskDecoderHQ(
        transformer_dim=spec.embed_dim,
        transformer=two_way,
        iou_head_hidden_dim=spec.iou_hidden_dim,
        vit_dim=spec.decoder.hq_dim,
    )
    return made.eval()


def _transformers() -> Any:
    return pytest.importorskip("transformers", reason="NOTHING is compared with transformers, which is not installed")


def _sizes(spec: ModelSpec) -> list[list[int]]:
    return [[spec.grid * scale] * 2 for scale in (4, 2, 1)]


def transformers_edgetam(spec: ModelSpec) -> Any:
    """transformers' EdgeTamModel of this row, with weights as it makes them."""
    transformers = _transformers()
    (repvit,) = _past_init("timm", ("models",), ("models.repvit",))
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
