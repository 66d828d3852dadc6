"""Adapters: what learns, that the merged model is the trained one, and that only their own weights take them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from samray.cli.main import main
from samray.config import load_config
from samray.errors import ConfigError
from samray.output.plan import make_plan
from samray.pipeline.labeler import build_labeler
from samray.pipeline.plan_run import run_identity
from samray.sam import onnx_export
from samray.sam.adapter import metadata
from samray.sam.checkpoints import check_weights, load_model
from samray.sam.fetch import file_sha256
from samray.sam.onnx_export import export_onnx
from samray.sam.sam import Sam
from samray.sam.spec import MODELS
from samray.sam.weights_file import WeightsFile
from samray.train import lora
from samray.train.data import open_data
from samray.train.examples import Frame
from samray.train.learner import Learner
from samray.train.loop import Worker, run_leg
from samray.train.masks import Masks
from samray.train.run import full_identity
from samray.train.settings import TrainSettings, load_train_settings
from samray.train.store import ADAPTER_FILE, WEIGHTS_FILE, Store
from tests.support.micro import (
    CPU,
    FRAME,
    MICRO,
    MICRO_EDGETAM,
    MICRO_SAM2,
    MICRO_SAM3,
    MICRO_VIT,
    batches_of,
    settings_of,
)

OPTIONS = ("train.trainable=lora", "train.from_scratch=false", "train.warmup_steps=1", "train.learning_rate=1e-2")

PROJECTIONS = lora.projections(Sam(MICRO))


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """base(spec): its name becomes a model's, and random weights of it are written."""

    def make(spec: Any = MICRO, seed: int = 0) -> Path:
        monkeypatch.setitem(MODELS, spec.name, spec)
        torch.manual_seed(seed)
        path = tmp_path / f"base-{seed}.safetensors"
        save_file({key: value.contiguous() for key, value in Sam(spec).state_dict().items()}, path)
        return path

    return make


def settings_for(spec: Any, checkpoint: Path, *overrides: str) -> TrainSettings:
    settings = settings_of(*OPTIONS, f"model.checkpoint={checkpoint}", *overrides)
    return settings.model_copy(update={"model": settings.model.model_copy(update={"name": spec.name})})


def learner_for(spec: Any, checkpoint: Path, *overrides: str, **options: Any) -> Learner:
    settings = settings_for(spec, checkpoint, *overrides)
    identity = full_identity(settings, spec.name, [])
    return Learner(settings, spec, identity=identity, image_size=spec.image_size, device=CPU, **options)


def saved(learner: Learner, output: Path) -> Path:
    Store(str(output)).write_weights(learner.weights(), learner.metadata(), ADAPTER_FILE)
    return output / ADAPTER_FILE


