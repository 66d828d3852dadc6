"""Sam's own contracts on a small random model; the numbers themselves are held by tests/parity."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from samray.sam import image_encoder
from samray.sam.image_encoder import ImageEncoderViT, merge_windows, partition_windows
from samray.sam.sam import _CPU_CHUNK_BYTES, Sam, input_size
from samray.sam.spec import MODELS, ModelSpec, TinyVitSpec, VitSpec
from samray.sam.tiny_vit import Attention

SPEC = ModelSpec(
    name="small",
    image_size=64,
    encoder=TinyVitSpec(dims=(16, 32), depths=(1, 1), num_heads=(1, 2), windows=(4, 4), strides=(2,)),
    embed_dim=32,
    decoder_heads=2,
    decoder_mlp_dim=32,
    iou_hidden_dim=32,
)


@pytest.fixture(scope="module")
def model() -> Sam:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Sam(SPEC).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def embedding() -> torch.Tensor:
    return torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(1))


def clicks(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    points = torch.rand(num, 1, 2, generator=torch.Generator().manual_seed(2)) * SPEC.image_size
    return points, torch.ones(num, 1, dtype=torch.int64)


# --- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (768, 1024)),
        (333, 500, (682, 1024)),
        (1, 1, (1024, 1024)),
        (1, 5000, (1, 1024)),
        (3, 4096, (1, 1024)),
    ],
)
def test_input_size(height: int, width: int, expected: tuple[int, int]) -> None:
    """As published, except that nothing shrinks to zero pixels (there 1x5000 does, and resizing fails)."""
    assert input_size(height, width, 1024) == expected


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (1, 1), (1, 500), (300, 2), (64, 64)])
def test_preprocess_normalises_and_pads(model: Sam, shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), (255, 0, 100), dtype=np.uint8)
    pixels, [(h, w)] = model.preprocess([image])
    assert pixels.shape == (1, 3, 64, 64)
    assert max(h, w) == 64
    expected = torch.tensor([(255 - 123.675) / 58.395, -116.28 / 57.12, (100 - 103.53) / 57.375])
    torch.testing.assert_close(pixels[0, :, :h, :w], expected[:, None, None].expand(3, h, w))
    assert not pixels[0, :, h:].any(), "zero after normalising, not the colour black"
    assert not pixels[0, :, :, w:].any()


def test_preprocess_takes_images_of_different_sizes_and_read_only_ones(model: Sam) -> None:
    images = [np.random.default_rng(i).integers(0, 256, (20 + 9 * i, 33, 3), dtype=np.uint8) for i in range(3)]
    images[1].flags.writeable = False
    together, sizes = model.preprocess(images)
    for i, image in enumerate(images):
        alone, [size] = model.preprocess([image])
        assert torch.equal(together[i], alone[0])
        assert sizes[i] == size


def test_an_image_s_embedding_does_not_depend_on_its_batch(model: Sam) -> None:
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    together = model.encode_images(pixels)
    assert together.shape == (3, 32, 8, 8)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], model.encode_images(pixels[i : i + 1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [8, 14, 15, 1])
def test_windows_merge_to_what_was_partitioned(side: int) -> None:
    x = torch.randn(2, side, side + 3, 5)
    windows, padded_hw = partition_windows(x, 7)
    assert windows.shape[1:] == (7, 7, 5)
    assert torch.equal(merge_windows(windows, padded_hw, (side, side + 3)), x)


def test_slices_of_the_vit_encoder_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the attention's queries nor of the MLP's rows, with a last slice that is shorter."""
    torch.manual_seed(0)
    encoder = ImageEncoderViT(VitSpec(dim=32, depth=2, num_heads=2, global_blocks=(1,), window=3), 112, 16).eval()
    pixels = torch.randn(2, 3, 112, 112)
    whole = encoder(pixels)  # with gradients: each MLP in one go
    monkeypatch.setattr(image_encoder, "_CPU_BIAS_ELEMENTS", 2 * 2 * 7 * 49 * 3)
    monkeypatch.setattr(image_encoder, "_CPU_MLP_ROWS", 2)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(pixels), whole.detach())


@pytest.mark.parametrize("name", MODELS)
def test_every_row_of_the_table_has_a_grid_that_fits(name: str) -> None:
    spec = MODELS[name]
    assert spec.grid * spec.stride == spec.image_size
    if isinstance(spec.encoder, TinyVitSpec):
        assert len(spec.encoder.strides) == len(spec.encoder.dims) - 1
    assert spec.embed_dim % (2 * spec.decoder_heads) == 0


