"""The published mask generator, `segment-anything` 1.0, runnable without torchvision.

It takes four functions from torchvision, which has no CPU build for every torch: stand-ins written here, from their
documentation, are in place while it is imported and gone afterwards (transformers looks for torchvision too).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from samray.sam.formats import meta_name, to_meta_names
from samray.sam.spec import HieraSpec, ModelSpec, TinyVitSpec, VitSpec


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
    """The package, with the stand-ins; the test is skipped if it is not installed."""
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
    """The published Sam at any size, with these weights (strictly all of them). `vit_t`: with MobileSAM's encoder."""
    segment_anything()
    modeling = importlib.import_module("segment_anything.modeling")
    sam = modeling.Sam(
        image_encoder=_image_encoder(spec, modeling),
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
    missing, unexpected = sam.load_state_dict(dict(state), strict=False)
    # Of MobileSAM's encoder the classifier is never run, and its table of offsets is made by itself.
    idle = re.compile(r"^image_encoder\.(norm_head|head)\.|\.attention_bias_idxs$")
    assert [key for key in (*missing, *unexpected) if not idle.search(key)] == []
    return sam.eval().requires_grad_(False)


def _image_encoder(spec: ModelSpec, modeling: Any) -> Any:
    encoder = spec.encoder
    if isinstance(encoder, TinyVitSpec):
        return build_tiny_vit(encoder, spec.image_size)
    assert isinstance(encoder, VitSpec)
    return modeling.ImageEncoderViT(
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
    )


def build_tiny_vit(encoder: TinyVitSpec, image_size: int) -> Any:
    """MobileSAM's encoder with a row's widths, depths, heads and windows; strides and neck are its own."""
    return published_tiny_vit().TinyViT(
        img_size=image_size,
        embed_dims=list(encoder.dims),
        depths=list(encoder.depths),
        num_heads=list(encoder.num_heads),
        window_sizes=list(encoder.windows),
        drop_path_rate=0.0,
    )


@functools.cache
def published_tiny_vit() -> types.ModuleType:
    """MobileSAM's module of the encoder alone. It takes four names from timm, all idle in evaluation: stand-ins do."""
    layers, registry = types.ModuleType("timm.models.layers"), types.ModuleType("timm.models.registry")
    layers.__dict__.update(DropPath=nn.Identity, to_2tuple=lambda x: (x, x), trunc_normal_=nn.init.trunc_normal_)
    registry.__dict__["register_model"] = lambda function: function
    package = importlib.util.find_spec("mobile_sam")
    if package is None or not package.submodule_search_locations:
        pytest.skip(
            "NOTHING is compared with MobileSAM, which is not installed: pip install -c constraints.txt '.[test]'"
        )
    path = Path(package.submodule_search_locations[0]) / "modeling" / "tiny_vit_sam.py"
    spec = importlib.util.spec_from_file_location("_published_tiny_vit", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in (
            ("timm", types.ModuleType("timm")),
            ("timm.models", types.ModuleType("timm.models")),
            ("timm.models.layers", layers),
            ("timm.models.registry", registry),
        ):
            patch.setitem(sys.modules, name, stand_in)
        spec.loader.exec_module(module)
    return module


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


# --- transformers --------------------------------------------------------------------------------------------------


def transformers_sam(spec: ModelSpec) -> Any:
    """transformers' SamModel or SamHQModel of this row, with weights as it makes them; its plain attention, not a fused
    one."""
    transformers = pytest.importorskip(
        "transformers", reason="NOTHING is compared with transformers, which is not installed"
    )
    encoder = spec.encoder
    assert isinstance(encoder, VitSpec)
    kind, decoder = ("SamHQ", {"vit_dim": spec.decoder.hq_dim}) if spec.decoder.hq_dim else ("Sam", {})
    config = getattr(transformers, f"{kind}Config")(
        mask_decoder_config=decoder,
        vision_config={
            "hidden_size": encoder.dim,
            "num_hidden_layers": encoder.depth,
            "num_attention_heads": encoder.num_heads,
            "global_attn_indexes": list(encoder.global_blocks),
            "image_size": spec.image_size,
            "mlp_dim": encoder.dim * 4,
        },
        prompt_encoder_config={"image_size": spec.image_size},
    )
    config._attn_implementation = "eager"
    return getattr(transformers, f"{kind}Model")(config).eval()


def transformers_sam2(spec: ModelSpec, kind: str = "Sam2") -> Any:
    """transformers' Sam2Model of this row, with weights as it makes them; its plain attention, not a fused one.

    kind: "Sam2Video" is the model that Hugging Face's files of SAM 2 hold.
    """
    transformers = pytest.importorskip(
        "transformers", reason="NOTHING is compared with transformers, which is not installed"
    )
    encoder = spec.encoder
    assert isinstance(encoder, HieraSpec)
    stages = [2**i for i in range(len(encoder.depths))]
    dims = [encoder.dim * width for width in stages]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": encoder.dim,
        "num_attention_heads": encoder.num_heads,
        "image_size": [spec.image_size, spec.image_size],
        "blocks_per_stage": list(encoder.depths),
        "embed_dim_per_stage": dims,
        "num_attention_heads_per_stage": [encoder.num_heads * width for width in stages],
        "window_size_per_stage": list(encoder.windows),
        "global_attention_blocks": list(encoder.global_blocks),
        "window_positional_embedding_background_size": [encoder.positions, encoder.positions],
    }
    config = getattr(transformers, f"{kind}Config")(
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_config": backbone,
            "backbone_channel_list": dims[::-1],
            "backbone_feature_sizes": [[spec.grid * scale] * 2 for scale in (4, 2, 1)],
            "fpn_hidden_size": spec.embed_dim,
        },
        prompt_encoder_config={"hidden_size": spec.embed_dim, "image_size": spec.image_size},
        mask_decoder_config={
            "hidden_size": spec.embed_dim,
            "mlp_dim": spec.decoder_mlp_dim,
            "num_attention_heads": spec.decoder_heads,
            "iou_head_hidden_dim": spec.iou_hidden_dim,
        },
    )
    config._attn_implementation = "eager"
    return getattr(transformers, f"{kind}Model")(config).eval()


