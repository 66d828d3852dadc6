"""`samray label` with phrases, with small random networks, two on Ray: names on disk, identity, texts of images."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import ray.data
from PIL import Image

from samray import storage
from samray.cli.main import main
from samray.config import Config, load_config
from samray.errors import ConfigError
from samray.exports.export import export
from samray.output.plan import load_plan
from samray.output.schema import samray_metadata
from samray.output.shards import read_shard, shard_uri
from samray.output.status import run_status
from samray.output.verify import verify
from samray.pipeline.dataset_stage import label_dataset
from samray.pipeline.run import label
from samray.scenes.scene import make_scene
from samray.storage.tables import read_parquet
from samray.text import plain
from tests.support.here import use_no_ray
from tests.support.networks import write_grounding_dino, write_sam3, write_text_weights
from tests.support.outputs import rows_of
from tests.support.tiny_clip import write_clip
from tests.support.tiny_yolo import write_yolo


def test_phrases_are_labels_on_disk(tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        storage.put(f"{tmp_path}/in/{seed}.png", png_of(seed))
    network = write_grounding_dino(tmp_path / "network")
    output, phrases = str(tmp_path / "out"), ["Cat", "fire hydrant", "dog"]
    (tmp_path / "phrases.txt").write_text("\n".join(phrases))

    def settings(*overrides: str) -> Config:
        base = [
            "labels.by=grounding_dino", f"labels.phrases={tmp_path}/phrases.txt", f"labels.checkpoint={network}",
            "labels.score_thresh=0.4", "output.images_per_shard=1", "cluster.max_actors=1",
            "cluster.num_cpus_per_actor=1", "masks.min_mask_area=1",
        ]  # fmt: skip
        return load_config(None, None, [*base, *overrides])

    assert label(tmp_path / "in", output, settings(), progress=False).exit_code == 0
    rows = rows_of(output)
    masks = [mask for row in rows for mask in row["annotations"]]
    assert len(rows) == 3
    assert masks
    assert {mask["label"] for mask in masks} <= set(phrases)
    assert all(mask["label_score"] > 0.4 for mask in masks)
    assert not verify(output, deep=True).problems

    data = Path(shard_uri(output, 1)).read_bytes()
    assert samray_metadata(read_parquet(data).schema)["categories"] == phrases
    in_command = f"labels.phrases={phrases}".replace("'", "")
    assert label(tmp_path / "in", output, settings(in_command), progress=False).num_labelled == 0, "the same run"
    with pytest.raises(ConfigError, match=r"labels\.categories"):
        label(tmp_path / "in", output, settings("labels.phrases=[Cat,dog]"), progress=False)
    with pytest.raises(ConfigError, match=r"labels\.text_thresh: 0\.25 there, 0\.5 now"):
        label(tmp_path / "in", output, settings("labels.text_thresh=0.5"), progress=False)
    write_grounding_dino(network, seed=4)
    with pytest.raises(ConfigError, match=r"labels\.network_sha256"):
        label(tmp_path / "in", output, settings(), progress=False)

    # Nothing is found: rows without masks.
    use_no_ray(monkeypatch)
    none = str(tmp_path / "none")
    assert not label(tmp_path / "in", none, settings("labels.score_thresh=1"), progress=False).num_masks
    assert [row["annotations"] for row in rows_of(none)] == [[], [], []]
    assert {row["status"] for row in rows_of(none)} == {"ok"}
    exported = export(none, tmp_path / "coco", format="coco", ray=False, progress=False)
    assert (exported.num_images, exported.num_masks) == (3, 0)
    assert run_status(none).labels == dict.fromkeys(phrases, 0)


def test_sam3_needs_no_sam_and_records_negatives(tmp_path: Path, here: None) -> None:
    (tmp_path / "in").mkdir()
    for seed in range(3):
        Image.fromarray(make_scene(seed, 96).image).save(tmp_path / "in" / f"{seed}.png")
    network = write_sam3(tmp_path / "network", seed=5)
    output, phrases = str(tmp_path / "out"), ["cat", "Fire hydrant", "red car", "dog"]

    def settings(*overrides: str) -> Config:
        base = [
            "labels.by=sam3", f"labels.phrases={phrases}".replace("'", ""), f"labels.checkpoint={network}",
            "output.images_per_shard=1", "cluster.max_actors=1", "cluster.num_cpus_per_actor=1",
        ]  # fmt: skip
        return load_config(None, None, [*base, *overrides])

    report = label(tmp_path / "in", output, settings("labels.score_thresh=0.6"), progress=False)
    assert report.exit_code == 0
    assert report.stage_seconds.keys() >= {"encode", "decode"}
    rows = rows_of(output)
    labelled = {(row["image"]["file_name"], mask["label"]) for row in rows for mask in row["annotations"]}
    assert 0 < len(labelled) < len(rows) * len(phrases), "some pairs of image and phrase are found, others not"
    assert all(mask["label_score"] > 0.6 for row in rows for mask in row["annotations"])
    assert not verify(output, deep=True).problems
    assert [[one["phrase"] for one in row["presence"]] for row in rows] == [phrases] * 3
    assert judged(output) == 1
    assert label(tmp_path / "in", output, settings("labels.score_thresh=0.6"), progress=False).num_labelled == 0
    other = write_grounding_dino(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"labels\.by"):
        label(tmp_path / "in", output, settings("labels.by=grounding_dino", f"labels.checkpoint={other}"))

    # Nothing is found: a row without masks, and every phrase of every image is a negative.
    none = str(tmp_path / "none")
    report = label(tmp_path / "in", none, settings("labels.score_thresh=1"), progress=False)
    assert report.warning is not None
    assert [row["annotations"] for row in rows_of(none)] == [[], [], []]
    for number, (where, expected) in enumerate([(output, labelled), (none, set())]):
        export(where, tmp_path / f"saco{number}", format="saco", ray=False, progress=False)
        saco = json.loads((tmp_path / f"saco{number}" / "saco.json").read_text())
        pairs = {pair["id"]: (pair["file_name"], pair["text_input"]) for pair in saco["images"]}
        assert sorted(pairs.values()) == sorted((f"{seed}.png", phrase) for seed in range(3) for phrase in phrases)
        assert {pairs[mask["image_id"]] for mask in saco["annotations"]} == expected
        scores = {(pair["file_name"], pair["text_input"]): pair["presence_score"] for pair in saco["images"]}
        stored = [(row["image"]["file_name"], one) for row in rows_of(where) for one in row["presence"]]
        assert scores == {(name, one["phrase"]): one["score"] for name, one in stored}


def test_fastsam_keeps_all_masks_or_those_that_phrases_choose(tmp_path: Path, here: None) -> None:
    (tmp_path / "in").mkdir()
    for seed in range(2):
        Image.fromarray(make_scene(seed, 96).image).save(tmp_path / "in" / f"{seed}.png")
    network, clip = write_yolo(tmp_path / "fast.onnx", size=(64, 64)), write_clip(tmp_path / "clip")

    def settings(*overrides: str) -> Config:
        base = [
            "labels.by=fastsam", f"labels.onnx={network}", "output.images_per_shard=1", "cluster.max_actors=1",
            "cluster.num_cpus_per_actor=1",
        ]  # fmt: skip
        return load_config(None, None, [*base, *overrides])

    every = str(tmp_path / "every")
    report = label(tmp_path / "in", every, settings(), progress=False)
    assert (report.exit_code, report.num_failed, report.num_named) == (0, 0, None)
    assert report.num_masks
    assert all("label" not in mask for row in rows_of(every) for mask in row["annotations"])
    assert not verify(every, deep=True).problems
    assert run_status(every).labels is None
    assert load_plan(every).run["identity"]["model"] == {}
    assert label(tmp_path / "in", every, settings(), progress=False).num_labelled == 0, "the same run"
    with pytest.raises(ConfigError, match=r"labels\.conf_thresh: 0\.4 there, 0\.5 now"):
        label(tmp_path / "in", every, settings("labels.conf_thresh=0.5"), progress=False)
    write_yolo(network, seed=3, size=(64, 64))
    with pytest.raises(ConfigError, match=r"labels\.onnx_sha256"):
        label(tmp_path / "in", every, settings(), progress=False)

    phrases = ["red square", "things"]
    asked = ("labels.phrases=[red square,things]", f"labels.checkpoint={clip}", "labels.negatives=[texture]")
    chosen = str(tmp_path / "chosen")
    assert label(tmp_path / "in", chosen, settings(*asked), progress=False).num_masks
    names = {mask["label"] for row in rows_of(chosen) for mask in row["annotations"]}
    assert names
    assert names <= set(phrases)
    assert not verify(chosen, deep=True).problems
    assert set(run_status(chosen).labels or {}) == set(phrases)
    assert judged(chosen) == 1
    none = str(tmp_path / "none")
    assert not label(tmp_path / "in", none, settings(*asked, "labels.score_thresh=1.01"), progress=False).num_masks
    assert [(row["annotations"], row["status"]) for row in rows_of(none)] == [([], "ok"), ([], "ok")]
    for format in ("coco", "saco"):  # every image, or pair of image and phrase, is a negative
        export(none, tmp_path / format, format=format, ray=False, progress=False)
    coco = json.loads((tmp_path / "coco" / "instances.json").read_text())
    assert ([image["file_name"] for image in coco["images"]], coco["annotations"]) == (["0.png", "1.png"], [])
    assert [category["name"] for category in coco["categories"]] == phrases
    saco = json.loads((tmp_path / "saco" / "saco.json").read_text())
    pairs = {(pair["file_name"], pair["text_input"]) for pair in saco["images"]}
    assert pairs == {(f"{seed}.png", phrase) for seed in range(2) for phrase in phrases}
    assert saco["annotations"] == []


def test_sam_text_with_the_texts_of_each_image(tmp_path: Path, here: None) -> None:
    (tmp_path / "in").mkdir()
    for seed in range(2):
        Image.fromarray(make_scene(seed, 96).image).save(tmp_path / "in" / f"{seed}.png")
    clip = write_clip(tmp_path / "clip")
    weights = write_text_weights(tmp_path / "w.safetensors", clip=clip)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"file_name": "1.png", "prompts": [{"text": "red square"}]}))
    arguments = [
        "labels.by=sam_text", "labels.phrases=[cat,green thing]", f"labels.checkpoint={clip}", "cluster.max_actors=1",
        f"model.checkpoint={weights}", f"input.prompts={tmp_path}/texts.jsonl", "cluster.num_cpus_per_actor=1",
        "masks.mask_nms_thresh=1", "masks.min_mask_area=1",
    ]  # fmt: skip
    config, output = load_config(None, None, arguments), str(tmp_path / "out")
    assert label(tmp_path / "in", output, config, progress=False).exit_code == 0
    first, second = ([mask["label"] for mask in row["annotations"]] for row in rows_of(output))
    assert set(first) <= {"cat", "green thing"}
    assert first, "SAM answers each phrase"
    assert "red square" in second
    assert len(set(second)) == len(second), "one mask per phrase"
    assert not verify(output, deep=True).problems
    assert label(tmp_path / "in", output, config, progress=False).num_labelled == 0, "the same run"


def judged(output: str) -> float:
    """AP of an output's masks and names by itself."""
    figures = Path(output).with_suffix(".json")
    assert main(["evaluate", "instances", output, "--masks", output, "--json", str(figures), "--no-progress"]) == 0
    ap: float = json.loads(figures.read_text())["ap"]
    return ap


