"""Exports of an output with names: classes, masks without a name, and images without masks."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from samray import storage
from samray.errors import ConfigError, StorageError
from samray.output.compact import compact
from samray.output.mask_dataset import MaskDataset
from samray.output.plan import Plan, load_plan
from samray.output.shards import read_shard
from samray.output.verify import verify
from samray.output.where import Where
from tests.support.exported import NAMES, export
from tests.support.handmade import decoded, masks_of_image, read_rows, write_output

CATEGORIES = ("yes", "object", "crème: brûlée")


def named(index: int, labels: tuple[str | None, ...] = (*CATEGORIES, None)) -> list[dict[str, Any]]:
    """As `masks_of_image`, with the names in turn."""
    masks = masks_of_image(index)
    names = [labels[(index + i) % len(labels)] for i in range(len(masks))]
    scores = [None if name is None else 0.25 + i / 8 for i, name in enumerate(names)]
    return [{**m, "label": n, "label_score": s} for m, n, s in zip(masks, names, scores, strict=True)]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Ten images: masks with three names and without, one failed image, some without masks."""
    plan = write_output(str(tmp_path), NAMES, masks=named, failed=(5,), categories=CATEGORIES)
    report = verify(plan.output, deep=True)
    assert report.ok, report.problems
    assert {mask["label"] for mask in masks_of(plan)} == {*CATEGORIES, None}
    return plan


def masks_of(plan: Plan) -> list[dict[str, Any]]:
    return [mask for row in read_rows(plan.output) for mask in row["annotations"]]


def fully_named(root: Path, categories: tuple[str, ...] = CATEGORIES) -> Plan:
    return write_output(str(root), NAMES, masks=lambda index: named(index, CATEGORIES), categories=categories)


def test_coco_has_the_names_as_categories_and_negatives(plan: Plan, tmp_path: Path) -> None:
    export(plan, tmp_path / "coco", "coco")
    coco = json.loads((tmp_path / "coco/instances.json").read_text())
    names = [*CATEGORIES, "unnamed object"]
    assert [(c["id"], c["name"]) for c in coco["categories"]] == list(enumerate(names, start=1))
    name_of = dict(enumerate(CATEGORIES, start=1))
    for mask, annotation in zip(masks_of(plan), coco["annotations"], strict=True):
        assert (name_of.get(annotation["category_id"]), annotation["label_score"]) == (
            mask["label"],
            mask["label_score"],
        )
    assert len(coco["images"]) == 9  # with those in which nothing was found
    assert {a["image_id"] for a in coco["annotations"]} < {image["id"] for image in coco["images"]}


def test_without_masks_that_lack_a_name_there_is_no_further_class(tmp_path: Path) -> None:
    plan = fully_named(tmp_path)
    export(plan, tmp_path / "coco", "coco")
    export(plan, tmp_path / "yolo", "yolo")
    coco = json.loads((tmp_path / "coco/instances.json").read_text())
    assert [category["name"] for category in coco["categories"]] == list(CATEGORIES)
    yolo = yaml.safe_load((tmp_path / "yolo/data.yaml").read_text())
    assert yolo["names"] == dict(enumerate(CATEGORIES))