def transformers_sam2_with(spec: ModelSpec, state: Mapping[str, Tensor]) -> Any:
    """transformers' Sam2Model with these weights (samray's names) and its own choice of attention."""
    model = transformers_sam2(spec)
    model.set_attn_implementation("sdpa")
    tied = model.prompt_encoder.shared_embedding.positional_embedding
    with torch.no_grad():
        tied.copy_(model.shared_image_embedding.positional_embedding)
        # Views of the model's own tensors, under samray's names.
        for name, value in to_meta_names(dict(model.state_dict()), Path("transformers")).items():
            value.copy_(state[name])
        tied.copy_(model.shared_image_embedding.positional_embedding)
    return model.requires_grad_(False)


def transformers_pipeline(spec: ModelSpec, state: Mapping[str, Tensor], device: str) -> Any:
    """Its "mask-generation" pipeline with these weights (Meta's names) and its own choice of attention.

    For this process only: what it takes from torchvision is replaced by stand-ins, for good.
    """
    import transformers
    from transformers.models.sam import image_processing_pil_sam as processing

    model = transformers_sam(spec)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        for key, value in model.state_dict().items():
            tied = key.replace("prompt_encoder.shared_embedding.", "shared_image_embedding.")  # the same tensor twice
            value.copy_(state[meta_name(tied)])
    for name, functions in _STAND_INS.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(functions)
    processor = processing.SamImageProcessorPil()
    processor.post_process_for_mask_generation = processing._post_process_for_mask_generation
    return transformers.pipeline(
        "mask-generation", model=model.requires_grad_(False), image_processor=processor, device=device
    )
