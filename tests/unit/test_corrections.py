"""Export of confident masks for a person, and import of what came back: there and back as through CVAT."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from handmade import HEIGHT, WIDTH, annotation, blob, write_output
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import samray
from samray import storage
from samray.cli import main
from samray.dataset.export import job as export_job
from samray.dataset.export.review import is_sure
from samray.dataset.imports.corrections import corrected_record, match_masks
from samray.dataset.manifest import Plan
from samray.dataset.runs import run_lengths, runs_of_image, union_area
from samray.dataset.schema import CORRECTED_SCHEMA, SCHEMA, samray_metadata
from samray.dataset.shards import done_shards, read_shard, shard_uri
from samray.dataset.verify import verify
from samray.errors import ConfigError, StorageError
from samray.pipeline import correct as correct_module
from samray.pipeline.report import ImportReport

NAMES = ["a/0.png", "a/1.png", "b/0.png", "c.png", "d.png"]
HW = (HEIGHT, WIDTH)


def square(x: int, y: int, side: int = 6) -> np.ndarray:
    mask = np.zeros(HW, dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


def masks_of(place: int) -> list[dict[str, Any]]:
    """Of each image but the fourth a sure mask, an unsure one, an unstable one, and two more sure ones."""
    scores = [(0.95, 0.98), (0.5, 0.99), (0.96, 0.5), (0.9, 0.95), (0.99, 0.99)]
    places = [(0, 0), (8, 0), (16, 0), (0, 10), (10, 10)]
    found = [
        annotation(square(x, y, 5 + place), predicted_iou=iou, stability_score=stability)
        for (x, y), (iou, stability) in zip(places, scores, strict=True)
    ]
    return [] if place == 3 else found


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Five images in three shards; the fourth without masks, the fifth failed."""
    return write_output(str(tmp_path), NAMES, masks=masks_of, failed=(4,), images_per_shard=2)


def export(plan: Plan, dest: Path, **options: Any) -> dict[str, Any]:
    samray.export(plan.output, dest, format="coco", progress=False, **options)
    found: dict[str, Any] = json.loads((dest / "instances.json").read_text())
    return found


def import_(source: Path, dest: Path, plan: Plan, **options: Any) -> ImportReport:
    report = samray.import_(source, dest, corrects=plan.output, progress=False, **options)
    found = verify(str(dest), deep=True)
    assert found.ok, found.problems
    assert (found.num_images, found.num_failed) == (report.num_images, report.num_failed)
    return report


def rows_of(output: object) -> dict[str, dict[str, Any]]:
    rows = [row for shard in sorted(done_shards(str(output))) for row in read_shard(str(output), shard).to_pylist()]
    return {row["image"]["file_name"]: row for row in rows}


def marks(row: dict[str, Any]) -> dict[int, str]:
    return {entry["id"] % 65536: entry["change"] for entry in row["corrections"]}


def indices(row: dict[str, Any]) -> list[int]:
    return [mask["id"] % 65536 for mask in row["annotations"]]


def pixels(mask: dict[str, Any]) -> np.ndarray:
    return coco_mask.decode(mask["segmentation"]).astype(bool)


