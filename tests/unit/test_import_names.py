"""Names of imported masks: COCO's and LVIS's categories, exports that come back, and what a person changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import samray
from samray.imports.categories import Categories
from samray.output.plan import Plan, load_plan
from samray.output.schema import categories_of
from samray.output.shards import shard_uri
from samray.output.verify import verify
from tests.support import reviewed
from tests.support.exported import export
from tests.support.handmade import HEIGHT, WIDTH, annotation, read_rows, write_output
from tests.support.reviewed import rows_of, square

CATEGORIES = ("dog", "cat")
SQUARE = [[5, 5, 15, 5, 15, 12, 5, 12]]


def import_(source: Path, dest: Path, **options: Any) -> list[dict[str, Any]]:
    """The rows of the import, which is sound."""
    samray.import_(source, dest, progress=False, **options)
    report = verify(str(dest), deep=True)
    assert report.ok, report.problems
    return read_rows(dest)


def names_in(output: Path) -> list[str] | None:
    return categories_of(load_plan(str(output)).run["identity"])


def names_of(rows: list[dict[str, Any]]) -> list[list[tuple[str | None, float | None]]]:
    return [[(mask["label"], mask["label_score"]) for mask in row["annotations"]] for row in rows]


def write_coco(path: Path, categories: list[dict[str, Any]], ids: list[Any], **more: Any) -> Path:
    """A file as COCO's own, which end with their categories: one image, with a mask of each of the category ids."""
    content = {
        "images": [{"id": 1, "width": WIDTH, "height": HEIGHT, "file_name": f"{path.stem}.jpg"}],
        "annotations": [
            {"id": i, "image_id": 1, "segmentation": SQUARE, "category_id": id, **more} for i, id in enumerate(ids)
        ],
        "categories": categories,
    }
    path.write_text(json.dumps(content))
    return path


def named_masks(index: int) -> list[dict[str, Any]]:
    """A dog, a mask without a name and a cat in each image but the second."""
    names = [("dog", 0.5), (None, None), ("cat", 0.25)]
    masks = [annotation(square(8 * i, index + 2, 5 + index)) for i in range(3)]
    return [{**m, "label": n, "label_score": s} for m, (n, s) in zip(masks, names, strict=True) if index != 1]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return write_output(str(tmp_path), reviewed.NAMES, masks=named_masks, failed=(4,), categories=CATEGORIES)


def test_categories_of_coco_and_lvis_are_names(tmp_path: Path) -> None:
    categories = [
        {"id": 90, "name": "toothbrush", "synset": "toothbrush.n.01", "frequency": "f", "synonyms": ["toothbrush"]},
        {"id": "3", "name": "car"},
        {"id": 4, "name": ""},
        {"name": "no id"},
        "nonsense",
    ]
    source = write_coco(tmp_path / "a.json", categories, [3.0, 90, 4, 5, None, [3], "90"])
    (row,) = import_(source, tmp_path / "out")
    nothing = (None, None)
    wanted = [("car", 1.0), ("toothbrush", 1.0), nothing, nothing, nothing, nothing, ("toothbrush", 1.0)]
    assert names_of([row]) == [wanted]
    assert names_in(tmp_path / "out") == ["toothbrush", "car"]
    assert json.loads((tmp_path / "out/_samray/run.json").read_text())["categories"] == ["toothbrush", "car"]


def test_each_file_has_ids_of_its_own_and_results_have_a_score(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_coco(folder / "a.json", [{"id": 1, "name": "dog"}], [1])
    write_coco(folder / "b.json", [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}], [1, 2])
    assert names_of(import_(folder, tmp_path / "out")) == [[("dog", 1.0)], [("cat", 1.0), ("dog", 1.0)]]
    assert names_in(tmp_path / "out") == ["dog", "cat"]

    (folder / "a.json").unlink()
    result = {"image_id": 1, "category_id": 2, "segmentation": SQUARE, "score": 0.75}
    (folder / "results.json").write_text(json.dumps([result]))
    (row,) = import_(folder, tmp_path / "out2")
    assert names_of([row]) == [[("cat", 1.0), ("dog", 1.0), ("dog", 0.75)]]


@pytest.mark.parametrize(("format", "options"), [("coco", {}), ("coco", {"polygons": True}), ("sa1b", {})])
def test_an_export_that_comes_back_keeps_every_name(
    plan: Plan, tmp_path: Path, format: str, options: dict[str, Any]
) -> None:
    export(plan, tmp_path / "dest", format, **options)
    rows = import_(tmp_path / "dest", tmp_path / "new")
    before = [row for row in read_rows(plan.output) if row["status"] == "ok"]
    assert [row["image"]["file_name"] for row in rows] == [row["image"]["file_name"] for row in before]
    assert [row["annotations"] for row in rows] == [row["annotations"] for row in before]
    assert names_in(tmp_path / "new") == list(CATEGORIES)


def test_a_name_that_looks_like_a_secret_stays_itself(tmp_path: Path) -> None:
    """`basic` and a long word are an HTTP header, whose value is hidden where it may be one."""
    categories = [{"id": 1, "name": "basic screwdriver"}, {"id": 2, "name": "Bearer flagpoles"}]
    (row,) = import_(write_coco(tmp_path / "a.json", categories, [2, 1]), tmp_path / "out")
    assert row["status"] == "ok", row["error"]
    assert names_of([row]) == [[("Bearer flagpoles", 1.0), ("basic screwdriver", 1.0)]]
    assert names_in(tmp_path / "out") == ["basic screwdriver", "Bearer flagpoles"]
    import_(tmp_path / "a.json", tmp_path / "out")  # finished, and the same
    export(load_plan(str(tmp_path / "out")), tmp_path / "coco", "coco")


