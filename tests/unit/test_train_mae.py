"""Masked autoencoders: against a plain script of the paper, through the trainer, and as the start of an encoder."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from samray.config.model_specs import VitSpec
from samray.config.models import MODELS
from samray.errors import ConfigError, StorageError
from samray.sam import mae
from samray.sam.encoder_start import check_encoder, fit_encoder, load_encoder, to_encoder_names
from samray.sam.sam import Sam
from samray.train.data import ExampleMaker, blocks, open_data
from samray.train.images import draw_crop
from samray.train.learner import Learner, check_settings, frame_of
from samray.train.loop import Worker, run_leg
from samray.train.mae import PICTURE_FILE, MaeLoss, encoder_of
from samray.train.objectives import objective_of
from samray.train.settings import TrainSettings, load_train_settings
from samray.train.store import WEIGHTS_FILE, Store
from tests.support.labelled import BROKEN, make_input
from tests.support.micro import CPU, MICRO_VIT

PLAIN = replace(
    MICRO_VIT, name="plain", encoder=VitSpec(dim=16, depth=3, num_heads=2, global_blocks=(0, 1, 2), patch=8)
)
SMALL = ["mae.decoder_dim=16", "mae.decoder_depth=1", "mae.decoder_heads=2"]


@pytest.fixture(autouse=True)
def plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "plain", PLAIN)


def settings_of(*overrides: str) -> TrainSettings:
    base = ["train.objective=mae", "model.name=plain", "train.batch_size=2", "train.log_every=1", *SMALL]
    return objective_of(load_train_settings(None, [*base, *overrides])).adjusted()


def learner_of(settings: TrainSettings, **options: Any) -> Learner:
    return Learner(settings, PLAIN, image_size=PLAIN.image_size, device=CPU, **options)


# --- parity with the paper -------------------------------------------------------------------------------------------


def test_masking_patches_and_loss_are_those_of_the_paper():
    """A plain script, patch by patch, of sections 3 and 4.1: no reshaping, no gathering."""
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    patches = mae.patchify(images, 4)
    assert patches.shape == (2, 9, 48)
    assert torch.equal(mae.unpatchify(patches, 4), images)
    predicted = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(2))
    order = mae.draw_order(2, 9, torch.Generator().manual_seed(3))
    visible = mae.num_visible(9, 0.75)
    assert visible == 2
    errors = []
    for b in range(2):
        masked = set(range(9)) - set(order[b, :visible].tolist())
        assert len(masked) == 7
        for number in masked:
            row, column = divmod(number, 3)
            values = [
                float(images[b, channel, 4 * row + y, 4 * column + x])
                for y in range(4)
                for x in range(4)
                for channel in range(3)
            ]
            mean = sum(values) / 48
            variance = sum((value - mean) ** 2 for value in values) / 47
            target = [(value - mean) / (variance + 1e-6) ** 0.5 for value in values]
            errors.append(sum((p - t) ** 2 for p, t in zip(predicted[b, number].tolist(), target, strict=True)) / 48)
    error = mae.masked_error(predicted, mae.normalised_patches(patches), order, visible)
    assert float(error) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_positions_are_the_papers():
    """Transformer's sine and cosine of column, then of row."""
    positions = mae.sine_positions(3, 8)
    for row in range(3):
        for column in range(3):
            wanted = [f(at * 10000 ** (-i / 2)) for at in (column, row) for f in (np.sin, np.cos) for i in range(2)]
            np.testing.assert_allclose(positions[row, column], wanted, atol=1e-6)