def test_each_category_of_coco_evaluated_against_itself_has_an_ap_of_one(tmp_path: Path) -> None:
    plan = fully_named(tmp_path)
    export(plan, tmp_path / "coco", "coco")
    file = tmp_path / "coco/instances.json"
    masks = json.loads(file.read_text())["annotations"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        evaluation = COCOeval(truth, truth.loadRes([{**m, "score": m["label_score"]} for m in masks]), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, categories; all areas
    assert precision.shape[2] == len(CATEGORIES)
    assert precision.mean((0, 1)) == pytest.approx(1.0, abs=1e-9)


def test_yolo_has_class_numbers_and_names(plan: Plan, tmp_path: Path) -> None:
    export(plan, tmp_path / "yolo", "yolo")
    names = yaml.safe_load((tmp_path / "yolo/data.yaml").read_text())["names"]
    assert names == dict(enumerate([*CATEGORIES, "unnamed object"]))
    for row in read_rows(plan.output):
        if row["status"] == "ok":
            text = (tmp_path / "yolo/labels" / row["image"]["file_name"].replace(".png", ".txt")).read_text()
            names_of_masks = [names[int(line.split()[0])] for line in text.splitlines()]
            assert names_of_masks == [mask["label"] or "unnamed object" for mask in row["annotations"]]


def test_sa1b_and_flat_have_the_two_fields(plan: Plan, tmp_path: Path) -> None:
    export(plan, tmp_path / "sa1b", "sa1b")
    export(plan, tmp_path / "flat", "flat")
    for row in read_rows(plan.output):
        if row["status"] == "ok":
            file = tmp_path / "sa1b" / row["image"]["file_name"].replace(".png", ".json")
            wanted = {"image": row["image"], "annotations": row["annotations"], "categories": list(CATEGORIES)}
            assert json.loads(file.read_text()) == wanted
    (file,) = (tmp_path / "flat").glob("*.parquet")
    flat = pq.read_table(file).sort_by("mask_id")
    masks = sorted(masks_of(plan), key=lambda mask: mask["id"])
    for name in ("label", "label_score"):
        assert flat[name].to_pylist() == [mask[name] for mask in masks]


def test_label_maps_of_classes(plan: Plan, tmp_path: Path) -> None:
    export(plan, tmp_path / "maps", "label-map")
    export(plan, tmp_path / "classes", "label-map", classes=True)
    for row in read_rows(plan.output):
        if row["status"] != "ok":
            continue
        stem = row["image"]["file_name"].removesuffix(".png")
        masks = row["annotations"]
        about = json.loads((tmp_path / "maps" / f"{stem}.json").read_text())
        assert [mask["name"] for mask in about["masks"]] == [mask["label"] for mask in masks]
        with Image.open(tmp_path / "classes" / f"{stem}.png") as image:
            pixels = np.asarray(image)
        legend = json.loads((tmp_path / "classes" / f"{stem}.json").read_text())["classes"]
        wanted = np.zeros_like(pixels)
        for mask in sorted(masks, key=lambda mask: -mask["area"]):  # the smallest is on top
            wanted[decoded(mask)] = 4 if mask["label"] is None else CATEGORIES.index(mask["label"]) + 1
        assert np.array_equal(pixels, wanted)
        assert [entry["visible_area"] for entry in legend] == [(wanted == entry["label"]).sum() for entry in legend]
        has_unnamed = None in [mask["label"] for mask in masks]
        assert [entry["name"] for entry in legend] == [*CATEGORIES, *["unnamed object"] * has_unnamed]


def test_classes_of_an_output_without_names_are_refused(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), NAMES[:3])
    with pytest.raises(ConfigError, match=r"has no names: leave out --classes"):
        export(plan, tmp_path / "maps", "label-map", classes=True)
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize("format", ["coco", "yolo"])
def test_a_name_that_was_not_asked_for_is_not_exported(tmp_path: Path, format: str) -> None:
    plan = fully_named(tmp_path, categories=("yes", "object"))
    with pytest.raises(StorageError, match=r"has the name 'crème: brûlée', which is not one of those asked for"):
        export(plan, tmp_path / "dest", format)


def test_an_export_begun_without_names_is_not_continued_with_them(plan: Plan, tmp_path: Path) -> None:
    export(plan, tmp_path / "coco", "coco")
    uri = str(tmp_path / "coco/_export/export.json")
    recorded = json.loads(storage.read_bytes(uri))
    del recorded["categories"]
    Path(uri).write_text(json.dumps(recorded))
    with pytest.raises(ConfigError, match=r"has a different export \(categories: None there, \['yes', 'object'"):
        export(plan, tmp_path / "coco", "coco")


def test_saco_makes_no_negatives_of_masks_that_a_selection_drops(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not show its phrase"):
        export(plan, tmp_path / "saco", "saco", where="label_score > 0.3")
    some = str(tmp_path / "some")
    compact(plan.output, some, 10**6, where=Where("label_score > 0.3"))
    compact(some, str(tmp_path / "again"), 10**6, where=Where("width > 0"))
    with pytest.raises(ConfigError, match="does not show its phrase"):
        export(load_plan(str(tmp_path / "again")), tmp_path / "saco", "saco")
    assert export(plan, tmp_path / "saco", "saco", where="width > 0").num_images == 9


def test_saco_has_a_pair_per_image_and_phrase(plan: Plan, tmp_path: Path) -> None:
    report = export(plan, tmp_path / "saco", "saco", with_images=True)
    saco = json.loads((tmp_path / "saco/saco.json").read_text())
    pairs = {pair["id"]: pair for pair in saco["images"]}
    rows = [row for row in read_rows(plan.output) if row["status"] == "ok"]
    asked = [(row["image"]["file_name"], name) for row in rows for name in CATEGORIES]
    assert [(pair["file_name"], pair["text_input"]) for pair in saco["images"]] == asked
    assert len(pairs) == len(asked) == 27, "unique ids; none for the failed image"
    masks = [(row, mask) for row in rows for mask in row["annotations"] if mask["label"] is not None]
    assert len(masks) == len(saco["annotations"]) == report.num_masks
    assert report.num_left_out == sum(mask["label"] is None for mask in masks_of(plan)) > 0
    for (row, mask), annotation in zip(masks, saco["annotations"], strict=True):
        pair = pairs[annotation["image_id"]]
        assert (pair["file_name"], pair["text_input"]) == (row["image"]["file_name"], mask["label"])
        assert annotation["segmentation"] == mask["segmentation"]
        assert annotation["area"] == pytest.approx(decoded(mask).mean())
        scale = [pair["width"], pair["height"]] * 2
        assert [part * side for part, side in zip(annotation["bbox"], scale, strict=True)] == pytest.approx(
            mask["bbox"]
        )
        with Image.open(tmp_path / "saco/images" / pair["file_name"]) as image:
            assert image.size == (pair["width"], pair["height"])
    with_masks = {annotation["image_id"] for annotation in saco["annotations"]}
    negatives = {pair["file_name"] for pair in saco["images"] if pair["id"] not in with_masks}
    assert {row["image"]["file_name"] for row in rows if not row["annotations"]} < negatives
    # pycocotools reads it, and the fractions of bbox and area do not matter for masks.
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "saco/saco.json"))
    assert np.array_equal(coco.annToMask(saco["annotations"][0]), decoded(masks[0][1]))


