"""EdgeTAM's networks against `transformers` 5.23 and timm's RepViT with the same seeded random weights, on the CPU.

Bound as in `test_networks.py`: the largest difference is at most 1e-4 of the largest value. The encoder with its true
widths and two blocks of each stage at 256 pixels; with `SAMRAY_FULL_SIZES=1`, all 20 blocks at 1024 pixels. samray's
encoder has folded batch norms, and is compared in training mode, too, where they are not. Prompts at the true width of
prompt encoder and decoder. As for SAM 2, a mask without points or a box gets no padding point.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.benchmarks.reference_families import TIMM, installed, transformers_edgetam
from samray.sam.checkpoints import load_model
from samray.sam.sam import Sam
from samray.sam.spec import MODELS, ModelSpec, RepVitSpec
from tests.parity.common import assert_close, assert_prompts, from_transformers, pixels_of, randomize, tie_positions

FULL = os.environ.get("SAMRAY_FULL_SIZES") == "1"


@pytest.fixture(scope="module", autouse=True)
def _timm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """timm in a folder of its own: it would bring torchvision."""
    with installed(TIMM, tmp_path_factory.mktemp("timm")):
        yield


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    row = MODELS["edgetam"]
    assert isinstance(row.encoder, RepVitSpec)
    return row if FULL else replace(row, image_size=256, encoder=replace(row.encoder, depths=(2, 2, 2, 2)))


@pytest.fixture(scope="module")
def reference(spec: ModelSpec) -> Any:
    model = transformers_edgetam(spec)
    randomize(model, 1)
    # Statistics of an image, as in a trained network: otherwise values grow with each block, and a sigmoid of thousands
    # enlarges rounding.
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.vision_encoder.train()(pixels_of(spec, 1, seed=2))
    for norm in norms:
        norm.momentum = 0.1
    return tie_positions(model.eval())


@pytest.fixture(scope="module")
def ours(spec: ModelSpec, reference: Any) -> Sam:
    return from_transformers(spec, reference)


@pytest.fixture(scope="module")
def image(spec: ModelSpec, ours: Sam, reference: Any) -> tuple[Tensor, list[Tensor]]:
    """The same image for both: samray's embedding, transformers' list of them."""
    pixels = pixels_of(spec, 1)
    with torch.no_grad():
        return ours.encode_images(pixels), reference.get_image_embeddings(pixels)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_encoder(training: bool, spec: ModelSpec, ours: Sam, reference: Any) -> None:
    """Embedding and both high-resolution features; while it learns, in float64.

    torch sums up the statistics of batch norms in float32 for samray's order of channels (last), and in float64 for
    that of the reference: after 20 blocks at 1024 pixels that is 1e-3 of the largest value, and 2e-11 in float64.
    """
    pixels = pixels_of(spec, 2)
    ours, reference = copy.deepcopy(ours), copy.deepcopy(reference)
    if training:
        ours.double().image_encoder.train()
        reference.double().vision_encoder.train()
        pixels = pixels.double()
    key = "image_encoder.stages.1.blocks.0.token_mixer.conv1.bn.running_mean"
    before = ours.state_dict()[key].clone()
    s0, s1, embedding = reference.get_image_embeddings(pixels)
    features = ours.image_encoder.features(pixels)
    assert_close(features.embedding, embedding)
    assert features.high_res is not None
    assert_close(features.high_res[0], s0)
    assert_close(features.high_res[1], s1)
    assert torch.equal(ours.state_dict()[key], before) is not training


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("kinds", ["points", "boxes", "points+boxes", "points+masks"])
def test_prompts(kinds: str, multimask: bool, ours: Sam, reference: Any, image: tuple[Tensor, list[Tensor]]) -> None:
    assert_prompts(kinds, multimask, ours, image[0], reference, image[1])


def test_a_hugging_face_folder_loads(
    spec: ModelSpec, ours: Sam, reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `yonigozlan/EdgeTAM-hf` is: with the parts for video."""
    monkeypatch.setitem(MODELS, "small", spec)
    video = ("spatial_perceiver.latents_1d", "memory_attention.layers.0.linear1.weight", "no_object_pointer")
    torch.save(reference.state_dict() | {key: torch.zeros(2) for key in video}, tmp_path / "pytorch_model.bin")
    loaded = load_model("small", tmp_path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in ours.state_dict().items())
