"""SAM 2 as published, `sam2` 1.1, runnable without torchvision, hydra and iopath.

Stand-ins take the place of what it imports from them; models are built from its own YAML files. Installed by
`SAM2_BUILD_CUDA=0 pip install --no-deps --no-build-isolation sam2==1.1.0`: its dependencies would bring torchvision.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from jobs.benchmarks.reference import _batched_nms, _box_area
from samray.sam.layouts import META_SAM2, renamed
from samray.sam.spec import HieraSpec, ModelSpec


class _ToTensor:
    """`torchvision.transforms.ToTensor` of uint8 arrays, as documented."""

    def __call__(self, image: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class _Resize(nn.Module):
    """`torchvision.transforms.Resize` of tensors, as documented: bilinear, with antialiasing."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        return F.interpolate(image[None], self.size, mode="bilinear", align_corners=False, antialias=True)[0]


class _Normalize(nn.Module):
    """`torchvision.transforms.Normalize`, as documented."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


class _GlobalHydra:
    @staticmethod
    def instance() -> Any:
        return types.SimpleNamespace(is_initialized=lambda: True)


def _nothing(*_: Any, **__: Any) -> None:
    pass


_STAND_INS: dict[str, dict[str, Callable[..., Any] | object]] = {
    "torchvision": {},
    "torchvision.ops": {},
    "torchvision.ops.boxes": {"batched_nms": _batched_nms, "box_area": _box_area},
    "torchvision.transforms": {"ToTensor": _ToTensor, "Resize": _Resize, "Normalize": _Normalize},
    "hydra": {"initialize_config_module": _nothing},
    "hydra.core": {},
    "hydra.core.global_hydra": {"GlobalHydra": _GlobalHydra},
    "iopath": {},
    "iopath.common": {},
    "iopath.common.file_io": {"g_pathmgr": None},
}


@functools.cache
def sam2() -> types.ModuleType:
    """The module of the published generator; the test is skipped if the package is not installed."""
    if importlib.util.find_spec("sam2") is None:
        pytest.skip(
            "NOTHING is compared with sam2, which is not installed: "
            "SAM2_BUILD_CUDA=0 pip install --no-deps --no-build-isolation sam2==1.1.0"
        )
    before = {name: sys.modules.pop(name, None) for name in _STAND_INS}
    for name, functions in _STAND_INS.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(functions)
    try:
        module = importlib.import_module("sam2.automatic_mask_generator")
        for part in ("memory_attention", "memory_encoder", "position_encoding", "backbones.hieradet"):
            importlib.import_module(f"sam2.modeling.{part}")
    finally:
        for name, module_before in before.items():
            del sys.modules[name]
            if module_before is not None:
                sys.modules[name] = module_before
    return module


def build_sam2(spec: ModelSpec, config: str = "sam2.1/sam2.1_hiera_t") -> Any:
    """The published SAM 2 with a row's encoder and input size, its own weights, from one of its YAML files.

    As `sam2.build_sam.build_sam2` with its default post-processing, but for video, which has its parts and is not run.
    """
    package = Path(str(sam2().__file__)).parent
    model = yaml.safe_load((package / "configs" / f"{config}.yaml").read_text())["model"]
    encoder = spec.encoder
    assert isinstance(encoder, HieraSpec)
    model["image_encoder"]["trunk"] |= {
        "embed_dim": encoder.dim,
        "num_heads": encoder.num_heads,
        "stages": list(encoder.depths),
        "global_att_blocks": list(encoder.global_blocks),
        "window_pos_embed_bkg_spatial_size": [encoder.positions] * 2,
        "window_spec": list(encoder.windows),
    }
    widths = [encoder.dim * 2**stage for stage in range(len(encoder.depths))]
    model["image_encoder"]["neck"]["backbone_channel_list"] = widths[::-1]
    model |= {"image_size": spec.image_size, "compile_image_encoder": False}
    model["sam_mask_decoder_extra_args"] = {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    }
    return _instantiate(model).eval().requires_grad_(False)


def sam2_state(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published model's state with samray's weights (its names) in place of its own; those for video stay.

    Raises: KeyError if a weight of the published model's image part is missing.
    """
    published = model.state_dict()
    return {
        key: value if META_SAM2.unused.search(key) else state[renamed(key, META_SAM2.renames)]
        for key, value in published.items()
    }


def _instantiate(node: Any) -> Any:
    """What a YAML file describes: `_target_` is a class, the rest its arguments."""
    if isinstance(node, str) and node.startswith("1e-"):
        return float(node)  # PyYAML takes it for a string
    if not isinstance(node, dict):
        return node
    arguments = {key: _instantiate(value) for key, value in node.items() if key != "_target_"}
    if "_target_" not in node:
        return arguments
    module, _, name = node["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**arguments)


def sam2_predictor(model: Any, spec: ModelSpec, **settings: Any) -> Any:
    """The published predictor, for any input size."""
    sam2()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.jit, "script", lambda module: module)  # the stand-ins are plain Python
        predictor = importlib.import_module("sam2.sam2_image_predictor").SAM2ImagePredictor(model, **settings)
    predictor._bb_feat_sizes = [(spec.grid * scale,) * 2 for scale in (4, 2, 1)]
    return predictor


def sam2_masks(model: Any, spec: ModelSpec, image: NDArray[np.uint8], settings: Mapping[str, Any]) -> list[Any]:
    """What the published generator returns for one image, segmentations as COCO RLE."""
    masks: list[Any] = sam2_generator(model, spec, settings).generate(image)
    return masks


def sam2_generator(model: Any, spec: ModelSpec, settings: Mapping[str, Any]) -> Any:
    """The published generator, for any input size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sam2(), "SAM2ImagePredictor", lambda model, **options: sam2_predictor(model, spec, **options))
        return sam2().SAM2AutomaticMaskGenerator(model, output_mode="coco_rle", **settings)