# --- prompts -------------------------------------------------------------------------------------------------------


def test_decode_points_orders_masks_prompt_by_prompt(model: Sam, embedding: torch.Tensor) -> None:
    points, labels = clicks(4)
    decoded = model.decode_points(model.prepare_decoder(embedding), points, labels)
    assert decoded.logits.shape == (12, 32, 32)
    assert decoded.prompt_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert decoded.mask_index.tolist() == [0, 1, 2] * 4
    assert torch.equal(decoded.iou.view(4, 3), decoded.all_iou)
    logits, iou = model.predict(embedding, points, labels)
    torch.testing.assert_close(decoded.logits.view(4, 3, 32, 32), logits)
    torch.testing.assert_close(decoded.all_iou, iou)


def test_the_chunk_of_prompts_changes_nothing(
    model: Sam, embedding: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = model.prepare_decoder(embedding)
    whole = model.decode_points(context, *clicks(7), min_iou=-1e9)
    monkeypatch.setattr(Sam, "_chunk", lambda self, context, cpu_bytes: 3 if cpu_bytes == _CPU_CHUNK_BYTES else 2)
    chunked = model.decode_points(context, *clicks(7), min_iou=-1e9)
    assert torch.equal(chunked.prompt_index, whole.prompt_index)
    torch.testing.assert_close(chunked.logits, whole.logits)
    torch.testing.assert_close(chunked.all_iou, whole.all_iou)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "vit_b"])