def as_cvat(content: dict[str, Any], *, keep_attributes: bool) -> dict[str, Any]:
    """As CVAT's "COCO 1.0" writes it, by datumaro: images and annotations numbered anew, fields of ours gone, masks as
    plain run lengths that count as crowds; an attribute that its label does not declare is gone, too.
    """
    number = {image["id"]: i for i, image in enumerate(content["images"], start=1)}
    annotations = []
    for i, old in enumerate(content["annotations"], start=1):
        segmentation, iscrowd = old["segmentation"], 0
        if isinstance(segmentation, dict):
            runs = run_lengths(segmentation["counts"])
            assert runs is not None
            segmentation, iscrowd = {"size": segmentation["size"], "counts": runs.tolist()}, 1
        attributes = {"occluded": False}
        if keep_attributes:
            attributes |= {"samray_id": str(old.get("attributes", {}).get("samray_id", ""))}
        new = {"id": i, "image_id": number[old["image_id"]], "category_id": 1, "iscrowd": iscrowd}
        annotations.append({**new, "segmentation": segmentation, "attributes": attributes, "area": 0.0, "bbox": []})
    images = [
        {**image, "id": number[image["id"]], "license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0}
        for image in content["images"]
    ]
    categories = [{"id": 1, "name": "object", "supercategory": ""}]
    licenses = [{"name": "", "id": 0, "url": ""}]
    return {"licenses": licenses, "info": {}, "categories": categories, "images": images, "annotations": annotations}


def write(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


# --- export for a person --------------------------------------------------------------------------------------------


def test_only_sure_masks_are_exported_and_the_rest_is_listed_by_need(plan: Plan, tmp_path: Path) -> None:
    report = samray.export(plan.output, tmp_path / "coco", format="coco", confident=0.9, stable=0.95, progress=False)
    assert report.files == ["instances.json", "review.csv"]
    assert (report.num_images, report.num_masks, report.num_left_out, report.num_failed) == (4, 9, 6, 1)
    coco = COCO(str(tmp_path / "coco" / "instances.json"))
    assert len(coco.getImgIds()) == 4
    rows = rows_of(plan.output)
    for image in coco.loadImgs(coco.getImgIds()):
        found = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert [mask["attributes"]["samray_id"] % 65536 for mask in found] == ([] if image["id"] == 3 else [0, 3, 4])
        wanted = {mask["id"]: mask for mask in rows[image["file_name"]]["annotations"]}
        for mask in found:
            assert mask["id"] == mask["attributes"]["samray_id"] + 1
            assert np.array_equal(pixels(mask), pixels(wanted[mask["attributes"]["samray_id"]]))
    listed = list(csv.reader((tmp_path / "coco" / "review.csv").read_text().splitlines()))
    sides = {0: 5, 1: 6, 2: 7}
    covered = {place: int(sum(square(x, y, side) for x, y in ((0, 0), (0, 10), (10, 10))).astype(bool).sum())
               for place, side in sides.items()}  # fmt: skip
    assert listed == [
        ["image_id", "file_name", "kept", "left_out", "uncovered"],
        ["3", "c.png", "0", "0", "1.0000"],
        *[[str(i), NAMES[i], "3", "2", f"{1 - covered[i] / (HEIGHT * WIDTH):.4f}"] for i in (0, 1, 2)],
    ]


@pytest.mark.parametrize("per_piece", [1, 2, 128])
def test_bounds_are_inclusive_and_of_equal_need_more_left_out_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_piece: int
) -> None:
    monkeypatch.setattr(export_job, "sizes_of", lambda name, options: (per_piece, None))

    def masks(place: int) -> list[dict[str, Any]]:
        sure = annotation(square(2, 2), predicted_iou=0.9, stability_score=0.95)
        return [sure] + [annotation(square(4, 4), predicted_iou=0.89)] * place

    plan = write_output(str(tmp_path), ['"x", y.png', "y.png", "z.png"], masks=masks)
    content = export(plan, tmp_path / "coco", confident=0.9, stable=0.95)
    assert len(content["annotations"]) == 3
    listed = list(csv.DictReader((tmp_path / "coco" / "review.csv").read_text().splitlines()))
    assert [row["file_name"] for row in listed] == ["z.png", "y.png", '"x", y.png']
    assert [row["left_out"] for row in listed] == ["2", "1", "0"]


def test_no_bounds_no_review_and_a_bound_of_0_reviews_all(plan: Plan, tmp_path: Path) -> None:
    plain = export(plan, tmp_path / "plain")
    assert len(plain["annotations"]) == 15
    assert "attributes" not in plain["annotations"][0]
    assert not (tmp_path / "plain" / "review.csv").exists()
    assert len(export(plan, tmp_path / "all", confident=0)["annotations"]) == 15
    assert (tmp_path / "all" / "review.csv").exists()
    assert is_sure(-0.1, 0.5, None, 0.5)
    assert not is_sure(-0.1, 0.5, 0.0, None)
    with pytest.raises(ConfigError, match="holds another export"):
        export(plan, tmp_path / "plain", confident=0)


def test_each_file_has_a_list_beside_it(plan: Plan, tmp_path: Path) -> None:
    report = samray.export(
        plan.output, tmp_path / "x", format="coco", stable=0.95, images_per_file=3, polygons=True, progress=False
    )
    assert report.files == [
        "instances-000000.json", "review-000000.csv", "instances-000001.json", "review-000001.csv"
    ]  # fmt: skip
    lines = [(tmp_path / "x" / f"review-00000{i}.csv").read_text().splitlines() for i in (0, 1)]
    assert [len(own) for own in lines] == [4, 2]  # with the header; the second file's last image failed


def test_areas_of_unions() -> None:
    masks = [blob(seed) for seed in range(6)]
    for number in (1, 2, 6):
        counts = [annotation(mask)["segmentation"]["counts"] for mask in masks[:number]]
        assert union_area(runs_of_image(0, counts, HEIGHT * WIDTH)) == np.any(masks[:number], axis=0).sum()
    assert union_area([]) == 0


# --- there and back -------------------------------------------------------------------------------------------------


def a_person(content: dict[str, Any]) -> dict[str, Any]:
    """Of a/0.png: the first mask stays, the second is changed, the third goes, and a polygon comes. b/0.png: all go. Of
    the failed image the tool shows more than samray could read: a mask is drawn there.
    """
    image = {image["file_name"]: image["id"] for image in content["images"]}
    edited = []
    for mask in content["annotations"]:
        index = mask["attributes"]["samray_id"] % 65536
        if mask["image_id"] == image["b/0.png"] or (mask["image_id"] == image["a/0.png"] and index == 4):
            continue
        if mask["image_id"] == image["a/0.png"] and index == 3:
            mask = {**mask, "segmentation": annotation(square(0, 10, 7))["segmentation"]}  # it was 5 wide
        edited.append(mask)
    polygon = {"id": 0, "image_id": image["a/0.png"], "segmentation": [[20, 12, 28, 12, 28, 20, 20, 20]]}
    rectangle = {"id": 0, "image_id": image["a/1.png"], "segmentation": []}
    of_failed = {"id": 0, "image_id": 77, "segmentation": [[0, 0, 4, 0, 4, 4]]}
    images = [*content["images"], {"id": 77, "width": WIDTH, "height": HEIGHT, "file_name": "d.png"}]
    return {**content, "images": images[::-1], "annotations": [*edited, polygon, rectangle, of_failed][::-1]}


@pytest.mark.parametrize("keep_attributes", [True, False])
@pytest.mark.parametrize("polygons", [True, False])
def test_what_a_person_did_in_cvat_comes_back(
    plan: Plan, tmp_path: Path, keep_attributes: bool, polygons: bool
) -> None:
    sure = {"confident": 0.9, "stable": 0.95}
    exported = export(plan, tmp_path / "there", polygons=polygons, **sure)
    source = write(tmp_path / "back" / "x.json", as_cvat(a_person(exported), keep_attributes=keep_attributes))
    report = import_(source, tmp_path / "new", plan, **sure)

    assert report.changes == {"unchanged": 4, "changed": 1, "added": 1, "removed": 4, "left_out": 6}
    assert (report.num_images, report.num_corrected, report.num_unknown_images) == (5, 5, 0)
    assert (report.num_failed, report.num_dropped) == (1, 2)
    before, after = rows_of(plan.output), rows_of(tmp_path / "new")
    assert list(after) == NAMES
    first = after["a/0.png"]
    assert indices(first) == [0, 3, 5]
    assert marks(first) == {1: "left_out", 2: "left_out", 3: "changed", 4: "removed", 5: "added"}
    old = {mask["id"] % 65536: mask for mask in before["a/0.png"]["annotations"]}
    unchanged, changed, added = first["annotations"]
    assert unchanged == old[0]
    assert np.array_equal(pixels(changed), square(0, 10, 7))
    assert (changed["point_coords"], changed["crop_box"]) == (old[3]["point_coords"], old[3]["crop_box"])
    assert (changed["area"], changed["bbox"]) == (49, [0, 10, 7, 7])
    assert np.array_equal(pixels(added), square(20, 12, 8))
    assert (added["point_coords"], added["crop_box"]) == ([], [0, 0, WIDTH, HEIGHT])
    assert {(m["predicted_iou"], m["stability_score"]) for m in (changed, added)} == {(1.0, 1.0)}
    assert (indices(after["a/1.png"]), marks(after["a/1.png"])) == ([0, 3, 4], {1: "left_out", 2: "left_out"})
    assert marks(after["b/0.png"]) == dict.fromkeys((0, 3, 4), "removed") | dict.fromkeys((1, 2), "left_out")
    assert (after["c.png"]["annotations"], after["c.png"]["corrections"]) == ([], [])
    assert after["d.png"] == {**before["d.png"], "corrections": None}

    again = import_(source, tmp_path / "new", plan, **sure)
    assert (again.num_shards_skipped, again.changes) == (3, {})


def test_masks_that_were_not_shown_may_stay_and_images_that_were_not_looked_at_do(plan: Plan, tmp_path: Path) -> None:
    content = export(plan, tmp_path / "there", confident=0.9)
    content["images"] = [image for image in content["images"] if image["file_name"] == "b/0.png"]
    content["images"] += [{"id": 99, "width": 5, "height": 5, "file_name": "other.png"}]
    report = import_(write(tmp_path / "x.json", content), tmp_path / "new", plan, confident=0.9, keep_rest=True)
    assert report.changes == {"unchanged": 4}
    assert (report.num_corrected, report.num_unknown_images, report.num_dropped) == (1, 1, 8)
    before, after = rows_of(plan.output), rows_of(tmp_path / "new")
    looked_at = after.pop("b/0.png")
    assert looked_at == {**before.pop("b/0.png"), "corrections": []}
    assert after == {name: {**row, "corrections": None} for name, row in before.items()}


def test_a_second_round_adds_to_what_the_first_one_says(plan: Plan, tmp_path: Path) -> None:
    def redraw(content: dict[str, Any], wanted: Callable[[int], bool], mask: np.ndarray) -> None:
        """In place of the first image's masks that are not wanted, this one."""
        content["annotations"] = [
            old for old in content["annotations"] if old["image_id"] != 0 or wanted(old["attributes"]["samray_id"])
        ]
        content["annotations"].append({"id": 0, "image_id": 0, **annotation(mask)})

    first = export(plan, tmp_path / "1", confident=0.9)
    redraw(first, lambda index: index < 4, square(20, 15))
    import_(write(tmp_path / "1.json", first), tmp_path / "out1", plan, confident=0.9)
    one = rows_of(tmp_path / "out1")["a/0.png"]
    assert (indices(one), marks(one)) == ([0, 2, 3, 5], {1: "left_out", 4: "removed", 5: "added"})

    corrected = samray.dataset.manifest.load_plan(str(tmp_path / "out1"))
    second = export(corrected, tmp_path / "2", confident=0.9)
    redraw(second, lambda index: index not in (0, 5), square(2, 15))
    mended = {**second["annotations"][0], **annotation(square(16, 0, 6))}
    assert mended["attributes"]["samray_id"] == 2
    second["annotations"][0] = mended
    import_(write(tmp_path / "2.json", second), tmp_path / "out2", corrected, confident=0.9)
    two = rows_of(tmp_path / "out2")["a/0.png"]
    assert indices(two) == [2, 3, 6]  # 5 was somebody's mask, and stays its id
    assert marks(two) == {0: "removed", 1: "left_out", 2: "changed", 4: "removed", 5: "removed", 6: "added"}


def test_an_import_that_died_goes_on(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = a_person(export(plan, tmp_path / "there", confident=0.9))
    source = write(tmp_path / "x.json", content)
    import_(source, tmp_path / "whole", plan, confident=0.9)
    real = correct_module.commit_shard

    def dies(output: str, shard: int, *rest: Any) -> int:
        if shard == 2:
            raise StorageError("the power went")
        return real(output, shard, *rest)

    monkeypatch.setattr(correct_module, "commit_shard", dies)
    with pytest.raises(StorageError, match="the power went"):
        import_(source, tmp_path / "half", plan, confident=0.9)
    monkeypatch.undo()
    assert not (tmp_path / "half" / "_SUCCESS").exists()
    report = import_(source, tmp_path / "half", plan, confident=0.9)
    assert report.num_shards_skipped == 2
    assert rows_of(tmp_path / "half") == rows_of(tmp_path / "whole")


def test_on_any_storage(storage_root: str) -> None:
    plan = write_output(storage_root, NAMES[:3], masks=masks_of)
    there, back = (storage.join(storage_root, name) for name in ("there", "back"))
    samray.export(plan.output, there, format="coco", confident=0.9, progress=False)
    report = samray.import_(there, back, corrects=plan.output, confident=0.9, progress=False)
    assert report.changes == {"unchanged": 12, "left_out": 3}
    assert verify(back, deep=True).ok


def test_other_shards_and_several_files(plan: Plan, tmp_path: Path) -> None:
    samray.export(plan.output, tmp_path / "there", format="coco", confident=0, images_per_file=3, progress=False)
    report = import_(tmp_path / "there", tmp_path / "new", plan, confident=0, images_per_shard=4)
    assert (report.num_shards, report.num_corrected, report.changes) == (2, 4, {"unchanged": 15})
    before, after = rows_of(plan.output), rows_of(tmp_path / "new")
    assert {name: row["annotations"] for name, row in after.items()} == {
        name: row["annotations"] for name, row in before.items()
    }


# --- matching -------------------------------------------------------------------------------------------------------


def test_masks_are_found_by_id_and_else_by_the_largest_overlap() -> None:
    def ours(*squares: np.ndarray) -> list[dict[str, Any]]:
        return [{"id": i, **annotation(mask)} for i, mask in enumerate(squares)]

    def theirs(*masks: tuple[np.ndarray, int | None]) -> list[tuple[str, int | None]]:
        return [(annotation(mask)["segmentation"]["counts"], id) for mask, id in masks]

    a, b, far = square(0, 0, 10), square(1, 0, 10), square(18, 12, 6)
    assert match_masks(ours(a, b), theirs((b, None), (a, None)), HW) == {0: 1, 1: 0}
    # The id counts, even where other pixels would say something else.
    assert match_masks(ours(a, b), theirs((b, 0), (far, 1)), HW) == {0: 0, 1: 1}
    # Two of the same id, as after copy and paste: the better one; the other by its pixels, if they are those of one.
    assert match_masks(ours(a, b), theirs((far, 0), (a, 0), (b, None)), HW) == {0: 1, 1: 2}
    assert match_masks(ours(a, far), theirs((a, 0), (far, 0)), HW) == {0: 0, 1: 1}
    # Ids that are none of the image's are no ids.
    assert match_masks(ours(a), theirs((a, 12345)), HW) == {0: 0}
    # Half of the union is enough, less is not.
    half = square(0, 0, 10)
    half[:, 5:] = False
    assert match_masks(ours(a), theirs((half, None)), HW) == {0: 0}
    half[0, 0] = False
    assert match_masks(ours(a), theirs((half, None)), HW) == {}
    assert match_masks([], theirs((a, None)), HW) == match_masks(ours(a), [], HW) == {}


@pytest.mark.parametrize(
    ("value", "is_id"), [(1, True), (1.0, True), ("1", True), ("1.0", True), ("", False), (None, False), ("x", False),
                         (True, False), (1.5, False), (float("nan"), False), ([1], False), (float("inf"), False)]
)  # fmt: skip
def test_ids_come_back_in_whatever_form(value: Any, is_id: bool) -> None:
    mask = {"id": 1, **annotation(square(0, 0))}
    row = {"image": {"image_id": 0, "width": WIDTH, "height": HEIGHT, "file_name": "a"}, "uri": "/a",
           "annotations": [mask]}  # fmt: skip
    elsewhere = {**annotation(square(18, 12)), "attributes": {"samray_id": value}}
    settings: dict[str, Any] = {"confident": None, "stable": None, "keep_rest": False, "bbox_convention": "coco"}
    record, numbers = corrected_record(row, row["image"], [elsewhere], **settings)
    assert +numbers == ({"changed": 1} if is_id else {"removed": 1, "added": 1})
    assert [mask["id"] for mask in record.annotations] == [1 if is_id else 2]


def test_the_convention_of_boxes_is_kept(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), NAMES[:1], masks=lambda place: [], settings=("masks.bbox_convention=sam",))
    content = export(plan, tmp_path / "there", confident=0)
    content["annotations"] = [{"id": 0, "image_id": 0, **annotation(square(3, 4, 5))}]
    import_(write(tmp_path / "x.json", content), tmp_path / "new", plan)
    (mask,) = rows_of(tmp_path / "new")["a/0.png"]["annotations"]
    assert mask["bbox"] == [3, 4, 4, 4]


# --- faults ---------------------------------------------------------------------------------------------------------


def test_images_whose_corrections_cannot_be_understood_fail_and_say_why(plan: Plan, tmp_path: Path) -> None:
    content = export(plan, tmp_path / "there", confident=0.9)
    by_name = {image["file_name"]: image for image in content["images"]}
    by_name["a/0.png"]["width"] = 7
    by_name["b/0.png"]["width"] = None
    content["annotations"].append({"id": 1, "image_id": by_name["a/1.png"]["id"], "segmentation": [["x"]]})
    report = import_(write(tmp_path / "x.json", content), tmp_path / "new", plan, confident=0.9)
    assert report.failures == {"truncated": 1, "unreadable": 3}
    rows = rows_of(tmp_path / "new")
    assert rows["a/0.png"]["error"] == "unreadable: the corrected image is 7x24, the labelled one 31x24"
    assert rows["a/1.png"]["error"].startswith("unreadable: annotation 4 cannot be understood: could not convert")
    assert rows["b/0.png"]["error"] == "unreadable: the image has the impossible height and width (24, None)"


def test_an_image_without_an_id_left_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from samray.dataset.imports import corrections

    plan = write_output(str(tmp_path), NAMES[:1], masks=masks_of)
    content = export(plan, tmp_path / "there", confident=0)
    content["annotations"].append({"id": 1, "image_id": 0, **annotation(blob(1))})
    monkeypatch.setattr(corrections, "ANNOTATIONS_PER_IMAGE", 5)
    report = import_(write(tmp_path / "x.json", content), tmp_path / "new", plan)
    assert report.failures == {"unsupported": 1}
    assert rows_of(tmp_path / "new")["a/0.png"]["error"] == "unsupported: no id is left: an image has 5"


def test_wrong_commands_are_one_sentence(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        return " ".join(capsys.readouterr().err.split())

    labels, out = plan.output, tmp_path / "new"
    content = export(plan, tmp_path / "there", confident=0.9)
    source = write(tmp_path / "x.json", content)
    assert "--confident=1.5 is not allowed: it is from 0 to 1" in _refused(plan, tmp_path / "no", confident=1.5)
    assert "--stable=-1 is not allowed: it is from 0 to 1" in _refused(plan, tmp_path / "no", stable=-1)
    assert "--confident is an option of coco, not of yolo" in refusal(
        "export", labels, tmp_path / "no", "--format", "yolo", "--confident", "0.9"
    )
    assert "--confident needs --corrects" in refusal("import", source, out, "--confident", "0.9")
    assert "--stable needs --corrects" in refusal("import", source, out, "--stable", "0.9")
    assert "--keep-rest needs --corrects" in refusal("import", source, out, "--keep-rest")
    with_corrects = ("import", source, out, "--corrects", labels)
    assert "with --corrects SOURCE is COCO" in refusal(*with_corrects, "--format", "sa1b")
    assert "leave out --images" in refusal(*with_corrects, "--images", tmp_path)
    assert "holds no samray run" in refusal("import", source, out, "--corrects", tmp_path / "in")
    assert "DEST must be another folder than the OUTPUT" in refusal("import", source, labels, "--corrects", labels)

    def of(**changes: Any) -> Path:
        return write(tmp_path / "bad" / "x.json", {**content, **changes})

    size = {"width": WIDTH, "height": HEIGHT}
    stranger = {"id": 1, "file_name": "0.png", **size}
    twice = [{"id": i, "file_name": "c.png", **size} for i in (1, 2)]
    arguments = (out, "--corrects", labels)
    assert "none of its 1 images is in" in refusal("import", of(images=[stranger]), *arguments)
    assert "its first is '0.png', there the first is 'a/0.png'" in refusal("import", of(images=[stranger]), *arguments)
    assert "holds the image 'c.png' twice" in refusal("import", of(images=twice), *arguments)
    assert "the image 1 has no file_name" in refusal("import", of(images=[{"id": 1}]), *arguments)
    assert not out.exists()

    assert main([*map(str, with_corrects), "--confident", "0.9", "--no-progress"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "corrected 4 images; the others stay as they were" in said
    assert "unchanged 12 masks" in said
    assert "left out 3 masks, not sure enough (--keep-rest keeps them)" in said
    assert "corrects.keep_rest: false there, true now" in refusal(*with_corrects, "--confident", "0.9", "--keep-rest")
    (out / "_samray" / "run.json").unlink()
    assert "holds shards of which nothing says what they are" in refusal(*with_corrects, "--confident", "0.9")
    Path(shard_uri(labels, 1)).unlink()
    assert "is not finished: 1 of 3 shards are missing" in refusal("import", source, tmp_path / "o", *arguments[1:])


def _refused(plan: Plan, dest: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        export(plan, dest, **options)
    return str(caught.value)


def test_names_of_several_images_need_the_id(tmp_path: Path) -> None:
    from samray.dataset.joining import join_images

    plan = write_output(str(tmp_path / "1"), ["a.png", "b.png"], masks=masks_of)
    other = write_output(str(tmp_path / "2"), ["a.png"], masks=masks_of)
    config = samray.load_config("default", overrides=["output.images_per_shard=3"])
    both, _ = join_images(plan, f"{tmp_path}/2/in", config, config.identity(), append=True, redo_changed=False)
    table = read_shard(other.output, 0)
    image = {**table["image"][0].as_py(), "image_id": 2}
    masks = [{**mask, "id": 2 * 65536 + i} for i, mask in enumerate(table["annotations"][0].as_py())]
    row = {"image": image, "annotations": masks, "uri": f"{tmp_path}/2/in/a.png", "status": "ok", "error": None}
    from samray.dataset.schema import shard_metadata
    from samray.dataset.shards import commit_shard, mark_success

    commit_shard(both.output, 1, pa.Table.from_pylist([row], SCHEMA).replace_schema_metadata(shard_metadata(both.run)))
    mark_success(both.output)
    content = export(both, tmp_path / "there", confident=0)
    content["annotations"] = [mask for mask in content["annotations"] if mask["image_id"] != 2]
    report = import_(write(tmp_path / "x.json", content), tmp_path / "new", both)
    assert report.changes == {"unchanged": 10, "removed": 5}
    renumbered = as_cvat(content, keep_attributes=True)
    with pytest.raises(
        ConfigError, match=r"the file_name 'a\.png' is that of several images of .*, none with the id 1"
    ):
        import_(write(tmp_path / "y.json", renumbered), tmp_path / "out2", both)


def test_the_commands_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(samray.__file__).parents[1] / "README.md").read_text()

    def block(mark: str) -> list[str]:
        return readme.partition(f"<!-- {mark} -->\n```")[2].partition("```")[0].splitlines()[1:]

    monkeypatch.chdir(tmp_path)
    plan = write_output(str(tmp_path), ["a/cat.jpg", "dog.jpg"], masks=masks_of)
    (tmp_path / "in").rename("photos")
    (tmp_path / "out").rename("round2")
    Path("clicks.jsonl").write_text("\n".join(block("clicks.jsonl")))
    (assisted,) = block("phase 1")
    assert main([*shlex.split(assisted)[1:], "--dry-run"]) == 0
    assert "prompts 2, on 1 image" in " ".join(capsys.readouterr().err.split())
    automatic, there, back = block("phase 2")
    assert main([*shlex.split(automatic.replace("round2", "other"))[1:], "--dry-run"]) == 0
    assert main(shlex.split(there)[1:]) == 0
    Path("review/instances.json").rename("corrected.json")
    assert main(shlex.split(back)[1:]) == 0
    assert verify("round2-corrected", deep=True).num_masks == 6
    assert plan.num_images == 2


# --- readers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def corrected(plan: Plan, tmp_path: Path) -> str:
    content = a_person(export(plan, tmp_path / "there", confident=0.9))
    import_(write(tmp_path / "x.json", content), tmp_path / "new", plan, confident=0.9)
    return str(tmp_path / "new")


def test_every_loader_reads_a_corrected_output(corrected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import duckdb
    import pandas
    import polars
    import pyarrow.dataset as pads

    rows = list(rows_of(corrected).values())
    files = f"{corrected}/annotations/*.parquet"
    assert pads.dataset(f"{corrected}/annotations").to_table().schema.equals(CORRECTED_SCHEMA)
    assert list(json.loads(json.dumps(rows[0])))[:2] == ["image", "annotations"]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    declared = json.loads(read_shard(corrected, 0).schema.metadata[b"huggingface"])["info"]["features"]
    for streaming in (False, True):
        found = datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
        assert list(found) == rows
        assert found.features == datasets.Features.from_dict(declared)
    assert duckdb.sql(f"SELECT corrections FROM '{files}'").fetchall() == [(row["corrections"],) for row in rows]
    assert polars.scan_parquet(files).collect().to_dicts() == rows
    assert len(pandas.read_parquet(f"{corrected}/annotations")) == len(rows)
    dataset = samray.MaskDataset(corrected, min_predicted_iou=0.99)  # a person's masks pass every bound
    assert len(dataset) == 4
    assert len(dataset[0][1]["masks"]) == sum(mask["predicted_iou"] >= 0.99 for mask in rows[0]["annotations"]) == 2
    assert samray.read_image(corrected, 2) == rows[2]


def test_a_corrected_output_goes_on_like_any_other(corrected: str, tmp_path: Path) -> None:
    assert main(["compact", corrected, str(tmp_path / "compact"), "--file-size", "1"]) == 0
    assert verify(str(tmp_path / "compact"), deep=True).ok
    assert rows_of(tmp_path / "compact") == rows_of(corrected)
    assert main(["report", corrected]) == 0
    for format in ("sa1b", "yolo", "flat", "label-map"):
        samray.export(corrected, tmp_path / format, format=format, progress=False)
    first = json.loads((tmp_path / "sa1b" / "a" / "0.json").read_text())
    assert [mask["id"] for mask in first["annotations"]] == [0, 2, 3, 5]
    with pytest.raises(ConfigError, match=r"corrects\.confident: 0\.9 there, not set now"):
        samray.label(tmp_path / "in", corrected, samray.load_config("default", overrides=["model.name=tiny"]))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda row: row["annotations"].reverse(), "ids do not rise from image_id"),
        (lambda row: row["annotations"][0].update(id=65536), "ids do not rise from image_id"),
        (
            lambda row: row["corrections"].append({"id": 0, "change": "removed"}),
            "annotation 0 was removed, and it is there",
        ),
        (
            lambda row: row["corrections"].append({"id": 9, "change": "added"}),
            "annotation 9 was added, and it is not there",
        ),
        (
            lambda row: row["corrections"].append({"id": 9, "change": "lost"}),
            "annotation 9 was lost, and it is not there",
        ),
    ],
)
def test_verify_sees_through_wrong_ids_and_marks(corrected: str, change: Callable[[Any], None], problem: str) -> None:
    from samray.dataset.shards import replace_shard

    table = read_shard(corrected, 0)
    rows = table.to_pylist()
    change(rows[0])
    broken = pa.Table.from_pylist(rows, CORRECTED_SCHEMA).replace_schema_metadata(table.schema.metadata)
    replace_shard(corrected, 0, broken, samray_metadata(table.schema)["stats"])
    assert problem in " ".join(verify(corrected, deep=True).problems)