@torch.no_grad()
def test_with_nothing_masked_the_encoder_is_the_full_one():
    learner = learner_of(settings_of())
    encoder, pixels = encoder_of(learner.sam), torch.randn(2, 3, 64, 64)
    everything = torch.arange(64).expand(2, 64)
    x = mae.encode_visible(encoder, pixels, everything).unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    torch.testing.assert_close(encoder.neck(x), encoder.features(pixels).embedding, rtol=1e-4, atol=1e-5)
    some = torch.stack([torch.randperm(64)[:16] for _ in range(2)])
    hidden = pixels.clone()
    is_visible = torch.zeros(2, 64).scatter_(1, some, 1.0)[..., None].expand(-1, -1, 192)
    hidden += mae.unpatchify((1 - is_visible) * 100, 8)
    part = mae.encode_visible(encoder, pixels, some)
    torch.testing.assert_close(mae.encode_visible(encoder, hidden, some), part)  # it does not see the others
    assert not torch.allclose(
        x.flatten(2).transpose(1, 2).gather(1, some[..., None].expand(-1, -1, 16)), part, atol=1e-3
    )


def test_each_prediction_is_of_its_own_place():
    """An untrained decoder without attention: what is visible arrives where it was."""
    decoder = mae.MaeDecoder(16, 4, 8, dim=16, depth=1, num_heads=2)
    order = mae.draw_order(2, 16, torch.Generator().manual_seed(0))
    decoder.blocks = torch.nn.ModuleList()
    decoder.positions.zero_()
    out = decoder(torch.randn(2, 4, 16), order)
    of_token = decoder.predict(decoder.last_norm(decoder.mask_token))[0, 0]
    is_token = torch.isclose(out, of_token, atol=1e-6).all(dim=2)
    for b in range(2):
        assert set(is_token[b].nonzero()[:, 0].tolist()) == set(order[b, 4:].tolist())


# --- the trainer -----------------------------------------------------------------------------------------------------


