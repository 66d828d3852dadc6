"""The networks of SAM 3's tracker against `transformers` 5.23 with the same seeded random weights, on the CPU.

Bound as in `test_networks.py`: the largest difference is at most 1e-4 of the largest value. The encoder with its true
widths and heads at 336 pixels, with one windowed and one global block; with `SAMRAY_FULL_SIZES=1`, all 32 blocks at
1008 pixels. Prompts at the true width of prompt encoder and decoder.

Where `transformers` differs from Meta's `sam3`, samray follows `sam3`:

- `transformers` 5.23 adds `no_memory_embedding` to the coarsest level of the neck, which nothing uses; `sam3` adds it
  to the embedding. The test adds it to what `transformers` gives.
- the layer norms of Meta's encoder have an epsilon of 1e-5, those in `transformers` 1e-6. The bound holds against both.
- as for SAM 2, a mask without points or a box gets no padding point.
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

from jobs.benchmarks.reference_families import transformers_sam3_tracker
from samray.sam.checkpoints import load_model
from samray.sam.sam import Sam
from samray.sam.spec import MODELS, ModelSpec, RopeVitSpec
from tests.parity.common import assert_close, assert_prompts, from_transformers, pixels_of, randomize, tie_positions

FULL = os.environ.get("SAMRAY_FULL_SIZES") == "1"


def shallow(image_size: int, window: int) -> ModelSpec:
    row = MODELS["sam3"]
    assert isinstance(row.encoder, RopeVitSpec)
    encoder = replace(row.encoder, depth=2, global_blocks=(1,), window=window)
    return replace(row, image_size=image_size, encoder=encoder)


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    """A window does not divide the grid, and the learned positions are repeated and cut off."""
    return MODELS["sam3"] if FULL else shallow(14 * 28, 12)


@pytest.fixture(scope="module")
def reference(spec: ModelSpec) -> Any:
    model = transformers_sam3_tracker(spec)
    randomize(model, 1)
    return tie_positions(model)


@pytest.fixture(scope="module")
def ours(spec: ModelSpec, reference: Any) -> Sam:
    return from_transformers(spec, reference)


@pytest.fixture(scope="module")
def image(spec: ModelSpec, ours: Sam, reference: Any) -> tuple[Tensor, list[Tensor]]:
    """The same image for both: samray's embedding, transformers' list of them."""
    pixels = pixels_of(spec, 1)
    with torch.no_grad():
        s0, s1, embedding = reference.get_image_embeddings(pixels)
        embedding = embedding + reference.no_memory_embedding.view(1, -1, 1, 1)
        return ours.encode_images(pixels), [s0, s1, embedding]


@torch.no_grad()
def test_encoder(spec: ModelSpec, ours: Sam, image: tuple[Tensor, list[Tensor]]) -> None:
    """Embedding and both high-resolution features."""
    features = ours.image_encoder.features(pixels_of(spec, 1))
    assert features.high_res is not None
    for feature, expected in zip((*features.high_res, features.embedding), image[1], strict=True):
        assert_close(feature, expected)


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("kinds", ["points", "boxes", "points+boxes", "points+masks"])
def test_prompts(kinds: str, multimask: bool, ours: Sam, reference: Any, image: tuple[Tensor, list[Tensor]]) -> None:
    assert_prompts(kinds, multimask, ours, image[0], reference, image[1])


def test_hugging_face_files_load(
    spec: ModelSpec, ours: Sam, reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `save_pretrained` writes the tracker alone, and with the prefixes of `facebook/sam3`, detector included."""
    monkeypatch.setitem(MODELS, "small", spec)
    reference.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("tracker_model.") for name in saved)
    loaded = load_model("small", tmp_path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in ours.state_dict().items())

    whole = {}
    for name, value in reference.state_dict().items():
        if name.startswith("vision_encoder.backbone."):
            name = f"detector_model.{name}"
        elif name.startswith("vision_encoder.neck."):
            name = name.replace("vision_encoder.neck.", "tracker_neck.")
        else:
            name = f"tracker_model.{name}"
        whole[name] = value
    whole |= {"detector_model.vision_encoder.neck.fpn_layers.0.proj1.weight": torch.zeros(2)}
    whole |= {"detector_model.text_encoder.x": torch.zeros(2), "tracker_model.memory_encoder.x": torch.zeros(2)}
    torch.save(whole, tmp_path / "whole.pt")
    loaded = load_model("small", tmp_path / "whole.pt").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in ours.state_dict().items())
