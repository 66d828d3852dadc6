"""The published mask generator, `segment-anything` 1.0, runnable without torchvision.

It takes four functions from torchvision, which has no CPU build for every torch: stand-ins written here, from their
documentation, are in place while it is imported and gone afterwards (transformers looks for torchvision too).
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from samray.sam.spec import ModelSpec, VitSpec


def plain_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """`torchvision.ops.nms` as documented: all pairs first, then greedily from the best score down."""
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    intersection = (high - low).clamp(min=0).prod(dim=2)
    areas = _box_area(boxes)
    overlaps = (intersection / (areas[:, None] + areas[None, :] - intersection)).double() > iou_threshold
    kept: list[int] = []
    for candidate in scores.argsort(descending=True, stable=True).tolist():
        if not overlaps[candidate, kept].any():
            kept.append(candidate)
    return torch.tensor(kept, dtype=torch.int64)


def _batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    assert not idxs.any(), "the generator has one category"
    return plain_nms(boxes, scores, iou_threshold)


def _box_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


_STAND_INS: dict[str, dict[str, Callable[..., Any]]] = {
    "torchvision": {},
    "torchvision.ops": {},
    "torchvision.ops.boxes": {"batched_nms": _batched_nms, "box_area": _box_area},
    "torchvision.transforms": {},
    "torchvision.transforms.functional": {"resize": _resize, "to_pil_image": Image.fromarray},
}


@functools.cache
def segment_anything() -> types.ModuleType:
    """The package, with the stand-ins; the test is skipped where it is not installed."""
    before = {name: sys.modules.pop(name, None) for name in _STAND_INS}
    for name, functions in _STAND_INS.items():
        module = types.ModuleType(name)
        vars(module).update(functions)
        sys.modules[name] = module
    try:
        return importlib.import_module("segment_anything")
    except ModuleNotFoundError as error:
        if error.name != "segment_anything":
            raise
        pytest.skip(
            "NOTHING is compared with segment-anything, which is not installed: pip install segment-anything==1.0"
        )
    finally:
        for name, module_before in before.items():
            del sys.modules[name]
            if module_before is not None:
                sys.modules[name] = module_before


def build_reference(spec: ModelSpec, state: Mapping[str, Tensor]) -> Any:
    """The published Sam at any size, with these weights (strictly all of them)."""
    segment_anything()
    modeling = importlib.import_module("segment_anything.modeling")
    encoder = spec.encoder
    assert isinstance(encoder, VitSpec)
    sam = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=spec.image_size,
            patch_size=encoder.patch,
            embed_dim=encoder.dim,
            depth=encoder.depth,
            num_heads=encoder.num_heads,
            out_chans=spec.embed_dim,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=encoder.window,
            global_attn_indexes=encoder.global_blocks,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=spec.embed_dim,
            image_embedding_size=(spec.grid, spec.grid),
            input_image_size=(spec.image_size, spec.image_size),
            mask_in_chans=spec.mask_in_chans,
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer_dim=spec.embed_dim,
            transformer=modeling.TwoWayTransformer(
                depth=2,
                embedding_dim=spec.embed_dim,
                num_heads=spec.decoder_heads,
                mlp_dim=spec.decoder_mlp_dim,
            ),
            iou_head_hidden_dim=spec.iou_hidden_dim,
        ),
    )
    sam.load_state_dict(dict(state), strict=True)
    return sam.eval().requires_grad_(False)


def reference_masks(
    sam: Any, image: NDArray[np.uint8], settings: Mapping[str, Any], predictor: Any = None
) -> list[Any]:
    """What the published generator returns for one image, segmentations as COCO RLE."""
    generator = segment_anything().SamAutomaticMaskGenerator(sam, output_mode="coco_rle", **settings)
    if predictor is not None:
        generator.predictor = predictor
    with torch.no_grad():
        masks: list[Any] = generator.generate(image)
    return masks