def run_to_end(data: str, output: Path, *overrides: str, stop_at: int | None = None) -> Store:
    settings, store = settings_of(*overrides), Store(str(output))
    mixture, frame = open_data([data], settings), frame_of(PLAIN, 64)
    learner = learner_of(settings, state=store.read_state())
    maker = ExampleMaker(mixture, frame)
    worker = Worker(
        config=settings.train, store=store, validation=lambda: mixture.validation(2, frame),
        report=lambda line: line["step"] == stop_at,
    )  # fmt: skip
    numbers = blocks(learner.position.step, 1000, settings.train.batch_size)
    run_leg(learner, ({k: torch.from_numpy(v) for k, v in maker({"number": n}).items()} for n in numbers), worker)
    return store


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["files", "tar", "parquet"])
def test_a_run_on_unlabelled_images_ends_as_one_that_was_stopped(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """One of ten files cannot be decoded: another one takes its place."""
    # By a hash of the URIs it is another half in each folder, and once it left the undecodable file alone to train on.
    monkeypatch.setattr("samray.train.images.held_out", lambda uris, fraction: np.arange(len(uris)) % 2 != BROKEN % 2)
    data = make_input(str(tmp_path / "in"), kind)
    settings = ["train.steps=4", "data.validation_fraction=0.5"]
    whole = run_to_end(data, tmp_path / "whole", *settings)
    parts = run_to_end(data, tmp_path / "parts", *settings, stop_at=2)
    assert parts.read_position().step == 2
    run_to_end(data, tmp_path / "parts", *settings)
    weights, expected = (load_file(folder / WEIGHTS_FILE) for folder in (tmp_path / "parts", tmp_path / "whole"))
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    assert not any("rel_pos" in name or "neck" in name or not name.startswith("image_encoder.") for name in expected)
    lines = whole.read_metrics()
    assert [line["kind"] for line in lines] == ["validation", *["train"] * 4, "validation"]
    picture = Image.open(io.BytesIO((tmp_path / "whole" / PICTURE_FILE).read_bytes()))
    assert picture.size == (3 * 64 + 2 * 4, 68 * lines[-1]["num_images"] - 4)
    original, masked = np.asarray(picture)[:64, :64], np.asarray(picture)[:64, 68:132]
    assert 0.2 < (original == masked).all(axis=2).mean() < 0.4  # a quarter, and pixels that are grey anyhow


def test_images_of_which_none_can_be_used_are_counted(tmp_path: Path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    mixture = open_data([str(tmp_path)], settings_of("data.validation_fraction=0"))
    with pytest.raises(StorageError, match=r"^3 of 3 training images of .* cannot be used, the last: not_an_image"):
        mixture.example(0, frame_of(PLAIN, 64))


@pytest.mark.slow
def test_the_loss_of_repeated_images_falls():
    learner = learner_of(settings_of("train.learning_rate=3e-3", "train.warmup_steps=1", "train.steps=1000"))
    yx = torch.linspace(0, 255, 64)
    ramp = torch.stack([yx[:, None].expand(64, 64), yx[None].expand(64, 64), 255 - yx[None].expand(64, 64)], dim=2)
    batch = {"image": torch.stack([ramp, ramp.flip(0)]).to(torch.uint8)}
    losses = [learner.step(batch)["reconstruction_loss"] for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    moved = learner.sam.state_dict()
    assert not moved["image_encoder.blocks.0.attn.rel_pos_h"].any()
    torch.testing.assert_close(moved["image_encoder.pos_embed"][0], mae.sine_positions(8, 16))


def test_validation_masks_the_same_patches_each_time():
    objective = objective_of(settings_of())
    learner = learner_of(settings_of())
    scenes = list(open_data(["scenes"], settings_of()).validation(2, frame_of(PLAIN, 64)))
    first, again = (objective.evaluate(learner.sam, scenes) for _ in range(2))
    assert first == again
    assert first.figures is not None
    assert first.figures["num_images"] == 2
    assert objective.evaluate(learner.sam, []).figures is None


def test_what_does_not_fit_is_refused():
    for overrides, message in (
        (["model.name=tiny"], "one of vit_b, vit_l, vit_h, sam_hq_vit_b, sam_hq_vit_l, sam_hq_vit_h, plain"),
        (["model.checkpoint=x.pth"], "leave model.checkpoint at null"),
        (["train.trainable=decoder"], r"train.trainable = 'decoder' is not allowed with train.objective=mae"),
        (["train.drop_path=0.1"], r"train.drop_path = 0.1 is not allowed"),
        (["mae.mask_ratio=0.999"], "none of plain's 64 patches visible"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_settings(settings_of(*overrides))
    with pytest.raises(ConfigError, match=r"mae.decoder_dim = 20 is not allowed; it takes a multiple of 4"):
        settings_of("mae.decoder_dim=20", "mae.decoder_heads=3")
    for name in ("vit_b", "vit_l", "vit_h"):
        assert check_settings(settings_of(f"model.name={name}")).name == name


def test_crops_are_of_the_papers_sizes():
    rng = np.random.default_rng(0)
    for _ in range(50):
        view = draw_crop(300, 500, 64, 0.5, rng)
        left, top, right, bottom = view.box
        assert 0 <= left < right <= 500
        assert 0 <= top < bottom <= 300
        assert 0.19 < (right - left) * (bottom - top) / (300 * 500) <= 1
        assert 0.74 < (right - left) / (bottom - top) < 1.34


# --- as the start of an encoder --------------------------------------------------------------------------------------


def official_state(dim: int = 16, depth: int = 3, cells: int = 4, patch: int = 8) -> dict[str, Tensor]:
    """Names and shapes of `mae_pretrain_vit_*.pth`."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim), "pos_embed": (1, 1 + cells * cells, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,), "norm.bias": (dim,),
    }  # fmt: skip
    for i in range(depth):
        for name, out, into in (
            ("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim), ("mlp.fc1", 4 * dim, dim), ("mlp.fc2", dim, 4 * dim),
        ):  # fmt: skip
            shapes |= {f"blocks.{i}.{name}.weight": (out, into), f"blocks.{i}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (dim,), f"blocks.{i}.{name}.bias": (dim,)}
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def plain_vit(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Patch tokens of MAE's encoder without its class token, norm and positions beyond those of the grid."""
    dim = state["cls_token"].shape[2]
    x = torch.nn.functional.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"][:, 1:]
    for i in range(3):
        w = {key.removeprefix(f"blocks.{i}."): value for key, value in state.items() if key.startswith(f"blocks.{i}.")}
        y = torch.nn.functional.layer_norm(x, (dim,), w["norm1.weight"], w["norm1.bias"], 1e-6)
        q, k, v = (y @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]).view(len(x), -1, 3, 2, dim // 2).unbind(2)
        scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / (dim // 2) ** 0.5
        y = torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), v).flatten(2)
        x = x + y @ w["attn.proj.weight"].T + w["attn.proj.bias"]
        y = torch.nn.functional.layer_norm(x, (dim,), w["norm2.weight"], w["norm2.bias"], 1e-6)
        y = torch.nn.functional.gelu(y @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
        x = x + y @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
    return x


@torch.no_grad()
def test_an_official_file_gives_the_features_of_its_own_encoder(tmp_path: Path):
    state, path = official_state(cells=8), tmp_path / "mae_pretrain_vit_base.pth"
    torch.save({"model": state}, path)
    torch.manual_seed(0)
    sam, pixels = Sam(PLAIN), torch.randn(1, 3, 64, 64)
    neck = sam.image_encoder.state_dict()["neck.0.weight"].clone()
    load_encoder(sam, str(path))
    x = plain_vit(state, pixels).unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    wanted = encoder_of(sam).neck(x)
    torch.testing.assert_close(sam.image_encoder.features(pixels).embedding, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(sam.image_encoder.state_dict()["neck.0.weight"], neck)
    assert not sam.image_encoder.state_dict()["blocks.0.attn.rel_pos_h"].any()


@pytest.mark.slow
def test_a_vitmae_folder_gives_the_same_encoder_as_the_library_has(tmp_path: Path):
    transformers = pytest.importorskip(
        "transformers", reason="ViTMAE's files are NOT compared with the library's: pip install 'samray[test]'"
    )
    config = transformers.ViTMAEConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=8,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=32, mask_ratio=0.0,
    )  # fmt: skip
    for made in (transformers.ViTMAEModel(config), transformers.ViTMAEForPreTraining(config)):
        folder = tmp_path / type(made).__name__
        made.save_pretrained(folder)
        sam = Sam(PLAIN)
        load_encoder(sam, str(folder))
        state = sam.image_encoder.state_dict()
        names = {name.removeprefix("vit."): value for name, value in load_file(folder / "model.safetensors").items()}
        keys = "encoder.layer.2.attention.attention." if any(".attention.attention." in n for n in names) else None
        assert keys is not None
        qkv = torch.cat([names[f"{keys}{part}.weight"] for part in ("query", "key", "value")])
        assert torch.equal(state["blocks.2.attn.qkv.weight"], qkv)
        assert torch.equal(state["blocks.1.mlp.lin2.weight"], names["encoder.layer.1.output.dense.weight"])
        assert torch.equal(state["blocks.1.norm2.bias"], names["encoder.layer.1.layernorm_after.bias"])
        assert torch.equal(state["pos_embed"].view(64, 16), names["embeddings.position_embeddings"][0, 1:])


def test_positions_and_patches_of_other_sizes_are_interpolated(tmp_path: Path):
    """As from 224 pixels to 1024, and from MAE's patch of 14 to SAM's of 16 for ViT-H."""
    state = official_state(cells=4, patch=7)
    ramp = torch.linspace(0, 1, 4)
    state["pos_embed"][0, 1:] = (ramp[:, None] + torch.zeros(4)).reshape(16, 1)
    state["patch_embed.proj.weight"] = torch.ones(16, 3, 7, 7)
    save_file(state, tmp_path / "x.safetensors")
    sam = Sam(PLAIN)
    load_encoder(sam, str(tmp_path / "x.safetensors"))
    encoder = encoder_of(sam)
    torch.testing.assert_close(encoder.patch_embed.proj.weight.data, torch.ones(16, 3, 8, 8))
    rows = encoder.pos_embed[0, :, 0, 0]
    assert encoder.pos_embed.shape == (1, 8, 8, 16)
    assert (rows.diff() > 0).all()
    torch.testing.assert_close(encoder.pos_embed[0, :, :, 3], rows[:, None].expand(8, 8).clone())


def test_a_file_that_does_not_fit_is_refused_with_its_keys(tmp_path: Path):
    path = tmp_path / "x.pth"
    torch.save({"model": official_state(depth=2)}, path)
    with torch.device("meta"):
        sam, other = Sam(PLAIN), Sam(MODELS["tiny"])
    with pytest.raises(ConfigError, match=r"fits plain: 12 missing keys: blocks.2.norm1.weight"):
        check_encoder(sam, str(path))
    with pytest.raises(ConfigError, match="tiny is not one"):
        check_encoder(other, str(path))
    with pytest.raises(ConfigError, match=r"train.encoder_checkpoint: the file .* does not exist"):
        check_encoder(sam, str(tmp_path / "nowhere.pth"))


def vitmae_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names for an official state; query, key and value apart."""
    renames = [
        ("pos_embed", "embeddings.position_embeddings"), ("cls_token", "embeddings.cls_token"),
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("blocks.", "encoder.layer."),
        ("attn.proj", "attention.output.dense"), ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
        ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
    ]  # fmt: skip
    named = {}
    for key, value in state.items():
        for ours, theirs in renames:
            key = key.replace(ours, theirs)
        parts = zip(("query", "key", "value"), value.chunk(3), strict=True) if ".qkv." in key else [("", value)]
        named |= {key.replace("attn.qkv", f"attention.attention.{name}"): part for name, part in parts}
    return named


@pytest.mark.parametrize("names", ["official", "ViTMAE"])
def test_a_tensor_of_any_shape_is_refused_with_a_sentence(names: str):
    """Each tensor in turn; no shape reaches an interpolation or a concatenation that it does not fit."""
    with torch.device("meta"):
        sam = Sam(PLAIN)
    state = official_state(cells=8)
    state = vitmae_names(state) if names == "ViTMAE" else state
    assert set(to_encoder_names(state)) >= {"pos_embed", "blocks.2.attn.qkv.weight", "blocks.0.mlp.lin1.bias"}
    dropped = ("cls_token", "norm.", "embeddings.cls_token")
    for key in state:
        if key.startswith(dropped):
            continue
        for shape in ((), (0,), (5,), (3, 5), (1, 0, 16), (1, 1, 0, 0), (16, 3, 0, 0), (16, 3, 4, 6), (1, 4, 6, 16)):
            changed = state | {key: torch.zeros(shape)}
            with pytest.raises(ConfigError, match=r"train.encoder_checkpoint: .*(key|square)"):
                fit_encoder(changed, sam, Path("x.pth"))


@pytest.mark.slow
def test_a_run_starts_a_training_of_masks_and_a_further_run(tmp_path: Path):
    store = run_to_end("scenes", tmp_path, "train.steps=2")
    written = load_file(tmp_path / WEIGHTS_FILE)
    start = f"train.encoder_checkpoint={store.uri(WEIGHTS_FILE)}"
    further = learner_of(settings_of(start))
    masks = learner_of(load_train_settings(None, ["model.name=plain", "train.from_scratch=true", start]))
    for learner in (further, masks):
        for name, value in written.items():
            assert torch.equal(learner.sam.state_dict()[name], value.float()), name
    assert isinstance(further.step_loss, MaeLoss)
    whole = load_train_settings(None, ["model.name=plain", f"model.checkpoint={store.uri(WEIGHTS_FILE)}"])
    with pytest.raises(ConfigError, match="missing keys"):
        learner_of(whole)