@pytest.mark.parametrize("chunk", [1, 1000])
def test_images_together_are_images_one_by_one(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the model with fine features, of which every image has its own."""
    torch.manual_seed(3)
    spec = replace(MODELS[name], image_size=128)
    model = Sam(spec).eval().requires_grad_(False)
    for weight in (weight for key, weight in model.named_parameters() if "conv_s" in key):
        weight.normal_()  # it begins at zero
    monkeypatch.setattr(Sam, "_chunk", lambda self, context, cpu_bytes: chunk)
    context = model.prepare_decoder(model.encode_images(torch.randn(3, 3, 128, 128)))
    points, labels = clicks(12)
    # In the widest gap of the middle third: rounding differs between the two ways, and must decide no mask.
    middle = model.decode_points(context, points, labels).iou.sort().values[12:24]
    gap = middle.diff().argmax()
    min_iou = float(middle[gap : gap + 2].mean())
    together = model.decode_points(context, points, labels, min_iou=min_iou)
    parts = [
        model.decode_points(context[i], points[rows], labels[rows], min_iou=min_iou)
        for i, rows in enumerate((slice(0, 4), slice(4, 8), slice(8, 12)))
    ]
    assert 3 < len(together.iou) < 36
    torch.testing.assert_close(together.logits, torch.cat([part.logits for part in parts]))
    torch.testing.assert_close(together.all_iou, torch.cat([part.all_iou for part in parts]))
    assert together.prompt_index.tolist() == [int(p) + 4 * i for i, part in enumerate(parts) for p in part.prompt_index]


def test_a_filter_that_nothing_passes_gives_no_mask(model: Sam, embedding: torch.Tensor) -> None:
    decoded = model.decode_points(model.prepare_decoder(embedding), *clicks(5), min_iou=1e9)
    assert decoded.logits.shape == (0, 32, 32)
    assert decoded.iou.shape == decoded.prompt_index.shape == decoded.mask_index.shape == (0,)
    assert decoded.all_iou.shape == (5, 3)


def test_of_images_together_nothing_may_be_left_either() -> None:
    model = Sam(replace(MODELS["tiny"], image_size=128)).eval().requires_grad_(False)
    context = model.prepare_decoder(model.encode_images(torch.zeros(3, 3, 128, 128)))
    assert context.fine is not None
    decoded = model.decode_points(context, *clicks(6), min_iou=1e9)
    assert decoded.logits.shape == (0, 32, 32)
    assert decoded.all_iou.shape == (6, 3)


@pytest.mark.parametrize("min_iou", [None, 0.5])
def test_no_prompts_give_no_masks(model: Sam, embedding: torch.Tensor, min_iou: float | None) -> None:
    decoded = model.decode_points(model.prepare_decoder(embedding), *clicks(0), min_iou=min_iou)
    assert decoded.logits.shape == (0, 32, 32)
    assert decoded.all_iou.shape == (0, 3)


@torch.no_grad()
def test_fine_features_join_the_upscaling_as_in_plain_convolutions() -> None:
    """SAM 2's form: transposed convolutions over the whole map, the features added after each of them."""
    encoder = TinyVitSpec(dims=(16, 32, 32), depths=(1, 1, 1), num_heads=(1, 2, 2), windows=(4, 4, 4), strides=(2, 2))
    model = Sam(replace(SPEC, encoder=replace(encoder, fine_features=True))).eval()
    fine = model.image_encoder.fine
    torch.nn.init.normal_(fine.conv_s0.weight)
    torch.nn.init.normal_(fine.conv_s1.weight)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    stages, x = [], model.image_encoder.patch_embed(pixels)
    for stage in model.image_encoder.layers[:2]:
        for block in stage.blocks:
            x = block(x)
        stages.append(x)
        x = stage.downsample(x)
    points, labels = clicks(6)
    sparse = model.prompt_encoder.encode_points(points, labels).unflatten(0, (2, 3))
    context = model.prepare_decoder(model.encode_images(pixels))
    state = model.mask_decoder.run(context, sparse)
    hyper = model.mask_decoder.hyper(state.mask_tokens, slice(1, None))
    conv1, norm, gelu, conv2, _ = model.mask_decoder.output_upscaling
    maps = state.keys.transpose(1, 2).unflatten(2, (4, 4))
    maps = gelu(norm(conv1(maps)) + fine.conv_s1(stages[1]).repeat_interleave(3, dim=0))
    maps = gelu(conv2(maps) + fine.conv_s0(stages[0]).repeat_interleave(3, dim=0))
    expected = (hyper @ maps.flatten(2)).unflatten(2, (16, 16))
    torch.testing.assert_close(model.mask_decoder.upscale(state.keys, hyper, context.fine), expected)
    second = model.decode_points(context[1], points[3:], labels[3:])
    torch.testing.assert_close(second.logits, expected[3:].flatten(0, 1))
    none = model.decode_points(context[1], points[3:], labels[3:], min_iou=float("inf"))
    assert none.logits.shape == (0, 16, 16)


def test_predict_wants_a_prompt_and_labels(model: Sam, embedding: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="points, boxes, a mask_input or text_embeddings"):
        model.predict(embedding)
    with pytest.raises(ValueError, match="labels"):
        model.predict(embedding, points=clicks(1)[0])


def test_an_absent_point_counts_for_nothing(model: Sam, embedding: torch.Tensor) -> None:
    """Label -1: the masks do not depend on the point's position; those of a foreground point do."""
    points, _ = clicks(1)
    here, there = (torch.cat([points, torch.full((1, 1, 2), float(xy))], dim=1) for xy in (3, 50))
    absent, present = torch.tensor([[1, -1]]), torch.tensor([[1, 1]])
    assert torch.equal(model.predict(embedding, here, absent)[0], model.predict(embedding, there, absent)[0])
    assert not torch.allclose(model.predict(embedding, here, present)[0], model.predict(embedding, there, present)[0])


def test_postprocess_cuts_the_padding_off(model: Sam) -> None:
    """Logits that are positive left of the middle of a 64 x 32 input stay so at any original size."""
    logits = torch.full((1, 32, 32), -1.0)
    logits[:, :, :8] = 1.0  # low-res columns 0 to 7 are input columns 0 to 15, half of the image's 32
    masks = model.postprocess(logits, (64, 32), (200, 100)) > 0
    assert masks.shape == (1, 200, 100)
    assert masks[0, :, :48].all()
    assert not masks[0, :, 52:].any()


# --- precision, gradients ------------------------------------------------------------------------------------------


def narrowed(model: Sam) -> Sam:
    half = Sam(SPEC).eval()
    half.load_state_dict(model.state_dict())
    return half.cast_image_side(torch.bfloat16)


@torch.no_grad()
def test_a_narrow_model_stays_near_float32(model: Sam) -> None:
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    mask_input = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(5))
    half = narrowed(model)
    for prompts in ({}, {"mask_input": mask_input}):
        exact, _ = model.predict(model.encode_images(pixels), *clicks(3), **prompts)  # type: ignore[arg-type]
        rough, rough_iou = half.predict(half.encode_images(pixels.bfloat16()), *clicks(3), **prompts)  # type: ignore[arg-type]
        assert rough.dtype == rough_iou.dtype == torch.float32
        assert (rough - exact).abs().max() <= 0.1 * exact.abs().max()
        assert not torch.equal(rough, exact)
    only_masks = half.predict(half.encode_images(pixels.bfloat16()), mask_input=mask_input)[0]
    assert only_masks.shape == (3, 3, 32, 32)


