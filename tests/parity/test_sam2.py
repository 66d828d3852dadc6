"""SAM 2's networks against `transformers` 5.23 with the same seeded random weights, float32, on the CPU.

Bound as in `test_networks.py`: the largest difference is at most 1e-4 of the largest value. Every size with its true
widths, heads, windows and positions at 256 pixels, with few blocks: one that halves the grid for each stage, others
with windows, and a global one. With `SAMRAY_FULL_SIZES=1`, all blocks at 1024 pixels. Prompts at the true width of
prompt encoder and decoder.

Where `transformers` differs from Meta's `sam2`, samray follows `sam2`: a mask without points or a box gets no padding
point.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from jobs.benchmarks.reference import transformers_sam2
from samray.sam.checkpoints import build, load_model
from samray.sam.formats import to_meta_names
from samray.sam.sam import Sam
from samray.sam.spec import MODELS, HieraSpec, ModelSpec
from tests.parity.common import assert_close, pixels_of, prompts_of, randomize

SIZES = [name for name in MODELS if name.startswith("sam2.1_")]
FULL = os.environ.get("SAMRAY_FULL_SIZES") == "1"


def hf_model(spec: ModelSpec, seed: int) -> Any:
    """transformers' Sam2Model of this row with seeded weights."""
    model = transformers_sam2(spec)
    randomize(model, seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "pos_embed" in name or name == "no_memory_embedding":
                value.normal_(generator=torch.Generator().manual_seed(seed))
        positions = model.shared_image_embedding.positional_embedding  # a buffer, and a copy of it
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(positions)
    return model


def from_hf(spec: ModelSpec, model: Any) -> Sam:
    return build(spec, to_meta_names(dict(model.state_dict()), Path("transformers")), "transformers")


def shallow(name: str) -> ModelSpec:
    """A row with its true widths at 256 pixels, with few blocks; the last of the third stage is the global one."""
    spec = MODELS[name]
    assert isinstance(spec.encoder, HieraSpec)
    encoder = replace(spec.encoder, depths=(1, 2, 3, 1), global_blocks=(5,))
    return replace(spec, image_size=256, encoder=encoder)


@torch.no_grad()
@pytest.mark.parametrize("name", SIZES)
def test_encoders_against_transformers(name: str) -> None:
    """Embedding and both high-resolution features."""
    spec = MODELS[name] if FULL else shallow(name)
    reference = hf_model(spec, seed=1)
    pixels = pixels_of(spec, 1)
    s0, s1, embedding = reference.get_image_embeddings(pixels)
    ours = from_hf(spec, reference).image_encoder.features(pixels)
    assert_close(ours.embedding, embedding)
    assert ours.high_res is not None
    assert_close(ours.high_res[0], s0)
    assert_close(ours.high_res[1], s1)


@pytest.fixture(scope="module")
def small() -> ModelSpec:
    return shallow("sam2.1_t")


@pytest.fixture(scope="module")
def hf_small(small: ModelSpec) -> Any:
    return hf_model(small, seed=3)


@pytest.fixture(scope="module")
def our_small(small: ModelSpec, hf_small: Any) -> Sam:
    return from_hf(small, hf_small)


@pytest.fixture(scope="module")
def image(small: ModelSpec, our_small: Sam, hf_small: Any) -> tuple[Tensor, list[Tensor]]:
    """The same image for both: samray's embedding, transformers' list of them."""
    pixels = pixels_of(small, 1)
    with torch.no_grad():
        return our_small.encode_images(pixels), hf_small.get_image_embeddings(pixels)


@torch.no_grad()
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("kinds", ["points", "padded", "boxes", "points+boxes", "points+masks", "boxes+masks"])
def test_prompts_against_transformers(
    kinds: str, multimask: bool, small: ModelSpec, our_small: Sam, hf_small: Any, image: tuple[Tensor, list[Tensor]]
) -> None:
    num = 6
    prompts = prompts_of(kinds, num, small.image_size, small.grid)
    points, labels, boxes = prompts.get("points"), prompts.get("labels"), prompts.get("boxes_xyxy")
    embedding, embeddings = image
    # transformers takes a mask per image, so its prompts become a batch of one prompt each.
    expected = hf_small(
        image_embeddings=[x.expand(num, -1, -1, -1) for x in embeddings],
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
def test_a_single_mask_that_is_not_stable_gives_way(
    small: ModelSpec, our_small: Sam, hf_small: Any, image: tuple[Tensor, list[Tensor]]
) -> None:
    """Both outcomes occur among the prompts, each as in transformers."""
    prompts = prompts_of("points", 24, small.image_size, small.grid)
    # Flatter masks: in about half of them more than 2% of the pixels are near the threshold.
    decoder, reference = our_small.mask_decoder, hf_small.mask_decoder
    expected = hf_small(
        image_embeddings=image[1],
        input_points=prompts["points"][None],
        input_labels=prompts["labels"][None],
        multimask_output=False,
    )
    logits, iou = our_small.predict(image[0], **prompts, multimask=False)
    assert_close(logits, expected.pred_masks[0])
    assert_close(iou, expected.iou_scores[0])
    state = decoder.run(
        our_small.prepare_decoder(image[0]),
        our_small.prompt_encoder.encode_points(prompts["points"], prompts["labels"])[None],
    )
    stayed = (iou[:, 0] - state.iou[:, 0]).abs() < 1e-6
    assert reference.dynamic_multimask_via_stability
    assert 0 < stayed.sum() < len(stayed)


def test_a_hugging_face_folder_loads(small: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `facebook/sam2.1-hiera-*` are: the model for video, saved by `save_pretrained`."""
    monkeypatch.setitem(MODELS, "small", small)
    model = transformers_sam2(small, "Sam2Video")
    tied = model.prompt_encoder.shared_embedding.positional_embedding
    model.shared_image_embedding.positional_embedding = tied.clone()  # the published files have it twice
    model.save_pretrained(tmp_path)
    loaded = load_model("small", tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert "occlusion_spatial_embedding_parameter" in saved
    no_memory = loaded.image_encoder.get_parameter("no_mem_embed")
    assert torch.equal(no_memory, saved["no_memory_embedding"])
    assert torch.equal(loaded.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix, tied)
