"""The Triton kernels against the plain torch bodies. `test_kernels.py` runs this file, in a process of its own.

Under TRITON_INTERPRET=1 (which has to be set before triton is imported) they run on the CPU, else on the GPU.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from jobs.benchmarks.weights import SMALL, blobs, random_sam
from samray.config import MaskConfig
from samray.masks import MaskGenerator
from samray.masks.crops import Crop
from samray.sam.kernels import MAX_TOKENS, image_to_tokens, measure
from samray.sam.sam import Sam
from samray.sam.transformer import TwoWayTransformer
from tests.parity.common import TOLERANCE, assert_close, randomize

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


class Calls:
    """Counts calls of a kernel: a comparison of the plain form with itself would always hold."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.num, self.inner = 0, getattr(module, name)
        monkeypatch.setattr(module, name, self)

    def __call__(self, *args: Any) -> Any:
        self.num += 1
        return self.inner(*args)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple[Any, Any]]:
    """Calls a function with the kernels off, then on."""

    def run(compute: Callable[[], Any]) -> tuple[Any, Any]:
        monkeypatch.setenv("SAMRAY_TRITON", "0")
        plain = compute()
        monkeypatch.setenv("SAMRAY_TRITON", "1")
        return plain, compute()

    return run


# --- image tokens read prompt tokens ----------------------------------------------------------------------------------


def transformer(c: int, heads: int, dtype: torch.dtype = torch.float32) -> TwoWayTransformer:
    model = TwoWayTransformer(c, heads, 2 * c)
    randomize(model, seed=1)
    return model.to(DEVICE, dtype)