def test_narrow_leaves_the_prompts_side_exact(model: Sam) -> None:
    half = narrowed(model)
    assert half.dtype == torch.bfloat16
    in_bfloat16 = {name for name, p in half.named_parameters() if p.dtype == torch.bfloat16}
    assert in_bfloat16 == {
        name
        for name, _ in half.named_parameters()
        if name.startswith(("image_encoder.", "mask_decoder.output_upscaling.")) or ".norm4." in name
    }
    points, labels = clicks(5)
    assert torch.equal(
        half.prompt_encoder.encode_points(points, labels), model.prompt_encoder.encode_points(points, labels)
    )


@torch.no_grad()
def test_what_all_tokens_have_in_common_costs_a_narrow_model_nothing(model: Sam) -> None:
    """The bias of a token's key is the same for all of an image token's scores, so its softmax must not see it."""
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(6))
    before = narrowed(model).predict(model.encode_images(pixels).bfloat16(), *clicks(3))[0]
    shifted = copy.deepcopy(model)
    for block in shifted.mask_decoder.transformer.blocks():
        block.cross_attn_image_to_token.k_proj.bias += 1000
    after = narrowed(shifted).predict(model.encode_images(pixels).bfloat16(), *clicks(3))[0]
    assert (after - before).abs().max() <= 0.02 * before.abs().max()


def test_decode_batch_passes_gradients_to_every_part() -> None:
    model = Sam(SPEC).train()
    embeddings = model.encode_images(torch.randn(2, 3, 64, 64))
    points, labels = clicks(6)
    sparse = model.prompt_encoder.encode_points(points.view(2, 3, 1, 2), labels.view(2, 3, 1))
    logits, iou = model.decode_batch(embeddings, sparse, mask_input=torch.randn(6, 1, 32, 32))
    assert logits.shape == (2, 3, 4, 32, 32)
    (logits.square().sum() + iou.square().sum()).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    # Boxes, background clicks and "no mask" are not among these prompts, and a key's bias drops out of the softmax.
    assert without == {
        "prompt_encoder.point_embeddings.2.weight",
        "prompt_encoder.point_embeddings.3.weight",
        "prompt_encoder.no_mask_embed.weight",
        "mask_decoder.transformer.layers.1.cross_attn_token_to_image.k_proj.bias",
        "mask_decoder.transformer.final_attn_token_to_image.k_proj.bias",
    }


def test_positions_are_exact_under_autocast(model: Sam) -> None:
    """Training in bfloat16 must click where inference does: rounded codes are off by up to a pixel."""
    points = torch.rand(1, 50, 2) * model.image_size
    labels = torch.ones(1, 50, dtype=torch.long)
    exact = model.prompt_encoder.encode_points(points, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.prompt_encoder.encode_points(points, labels), exact)


def test_positions_are_exact_in_every_dtype(model: Sam) -> None:
    """Also after a detour: what is rounded once would stay so."""
    points, labels = torch.rand(1, 50, 2) * model.image_size, torch.ones(1, 50, dtype=torch.long)
    positions = model.prompt_encoder.pe_layer(points / model.image_size)
    halved = copy.deepcopy(model).bfloat16()
    assert torch.equal(halved.prompt_encoder.pe_layer(points / model.image_size), positions)
    assert halved.prompt_encoder.encode_points(points, labels).dtype == torch.bfloat16
    assert halved.prompt_encoder.dense_positions().dtype == torch.bfloat16
    assert torch.equal(halved.float().prompt_encoder.pe_layer(points / model.image_size), positions)
    assert copy.deepcopy(model).to("meta").prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.is_meta


def test_attention_is_the_same_where_its_bias_learns() -> None:
    """On a CPU it then takes another way through torch."""
    torch.manual_seed(0)
    attention = Attention(dim=32, num_heads=2, window=4)
    torch.nn.init.normal_(attention.attention_biases)
    x = torch.randn(3, 16, 32)
    learning = attention(x)
    assert learning.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(attention(x), learning, rtol=1e-5, atol=1e-6)
    learning.square().sum().backward()
    assert attention.attention_biases.grad is not None
    assert attention.attention_biases.grad.abs().sum() > 0
