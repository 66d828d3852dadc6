"""Text prompts: the projection in the weights, what CLIP sees of a mask, the loss, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from samray.config import load_config
from samray.errors import ConfigError
from samray.labels.clip import load_clip, read_pixels
from samray.labels.networks import WEIGHTS, find_network
from samray.labels.sam_text import build_generator, read_inputs
from samray.labels.zero_shot import cut_out
from samray.masks.prompted import PromptedGenerator
from samray.prompts import Prompt
from samray.sam.checkpoints import load_model
from samray.sam.fetch import file_sha256
from samray.sam.sam import Sam
from samray.sam.spec import MODELS
from samray.sam.text_projection import TextProjection
from samray.scenes.scene import make_scene
from samray.train.data import ExampleMaker, open_data
from samray.train.interaction import Rounds, draw_course
from samray.train.learner import Learner, check_settings
from samray.train.loop import Worker, run_leg
from samray.train.objectives import objective_of
from samray.train.run import full_identity
from samray.train.settings import TextConfig, TrainSettings, load_train_settings
from samray.train.store import Store
from samray.train.text_prompts import Shown, TextPrompts, box_of, embed, enlarged
from tests.support.micro import CPU, FRAME, MICRO
from tests.support.tiny_clip import write_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(autouse=True)
def micro_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "micro", MICRO)


def settings_of(clip: Path, *overrides: str) -> TrainSettings:
    base = [
        "train.objective=text", f"text.checkpoint={clip}", "model.name=micro", "train.from_scratch=true",
        "train.batch_size=2", "data.prompts_per_image=3", "data.validation_images=2", "train.interaction_steps=3",
        "train.layer_decay=1", "train.log_every=1", "train.steps=2",
    ]  # fmt: skip
    return objective_of(load_train_settings(None, [*base, *overrides])).adjusted()


def learner_of(settings: TrainSettings, **options: Any) -> Learner:
    return Learner(settings, MICRO, image_size=MICRO.image_size, device=CPU, **options)


def batch_of(settings: TrainSettings) -> dict[str, torch.Tensor]:
    made = ExampleMaker(open_data(["scenes"], settings), FRAME)({"number": np.arange(2)})
    return {name: torch.from_numpy(array) for name, array in made.items()}


def weights_with_projection(path: Path, clip_sha256: str = "00" * 32, clip_dim: int = 16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    sam = Sam(MICRO)
    sam.prompt_encoder.text_projection = TextProjection(clip_dim, MICRO.embed_dim, bytes.fromhex(clip_sha256))
    save_file(sam.state_dict(), path)
    return dict(sam.state_dict())


# --- in the weights --------------------------------------------------------------------------------------------------


def test_weights_have_a_projection_or_none(tmp_path: Path) -> None:
    state = weights_with_projection(tmp_path / "w.safetensors", "ab" * 32)
    loaded = load_model("micro", tmp_path / "w.safetensors")
    projection = loaded.prompt_encoder.text_projection
    assert projection is not None
    assert projection.clip_sha256_hex == "ab" * 32
    assert torch.equal(projection.weight, state["prompt_encoder.text_projection.weight"])
    save_file({k: v for k, v in state.items() if "text_projection" not in k}, tmp_path / "plain.safetensors")
    assert load_model("micro", tmp_path / "plain.safetensors").prompt_encoder.text_projection is None


def test_a_damaged_projection_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = weights_with_projection(path)
    key = "prompt_encoder.text_projection"
    for changed, message in (
        ({f"{key}.bias": None}, rf"1 missing key: {key}\.bias"),
        ({f"{key}.weight": None}, rf"1 missing key: {key}\.weight"),
        ({f"{key}.weight": torch.zeros(7, 16)}, rf"{key}\.weight is \(7, 16\), expected \(32, 16\)"),
        ({f"{key}.weight": torch.zeros(16)}, rf"{key}\.weight is \(16,\)"),
        ({f"{key}.clip_sha256": torch.zeros(3, dtype=torch.uint8)}, r"clip_sha256 is \(3,\), expected \(32,\)"),
        ({f"{key}.more": torch.zeros(3)}, rf"1 unexpected key: {key}\.more"),
    ):
        save_file({k: v for k, v in (state | changed).items() if v is not None}, path)
        with pytest.raises(ConfigError, match=message):
            load_model("micro", path)


@torch.no_grad()
def test_a_text_is_one_token_and_no_point_is_added() -> None:
    torch.manual_seed(0)
    sam = Sam(MICRO).eval()
    sam.prompt_encoder.text_projection = TextProjection(16, MICRO.embed_dim)
    embedding, texts = torch.randn(1, 32, 4, 4), torch.randn(3, 16)
    tokens = sam.prompt_encoder.encode_texts(texts)
    assert tokens.shape == (3, 1, 32)
    logits, iou = sam.predict(embedding, text_embeddings=texts)
    batch_logits, batch_iou = sam.decode_batch(embedding, tokens[None])
    torch.testing.assert_close(logits, batch_logits[0, :, 1:])
    torch.testing.assert_close(iou, batch_iou[0, :, 1:])


# --- training --------------------------------------------------------------------------------------------------------


def test_clip_sees_the_masks_cut_out_as_for_names(clip: Path) -> None:
    scene = make_scene(3, 64)
    example = {
        "image": scene.image,
        "targets": np.stack([m[::4, ::4] for m in scene.masks]).astype(np.uint8) * np.uint8(255),
    }
    masks = [enlarged(target, 64) for target in example["targets"]]
    pixels = read_pixels(clip)
    for blank, crop in ((0.0, "plain"), (1.0, "blanked")):
        shown = Shown(TextConfig(expand=(1.0, 1.0), blank_fraction=blank), pixels, 0)
        squares = shown.squares(example, np.random.default_rng(0))
        wanted = [pixels.resized(cut_out(scene.image, mask, box_of(mask), crop)) for mask in masks]
        np.testing.assert_array_equal(squares, np.stack(wanted))
    wide = Shown(TextConfig(expand=(1.0, 2.0), blank_fraction=0.0), pixels, 0)
    draws = [wide.squares(example, np.random.default_rng(i)) for i in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


def test_the_first_prompt_is_what_clip_sees_and_clicks_follow(clip: Path) -> None:
    settings = settings_of(clip)
    learner, batch = learner_of(settings), batch_of(settings)
    network = load_clip(find_network(str(clip), ("clip",), "text"), "text", "cpu")
    texts = embed(network, batch["shown"].flatten(0, 1)).unflatten(0, (2, 3))
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(2, 3))
    course = draw_course(settings.train, 0)
    rounds = Rounds(learner.sam, settings.train, course, batch | {"text_embeddings": texts}, torch.Generator())
    assert rounds.clicks.shape[2] == 0
    assert rounds.boxes is None
    losses = list(rounds.run(learner.sam.encode_images(torch.zeros(2, 3, 64, 64))))
    assert len(losses) == 3
    assert rounds.clicks.shape[2] == sum(course.adds_click) > 0
    gradient = torch.autograd.grad(losses[1], learner.sam.prompt_encoder.text_projection.weight)[0]
    assert gradient.abs().sum() > 0, "a later round has the text, too"


def test_the_projection_learns_with_the_decoder_and_is_written(clip: Path, tmp_path: Path) -> None:
    settings = settings_of(clip, "train.trainable=decoder")
    learner = learner_of(settings)
    before = {key: value.clone() for key, value in learner.sam.state_dict().items()}
    batch = batch_of(settings)
    for _ in range(2):
        learner.step(batch)
    changed = {key for key, value in learner.sam.state_dict().items() if not torch.equal(value, before[key])}
    assert "prompt_encoder.text_projection.weight" in changed
    assert any(key.startswith("mask_decoder.") for key in changed)
    assert {key.partition(".")[0] for key in changed} == {"mask_decoder", "prompt_encoder"}
    assert not [key for key in changed if key.startswith("prompt_encoder.") and "text_projection" not in key]
    weights = learner.weights()
    assert not [key for key in weights if "clip" in key and not key.endswith("text_projection.clip_sha256")]
    save_file(weights, tmp_path / "w.safetensors")
    loaded = load_model("micro", tmp_path / "w.safetensors")
    assert loaded.prompt_encoder.text_projection.clip_sha256_hex == file_sha256(clip / WEIGHTS)


def test_a_stopped_run_ends_like_a_whole_one_and_validates(clip: Path, tmp_path: Path) -> None:
    settings = settings_of(clip)
    mixture = open_data(["scenes"], settings)
    maker = ExampleMaker(mixture, FRAME)

    def run(output: Path, steps: list[int]) -> Store:
        store = Store(str(output))
        for step in steps:
            batch = {k: torch.from_numpy(v) for k, v in maker({"number": np.arange(2 * step, 2 * step + 2)}).items()}
            worker = Worker(
                config=settings.train, store=store, validation=lambda: mixture.validation(2, FRAME), max_steps=1
            )
            run_leg(learner_of(settings, state=store.read_state()), [batch], worker)
        return store

    parts = run(tmp_path / "parts", [0, 1])
    learner = learner_of(settings)
    for step in range(2):
        learner.step({k: torch.from_numpy(v) for k, v in maker({"number": np.arange(2 * step, 2 * step + 2)}).items()})
    written = load_file(tmp_path / "parts" / "weights.safetensors")
    assert all(torch.equal(value, written[key]) for key, value in learner.weights().items())
    figures = [line for line in parts.read_metrics() if line["kind"] == "validation"][-1]
    assert 0 <= figures["miou"] <= figures["miou_oracle"] <= 1
    assert "another mask's embedding" in objective_of(settings).in_words(figures)


def test_a_training_goes_on_from_a_projection_for_the_same_clip_only(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "prompt_encoder.text_projection.weight"
    path = tmp_path / "w.safetensors"
    start = ["train.from_scratch=false", f"model.checkpoint={path}"]
    state = weights_with_projection(path, file_sha256(clip / WEIGHTS))
    assert torch.equal(learner_of(settings_of(clip, *start)).sam.state_dict()[key], state[key])
    masks = load_train_settings(None, ["model.name=micro", *start])
    assert key not in learner_of(masks).sam.state_dict()
    weights_with_projection(path, "12" * 32, clip_dim=5)
    fresh = learner_of(settings_of(clip, *start)).sam
    assert fresh.state_dict()[key].shape == (32, 16)
    assert fresh.prompt_encoder.text_projection.clip_sha256_hex == file_sha256(clip / WEIGHTS)
    weights = {k: v for k, v in state.items() if "text" not in k}
    save_file(weights, path)
    begun = learner_of(settings_of(clip, *start)).sam.state_dict()
    assert all(torch.equal(begun[name], value) for name, value in weights.items())


def test_the_network_belongs_to_the_run(clip: Path, tmp_path: Path) -> None:
    settings = settings_of(clip)
    identity = full_identity(settings, "micro", [("scenes", None)])
    moved = shutil.copytree(clip, tmp_path / "moved")
    assert full_identity(settings_of(moved), "micro", [("scenes", None)]) == identity
    learner_of(settings_of(moved), identity=identity)
    write_clip(moved, seed=1)
    assert full_identity(settings_of(moved), "micro", [("scenes", None)]) != identity
    with pytest.raises(ConfigError, match=r"text\.checkpoint .* is not this run's network"):
        learner_of(settings_of(moved), identity=identity)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.trainable=iou_head"], r"train\.trainable = 'iou_head' is not allowed with train\.objective=text"),
        (["train.box_fraction=0.5"], r"train\.box_fraction = 0\.5 is not allowed with train\.objective=text"),
        (["text.expand=[2,1]"], r"text\.expand = \[2\.0, 1\.0\] is not allowed; it takes a range in 1 to 10"),
        (["text.expand=[0.5,1]"], "it takes a range in 1 to 10"),
    ],
)
def test_settings_that_do_not_fit_are_refused(clip: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(settings_of(clip, *overrides))


def test_masks_are_as_large_as_in_the_paper_unless_asked_for(clip: Path) -> None:
    assert settings_of(clip).data.min_area == 10_000
    assert settings_of(clip, "data.min_area=64").data.min_area == 64
    assert settings_of(clip).train.box_fraction == 0
    assert isinstance(objective_of(settings_of(clip)), TextPrompts)


def test_a_missing_clip_is_named_by_its_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"text\.checkpoint .*/none is not a folder; set text\.checkpoint to"):
        open_data(["scenes"], settings_of(tmp_path / "none"))
    (tmp_path / "bert").mkdir()
    shutil.copytree(write_clip(tmp_path / "clip"), tmp_path / "bert", dirs_exist_ok=True)
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"kind 'bert' .* but train\.objective=text needs 'clip'"):
        open_data(["scenes"], settings_of(tmp_path / "bert"))


# --- labelling -------------------------------------------------------------------------------------------------------


def config_of(clip: Path, *overrides: str) -> Any:
    base = ["labels.by=sam_text", "labels.phrases=[red square,green thing,cat]", f"labels.checkpoint={clip}"]
    return load_config(None, None, [*base, "model.name=micro", "masks.min_mask_area=1", *overrides])


@pytest.mark.parametrize("points_per_batch", [None, 1])
def test_each_phrase_gets_its_best_mask(clip: Path, tmp_path: Path, points_per_batch: int | None) -> None:
    """Against a plain script, phrase by phrase."""
    weights_with_projection(tmp_path / "w.safetensors", file_sha256(clip / WEIGHTS))
    config = config_of(clip, f"model.checkpoint={tmp_path}/w.safetensors", "masks.mask_nms_thresh=1")
    model = load_model("micro", tmp_path / "w.safetensors")
    images = [make_scene(seed, (48, 64)).image for seed in range(2)]
    masks_of_images = build_generator(model, config, read_inputs(config))(points_per_batch).generate(images)
    network = load_clip(find_network(str(clip), ("clip",), "x"), "x", "cpu")
    for image, records in zip(images, masks_of_images, strict=True):
        wanted = {}
        for phrase in config.labels.phrases:
            text = network.embed_texts([f"a photo of a {phrase}."])
            with torch.no_grad():
                embedding = model.encode_images(model.preprocess([image])[0])
                logits, iou = model.predict(embedding, text_embeddings=text)
            best = int(iou[0].argmax())
            area = int((model.frame.masks_out(logits[0, best][None], (48, 64)) > 0).sum())
            if area:
                wanted[phrase] = (area, float(iou[0, best]))
        assert {r["label"]: r["area"] for r in records} == {phrase: area for phrase, (area, _) in wanted.items()}
        for record in records:
            assert record["label_score"] == pytest.approx(wanted[record["label"]][1], abs=1e-5)
            assert record["predicted_iou"] == record["label_score"]
    strict = config_of(clip, f"model.checkpoint={tmp_path}/w.safetensors", "labels.score_thresh=1.9")
    assert build_generator(model, strict, read_inputs(strict))(None).generate(images) == [[], []]


def test_texts_and_clicks_of_an_image_are_asked_of_it_alone(clip: Path, tmp_path: Path) -> None:
    weights_with_projection(tmp_path / "w.safetensors", file_sha256(clip / WEIGHTS))
    weights = (f"model.checkpoint={tmp_path}/w.safetensors", "masks.mask_nms_thresh=1")
    every, one_phrase = config_of(clip, *weights), config_of(clip, *weights, "labels.phrases=[cat]")
    model, image = load_model("micro", tmp_path / "w.safetensors"), make_scene(0, (48, 64)).image
    (wanted,) = build_generator(model, every, read_inputs(every))(None).generate([image])
    generator = build_generator(model, one_phrase, read_inputs(one_phrase, ["red square", "green thing"]))(None)
    texts = [Prompt(text="red square"), Prompt(text="Cat."), Prompt(text="green thing")]
    click = Prompt(points=((20, 20),), labels=(1,))
    with_texts, without, clicked = generator.generate([image] * 3, [texts, [], [click, *texts]])
    assert {mask["label"]: mask["segmentation"] for mask in with_texts} == {
        m["label"]: m["segmentation"] for m in wanted
    }
    assert len(wanted) > 1
    assert [mask["label"] for mask in without] == ["cat"]
    (alone,) = PromptedGenerator(model, one_phrase.masks).generate([image], [[click]])
    # Scores follow from batches of other sizes, so their last digits may differ.
    scores = ("predicted_iou", "label_score")
    for mask, wanted_mask in zip(clicked, alone + with_texts, strict=True):
        assert {key: mask[key] for key in mask if key not in scores} == {
            key: wanted_mask[key] for key in wanted_mask if key not in scores
        }, "clicks first, without a name"
        assert [mask.get(key) for key in scores] == [pytest.approx(wanted_mask.get(key), abs=1e-6) for key in scores]


@pytest.mark.parametrize("num_phrases", [1, 10, 100])
def test_the_image_encoder_runs_once_per_image(clip: Path, tmp_path: Path, num_phrases: int) -> None:
    weights_with_projection(tmp_path / "w.safetensors", file_sha256(clip / WEIGHTS))
    phrases = ",".join(f"thing {i}" for i in range(num_phrases))
    config = config_of(clip, f"labels.phrases=[{phrases}]", f"model.checkpoint={tmp_path}/w.safetensors")
    model = load_model("micro", tmp_path / "w.safetensors")
    encoded = []
    model.image_encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    generator = build_generator(model, config, read_inputs(config))(None)
    generator.generate([make_scene(seed, (48, 64)).image for seed in range(3)])
    assert sum(encoded) == 3
    assert generator.asked.common == tuple(phrases.split(","))


def test_weights_that_know_no_text_are_refused_with_what_to_do(clip: Path, tmp_path: Path) -> None:
    sentence = r"needs weights with a text projection.*samray train LABELS WEIGHTS train\.objective=text model"
    path = tmp_path / "w.safetensors"
    with pytest.raises(ConfigError, match=sentence):
        read_inputs(config_of(clip))
    state = weights_with_projection(path)
    with pytest.raises(ConfigError, match=rf"is not the network with which .* expected {'00' * 32}"):
        read_inputs(config_of(clip, f"model.checkpoint={path}"))
    save_file({k: v for k, v in state.items() if "text" not in k}, path)
    with pytest.raises(ConfigError, match=sentence):
        read_inputs(config_of(clip, f"model.checkpoint={path}"))
