"""`samray evaluate instances`: AP per name and class-agnostic against a plain pycocotools script, and the confusion."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import samray
from samray.cli.main import main
from samray.errors import ConfigError
from samray.evaluate.confusion import Confusion
from samray.evaluate.instances import evaluate_instances, labelled, matched
from samray.evaluate.pictures import confusion_picture
from samray.evaluate.regions import RegionData
from samray.output.plan import Plan
from tests.support.exported import NAMES, export
from tests.support.handmade import HEIGHT as H
from tests.support.handmade import WIDTH as W
from tests.support.handmade import annotation, blob, write_output
from tests.support.marked import TALL, WIDE, box, bsds_row, region_image, rle, write_parquet

CATEGORIES = ("cat", "object", "crème: brûlée", "dog")


def named(index: int, seed: int | None = None) -> list[dict[str, Any]]:
    """Up to four blobs with names. seed: some moved, some with another name or none, some left out."""
    rng = np.random.default_rng([index, seed or 0])
    masks = []
    for i in range(index % 5):
        mask, name = blob(10 * index + i), CATEGORIES[(index + i) % 4]
        if seed is not None:
            mask = np.roll(mask, int(rng.integers(0, 3)), axis=1) if rng.random() < 0.5 else mask
            name = rng.choice([name, name, "dog", None])
        if seed is None or rng.random() < 0.8:
            masks.append(annotation(mask, predicted_iou=float(rng.random())) | {"label": name, "label_score": None})
            masks[-1]["label_score"] = None if name is None else float(rng.random())
    return masks


@pytest.fixture
def truth(tmp_path: Path) -> Plan:
    return write_output(str(tmp_path / "truth"), NAMES, masks=named, failed=(5,), categories=CATEGORIES)


@pytest.fixture
def guess(tmp_path: Path) -> Plan:
    return write_output(str(tmp_path / "guess"), NAMES, masks=lambda at: named(at, 1), categories=CATEGORIES)


def plain_ap(truth: Path, masks: Path, by_name: bool) -> np.ndarray:
    """(thresholds, recalls, names) of a plain script on two COCO files, the second with scores."""
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(str(truth))
        results = json.loads(masks.read_text())["annotations"]
        for one in results:
            one["score"] = one["predicted_iou"] if one.get("label_score") is None else one["label_score"]
        evaluation = COCOeval(known, known.loadRes(results), "segm")
        evaluation.params.useCats = int(by_name)
        # Masks without a name are of a category more, which DATA lacks.
        evaluation.params.catIds = [1, 2, 3, 4] + [5] * (not by_name)
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"][:, :, :, 0, -1])


def figures_of(data: str, masks: str) -> tuple[dict[str, Any], Confusion]:
    pairs, _ = matched(RegionData(data, with_pixels=False), RegionData(masks, with_pixels=False))
    return evaluate_instances(pairs)


def test_ap_is_that_of_a_plain_pycocotools_script(truth: Plan, guess: Plan, tmp_path: Path) -> None:
    export(truth, tmp_path / "a", "coco")
    export(guess, tmp_path / "b", "coco")
    # The failed image of DATA counts on neither side.
    known = json.loads((tmp_path / "a/instances.json").read_text())
    coco = json.loads((tmp_path / "b/instances.json").read_text())
    ids = {image["id"] for image in known["images"]}
    coco["annotations"] = [one for one in coco["annotations"] if one["image_id"] in ids]
    (tmp_path / "b.json").write_text(json.dumps(coco))
    figures, _ = figures_of(truth.output, guess.output)
    for by_name, suffix in ((True, ""), (False, "_agnostic")):
        plain = plain_ap(tmp_path / "a/instances.json", tmp_path / "b.json", by_name)
        assert 0.05 < plain.mean() < 0.95, "neither trivial nor empty"
        for key, thresholds in (("ap", slice(None)), ("ap_50", slice(0, 1)), ("ap_75", slice(5, 6))):
            assert figures[key + suffix] == pytest.approx(plain[thresholds].mean(), abs=1e-12)
            for index, name in enumerate(CATEGORIES if by_name else ()):
                assert figures["names"][name][key] == pytest.approx(plain[thresholds, :, index].mean(), abs=1e-12)


@pytest.mark.parametrize("polygons", [False, True])
def test_a_coco_export_judged_by_its_own_output_has_an_ap_of_one(
    truth: Plan, tmp_path: Path, polygons: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    export(truth, tmp_path / "coco", "coco", polygons=polygons)
    samray.import_(
        tmp_path / "coco/instances.json", tmp_path / "back", images=str(tmp_path / "truth/in"), progress=False
    )
    argv = ["evaluate", "instances", str(tmp_path / "back"), "--masks", truth.output, "--json", "-"]
    assert main(argv) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures["names"]) == set(CATEGORIES)
    for of_name in figures["names"].values():
        assert [of_name[key] for key in ("ap", "ap_50", "ap_75")] == pytest.approx([1, 1, 1], abs=1e-12)
    assert figures["ap_agnostic"] == pytest.approx(1, abs=1e-12)
    assert figures["confusion"] == {name: {name: of_name["num_regions"]} for name, of_name in figures["names"].items()}
    assert (figures["num_images"], figures["model"]) == (9, None)


def test_confusion_by_hand() -> None:
    left, right = box(0, 40, 0, 30), box(0, 40, 30, 60)
    most_of_left, corner = box(0, 40, 0, 25), box(0, 5, 0, 5)
    confusion = Confusion(["cat", "dog"])
    # The better mask gets the region; the other one is background.
    confusion.add(
        [rle(left), rle(right)], ["cat", None], [rle(most_of_left), rle(left), rle(right)], ["cat", "dog", "dog"]
    )
    confusion.add([rle(left)], ["cat"], [rle(corner)], ["cat"])
    assert confusion.as_dict() == {
        "cat": {"dog": 1, "background": 1},
        "no name": {"dog": 1},
        "background": {"cat": 2},
    }
    assert confusion.words == ["cat", "dog", "no name", "background"]
    assert confusion.matrix(["cat", "background"]).tolist() == [[0, 1], [2, 0]]


def test_of_equal_masks_the_one_with_the_regions_name_is_taken() -> None:
    confusion = Confusion(["shirt", "cloth"])
    confusion.add([rle(TALL)] * 2, ["shirt", "cloth"], [rle(TALL)] * 2, ["cloth", "shirt"])
    assert confusion.as_dict() == {"shirt": {"shirt": 1}, "cloth": {"cloth": 1}}


def test_names_that_are_words_of_the_matrix_stay_apart() -> None:
    confusion = Confusion(["background", "no name"])
    confusion.add([rle(TALL), rle(WIDE)], ["background", None], [], [])
    assert confusion.as_dict() == {"background": {"(background)": 1}, "(no name)": {"(background)": 1}}


def test_the_picture_shows_each_row_as_shares() -> None:
    confusion = Confusion([f"name {i}" for i in range(60)])
    for i in range(60):
        confusion.counts[f"name {i}", f"name {i}"] = 5
    picture = Image.open(io.BytesIO(confusion_picture(confusion, "PNG")))
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    full = (np.abs(pixels - (56, 135, 255)).max(axis=2) < 3).sum()
    assert 41 * 600 < full < 41 * 40 * 40, "40 names and the others, all on the diagonal"
    merged = confusion.merged(40)
    assert merged.words == [*(f"name {i}" for i in range(40)), "others", "background"]
    assert merged.counts["others", "others"] == 100


def test_masks_without_names_count_class_agnostically_only() -> None:
    class FindsTall:
        def generate(self, images: list[np.ndarray]) -> list[list[dict[str, Any]]]:
            return [[annotation(TALL)] for _ in images]

    pairs, failures = labelled(FindsTall(), [region_image([[TALL], [TALL, WIDE]])])  # type: ignore[arg-type]
    figures, confusion = evaluate_instances(pairs)
    assert np.isnan(figures["ap"])
    # Recall 1 for one annotator and 1/2 for the other, without a false mask: 2 of 3 regions.
    assert figures["ap_50_agnostic"] == pytest.approx(67 / 101)
    assert (len(failures), figures["num_regions"], figures["num_images"]) == (0, 3, 1)
    assert confusion.as_dict() == {"no name": {"no name": 2, "background": 1}}


def test_images_that_the_output_lacks_are_counted(truth: Plan, tmp_path: Path) -> None:
    part = write_output(str(tmp_path / "part"), NAMES[:4], masks=named, failed=(1,), categories=CATEGORIES)
    pairs, failures = matched(RegionData(truth.output, with_pixels=False), RegionData(part.output, with_pixels=False))
    assert [image.file_name for image, _ in pairs] == [NAMES[0], NAMES[2], NAMES[3]]
    assert failures.figures() == {"num_failed": 7, "failures": {"truncated": 1, "missing": 6}}
    other = write_output(str(tmp_path / "other"), ["b.png"], categories=CATEGORIES)
    with pytest.raises(ConfigError, match=r"has none of the images of DATA, of which the first is 'photo 00.png'"):
        matched(RegionData(truth.output, with_pixels=False), RegionData(other.output, with_pixels=False))


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = bsds_row("a.jpg", [[TALL, WIDE]])
    row["annotators"][0]["names"] = ["cat", "dog [x]"]
    data = write_parquet(tmp_path / "val.parquet", [row, bsds_row("b.jpg", [[TALL]], b"no image")])
    file, picture = tmp_path / "names.json", tmp_path / "matrix.png"
    argv = ["evaluate", "instances", data, "masks.points_per_side=2", "--json", str(file), "--picture", str(picture)]
    assert main(argv) == 0
    said = capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert set(figures["names"]) == {"cat", "dog [x]"}
    assert figures["settings"]["masks"]["points_per_side"] == 2
    assert (figures["num_images"], figures["failures"], figures["model"]) == (1, {"not_an_image": 1}, "tiny")
    assert "dog [x]" in said
    assert "no mask has a name: set labels.by" in said
    assert Image.open(picture).format == "PNG"
    for more, words in (
        (["--masks", data], "is not in samray's layout"),
        (["--masks", data, "model.name=tiny"], "--masks judges masks that exist"),
        (["--picture", "x.gif"], "must end in .png"),
    ):
        assert main(["evaluate", "instances", data, *more]) == 2
        assert words in capsys.readouterr().err


def test_another_size_is_refused(truth: Plan, tmp_path: Path) -> None:
    rows = [bsds_row(NAMES[1], [[TALL]])]
    data = write_parquet(tmp_path / "val.parquet", rows)
    with pytest.raises(ConfigError, match=rf"is {W}x{H} pixels in --masks, but 60x40 in DATA"):
        matched(RegionData(data, with_pixels=False), RegionData(truth.output, with_pixels=False))
