"""The networks against the published implementations, with the same seeded random weights, float32, on the CPU.

Bound: the largest absolute difference is at most 1e-4 of the largest absolute value of what is compared ("relative to
logit scale"); about 2e-6 is what comes out. What is covered:

- Encoders against `transformers`: ViT-B with all of its 12 blocks at 512 pixels, and at the true 1024 pixels (a grid of
  64, padded to five windows of 14) with one windowed and one global block; ViT-L and ViT-H with their true widths,
  heads, windows and necks at 512 pixels, also two blocks. What further blocks add is the same arithmetic again.
- MobileSAM's TinyViT whole at 1024 pixels, and the embedded model's variant of it, against MobileSAM's own module.
- Prompt encoder and decoder at their true width (256 channels, 8 heads): points, boxes, masks and their combinations,
  multimask and single mask, batches of images, against `transformers`, and against `segment-anything` with its pre- and
  postprocessing around it.

`transformers` gives the decoder's layer norms an epsilon of 1e-6 where Meta's code has 1e-5; samray follows Meta. The
bound holds against both. `test_decoder_algebra.py` holds the decoder against a textbook form.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jobs.benchmarks.reference import build_reference, build_tiny_vit, published_tiny_vit, transformers_sam
from samray.sam.checkpoints import build, load_model
from samray.sam.formats import read_state_dict, to_meta_names
from samray.sam.sam import Sam
from samray.sam.spec import MODELS, ModelSpec, TinyVitSpec
from tests.parity.common import assert_close, pixels_of, prompts_of, randomize, smaller

# --- transformers --------------------------------------------------------------------------------------------------


def hf_model(spec: ModelSpec, seed: int) -> Any:
    """transformers' SamModel of this row with seeded weights; its plain attention, not a fused one."""
    model = transformers_sam(spec)
    randomize(model, seed)
    with torch.no_grad():  # the tied copy
        tied = model.prompt_encoder.shared_embedding.positional_embedding
        tied.copy_(model.shared_image_embedding.positional_embedding)
    return model


def from_hf(spec: ModelSpec, model: Any) -> Sam:
    return build(spec, to_meta_names(dict(model.state_dict()), Path("transformers")), "transformers")


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "image_size", "depth", "batch"),
    [("vit_b", 512, 12, 1), ("vit_b", 1024, 2, 1), ("vit_l", 512, 2, 2), ("vit_h", 512, 2, 2)],
)
def test_encoders_against_transformers(name: str, image_size: int, depth: int, batch: int) -> None:
    spec = smaller(name, image_size, depth)
    reference = hf_model(spec, seed=1)
    pixels = pixels_of(spec, batch)
    assert_close(from_hf(spec, reference).encode_images(pixels), reference.get_image_embeddings(pixels))


@pytest.fixture(scope="module")
def small() -> ModelSpec:
    return smaller("vit_b", image_size=256)


@pytest.fixture(scope="module")
def hf_small(small: ModelSpec) -> Any:
    return hf_model(small, seed=3)


@pytest.fixture(scope="module")
def our_small(small: ModelSpec, hf_small: Any) -> Sam:
    return from_hf(small, hf_small)


@pytest.fixture(scope="module")
def embedding(our_small: Sam) -> Tensor:
    with torch.no_grad():
        return our_small.encode_images(pixels_of(our_small.spec, 1))


KINDS = ["points", "padded", "boxes", "points+boxes", "masks", "points+masks", "boxes+masks", "points+boxes+masks"]


@torch.no_grad()
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("kinds", KINDS)
def test_prompts_against_transformers(
    kinds: str, multimask: bool, small: ModelSpec, our_small: Sam, hf_small: Any, embedding: Tensor
) -> None:
    num = 3
    prompts = prompts_of(kinds, num, small.image_size, small.grid)
    # transformers takes a mask per image, so its prompts become a batch of one prompt each.
    points, labels, boxes = prompts.get("points"), prompts.get("labels"), prompts.get("boxes_xyxy")
    expected = hf_small(
        image_embeddings=embedding.expand(num, -1, -1, -1),
        input_points=None if points is None else points[:, None],
        input_labels=None if labels is None else labels[:, None],
        input_boxes=None if boxes is None else boxes[:, None],
        input_masks=prompts.get("mask_input"),
        multimask_output=multimask,
    )
    logits, iou = our_small.predict(embedding, **prompts, multimask=multimask)
    assert_close(logits, expected.pred_masks[:, 0])
    assert_close(iou, expected.iou_scores[:, 0])


