"""Networks of text and Grounding DINO: wrong networks get a sentence; one backbone pass per image."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from samray.cli.main import main
from samray.config import Config
from samray.errors import ConfigError, ImageError
from samray.labels.grounding_dino import Detector, GroundedGenerator, build_generator, prompt_of
from samray.labels.networks import WEIGHTS, Network, digest, find_network, opened
from samray.labels.ways import labels_identity, read_inputs
from samray.masks.prompted import PromptedGenerator
from samray.prompts import Prompt
from tests.support.marked import TALL, WIDE, bsds_row, write_parquet
from tests.support.networks import write_grounding_dino
from tests.unit.test_labels_example import micro

CPU = torch.device("cpu")
pytestmark = pytest.mark.slow  # transformers takes more than ten seconds to import


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grounding_dino(tmp_path_factory.mktemp("network"))


@pytest.fixture
def copy(network: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(network, tmp_path / "copy"))


def settings(network: Path, **changes: Any) -> Config:
    labels = {"by": "grounding_dino", "phrases": ["cat", "Dog"], "checkpoint": str(network), **changes}
    return Config(labels=labels, masks={"min_mask_area": 0})


# --- networks ---------------------------------------------------------------------------------------------------------


def test_a_network_is_identified_by_its_files_not_their_place(network: Path, copy: Path) -> None:
    (copy / "README.md").write_text("not of the network")
    one, two = (labels_identity(c, read_inputs(c)) for c in (settings(network), settings(copy)))
    assert one == two
    assert one["labels"]["categories"] == ["cat", "Dog"]
    assert one["labels"]["text_thresh"] == 0.25
    (copy / "preprocessor_config.json").write_text("{}")
    assert labels_identity(settings(copy), read_inputs(settings(copy))) != one


def test_a_network_is_read_from_any_storage(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setenv("SAMRAY_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(str(network) + "/", "/weights/dino/", recursive=True)
    remote = find_network("memory://weights/dino", ("grounding-dino",), "grounding_dino")
    assert remote.sha256 == digest(network)
    with opened(remote) as folder:
        before = (folder / WEIGHTS).resolve().stat().st_mtime_ns
    with opened(remote) as again:
        assert again == folder
        assert (folder / WEIGHTS).resolve().stat().st_mtime_ns == before, "downloaded once"


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut_off(name: str, stop: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:stop])


def of_kind(kind: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": kind}))


def with_setting(key: str, value: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, key: value}))

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled, r"has pytorch_model\.bin, but not model\.safetensors\. Pickled .* save_pretrained"),
        (without(WEIGHTS), r"does not have model\.safetensors; set labels\.checkpoint to a folder"),
        (without("preprocessor_config.json"), r"does not have preprocessor_config\.json or processor_config\.json"),
        (of_kind("clip"), r"of the kind 'clip' .* needs 'grounding-dino'"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be read"),
        (with_setting("auto_map", {"AutoModel": "net.Net"}), "has auto_map, which names code"),
        (with_setting("text_config", {"_attn_implementation": "some/kernel"}), "has _attn_implementation, which names"),
        (shutil.rmtree, r"copy is not a folder"),
        (cut_off(WEIGHTS, 50), r"copy: model\.safetensors cannot be read: .* get it again"),
        (cut_off(WEIGHTS, -4), r"copy: model\.safetensors cannot be read: .* download is incomplete"),
        (lambda folder: (folder / WEIGHTS).write_text("version https://git-lfs\n"), r"cannot be read: .* Git LFS"),
        (cut_off("tokenizer.json", 50), r"copy: tokenizer\.json cannot be read"),
    ],
)
def test_a_wrong_network_is_refused_in_the_driver(copy: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(copy)
    with pytest.raises(ConfigError, match=message):
        read_inputs(settings(copy))


def test_a_missing_package_is_named(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package transformers: pip install 'samray\[text\]'"):
        read_inputs(settings(network))


def test_a_name_that_cannot_be_downloaded_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def away(name: str, **options: Any) -> str:
        raise OSError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", away)
    with pytest.raises(ConfigError, match=r"no connection\. Get the files of https://huggingface.co/some/net .* set"):
        find_network("some/net", ("grounding-dino",), "grounding_dino")


def test_a_replaced_network_is_refused_in_the_actor(copy: Path) -> None:
    network = find_network(str(copy), ("grounding-dino",), "grounding_dino")
    write_grounding_dino(copy, seed=5)
    with pytest.raises(ConfigError, match="is not this run's network"):
        Detector(network, ["cat"], CPU)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"does not have 1 tensor of this network, as model\.text_projection\.weight"),
        (torch.zeros(3, 2), r"model\.text_projection\.weight is \(3, 2\), but config\.json expects \(32, 16\)"),
        (torch.full((32, 16), torch.nan), r"model\.text_projection\.weight has values that are not finite"),
    ],
)
def test_wrong_tensors_are_named(copy: Path, value: torch.Tensor | None, message: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / WEIGHTS)
    tensors |= {"model.text_projection.weight": value}
    save_file({key: one for key, one in tensors.items() if one is not None}, copy / WEIGHTS, {"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        Detector(find_network(str(copy), ("grounding-dino",), "x"), ["cat"], CPU)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (WEIGHTS, "cannot be loaded: "),
        ("tokenizer.json", "cannot be loaded: "),
        ("preprocessor_config.json", "cannot be"),
    ],
)
def test_damaged_files_are_refused(copy: Path, name: str, message: str) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:50])
    with pytest.raises(ConfigError, match=f"copy {message}"):
        Detector(Network(str(copy), digest(copy)), ["cat"], CPU)


def test_a_phrase_that_does_not_fit_the_network_is_named(tmp_path: Path) -> None:
    folder = write_grounding_dino(tmp_path / "short", max_text_len=8)
    with pytest.raises(ConfigError, match=r"'cat dog cat dog cat dog' has 6 tokens, and this network takes 5"):
        Detector(Network(str(folder), digest(folder)), ["cat", "cat dog cat dog cat dog"], CPU)
    detector, image = Detector(Network(str(folder), digest(folder)), ["cat"], CPU), np.zeros((40, 60, 3), np.uint8)
    with pytest.raises(ImageError, match=r"^bad_prompt: .* has 6 tokens"):
        detector.detect(image, ["cat dog cat dog cat dog"], score_thresh=0.1, text_thresh=0.1, nms_thresh=0.8)


def test_phrases_come_from_settings_or_prompts(network: Path) -> None:
    config = settings(network, phrases=None)
    with pytest.raises(ConfigError, match=r"^labels\.by=grounding_dino needs labels\.phrases"):
        read_inputs(config)
    inputs = read_inputs(config, ["cat"])
    assert (inputs.common, inputs.categories) == ([], ["cat"])
    both = read_inputs(settings(network, phrases=["Cat", "dog"]), ["cat.", "car"])
    assert (both.common, both.categories) == (["Cat", "dog"], ["Cat", "dog", "car"])
    assert both.phrases_in_words == "2 phrases: Cat, dog; 1 phrase of single images: car"
    identity = labels_identity(config, both)["labels"]
    assert (identity["asked_of_all"], identity["categories"]) == (2, ["Cat", "dog", "car"])
    with pytest.raises(ConfigError, match=r"10,001 phrases, expected at most 10,000"):
        inputs.with_texts([f"n{i}" for i in range(10_000)])


def test_the_prompt_ends_each_phrase_with_a_full_stop() -> None:
    assert prompt_of(["Cat", "Fire  hydrant.", "st. bernard"]) == "cat . fire hydrant . st bernard . "


# --- boxes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 10, 100])
def test_image_and_phrases_are_encoded_once(tmp_path: Path, number: int) -> None:
    folder = write_grounding_dino(tmp_path / "short", max_text_len=64)
    detector = Detector(Network(str(folder), digest(folder)), [f"n{i}" for i in range(number)], CPU)
    counts = dict.fromkeys(("image", "text", "fusion"), 0)
    model = detector.model.model
    parts = {"image": model.backbone.conv_encoder.model, "text": model.text_backbone.encoder, "fusion": model.encoder}
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    boxes = [detector.detect(image, score_thresh=0.0, text_thresh=0.0, nms_thresh=1.0) for _ in range(2)]
    passes = -(-number // 31)  # a phrase and its full stop are two of the 62 tokens between [CLS] and [SEP]
    assert counts == {"image": 2, "text": passes, "fusion": 2 * passes}
    np.testing.assert_array_equal(boxes[0].xyxy, boxes[1].xyxy)
    assert len(boxes[0].xyxy) == 20 * passes
    assert max(boxes[0].phrases) > (passes - 1) * 31 - 1, "phrases of the last part have their own numbers"


def test_own_phrases_of_images_are_encoded_once_and_change_no_other_image(network: Path) -> None:
    config = settings(network, phrases=["cat"], score_thresh=0.1, text_thresh=0.1)
    inputs = read_inputs(config)
    detector = Detector(inputs.network, inputs.common, CPU)
    encoded = []
    detector.model.model.text_backbone.encoder.register_forward_hook(lambda *_: encoded.append(1))
    generator = GroundedGenerator(micro(), config, detector)
    images = [np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8) for i in range(3)]
    texts = [Prompt(text="red car"), Prompt(text="Dog"), Prompt(text="dog."), Prompt(text="CAT")]
    prompts = [texts[:2], [], texts[:0:-1]]
    together = [generator.generate([images[i]], [prompts[i]])[0] for i in range(3)]
    assert len(encoded) == 3, "cat, red car, and dog, which was kept"
    other = build_generator(micro(), config, inputs)(None)
    assert [other.generate([images[i]], [prompts[i]])[0] for i in (2, 1, 0)] == together[::-1]
    assert {mask["label"] for mask in together[0]} & {"red car", "Dog"}
    assert {mask["label"] for mask in together[1]} == {"cat"}
    assert {mask["label"] for mask in together[2]} <= {"cat", "dog.", "red car"}


def test_clicks_come_first_and_without_a_name(network: Path) -> None:
    config = settings(network, phrases=None, score_thresh=0.1, text_thresh=0.1)
    model, image = micro(), np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    generator = build_generator(model, config, read_inputs(config, []))(None)
    click, box = Prompt(points=((20, 20),), labels=(1,)), Prompt(box=(4, 4, 30, 30))
    texts = [Prompt(text="dog"), Prompt(text="cat")]
    (mixed,) = generator.generate([image], [[texts[0], click, texts[1], box]])
    (clicks,) = PromptedGenerator(model, config.masks).generate([image], [[click, box]])
    (named,) = generator.generate([image], [texts])
    assert mixed == clicks + named
    assert named
    assert generator.generate([image, image]) == [[], []], "nothing is asked"
    with pytest.raises(ImageError, match=r"prompts\[1\]: the point \[99, 2\] is outside"):
        generator.generate([image], [[texts[0], Prompt(points=((99, 2),), labels=(1,))]])
    with pytest.raises(ValueError, match=r"'dog' is a text, which needs samray\.label"):
        PromptedGenerator(model, config.masks).generate([image], [texts])


def test_parts_of_a_prompt_are_as_if_asked_alone(network: Path, tmp_path: Path) -> None:
    folder = write_grounding_dino(tmp_path / "short", max_text_len=8)
    names, thresholds = ["cat", "dog", "car", "tree"], {"score_thresh": 0.0, "text_thresh": 0.0, "nms_thresh": 1.0}
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)

    def boxes(phrases: list[str]) -> Any:
        return Detector(Network(str(folder), digest(folder)), phrases, CPU).detect(image, **thresholds)

    together, alone = boxes(names), [boxes(names[:3]), boxes(names[3:])]
    scores = np.concatenate([one.scores for one in alone])
    order = np.argsort(-scores, kind="stable")
    np.testing.assert_allclose(together.scores, scores[order], rtol=1e-5)
    np.testing.assert_allclose(together.xyxy, np.concatenate([one.xyxy for one in alone])[order], rtol=1e-4)


def test_an_image_without_boxes_has_no_masks(network: Path) -> None:
    config = settings(network, score_thresh=1.0)
    model = micro()
    model.encode_images = None  # type: ignore[assignment,method-assign]  # it needs no encoding
    generator = build_generator(model, config, read_inputs(config))(None)
    assert generator.generate([np.zeros((40, 60, 3), np.uint8)]) == [[]]


@pytest.mark.parametrize("hw", [(1, 1), (1, 3000), (3000, 1), (3, 5)])
def test_small_and_slender_images_are_searched(network: Path, hw: tuple[int, int]) -> None:
    detector = Detector(Network(str(network), digest(network)), ["cat", "dog"], CPU)
    boxes = detector.detect(np.full((*hw, 3), 200, np.uint8), score_thresh=0.0, text_thresh=0.0, nms_thresh=1.0)
    assert len(boxes.xyxy) == 20
    assert np.isfinite(boxes.xyxy).all()


def test_threads_share_a_network_and_not_their_images(network: Path) -> None:
    config = settings(network, score_thresh=0.1, text_thresh=0.1)
    make = build_generator(micro(), config, read_inputs(config))
    random = np.random.default_rng(2)
    images = [random.integers(0, 255, (40 + 7 * i, 64, 3), dtype=np.uint8) for i in range(6)]
    alone = [make(None).generate([image])[0] for image in images]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda image: make(None).generate([image])[0], images))
    assert together == alone
    assert len({len(masks) for masks in alone}) > 1, "the images differ"


def test_better_boxes_suppress_others_of_any_phrase(network: Path) -> None:
    image = np.random.default_rng(1).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    detector = Detector(Network(str(network), digest(network)), ["cat", "dog"], CPU)
    loose, strict = (
        detector.detect(image, score_thresh=0.0, text_thresh=0.0, nms_thresh=thresh) for thresh in (1.0, 0.0)
    )
    assert 0 < len(strict.scores) < len(loose.scores)
    assert strict.scores[0] == loose.scores[0]


def test_what_is_found_now_can_be_evaluated(network: Path, tmp_path: Path) -> None:
    row = bsds_row("a.jpg", [[TALL, WIDE]])
    row["annotators"][0]["names"] = ["cat", "Dog"]
    data, file = write_parquet(tmp_path / "val.parquet", [row]), tmp_path / "names.json"
    settings = ["labels.by=grounding_dino", f"labels.checkpoint={network}", "labels.score_thresh=0.1"]
    argv = ["evaluate", "instances", data, *settings, "labels.text_thresh=0.1", "masks.min_mask_area=1"]
    assert main([*argv, "labels.phrases=[cat,Dog]", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert sum(of_name["num_masks"] for of_name in figures["names"].values()) == figures["num_masks"] > 0, (
        "each has a name"
    )
    assert set(figures["names"]) == {"cat", "Dog"}
    assert figures["settings"]["labels"]["phrases"] == ["cat", "Dog"]
    assert main(argv) == 2, "without phrases"


def test_the_plan_shows_phrases_and_network(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    options = ["labels.by=grounding_dino", "labels.phrases=[cat,dog]", f"labels.checkpoint={network}", "--dry-run"]
    assert main(["label", str(tmp_path / "in"), str(tmp_path / "out"), *options]) == 0
    text = " ".join(capsys.readouterr().err.split())
    assert "masks grounding_dino, 2 phrases: cat, dog" in text
    assert f"network {network} (SHA-256 {digest(network)[:12]}...)" in text