def test_clip_names_with_the_texts_of_each_image(tmp_path: Path, local_ray: None, here: None) -> None:
    """And `label_dataset` with the same texts in a column gives the same names, on Ray."""
    for seed in range(3):
        storage.put(f"{tmp_path}/in/{seed}.png", png_of(seed))
    texts = {"0.png": ["Red", "green thing"], "1.png": ["red.", "cat"]}
    rows = [{"file_name": name, "prompts": [{"text": text} for text in phrases]} for name, phrases in texts.items()]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = [
        "labels.by=clip", "labels.phrases=[dog]", f"labels.checkpoint={write_clip(tmp_path / 'clip')}",
        "labels.score_thresh=0.2", "output.images_per_shard=2", "cluster.max_actors=1", "cluster.num_cpus_per_actor=1",
        "masks.points_per_side=6",
    ]  # fmt: skip
    config, output = load_config(None, None, [*base, f"input.prompts={tmp_path}/texts.jsonl"]), str(tmp_path / "out")
    assert label(tmp_path / "in", output, config, progress=False).exit_code == 0
    stored_rows = rows_of(output)
    assert [row["phrases"] for row in stored_rows] == [["Red", "green thing"], ["Red", "cat"], []]
    names = [{mask["label"] for mask in row["annotations"]} - {None} for row in stored_rows]
    assert all(phrases <= {"dog", *row["phrases"]} for phrases, row in zip(names, stored_rows, strict=True))
    assert len(set().union(*names)) > 1
    assert verify(output, deep=True).problems == []
    assert run_status(output).labels.keys() == {"dog", "Red", "green thing", "cat"}
    metadata = samray_metadata(read_shard(output, 0).schema)
    assert metadata["categories"] == ["dog", "Red", "green thing", "cat"]
    assert label(tmp_path / "in", output, config, progress=False).num_labelled == 0, "the same run"
    (tmp_path / "texts.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ConfigError, match=r"labels\.categories"):
        label(tmp_path / "in", output, config, progress=False)

    items = [{"image_id": i, "bytes": png_of(i), "tags": stored_rows[i]["phrases"] or None} for i in range(3)]
    config = load_config(None, None, base)
    labelled = label_dataset(ray.data.from_items(items), config, phrases_column="tags").take_all()
    assert {row["image_id"]: masks_in(row) for row in labelled} == dict(enumerate(map(masks_in, stored_rows)))


def masks_in(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The pixels and the name of each mask."""
    return [(mask["segmentation"]["counts"], plain(mask["label"] or "")) for mask in row["annotations"]]


def png_of(seed: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(make_scene(seed, 96).image).save(sink, "PNG")
    return sink.getvalue()
