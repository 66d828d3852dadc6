"""SAM-HQ's networks against `transformers` 5.23 with the same seeded random weights, float32, on the CPU.

Bound as in `test_networks.py`: the largest difference is at most 1e-4 of the largest value. Embedding and early
features of ViT-B, ViT-L and ViT-H with their true widths at 256 pixels, with three blocks; with `SAMRAY_FULL_SIZES=1`,
all blocks at 1024 pixels. Prompts at the true width of prompt encoder and decoder.

Where `transformers` differs from the authors' `segment_anything_hq`, samray follows the authors, whose own decoder the
last test compares with samray's:

- `transformers` 5.23 upscales the image tokens that go into the two-way transformer, not those that come out of it. The
  tests put the latter in their place.
- an ambiguous prompt has one mask, the one with the highest predicted IoU; `transformers` gives all three, ordered.

`transformers` has no light SAM-HQ: its TinyViT is compared with MobileSAM's own module; its decoder is the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.benchmarks.reference import build_tiny_vit, transformers_sam
from jobs.benchmarks.reference_families import SAM_HQ, authors_decoder, installed
from samray.sam.checkpoints import load_model
from samray.sam.image_encoder import ImageEncoderViT
from samray.sam.sam import Sam
from samray.sam.spec import MODELS, ModelSpec, TinyVitSpec, VitSpec
from samray.sam.tiny_vit import TinyViT
from tests.parity.common import (
    assert_close,
    from_transformers,
    pixels_of,
    prompts_of,
    randomize,
    smaller,
    tie_positions,
)


@pytest.fixture(scope="module", autouse=True)
def _authors_package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """segment_anything_hq in a folder of its own: it would bring torchvision."""
    with installed(SAM_HQ, tmp_path_factory.mktemp("sam_hq")):
        yield


FULL = os.environ.get("SAMRAY_FULL_SIZES") == "1"
SIZES = ["sam_hq_vit_b", "sam_hq_vit_l", "sam_hq_vit_h"]
KINDS = ["points", "padded", "boxes", "points+boxes", "masks", "points+masks", "boxes+masks"]


def hf_model(spec: ModelSpec, seed: int) -> Any:
    """transformers' SamHQModel of this row with seeded weights, corrected as said above."""
    model = transformers_sam(spec)
    randomize(model, seed)
    keys: list[Tensor] = []
    decoder = model.mask_decoder
    decoder.transformer.register_forward_hook(lambda _, __, out: keys.append(out[1]))
    decoder.upscale_conv1.register_forward_pre_hook(lambda _, x: keys.pop().transpose(-1, -2).reshape(x[0].shape))
    return tie_positions(model)


@torch.no_grad()
@pytest.mark.parametrize("name", SIZES)
def test_encoders_against_transformers(name: str) -> None:
    """With the early features: those after the first global block, here the second of three."""
    spec = MODELS[name] if FULL else smaller(name, 256, depth=3)
    assert isinstance(spec.encoder, VitSpec)
    if not FULL:
        spec = replace(spec, encoder=replace(spec.encoder, global_blocks=(1, 2)))
    reference = hf_model(spec, seed=1)
    pixels = pixels_of(spec, 1)
    embedding, early = reference.get_image_embeddings(pixels)
    model = from_transformers(spec, reference)
    assert isinstance(model.image_encoder, ImageEncoderViT)
    ours = model.image_encoder.features(pixels)
    assert_close(ours.embedding, embedding)
    assert ours.early is not None
    assert_close(ours.early.permute(0, 2, 3, 1), early[0])


@pytest.fixture(scope="module")
def small() -> ModelSpec:
    return smaller("sam_hq_vit_b", image_size=256)


@pytest.fixture(scope="module")
def hf_small(small: ModelSpec) -> Any:
    return hf_model(small, seed=3)


@pytest.fixture(scope="module")
def our_small(small: ModelSpec, hf_small: Any) -> Sam:
    return from_transformers(small, hf_small)