def test_an_output_without_names_comes_back_without(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), ["a.png"], masks=lambda _: [annotation(square(1, 1))])
    for format in ("coco", "sa1b"):
        export(plan, tmp_path / format, format)
        (row,) = import_(tmp_path / format, tmp_path / f"new-{format}")
        assert names_in(tmp_path / f"new-{format}") is None
        assert "label" not in row["annotations"][0]


def test_an_import_that_was_begun_without_names_is_finished_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "ab":
        write_coco(folder / f"{name}.json", [{"id": 1, "name": "dog"}], [1])
    with monkeypatch.context() as older:
        older.setattr(Categories, "add", lambda *_: None)
        import_(folder, tmp_path / "out", images_per_shard=1)
    Path(shard_uri(str(tmp_path / "out"), 1)).unlink()
    rows = import_(folder, tmp_path / "out", images_per_shard=1)
    assert [len(row["annotations"]) for row in rows] == [1, 1]
    assert all("label" not in row["annotations"][0] for row in rows)


def test_a_name_in_sa1b_that_its_list_lacks_fails_the_image(plan: Plan, tmp_path: Path) -> None:
    export(plan, tmp_path / "sa1b", "sa1b")
    file = tmp_path / "sa1b/c.json"
    file.write_text(file.read_text().replace('"label": "dog"', '"label": "wolf"'))
    rows = import_(tmp_path / "sa1b", tmp_path / "new")
    (failed,) = [row for row in rows if row["status"] == "failed"]
    assert "it has the name 'wolf', which is not one of the categories" in failed["error"]


# --- a person ---------------------------------------------------------------------------------------------------------


def as_tools_write_them(content: dict[str, Any]) -> None:
    """Without what annotation tools drop: the supercategories."""
    content["categories"] = [{**category, "supercategory": ""} for category in content["categories"]]


def test_a_persons_category_wins(plan: Plan, tmp_path: Path) -> None:
    content = reviewed.export(plan, tmp_path / "there", confident=0.5)
    as_tools_write_them(content)
    ids = {category["name"]: category["id"] for category in content["categories"]}
    assert list(ids) == ["dog", "cat", "object"]
    content["categories"].append({"id": 9, "name": "fox"})
    masks = [mask for mask in content["annotations"] if mask["image_id"] == content["images"][0]["id"]]
    masks[0]["category_id"] = ids["object"]  # no dog
    masks[1]["category_id"] = 9
    del masks[2]["category_id"]  # says nothing
    drawn = {"id": 0, "image_id": masks[0]["image_id"], "category_id": ids["cat"]}
    content["annotations"].append({**drawn, "segmentation": annotation(square(20, 12, 8))["segmentation"]})
    source = reviewed.write(tmp_path / "x.json", content)
    report = reviewed.import_(source, tmp_path / "new", plan, confident=0.5)

    assert report.changes == {"unchanged": 7, "changed": 2, "added": 1}
    before, after = rows_of(plan.output), rows_of(tmp_path / "new")
    row = after["a/0.png"]
    assert names_of([row]) == [[(None, None), ("fox", 1.0), ("cat", 0.25), ("cat", 1.0)]]
    assert [entry["change"] for entry in row["corrections"]] == ["changed", "changed", "added"]
    # Only the name is another one.
    assert row["annotations"][1] == {**before["a/0.png"]["annotations"][1], "label": "fox", "label_score": 1.0}
    assert names_of([after["b/0.png"], after["a/1.png"]]) == names_of([before["b/0.png"], before["a/1.png"]])
    assert names_in(tmp_path / "new") == ["dog", "cat", "fox"]
    again = reviewed.import_(source, tmp_path / "new", plan, confident=0.5)
    assert (again.num_shards_skipped, again.changes) == (2, {})


def test_new_names_of_a_person_are_no_negatives_elsewhere(plan: Plan, tmp_path: Path) -> None:
    content = reviewed.export(plan, tmp_path / "there", confident=0.5)
    content["categories"].append({"id": 9, "name": "fox"})
    content["annotations"][0]["category_id"] = 9
    reviewed.import_(reviewed.write(tmp_path / "x.json", content), tmp_path / "new", plan, confident=0.5)
    export(load_plan(str(tmp_path / "new")), tmp_path / "saco", "saco")
    pairs = json.loads((tmp_path / "saco" / "saco.json").read_text())["images"]
    asked = [(pair["file_name"], pair["text_input"]) for pair in pairs]
    wanted = {(name, text) for name in reviewed.NAMES[:4] for text in CATEGORIES} | {("a/0.png", "fox")}
    assert set(asked) == wanted
    assert len(asked) == len(wanted)


def test_a_person_names_an_output_without_names(tmp_path: Path) -> None:
    plan = reviewed.five_images(str(tmp_path))
    content = reviewed.export(plan, tmp_path / "there", confident=0.1)
    as_tools_write_them(content)
    content["categories"].append({"id": 2, "name": "fox"})
    content["annotations"][0]["category_id"] = 2
    source = reviewed.write(tmp_path / "x.json", content)
    reviewed.import_(source, tmp_path / "new", plan, confident=0.1)
    labels = [mask["label"] for row in read_rows(tmp_path / "new") for mask in row["annotations"]]
    assert labels == ["fox", *[None] * (len(labels) - 1)]
    assert names_in(tmp_path / "new") == ["fox"]