def image_phrases(index: int) -> list[str]:
    """Each image is asked for the names of its masks, every third also for another."""
    labels = [mask["label"] for mask in named(index) if mask["label"] not in (None, "yes")]
    return list(dict.fromkeys([*labels, *(CATEGORIES[1:] if index % 3 == 0 else ())]))


def test_pairs_are_those_that_were_asked(tmp_path: Path) -> None:
    plan = write_output(
        str(tmp_path), NAMES, masks=named, failed=(5,), categories=CATEGORIES, num_common=1, phrases=image_phrases
    )
    assert verify(plan.output, deep=True).problems == []
    export(plan, tmp_path / "saco", "saco")
    saco = json.loads((tmp_path / "saco/saco.json").read_text())
    names = [row["image"]["file_name"] for row in read_rows(plan.output)]
    asked = {(name, text) for index, name in enumerate(names) for text in ("yes", *image_phrases(index)) if index != 5}
    assert {(pair["file_name"], pair["text_input"]) for pair in saco["images"]} == asked
    assert len(saco["images"]) == len(asked) < 27, "not every phrase of every image"
    compact(plan.output, str(tmp_path / "compact"), 2**20)
    assert [row["phrases"] for row in read_rows(tmp_path / "compact")] == [image_phrases(i) for i in range(len(names))]
    features = json.loads(read_shard(plan.output, 0).schema.metadata[b"huggingface"])["info"]["features"]
    assert features["phrases"] == [{"dtype": "string", "_type": "Value"}]