@torch.no_grad()
def test_prompt_tokens_against_transformers(small: ModelSpec, our_small: Sam, hf_small: Any) -> None:
    """The prompt encoder by itself, so that a fault there is not looked for in the decoder."""
    encoder = our_small.prompt_encoder
    prompts = prompts_of("padded+boxes+masks", 3, small.image_size, small.grid)
    points, labels, boxes = prompts["points"][None], prompts["labels"][None], prompts["boxes_xyxy"][None]
    expected_points, _ = hf_small.get_prompt_embeddings(points, labels, None, None)
    assert_close(encoder.encode_points(points, labels), expected_points)
    expected_boxes, expected_masks = hf_small.get_prompt_embeddings(None, None, boxes, prompts["mask_input"])
    assert_close(encoder.encode_boxes(boxes), expected_boxes)
    assert_close(encoder.encode_masks(prompts["mask_input"]), expected_masks)
    expected_both, _ = hf_small.get_prompt_embeddings(points, labels, boxes, None)
    ours = torch.cat([encoder.encode_points(points, labels, pad=False), encoder.encode_boxes(boxes)], dim=2)
    assert_close(ours, expected_both)
    expected_dense = hf_small.get_image_wide_positional_embeddings()[0].flatten(1).T
    assert_close(encoder.dense_positions(), expected_dense)


@torch.no_grad()
def test_batches_of_images_against_transformers(small: ModelSpec, our_small: Sam, hf_small: Any) -> None:
    """Two images with three prompts each, in one call."""
    pixels = pixels_of(small, 2, seed=5)
    prompts = prompts_of("points", 6, small.image_size, small.grid)
    points, labels = prompts["points"].view(2, 3, 3, 2), prompts["labels"].view(2, 3, 3)
    expected = hf_small(pixel_values=pixels, input_points=points, input_labels=labels, multimask_output=True)
    embeddings = our_small.encode_images(pixels)
    logits, iou = our_small.decode_batch(embeddings, our_small.prompt_encoder.encode_points(points, labels))
    assert_close(logits[:, :, 1:], expected.pred_masks)
    assert_close(iou[:, :, 1:], expected.iou_scores)
    context = our_small.prepare_decoder(embeddings)
    for i in range(2):
        decoded = our_small.decode_points(context[i], points[i], labels[i])
        assert_close(decoded.logits.view(3, 3, 4 * small.grid, -1), expected.pred_masks[i])


@torch.no_grad()
@pytest.mark.parametrize("file_name", ["model.safetensors", "pytorch_model.bin"])
def test_a_hugging_face_folder_loads(
    file_name: str, small: ModelSpec, our_small: Sam, hf_small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `save_pretrained` writes it (the tied positions once), and as the older format holds it (twice)."""
    if file_name == "model.safetensors":
        hf_small.save_pretrained(tmp_path)
    else:
        torch.save(hf_small.state_dict(), tmp_path / file_name)
    monkeypatch.setitem(MODELS, "small", small)
    loaded = load_model("small", tmp_path).state_dict()
    assert loaded.keys() == our_small.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in our_small.state_dict().items())


# --- segment-anything ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize(("height", "width"), [(200, 256), (256, 97)])
def test_whole_model_against_segment_anything(height: int, width: int, multimask: bool, our_small: Sam) -> None:
    """From uint8 pixels to logits in the original frame. Meta's code takes our state dict as its own, strictly."""
    spec = our_small.spec
    reference = build_reference(spec, our_small.state_dict())
    # Its longest side is the model's already: resizing is Pillow's in both, and the generator's parity test covers it.
    image = np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)
    original_hw = (height * 2 + 1, width * 2)
    prompts = prompts_of("points+boxes", 3, min(height, width), spec.grid)
    expected = reference(
        [
            {
                "image": torch.from_numpy(image).permute(2, 0, 1),
                "original_size": original_hw,
                "point_coords": prompts["points"],
                "point_labels": prompts["labels"],
                "boxes": prompts["boxes_xyxy"],
            }
        ],
        multimask_output=multimask,
    )[0]
    pixels, sizes = our_small.preprocess([image])
    assert sizes == [(height, width)]
    logits, iou = our_small.predict(our_small.encode_images(pixels), **prompts, multimask=multimask)
    assert_close(logits, expected["low_res_logits"])
    assert_close(iou, expected["iou_predictions"])

    masks = our_small.postprocess(expected["low_res_logits"].flatten(0, 1), (height, width), original_hw) > 0
    assert torch.equal(masks, expected["masks"].flatten(0, 1)), "the same logits give the same masks, bit by bit"
    assert 0.01 < masks.float().mean().item() < 0.99