def inputs(
    b: int, n: int, t: int, length: int, c: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = (b, length, c), (length, c), (b, n, t, c)
    src, pe, tokens = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    return src, pe, tokens


@torch.no_grad()
@pytest.mark.parametrize(
    ("c", "heads", "b", "n", "t", "length"),
    [
        (64, 4, 1, 3, 7, 100),  # prompts that share an image; a last block that is not full
        (64, 4, 2, 2, 9, 48),  # two images; tokens beyond a power of two
        (64, 4, 3, 1, 6, 23),  # image tokens of every prompt's own
        (256, 8, 1, 2, 7, 40),  # the published widths
        (256, 8, 2, 1, 9, 16),
        (64, 4, 1, 2, MAX_TOKENS, 20),
        (32, 1, 1, 2, 5, 17),  # one head: fewer rows and channels than a product of the GPU takes
    ],
)
def test_image_to_tokens(
    c: int, heads: int, b: int, n: int, t: int, length: int, both: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (src, pe, tokens) = transformer(c, heads), inputs(b, n, t, length, c)
    image = model.prepare(src, pe)
    before = image.src.clone()
    calls = Calls(monkeypatch, image_to_tokens, "image_to_tokens")
    (plain_x, plain_keys), (x, keys) = both(lambda: model(image, tokens))
    assert calls.num == len(model.layers)
    assert_close(keys, plain_keys)
    assert_close(x, plain_x)
    assert torch.equal(image.src, before), "other prompts start from these"


@torch.no_grad()
@pytest.mark.parametrize("absorb", [False, True])
def test_one_layer_with_large_scores(absorb: bool) -> None:
    """Softmax of scores in the hundreds, far apart from head to head: exp of them would overflow or vanish."""
    block = transformer(64, 4).blocks()[0]
    keys, _, tokens = inputs(1, 3, 7, 40, 64)
    attn, tokens = block.cross_attn_image_to_token, tokens[0] * 40
    attn.k_proj.weight.view(4, 8, 64).mul_(torch.tensor([0.01, 1.0, 5.0, 20.0], device=DEVICE).view(4, 1, 1))
    heads = attn.split(attn.k_proj(tokens)) * attn.scale
    positions = torch.randn(4, 8, 40, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    queries = positions.transpose(1, 2)[None]  # (1, H, L, d)
    position_input = positions if absorb else queries
    if absorb:
        queries = queries + attn.split(F.linear(keys, attn.q_proj.weight))
    scores = (heads @ queries.transpose(-2, -1)).flatten(1, 2)
    assert scores.max() > 200
    expected = block.norm4(attn.spread(keys.expand(3, -1, -1), scores, tokens / 40))
    assert_close(block.write(keys, position_input, tokens, tokens / 40, absorb=absorb), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, both: Any) -> None:
    """Both forms round, each in its own places: as far from float32 as the plain form is, no further."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies no bfloat16, so it is NOT tested; on a GPU it is")
    (src, pe, tokens), model = inputs(2, 3, 7, 100, 64, dtype), transformer(64, 4, dtype)
    exact = transformer(64, 4, dtype).float()
    exact_keys = exact(exact.prepare(src.float(), pe.float()), tokens.float())[1]
    image = model.prepare(src, pe)
    plain, fused = ((keys.float() - exact_keys).abs() for _, keys in both(lambda: model(image, tokens)))
    assert 0 < fused.mean() < 1.2 * plain.mean()
    assert fused.max() < 2 * plain.max()


def test_what_is_left_to_the_plain_form(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, image_to_tokens, "image_to_tokens")
    model = transformer(64, 4)
    src, pe, tokens = inputs(1, 2, MAX_TOKENS + 1, 20, 64)
    with torch.no_grad():
        plain, fused = both(lambda: model(model.prepare(src, pe), tokens)[1])
    assert torch.equal(plain, fused), "more tokens than the kernel takes"
    _, trained = both(lambda: model(model.prepare(src, pe), tokens[:, :, :7])[1])
    trained.sum().backward()
    assert model.layers[0].norm4.weight.grad is not None, "the kernel has no gradient"
    assert calls.num == 0


# --- masks measured without their pixels ------------------------------------------------------------------------------

SIDE = 64
"""Size of the model's input here; its low-res logits are 16 x 16."""
SIZES = {
    "square": (64, 64),
    "wide": (37, 90),
    "tall": (141, 50),
    "larger": (150, 133),
    "smaller": (33, 20),
    "tiny": (3, 5),
    "one pixel": (1, 1),
    "a line": (1, 70),
}


@pytest.fixture(scope="module")
def generator() -> MaskGenerator:
    return MaskGenerator(Sam(dataclasses.replace(SMALL, image_size=SIDE)).to(DEVICE), MaskConfig())


def random_logits(num: int, low: int) -> Tensor:
    coarse = 4 * torch.randn(1, num, 5, 5, generator=torch.Generator().manual_seed(7))
    return F.interpolate(coarse, (low, low), mode="bicubic")[0].to(DEVICE)


def clear_of_thresholds(generator: MaskGenerator, logits: Tensor, hw: tuple[int, int], offset: float) -> Tensor:
    """Those of the masks of which no pixel is so near a threshold that rounding decides."""
    pixels = generator.model.postprocess(logits, generator._input_hw(Crop(0, 0, hw[1], hw[0], 0)), hw)
    gaps = torch.stack([(pixels - threshold).abs().amin(dim=(1, 2)) for threshold in (-offset, 0, offset)])
    return logits[(gaps > 1e-5).all(dim=0)]


@torch.no_grad()
@pytest.mark.parametrize("offset", [1.0, 2.5])
@pytest.mark.parametrize("size", SIZES)
def test_measure(
    size: str, offset: float, generator: MaskGenerator, both: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width = hw = SIZES[size]
    generator.config = MaskConfig(stability_score_offset=offset)
    logits = clear_of_thresholds(generator, random_logits(4, SIDE // 4), hw, offset)
    assert len(logits) >= 2
    calls = Calls(monkeypatch, measure, "measure")
    crop = Crop(11, 5, 11 + width, 5 + height, 1)
    plain, fused = both(lambda: generator._measure(logits, crop))
    assert calls.num == 1
    assert torch.equal(fused, plain)
    if height * width > 100:
        assert (plain[:, 1] > 0).all()
        assert ((plain[:, 0] > 0) & (plain[:, 0] < 1)).all()


def handmade() -> dict[str, Tensor]:
    """Low-res masks (16, 16) of +5 and -5."""
    regions = {
        "empty": (slice(0, 0), slice(0, 0)),
        "full": (slice(None), slice(None)),
        "one cell": (slice(6, 7), slice(9, 10)),
        "top": (slice(0, 2), slice(4, 9)),
        "bottom": (slice(13, 16), slice(4, 9)),
        "left": (slice(4, 9), slice(0, 2)),
        "right": (slice(4, 9), slice(13, 16)),
        "last corner": (slice(15, 16), slice(15, 16)),
    }
    masks = {}
    for name, region in regions.items():
        masks[name] = torch.full((SIDE // 4, SIDE // 4), -5.0)
        masks[name][region] = 5.0
    return masks


@torch.no_grad()
@pytest.mark.parametrize("hw", [(16, 16), (70, 110), (110, 70)])
def test_measure_edges(hw: tuple[int, int], generator: MaskGenerator, both: Any) -> None:
    generator.config = MaskConfig()
    height, width = hw
    names, logits = list(handmade()), torch.stack(list(handmade().values())).to(DEVICE)
    logits += 0.0123  # else a pixel halfway between two cells would lie on the threshold
    plain, fused = both(lambda: generator._measure(logits, Crop(0, 0, width, height, 0)))
    assert torch.equal(fused, plain)
    of = dict(zip(names, fused.cpu().numpy(), strict=True))
    assert of["empty"].tolist() == [0] * 6
    assert of["full"].tolist() == [1, height * width, 0, 0, width - 1, height - 1]
    assert of["top"][3] == 0
    assert of["left"][2] == 0
    if hw == (16, 16):  # a pixel for every cell
        assert of["one cell"][1:].tolist() == [1, 9, 6, 9, 6]
        assert of["last corner"][1:].tolist() == [1, 15, 15, 15, 15]
    if width >= height:
        assert of["right"][4] == width - 1
    if height >= width:
        assert of["bottom"][5] == height - 1


# --- the whole generator ----------------------------------------------------------------------------------------------


def test_whole_generator(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:  # its time goes by the block, whatever the block's size
        monkeypatch.setattr(measure, "BLOCK_HW", (128, 256))
        sizes_of = image_to_tokens.kernel_sizes
        monkeypatch.setattr(image_to_tokens, "kernel_sizes", lambda *arguments: sizes_of(*arguments) | {"BLOCK": 256})
    calls = Calls(monkeypatch, image_to_tokens, "image_to_tokens"), Calls(monkeypatch, measure, "measure")
    sam, image = random_sam().to(DEVICE), blobs(20, (110, 160))
    config = MaskConfig(points_per_side=6, crop_n_layers=1, crop_n_points_downscale_factor=2)
    expected, masks = both(lambda: MaskGenerator(sam, config).generate([image])[0])
    assert all(kernel.num > 0 for kernel in calls)
    assert len(masks) == len(expected) >= 10
    same = 0
    for ours, theirs in zip(masks, expected, strict=True):
        assert (ours["point_coords"], ours["crop_box"]) == (theirs["point_coords"], theirs["crop_box"])
        assert ours["predicted_iou"] == pytest.approx(theirs["predicted_iou"], abs=TOLERANCE)
        assert ours["stability_score"] == pytest.approx(theirs["stability_score"], abs=TOLERANCE + 1 / ours["area"])
        pixels = coco_mask.decode(ours["segmentation"]) != coco_mask.decode(theirs["segmentation"])
        assert np.count_nonzero(pixels) <= 1  # one that meets the threshold but for rounding
        same += ours["segmentation"] == theirs["segmentation"] and ours["bbox"] == theirs["bbox"]
    assert same >= 0.9 * len(masks)
