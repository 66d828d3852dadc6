"""Corrections of a person, there and back as through CVAT: whose masks they are, and what becomes of each."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import samray
from samray import storage
from samray.cli.main import main
from samray.errors import ConfigError, StorageError
from samray.imports import correct as correct_module
from samray.imports.corrections import corrected_record, id_of, match_masks
from samray.output.append import join_images
from samray.output.plan import Plan
from samray.output.schema import SCHEMA, shard_metadata
from samray.output.shards import commit_shard, mark_success, read_shard
from samray.output.verify import verify
from samray.rle.runs import run_lengths
from tests.support.handmade import HEIGHT, WIDTH, annotation, decoded, write_output
from tests.support.pages import block
from tests.support.reviewed import HW, NAMES, a_person, export, five_images, import_, masks_of, rows_of, square, write


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return five_images(str(tmp_path))


def marks(row: dict[str, Any]) -> dict[int, str]:
    return {entry["id"] % 65536: entry["change"] for entry in row["corrections"]}


def indices(row: dict[str, Any]) -> list[int]:
    return [mask["id"] % 65536 for mask in row["annotations"]]


def as_cvat(content: dict[str, Any], *, keep_attributes: bool) -> dict[str, Any]:
    """As CVAT's "COCO 1.0" writes it, by datumaro: images and annotations renumbered, samray's fields gone, masks as
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


# --- there and back ---------------------------------------------------------------------------------------------------


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
    assert np.array_equal(decoded(changed), square(0, 10, 7))
    assert (changed["point_coords"], changed["crop_box"]) == (old[3]["point_coords"], old[3]["crop_box"])
    assert (changed["area"], changed["bbox"]) == (49, [0, 10, 7, 7])
    assert np.array_equal(decoded(added), square(20, 12, 8))
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

    corrected = samray.output.plan.load_plan(str(tmp_path / "out1"))
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


def test_the_convention_of_boxes_is_kept(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), NAMES[:1], masks=lambda index: [], settings=("masks.bbox_convention=sam",))
    content = export(plan, tmp_path / "there", confident=0)
    content["annotations"] = [{"id": 0, "image_id": 0, **annotation(square(3, 4, 5))}]
    import_(write(tmp_path / "x.json", content), tmp_path / "new", plan)
    (mask,) = rows_of(tmp_path / "new")["a/0.png"]["annotations"]
    assert mask["bbox"] == [3, 4, 4, 4]


def test_the_commands_of_the_docs_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = write_output(str(tmp_path), ["a/cat.jpg", "dog.jpg"], masks=masks_of)
    (tmp_path / "in").rename("photos")
    (tmp_path / "out").rename("round2")
    Path("clicks.jsonl").write_text(block("clicks.jsonl")[1])
    (assisted,) = block("phase 1")[1].splitlines()
    assert main([*shlex.split(assisted)[1:], "--dry-run"]) == 0
    assert "prompts 2, on 1 image" in " ".join(capsys.readouterr().err.split())
    automatic, there, back = block("phase 2")[1].splitlines()
    assert main([*shlex.split(automatic.replace("round2", "other"))[1:], "--dry-run"]) == 0
    assert main(shlex.split(there)[1:]) == 0
    Path("review/instances.json").rename("corrected.json")
    assert main(shlex.split(back)[1:]) == 0
    assert verify("round2-corrected", deep=True).num_masks == 6
    assert plan.num_images == 2


# --- matching ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("value", [2**60 + 1, str(2**60 + 1)])
def test_ids_that_no_float_holds_come_back_exactly(value: Any) -> None:
    assert id_of({"samray_id": value}) == 2**60 + 1


def test_names_of_several_images_need_the_id(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path / "1"), ["a.png", "b.png"], masks=masks_of)
    other = write_output(str(tmp_path / "2"), ["a.png"], masks=masks_of)
    config = samray.load_config("default", overrides=["output.images_per_shard=3"])
    both, _ = join_images(plan, f"{tmp_path}/2/in", config, config.identity(), append=True, redo_changed=False)
    table = read_shard(other.output, 0)
    image = {**table["image"][0].as_py(), "image_id": 2}
    masks = [{**mask, "id": 2 * 65536 + i} for i, mask in enumerate(table["annotations"][0].as_py())]
    row = {"image": image, "annotations": masks, "uri": f"{tmp_path}/2/in/a.png", "status": "ok", "error": None}
    commit_shard(both.output, 1, pa.Table.from_pylist([row], SCHEMA).replace_schema_metadata(shard_metadata(both.run)))
    mark_success(both.output)
    content = export(both, tmp_path / "there", confident=0)
    content["annotations"] = [mask for mask in content["annotations"] if mask["image_id"] != 2]
    report = import_(write(tmp_path / "x.json", content), tmp_path / "new", both)
    assert report.changes == {"unchanged": 10, "removed": 5}
    renumbered = as_cvat(content, keep_attributes=True)
    with pytest.raises(ConfigError, match=r"the file_name 'a\.png' matches several images of .*, none with the id 1"):
        import_(write(tmp_path / "y.json", renumbered), tmp_path / "out2", both)