@pytest.mark.parametrize(
    "spec",
    [MICRO, MICRO_VIT, MICRO_SAM2, MICRO_EDGETAM, MICRO_SAM3],
    ids=["tiny_vit", "vit", "hiera", "repvit", "rope_vit"],
)
def test_only_the_adapter_learns_and_merged_it_gives_the_same_masks(
    spec: Any, base: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = base(spec)
    learner = learner_for(spec, checkpoint, "train.ema_decay=0", "train.lora_rank=3")
    before = {name: value.clone() for name, value in learner.sam.state_dict().items()}
    batches = batches_of(settings_of(), Frame(spec.image_size, 4 * spec.grid, spec.frame == "pad"))
    for _ in range(2):
        learner.step(next(batches))
    changed = {name for name, value in learner.sam.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".lora_" in name}
    adapted = {name.partition(".lora_")[0] for name in changed}
    assert adapted == set(lora.projections(Sam(spec)))
    # Both sides, but for an encoder of convolutions, and in the decoder all that the transformer's algebra absorbs.
    sides = {"mask_decoder"} if spec is MICRO_EDGETAM else {"image_encoder", "mask_decoder"}
    assert {name.partition(".")[0] for name in adapted} == sides
    assert "mask_decoder.transformer.final_attn_token_to_image.k_proj" in adapted

    merged = load_model(spec.name, checkpoint, "cpu", adapter=saved(learner, tmp_path / "out"))
    assert learner.average is not None
    plain = load_model(spec.name, checkpoint, "cpu")
    pixels = torch.randn(1, 3, spec.image_size, spec.image_size)
    points, labels = torch.tensor([[[20.0, 30.0]]]), torch.ones(1, 1)

    def logits(sam: Sam) -> torch.Tensor:
        return sam.predict(sam.encode_images(pixels), points, labels)[0]

    with torch.no_grad():
        trained, of_merged, unadapted = logits(learner.average), logits(merged), logits(plain)
    scale = trained.abs().max()
    # The file is in half precision.
    assert (of_merged - trained).abs().max() < 2e-3 * scale
    assert (unadapted - trained).abs().max() > 0.05 * scale


def test_a_run_writes_the_adapter_alone_and_resumes_to_the_same_digit(
    base: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = base()
    settings = settings_for(MICRO, checkpoint, "train.steps=3")

    def run(output: Path, stop_at: int | None = None) -> Store:
        store = Store(str(output))
        learner = learner_for(MICRO, checkpoint, "train.steps=3", state=store.read_state())
        mixture = open_data(["scenes"], settings)
        worker = Worker(
            config=settings.train, store=store, validation=lambda: mixture.validation(1, FRAME),
            report=lambda line: line["step"] == stop_at,
        )  # fmt: skip
        run_leg(learner, batches_of(settings, FRAME, learner.position.step), worker)
        return store

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", stop_at=1)
    parts = run(tmp_path / "parts")
    for name, value in load_file(tmp_path / "whole" / ADAPTER_FILE).items():
        torch.testing.assert_close(load_file(tmp_path / "parts" / ADAPTER_FILE)[name], value, rtol=0, atol=0)
    assert whole.read_position().step == parts.read_position().step == 3
    assert not (tmp_path / "whole" / WEIGHTS_FILE).exists()
    with safe_open(tmp_path / "whole" / ADAPTER_FILE, "pt") as file:
        expected = metadata("micro", file_sha256(checkpoint), lora.SCALE) | {"steps": "3"}
        assert file.metadata() == expected
    command = Masks(settings).next_command("micro", "out/adapter.safetensors")
    assert command.endswith(f"model.name=micro model.checkpoint={checkpoint} model.adapter=out/adapter.safetensors")


def test_the_adapter_is_a_part_of_a_runs_identity_and_actors_check_it(
    base: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = base()
    adapter = saved(learner_for(MICRO, checkpoint), tmp_path / "out")
    config = load_config(None, None, [f"model.checkpoint={checkpoint}", f"model.adapter={adapter}"])
    config = config.model_copy(update={"model": config.model.model_copy(update={"name": "micro"})})
    identity = run_identity(config)["model"]
    assert identity["adapter_sha256"] == file_sha256(adapter)
    without = config.model_copy(update={"model": config.model.model_copy(update={"adapter": None})})
    assert run_identity(without)["model"] == {k: v for k, v in identity.items() if k != "adapter_sha256"}
    build_labeler(config, 1, identity["checkpoint_sha256"], adapter_sha256=identity["adapter_sha256"])
    with pytest.raises(ConfigError, match=r"adapter.safetensors on .* does not have this run's weights"):
        build_labeler(config, 1, identity["checkpoint_sha256"], adapter_sha256="0" * 64)


def test_an_export_to_onnx_is_of_the_adapter_that_it_names(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is written again after it was hashed, as a training does."""
    checkpoint, out = base(), tmp_path / "onnx"
    adapter = saved(learner_for(MICRO, checkpoint), tmp_path / "out")

    def load(*arguments: Any, **options: Any) -> Sam:
        saved(learner_for(MICRO, checkpoint, "train.lora_rank=2"), tmp_path / "out")
        return load_model(*arguments, **options)

    monkeypatch.setattr(onnx_export, "load_model", load)
    with pytest.raises(ConfigError, match=r"adapter.safetensors on .* does not have this run's weights"):
        export_onnx("micro", out, checkpoint=str(checkpoint), adapter=str(adapter))
    assert not out.exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            "other base",
            "was trained on other weights of micro: their SHA-256 is .*; set model.checkpoint",
        ),
        ("other model", "adapts vit_b, not micro: set model.name=vit_b"),
        ("weights", "is not an adapter; `samray train train.trainable=lora` writes one"),
        ("text", "is not an adapter: "),
        ("half", "is damaged, .*q_proj.lora_B.weight is missing; copy it again, or train it again"),
        ("other key", r"of another version of samray: a.weight does not belong in an adapter"),
        ("empty", "it has no tensors"),
        ("rank 0", r"q_proj.lora_B.weight is \(32, 0\), expected a matrix"),
        ("vector", r"q_proj.lora_B.weight is \(32,\), expected a matrix"),
        ("ranks", "lora_A of mask_decoder.*q_proj has rank 8, lora_B has rank 4"),
        ("integers", "q_proj.lora_B.weight is int8, expected floats"),
        ("nan", "q_proj.lora_B.weight has values that are not finite"),
        ("product", r"with its scale 1e\+30, mask_decoder.*q_proj is not finite in half precision"),
        ("no scale", "its metadata have no scale"),
        ("scale", "its scale is not a number"),
        ("shape", r"does not fit micro: .*q_proj.weight is \(32, 32\), the adapter's is \(33, 32\)"),
        ("missing", "does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    spoil: str, message: str, base: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint, adapter = base(), tmp_path / ADAPTER_FILE
    sizes = {name: layer.weight.shape for name, layer in Sam(MICRO).named_modules() if name in PROJECTIONS}
    tensors = {f"{name}.lora_A.weight": torch.zeros(8, shape[1]) for name, shape in sizes.items()}
    tensors |= {f"{name}.lora_B.weight": torch.zeros(shape[0], 8) for name, shape in sizes.items()}
    info = metadata("micro", file_sha256(checkpoint), lora.SCALE)
    save_file(tensors, adapter, info)
    load_model("micro", checkpoint, "cpu", adapter=adapter)  # as it is, it fits
    name = "mask_decoder.transformer.layers.0.self_attn.q_proj.lora_B.weight"
    if spoil == "other base":
        checkpoint = base(MICRO, seed=1)
    elif spoil == "other model":
        save_file(tensors, adapter, info | {"model": "vit_b"})
    elif spoil == "weights":
        adapter = checkpoint
    elif spoil == "text":
        adapter.write_text("adapter")
    elif spoil == "half":
        del tensors[name]
        save_file(tensors, adapter, info)
    elif spoil == "other key":
        save_file(tensors | {"a.weight": torch.zeros(2, 2)}, adapter, info)
    elif spoil == "empty":
        save_file({}, adapter, info)
    elif spoil == "product":
        tensors |= {key: torch.ones_like(value) for key, value in tensors.items() if key.startswith(name[:-15])}
        save_file(tensors, adapter, info | {"scale": "1e30"})
    elif spoil == "no scale":
        save_file(tensors, adapter, {key: value for key, value in info.items() if key != "scale"})
    elif spoil == "scale":
        save_file(tensors, adapter, info | {"scale": "inf"})
    elif spoil != "missing":
        tensors[name] = {
            "shape": torch.zeros(33, 8), "rank 0": torch.zeros(32, 0), "vector": torch.zeros(32),
            "ranks": torch.zeros(32, 4), "integers": torch.zeros(32, 8).to(torch.int8),
            "nan": torch.full((32, 8), torch.nan),
        }[spoil]  # fmt: skip
        save_file(tensors, adapter, info)
    else:
        adapter.unlink()
    for refused in (
        lambda: load_model("micro", checkpoint, "cpu", adapter=adapter),
        lambda: check_weights(WeightsFile("micro", checkpoint, adapter)),
    ):
        with pytest.raises(ConfigError, match=message):
            refused()


def test_an_adapter_of_another_model_or_of_other_weights_is_refused_before_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch_published(*arguments: Any) -> Path:
        raise AssertionError("downloaded")

    monkeypatch.setattr("samray.sam.fetch.fetch_published", fetch_published)
    adapter = tmp_path / ADAPTER_FILE
    for model, message in (("tiny", "adapts tiny, not vit_h"), ("vit_h", "was trained on other weights of vit_h")):
        save_file({"a": torch.zeros(1)}, adapter, metadata(model, "0" * 64, lora.SCALE))
        for refused in (
            lambda: WeightsFile("vit_h", None, adapter).sha256,
            lambda: load_model("vit_h", adapter=adapter),
            lambda: export_onnx("vit_h", tmp_path / "onnx", adapter=str(adapter)),
        ):
            with pytest.raises(ConfigError, match=message):
                refused()


def test_a_dry_run_refuses_the_adapters_that_a_run_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    good, other = tmp_path / "good.safetensors", tmp_path / "other.safetensors"
    weights = WeightsFile("tiny")
    name = "mask_decoder.transformer.final_attn_token_to_image.k_proj"
    rows, columns = load_model("tiny", device="cpu").get_parameter(f"{name}.weight").shape
    for path, value in ((good, 0.0), (other, 1.0), (tmp_path / "nan.safetensors", torch.nan)):
        pair = {f"{name}.lora_A.weight": torch.full((1, columns), value), f"{name}.lora_B.weight": torch.ones(rows, 1)}
        save_file(pair, path, metadata("tiny", weights.sha256, lora.SCALE))
    save_file({"a": torch.zeros(1)}, tmp_path / "vit_b.safetensors", metadata("vit_b", "0" * 64, lora.SCALE))
    save_file({"a": torch.zeros(1)}, tmp_path / "base.safetensors", metadata("tiny", "0" * 64, lora.SCALE))

    def dry_run(adapter: Path | None) -> tuple[int, str]:
        words = [] if adapter is None else [f"model.adapter={adapter}"]
        code = main(["label", str(tmp_path / "in"), str(tmp_path / "out"), "--dry-run", *words])
        return code, " ".join(capsys.readouterr().err.split())

    assert dry_run(good)[0] == 0
    for name, words in (
        ("vit_b", "adapts vit_b, not tiny"),
        ("base", "was trained on other weights of tiny"),
        ("nowhere", "does not exist"),
        ("nan", "values that are not finite"),
    ):
        code, text = dry_run(tmp_path / f"{name}.safetensors")
        assert code == 2
        assert words in text
    config = load_config(None, None, [f"model.adapter={good}"])
    make_plan(str(tmp_path / "in"), str(tmp_path / "out"), config, run_identity(config))
    assert dry_run(good)[0] == 0
    for adapter in (other, None):
        code, text = dry_run(adapter)
        assert code == 2
        assert "model.adapter_sha256" in text


@pytest.mark.parametrize(
    "override",
    ["train.objective=text", "train.from_scratch=true", "train.encoder_checkpoint=a.pth", "train.first_fraction=0.5"],
)
def test_settings_without_a_fixed_base_are_refused(override: str) -> None:
    name = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{name} is not possible with train.trainable=lora"):
        load_train_settings(None, ["train.trainable=lora", override])


def test_an_adapter_is_found_in_its_folder_and_is_not_weights(base: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, output = base(), tmp_path / "out"
    adapter = saved(learner_for(MICRO, checkpoint), output)
    assert WeightsFile("micro", checkpoint, output).adapter_sha256 == file_sha256(adapter)
    with pytest.raises(ConfigError, match=r"is a LoRA adapter, not weights: set model\.adapter to it"):
        load_model("micro", adapter)
    adapter.unlink()
    with pytest.raises(ConfigError, match=r"model\.adapter: the folder .* has no adapter\.safetensors"):
        load_model("micro", checkpoint, adapter=output)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'samray\[lora\]'"):
        lora.require_peft()
