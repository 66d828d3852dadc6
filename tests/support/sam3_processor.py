"""transformers' own `Sam3Processor`, runnable without torchvision, which has no CPU build for every torch.

Its image processor takes three functions from torchvision: stand-ins written here, from their documentation.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch.nn.functional as F
from torch import Tensor

from samray.storage.strict_json import parse_json


def _resize(image: Tensor, size: tuple[int, int], *, interpolation: str, antialias: bool) -> Tensor:
    """`torchvision.transforms.v2.functional.resize` of uint8, as it is on a CPU with AVX2."""
    return F.interpolate(image, size, mode=interpolation, antialias=antialias, align_corners=False)


def _normalize(image: Tensor, mean: Tensor, std: Tensor, *, inplace: bool) -> Tensor:
    return (image - mean[:, None, None]) / std[:, None, None]


def sam3_processor(folder: Path) -> Any:
    """The processor of a network's folder, as `Sam3Processor.from_pretrained` makes it where torchvision is."""
    from transformers import AutoTokenizer, image_processing_backends
    from transformers.image_utils import PILImageResampling
    from transformers.models.sam3.processing_sam3 import Sam3Processor

    boxes = types.ModuleType("torchvision.ops.boxes")
    boxes.batched_nms = None  # type: ignore[attr-defined]  # of another function
    names = ("torchvision", "torchvision.ops")
    stand_ins = {name: types.ModuleType(name) for name in names} | {boxes.__name__: boxes}
    with mock.patch.dict(sys.modules, stand_ins):
        module = importlib.import_module("transformers.models.sam3.image_processing_sam3")
    functions = types.SimpleNamespace(
        resize=_resize, normalize=_normalize, grayscale_to_rgb=lambda image: image,
        InterpolationMode=types.SimpleNamespace(BILINEAR="bilinear", LANCZOS="lanczos"),
    )  # fmt: skip
    backend: Any = image_processing_backends
    backend.tvF, backend.pil_torch_interpolation_mapping = functions, {PILImageResampling.BILINEAR: "bilinear"}
    settings = parse_json((folder / "processor_config.json").read_bytes())["image_processor"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Sam3Processor(module.Sam3ImageProcessor(**settings), tokenizer)