@pytest.mark.parametrize(
    ("phrases", "problem"),
    [
        (["nobody asked"], "image 3 has the phrases ['nobody asked'], expected a list of names that the run asks for"),
        ([], "image 3 has a mask with the name 'object', which was not asked of this image"),
    ],
)
def test_verify_finds_names_that_were_not_asked(tmp_path: Path, phrases: list[str], problem: str) -> None:
    def wrong(index: int) -> list[str]:
        return phrases if index == 3 else image_phrases(index)

    plan = write_output(str(tmp_path), NAMES, masks=named, categories=CATEGORIES, num_common=1, phrases=wrong)
    (reported,) = verify(plan.output).problems
    assert reported.endswith(problem), reported


def scores_of(index: int, asked: Sequence[str]) -> list[dict[str, Any]]:
    """A score for each phrase asked of an image."""
    return [{"phrase": phrase, "score": (index + i) / 16} for i, phrase in enumerate(asked)]


def test_presence_scores_are_stored_and_exported(tmp_path: Path) -> None:
    def presence(index: int) -> list[dict[str, Any]]:
        return scores_of(index, ["yes", *image_phrases(index)])

    options: Any = {"masks": named, "failed": (5,), "categories": CATEGORIES, "num_common": 1, "phrases": image_phrases}
    plan = write_output(str(tmp_path), NAMES, **options, presence=presence)
    assert verify(plan.output, deep=True).problems == []
    wanted = [[] if index == 5 else presence(index) for index in range(len(NAMES))]
    rows = read_rows(plan.output)
    assert [row["presence"] for row in rows] == wanted
    features = json.loads(read_shard(plan.output, 0).schema.metadata[b"huggingface"])["info"]["features"]
    parts = {"phrase": "string", "score": "float64"}
    assert features["presence"] == [{name: {"dtype": kind, "_type": "Value"} for name, kind in parts.items()}]
    compact(plan.output, str(tmp_path / "compact"), 2**20)
    assert [row["presence"] for row in read_rows(tmp_path / "compact")] == wanted

    export(plan, tmp_path / "saco", "saco")
    pairs = json.loads((tmp_path / "saco/saco.json").read_text())["images"]
    names = [row["image"]["file_name"] for row in rows]
    stored = {(names[i], one["phrase"]): one["score"] for i, of_image in enumerate(wanted) for one in of_image}
    assert {(pair["file_name"], pair["text_input"]): pair["presence_score"] for pair in pairs} == stored

    for masks in ("boxes", "rle"):
        data = MaskDataset(plan.output, images=False, masks=masks)  # type: ignore[arg-type]
        for target, of_image in zip((data[i][1] for i in range(len(data))), wanted[:5] + wanted[6:], strict=True):
            scores = dict(zip(data.classes, target["presence"].tolist(), strict=True))
            assert {name: score for name, score in scores.items() if score == score} == {
                one["phrase"]: one["score"] for one in of_image
            }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda scores: scores[1:], r"has the presence of \[.*\], expected \['yes', "),
        (lambda scores: scores[::-1], r"has the presence of \[.*\], expected \['yes', "),
        (
            lambda scores: [{**scores[0], "score": 1.5}, *scores[1:]],
            "has a score out of range: presence of 'yes' 1.5, expected",
        ),
        (lambda scores: [{**scores[0], "score": None}, *scores[1:]], "has an empty field in its presence"),
    ],
)
def test_verify_finds_wrong_presence_scores(tmp_path: Path, change: Callable[[Any], Any], problem: str) -> None:
    def presence(index: int) -> list[dict[str, Any]]:
        scores = scores_of(index, CATEGORIES)
        return change(scores) if index == 3 else scores

    plan = write_output(str(tmp_path), NAMES, masks=named, categories=CATEGORIES, presence=presence)
    (reported,) = verify(plan.output).problems
    assert re.search(f"image 3 {problem}", reported), reported


def test_saco_of_an_output_without_names_is_refused(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), NAMES[:3])
    with pytest.raises(ConfigError, match=r"has no names, so there are no phrases to pair images with"):
        export(plan, tmp_path / "saco", "saco")
    assert not (tmp_path / "saco").exists()
