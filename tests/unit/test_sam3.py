"""`labels.by=sam3`: wrong networks get a sentence, image and phrases are encoded once, and no SAM is loaded."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from samray.cli.main import main
from samray.config import Config
from samray.errors import ConfigError, ImageError
from samray.labels.networks import WEIGHTS, Network, digest, find_network
from samray.labels.sam3 import Segmenter, build_generator, read_inputs
from samray.labels.ways import labels_identity
from samray.output.schema import schema_of
from samray.pipeline.dataset_stage import DatasetLabeler
from samray.pipeline.labeler import EncodedImage, build_labeler
from samray.pipeline.plan_run import run_identity
from samray.pipeline.report import no_masks
from samray.prompts import Prompt
from tests.support.networks import write_sam3

CPU = torch.device("cpu")
IMAGE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
pytestmark = pytest.mark.slow  # transformers takes more than ten seconds to import


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sam3(tmp_path_factory.mktemp("network"), seed=5)


@pytest.fixture
def copy(network: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(network, tmp_path / "copy"))


def settings(network: Path, **changes: Any) -> Config:
    return Config(labels={"by": "sam3", "phrases": ["cat", "Dog"], "checkpoint": str(network), **changes})


def segmenter_of(folder: Path, phrases: list[str]) -> Segmenter:
    return Segmenter(Network(str(folder), digest(folder)), phrases, CPU)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_no_other_model_can_be_chosen(network: Path) -> None:
    labels = {"by": "sam3", "phrases": ["cat"]}
    for key, value in {"name": "vit_b", "checkpoint": "x.pth", "dtype": "float16"}.items():
        with pytest.raises(ConfigError, match=rf"labels\.by=sam3 makes the masks .* leave out model\.{key}"):
            Config(labels=labels, model={key: value})
    config = Config(labels=labels, model={"device": "cpu"})
    assert config.masks.min_mask_area == 0, "the reference's, not those of the embedded model"
    assert config.masks.stability_score_offset == 1.0


def test_the_identity_is_the_networks_and_names_no_sam(network: Path, copy: Path) -> None:
    one, two = ({**run_identity(c), **labels_identity(c, read_inputs(c))} for c in (settings(network), settings(copy)))
    assert one == two
    assert one["model"] == {}
    assert one["labels"]["network_sha256"] == digest(network)


def test_the_plan_shows_the_network_that_makes_the_masks(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    options = ["labels.by=sam3", "labels.phrases=[cat,dog]", f"labels.checkpoint={network}", "--dry-run"]
    assert main(["label", str(tmp_path / "in"), str(tmp_path / "out"), *options]) == 0
    text = " ".join(capsys.readouterr().err.split())
    assert "masks by SAM 3 (no other model is loaded), 2 phrases: cat, dog" in text
    assert f"network {network} (SHA-256 {digest(network)[:12]}...)" in text
    assert "model tiny" not in text


def test_the_warning_of_no_masks_names_the_thresholds_that_there_are(network: Path) -> None:
    assert "Lower labels.score_thresh, into another OUTPUT" in no_masks(3, settings(network))


# --- networks ---------------------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def with_setting(key: str, value: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, key: value}))

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without(WEIGHTS), r"does not have model\.safetensors; set labels\.checkpoint to a folder"),
        (without("processor_config.json"), r"does not have preprocessor_config\.json or processor_config\.json"),
        (with_setting("model_type", "clip"), r"of the kind 'clip' .* labels\.by=sam3 needs 'sam3' or 'sam3_video'"),
        (with_setting("detector_config", {"auto_map": {"AutoModel": "x.Y"}}), "has auto_map, which names code"),
        (lambda folder: (folder / "config.json").write_text("["), r"config\.json cannot be read"),
    ],
)
def test_a_wrong_network_is_refused_in_the_driver(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(ConfigError, match=message):
        read_inputs(settings(copy))


def test_a_network_that_the_hub_does_not_give_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def away(name: str, **options: Any) -> str:
        raise OSError("403 Client Error: gated")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", away)
    message = (
        r"facebook/sam3 .* gated\. See https://huggingface\.co/facebook/sam3\. It has a licence of its own, Meta's SAM "
        r"License: accept it .* HF_TOKEN .* set labels\.checkpoint to a folder, .* with config\.json, "
    )
    with pytest.raises(ConfigError, match=message):
        read_inputs(Config(labels={"by": "sam3", "phrases": ["cat"]}))


def detector(settings: dict[str, Any]) -> dict[str, Any]:
    detector_config: dict[str, Any] = settings["detector_config"]
    return detector_config


def of_detector(part: str, **change: Any) -> Callable[[dict[str, Any]], None]:
    return lambda settings: detector(settings)[part].update(change)


def of_pixels(**change: Any) -> Callable[[dict[str, Any]], None]:
    return lambda settings: settings["image_processor"].update(change)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (WEIGHTS, None, "cannot be loaded: "),
        ("tokenizer.json", None, "cannot be loaded: "),
        ("processor_config.json", None, "cannot be loaded: "),
        ("config.json", of_detector("detr_encoder_config", hidden_size=24), r"config\.json expects"),
        ("config.json", of_detector("vision_config", fpn_hidden_size="x"), "cannot be loaded: "),
        ("config.json", of_detector("text_config", vocab_size=40), r"config\.json expects"),
        ("processor_config.json", of_pixels(size=64), "images of 64 pixels a side, but the network takes 56"),
        ("processor_config.json", of_pixels(size=10**9), "images of 1000000000 pixels"),
        ("processor_config.json", of_pixels(image_mean=None), "has no image_mean"),
        ("processor_config.json", lambda all: all.update(image_processor=[]), "is not a JSON object"),
    ],
)
def test_damaged_files_are_refused(copy: Path, name: str, change: Callable[[Any], None] | None, message: str) -> None:
    if change is None:
        (copy / name).write_bytes((copy / name).read_bytes()[:50])
    else:
        settings = json.loads((copy / name).read_text())
        change(settings)
        (copy / name).write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=f"copy.* {message}"):
        segmenter_of(copy, ["cat"])


def test_wrong_tensors_are_named(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    key = "detector_model.text_projection.weight"
    for value, message in ((None, "does not have 1 tensor"), (torch.full((16, 16), torch.nan), "not finite numbers")):
        tensors: dict[str, Any] = {**load_file(copy / WEIGHTS), key: value}
        save_file({name: one for name, one in tensors.items() if one is not None}, copy / WEIGHTS, {"format": "pt"})
        with pytest.raises(ConfigError, match=message):
            segmenter_of(copy, ["cat"])


def test_a_detector_alone_is_the_same_network(network: Path, copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    prefix = "detector_model."
    tensors = {key.removeprefix(prefix): value for key, value in load_file(copy / WEIGHTS).items() if prefix in key}
    save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    (copy / "config.json").write_text(json.dumps(detector(json.loads((copy / "config.json").read_text()))))
    processor = json.loads((copy / "processor_config.json").read_text())
    (copy / "processor_config.json").unlink()
    (copy / "preprocessor_config.json").write_text(json.dumps(processor["image_processor"]))
    remote = find_network(str(copy), ("sam3",), "sam3")
    one, two = segmenter_of(network, ["cat"]), Segmenter(remote, ["cat"], CPU)
    scores = [next(each.find(each.encode(IMAGE), score_thresh=0, phrases_at_once=1)).scores for each in (one, two)]
    torch.testing.assert_close(*scores)


def test_a_phrase_that_does_not_fit_the_network_is_named(tmp_path: Path) -> None:
    folder = write_sam3(tmp_path / "short", texts=6)
    with pytest.raises(ConfigError, match=r"'cat dog cat dog cat' has 5 tokens, and this network takes 4"):
        segmenter_of(folder, ["cat", "cat dog cat dog cat"])
    with pytest.raises(ConfigError, match=r"^labels\.phrases: 'cat dog cat dog cat' has 5 tokens"):
        read_inputs(settings(folder, phrases=["cat", "cat dog cat dog cat"]))
    assert read_inputs(settings(folder, phrases=["cat dog", "cat dog cat dog"])).categories


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 10, 100])
def test_image_and_phrases_are_encoded_once(network: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Sam3Model

    texts: list[int] = []
    of_texts = Sam3Model.get_text_features
    monkeypatch.setattr(
        Sam3Model,
        "get_text_features",
        lambda self, **arguments: texts.append(len(arguments["input_ids"])) or of_texts(self, **arguments),
    )
    config = settings(network, phrases=[f"n{i}" for i in range(number)], score_thresh=0.45)
    make = build_generator(CPU, config, read_inputs(config))
    generator, segmenter = make(None), make(None).segmenter
    counts = dict.fromkeys(("image", "fusion", "masks"), 0)
    model = segmenter.model
    parts = {"image": model.vision_encoder, "fusion": model.detr_encoder, "masks": segmenter._mask_decoder}
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    masks = generator.generate([IMAGE, IMAGE])
    assert sum(texts) == number
    assert masks[0] == masks[1]
    labels = {mask["label"] for mask in masks[0]}
    assert counts == {"image": 2, "fusion": 2 * number, "masks": 2 * len(labels)}
    if number > 1:
        assert 0 < len(labels) < number


def test_an_image_in_which_nothing_is_found_has_no_masks(network: Path) -> None:
    config = settings(network, score_thresh=1.0)
    assert build_generator(CPU, config, read_inputs(config))(None).generate([IMAGE]) == [[]]


def test_little_memory_gives_the_same_masks(network: Path) -> None:
    config = settings(network, score_thresh=0.3)
    make = build_generator(CPU, config, read_inputs(config))
    usual = make(None)
    usual.phrases_at_once = 8
    assert make(1).phrases_at_once == 1
    (many,), (one_by_one,) = usual.generate([IMAGE]), make(1).generate([IMAGE])
    assert many
    assert [(one["label"], one["bbox"]) for one in many] == [(one["label"], one["bbox"]) for one in one_by_one]


@pytest.mark.parametrize("hw", [(1, 1), (1, 3000), (3000, 1), (3, 5)])
def test_small_and_slender_images_are_searched(network: Path, hw: tuple[int, int]) -> None:
    config = settings(network, score_thresh=0.0)
    (masks,) = build_generator(CPU, config, read_inputs(config))(None).generate([np.full((*hw, 3), 200, np.uint8)])
    assert all(mask["segmentation"]["size"] == [*hw] for mask in masks)


def test_threads_share_a_network_and_not_their_images(network: Path) -> None:
    config = settings(network, score_thresh=0.35)
    make = build_generator(CPU, config, read_inputs(config))
    random = np.random.default_rng(2)
    images = [random.integers(0, 255, (40 + 7 * i, 64, 3), dtype=np.uint8) for i in range(6)]
    alone = [make(None).generate([image])[0] for image in images]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda image: make(None).generate([image])[0], images))
    assert together == alone
    assert any(alone)


# --- phrases of single images, and presence ---------------------------------------------------------------------------


def test_own_phrases_are_as_if_asked_of_all_and_are_encoded_once(
    network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Sam3Model

    config = settings(network, phrases=["cat"], score_thresh=0.3)
    inputs = read_inputs(config, ["red car", "Dog"])
    assert (inputs.categories, inputs.identity["asked_of_all"]) == (["cat", "red car", "Dog"], 1)
    generator = build_generator(CPU, config, inputs)(None)
    texts: list[int] = []
    of_texts = Sam3Model.get_text_features
    monkeypatch.setattr(
        Sam3Model,
        "get_text_features",
        lambda self, **arguments: texts.append(len(arguments["input_ids"])) or of_texts(self, **arguments),
    )
    prompts = [Prompt(text="red car"), Prompt(text="Dog"), Prompt(text="CAT")]
    results = generator.generate([IMAGE, IMAGE, IMAGE], [prompts, [], prompts[1:]])
    assert texts == [1, 1], "each own phrase once, although two images have it"
    every = settings(network, phrases=["cat", "red car", "Dog"], score_thresh=0.3)
    (wanted,) = build_generator(CPU, every, read_inputs(every))(None).generate([IMAGE])
    asked = [["cat", "red car", "Dog"], ["cat"], ["cat", "Dog"]]
    for arguments, phrases in zip(results, asked, strict=True):
        assert [one["phrase"] for one in arguments.presence] == phrases
        scores = {one["phrase"]: one["score"] for one in wanted.presence}
        assert [one["score"] for one in arguments.presence] == pytest.approx([scores[p] for p in phrases], abs=1e-5)
        assert [(m["label"], m["bbox"]) for m in arguments] == [
            (m["label"], m["bbox"]) for m in wanted if m["label"] in phrases
        ]
    assert {mask["label"] for mask in wanted} & {"red car", "Dog"}
    alone = build_generator(CPU, every, read_inputs(settings(network, phrases=None), []))(None)
    assert alone.generate([IMAGE]) == [[]], "nothing is asked"
    with pytest.raises(ImageError, match=r"bad_prompt: '(cat ?){40}' has 40 tokens, and this network takes 30"):
        generator.generate([IMAGE], [[Prompt(text="cat " * 40)]])


def test_a_run_from_before_presence_scores_is_finished_without(network: Path) -> None:
    config = settings(network)
    new = labels_identity(config, read_inputs(config))
    assert new["labels"]["presence"] is True
    old = {"labels": {key: value for key, value in new["labels"].items() if key != "presence"}}
    assert labels_identity(config, read_inputs(config), old) == old
    assert labels_identity(config, read_inputs(config), new) == new
    assert schema_of({"identity": old}).names == [n for n in schema_of({"identity": new}).names if n != "presence"]


def test_a_dataset_gets_presence_scores(network: Path) -> None:
    config = settings(network, phrases=["cat"], score_thresh=0.3)
    make = partial(build_labeler, labels=read_inputs(config, []))
    batch = pa.table({"image": [png(IMAGE), b"x"], "tags": [["Dog", "cat"], None]})
    rows = DatasetLabeler(config, 1, make, "tags")(batch).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "failed"]
    assert [[one["phrase"] for one in row["presence"]] for row in rows] == [["cat", "Dog"], []]
    best = {one["phrase"]: one["score"] for one in rows[0]["presence"]}
    assert rows[0]["annotations"]
    assert all(mask["label_score"] <= best[mask["label"]] + 1e-6 for mask in rows[0]["annotations"])
    with pytest.raises(ConfigError, match="already has columns named presence"):
        DatasetLabeler(config, 1, make, "tags")(batch.append_column("presence", pa.array([1, 2])))


def png(image: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "PNG")
    return sink.getvalue()


def test_an_actor_loads_no_sam(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a SAM is loaded")

    monkeypatch.setattr("samray.sam.checkpoints.load_model", refuse)
    config = settings(network, score_thresh=0.3)
    labeler = build_labeler(config, 1, None, read_inputs(config))
    (record,) = labeler.label([EncodedImage(7, "a.png", "a.png", IMAGE)]).records
    assert record.error is None
    assert {mask["label"] for mask in record.annotations} <= {"cat", "Dog"}
    assert [one["phrase"] for one in record.presence or ()] == ["cat", "Dog"]
    assert record.annotations