@pytest.fixture(scope="module")
def image(small: ModelSpec, our_small: Sam, hf_small: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same image for both: samray's embedding, transformers', and its early features."""
    pixels = pixels_of(small, 1)
    with torch.no_grad():
        return our_small.encode_images(pixels), *hf_small.get_image_embeddings(pixels)


@torch.no_grad()
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("kinds", KINDS)
def test_prompts_against_transformers(
    kinds: str,
    multimask: bool,
    small: ModelSpec,
    our_small: Sam,
    hf_small: Any,
    image: tuple[Tensor, Tensor, list[Tensor]],
) -> None:
    num = 5
    prompts = prompts_of(kinds, num, small.image_size, small.grid)
    points, labels, boxes = prompts.get("points"), prompts.get("labels"), prompts.get("boxes_xyxy")
    packed, embedding, early = image
    # transformers takes a mask per image, so its prompts become a batch of one prompt each.
    expected = hf_small(
        image_embeddings=embedding.expand(num, -1, -1, -1),
        intermediate_embeddings=[early[0].expand(num, -1, -1, -1)],
        input_points=None if points is None else points[:, None],
        input_labels=None if labels is None else labels[:, None],
        input_boxes=None if boxes is None else boxes[:, None],
        input_masks=prompts.get("mask_input"),
        multimask_output=multimask,
    )
    logits, iou = our_small.predict(packed, **prompts, multimask=multimask)
    # Its masks are ordered by predicted IoU; the authors' is the first.
    assert_close(logits, expected.pred_masks[:, 0, :1])
    assert_close(iou, expected.iou_scores[:, 0, :1])


@torch.no_grad()
def test_batches_of_images_against_transformers(small: ModelSpec, our_small: Sam, hf_small: Any) -> None:
    """Two images with three prompts each, in one call: each prompt's masks have the features of its own image."""
    pixels = pixels_of(small, 2, seed=5)
    prompts = prompts_of("points+masks", 6, small.image_size, small.grid)
    points, labels = prompts["points"].view(2, 3, 3, 2), prompts["labels"].view(2, 3, 3)
    expected = hf_small(pixel_values=pixels, input_points=points, input_labels=labels, multimask_output=True)
    embeddings = our_small.encode_images(pixels)
    tokens = our_small.prompt_encoder.encode_points(points, labels)
    logits, iou = our_small.decode_batch(embeddings, tokens)
    in_order = iou[:, :, 1:].argsort(dim=2, descending=True)
    assert_close(iou[:, :, 1:].gather(2, in_order), expected.iou_scores)
    maps = in_order[..., None, None].expand(-1, -1, -1, *logits.shape[-2:])
    assert_close(logits[:, :, 1:].gather(2, maps), expected.pred_masks)
    decoded = our_small.decode_points(our_small.prepare_decoder(embeddings), points.flatten(0, 1), labels.flatten(0, 1))
    assert_close(decoded.logits.view(2, 3, *logits.shape[-2:]), expected.pred_masks[:, :, 0])
    assert_close(decoded.all_iou.view(2, 3, 1), expected.iou_scores[:, :, :1])

    masks = prompts["mask_input"]
    with_masks, _ = our_small.decode_batch(embeddings, tokens, masks)
    for i in range(2):
        alone, _ = our_small.predict(
            embeddings[i : i + 1],
            points[i],
            labels[i],
            mask_input=masks.unflatten(0, (2, 3))[i],
            multimask=False,
        )
        assert_close(with_masks[i, :, :1], alone)


def test_a_hugging_face_folder_loads(
    small: ModelSpec, our_small: Sam, hf_small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `syscv-community/sam-hq-vit-*` are, saved by `save_pretrained`."""
    monkeypatch.setitem(MODELS, "small", small)
    hf_small.save_pretrained(tmp_path)
    loaded = load_model("small", tmp_path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in our_small.state_dict().items())


@torch.no_grad()
def test_the_light_encoder_against_mobile_sam() -> None:
    """At the true 1024 pixels. Its early features are the output of the second stage, merging included."""
    spec = MODELS["sam_hq_vit_t"]
    assert isinstance(spec.encoder, TinyVitSpec)
    reference = build_tiny_vit(spec.encoder, spec.image_size)
    randomize(reference, seed=8)
    reference.eval()
    encoder = TinyViT(spec.encoder, spec.embed_dim, gives_early=True).eval()
    encoder.load_state_dict({k: v for k, v in reference.state_dict().items() if "head" not in k and "idxs" not in k})
    pixels = pixels_of(spec, 1)
    x = reference.layers[1](reference.layers[0](reference.patch_embed(pixels)))
    features = encoder.features(pixels)
    assert features.early is not None
    assert_close(features.early, x.transpose(1, 2).unflatten(2, (64, 64)))


@torch.no_grad()
@pytest.mark.parametrize("multimask", [True, False])
def test_masks_against_the_authors_decoder(multimask: bool, small: ModelSpec, our_small: Sam) -> None:
    """The same features and prompt tokens for both."""
    reference = authors_decoder(small)
    weights = {key.replace("hq.", ""): value for key, value in our_small.mask_decoder.state_dict().items()}
    reference.load_state_dict(weights, strict=True)
    packed = our_small.encode_images(pixels_of(small, 1))
    embedding, early = packed.split([small.embed_dim, small.decoder.hq_dim], dim=1)
    prompts = prompts_of("points", 6, small.image_size, small.grid)
    encoder, grid = our_small.prompt_encoder, (small.grid, small.grid)
    expected, expected_iou = reference(
        image_embeddings=embedding,
        image_pe=encoder.dense_positions().T.unflatten(1, grid)[None],
        sparse_prompt_embeddings=encoder.encode_points(prompts["points"], prompts["labels"]),
        dense_prompt_embeddings=encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand(6, -1, *grid),
        multimask_output=multimask,
        hq_token_only=False,
        interm_embeddings=[early.permute(0, 2, 3, 1)],
    )
    logits, iou = our_small.predict(packed, prompts["points"], prompts["labels"], multimask=multimask)
    assert_close(logits, expected)
    assert_close(iou, expected_iou)