# --- MobileSAM's TinyViT -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mobile_sam() -> ModuleType:
    return published_tiny_vit()


@torch.no_grad()
def test_tiny_vit_in_full(mobile_sam: ModuleType, tmp_path: Path) -> None:
    """MobileSAM's encoder with its classifier in a `.pt` file, read back as its checkpoint would be."""
    spec = MODELS["vit_t"]
    reference = mobile_sam.TinyViT(
        img_size=1024,
        embed_dims=[64, 128, 160, 320],
        depths=[2, 2, 6, 2],
        num_heads=[2, 4, 5, 10],
        window_sizes=[7, 7, 14, 7],
        drop_path_rate=0.0,
    )
    randomize(reference, seed=8)
    reference.eval()  # after the weights: this is when it tabulates its attention biases
    full = Sam(spec)
    state = {key: value for key, value in full.state_dict().items() if not key.startswith("image_encoder.")}
    state |= {f"image_encoder.{key}": value for key, value in reference.state_dict().items()}
    torch.save(state, tmp_path / "mobile_sam.pt")
    model = build(spec, read_state_dict(tmp_path / "mobile_sam.pt"), "MobileSAM")
    pixels = pixels_of(spec, 1)
    assert_close(model.encode_images(pixels), reference(pixels))


@torch.no_grad()
def test_embedded_model_s_encoder() -> None:
    """The `tiny` row: three stages and a narrower neck. Its fine features, which MobileSAM has not, are left out."""
    spec = MODELS["tiny"]
    assert isinstance(spec.encoder, TinyVitSpec)
    encoder = replace(spec.encoder, fine_features=False)
    spec = replace(spec, encoder=encoder)
    reference = build_tiny_vit(encoder, spec.image_size)
    # MobileSAM writes its strides, grids and neck into the code for its own sizes.
    for i, stride in enumerate(encoder.strides):
        reference.layers[i].downsample.conv2.c.stride = (stride, stride)
    sides = [spec.image_size // 4]
    for stride in encoder.strides:
        sides.append(sides[-1] // stride)
    for stage, side in zip(reference.layers, sides, strict=True):
        for part in stage.modules():
            if hasattr(part, "input_resolution"):
                part.input_resolution = (side, side)
    c, norm = spec.embed_dim, type(reference.neck[1])
    reference.neck = nn.Sequential(
        nn.Conv2d(encoder.dims[-1], c, 1, bias=False), norm(c), nn.Conv2d(c, c, 3, padding=1, bias=False), norm(c)
    )
    randomize(reference, seed=9)
    reference.eval()
    model = Sam(spec).eval()
    model.image_encoder.load_state_dict({k: v for k, v in reference.state_dict().items() if "head" not in k})
    pixels = pixels_of(spec, 2)
    x = reference.patch_embed(pixels)
    for stage in reference.layers:
        x = stage(x)
    expected = reference.neck(x.transpose(1, 2).unflatten(2, (spec.grid, spec.grid)))
    assert_close(model.encode_images(pixels), expected)
