"""Each export format, read by the tools it is for: pycocotools and its COCOeval, a polygon filler, DuckDB, Pillow."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from samray.config import load_config
from samray.errors import ConfigError
from samray.exports import label_map, yolo
from samray.exports.images import LabelledImage
from samray.output.append import join_images
from samray.output.file_names import stem_of
from samray.output.plan import Plan
from tests.support.exported import NAMES, export, fill, ten_images
from tests.support.handmade import HEIGHT, WIDTH, annotation, decoded, masks_of_image, read_rows, write_output
from tests.support.standin import make_image


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return ten_images(str(tmp_path))


def rows_of(plan: Plan) -> list[dict[str, Any]]:
    return [row for row in read_rows(plan.output) if row["status"] == "ok"]


@contextlib.contextmanager
def silent() -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


# --- formats ----------------------------------------------------------------------------------------------------------


def test_sa1b_has_the_fields_types_and_order_of_the_published_files(plan: Plan, tmp_path: Path) -> None:
    report = export(plan, tmp_path / "sa1b", "sa1b")
    assert (report.num_images, report.num_failed) == (9, 1)
    rows = rows_of(plan)
    assert report.num_masks == sum(len(row["annotations"]) for row in rows)
    for row in rows:
        text = (tmp_path / "sa1b" / row["image"]["file_name"].replace(".png", ".json")).read_text()
        content = json.loads(text)
        assert content == {"image": row["image"], "annotations": row["annotations"]}
        assert list(content) == ["image", "annotations"]
        assert [(key, type(value)) for key, value in content["image"].items()] == [
            ("image_id", int),
            ("width", int),
            ("height", int),
            ("file_name", str),
        ]
        for mask in content["annotations"]:
            # In the order of https://ai.meta.com/datasets/segment-anything-downloads
            assert [(key, type(value)) for key, value in mask.items()] == [
                ("bbox", list),
                ("area", int),
                ("segmentation", dict),
                ("predicted_iou", float),
                ("point_coords", list),
                ("crop_box", list),
                ("id", int),
                ("stability_score", float),
            ]
            assert list(mask["segmentation"]) == ["size", "counts"]
            assert {type(number) for number in [*mask["bbox"], *mask["crop_box"], *mask["point_coords"][0]]} == {float}
            assert coco_mask.decode(mask["segmentation"]).sum() == mask["area"]
    assert not (tmp_path / "sa1b" / "photo 05.json").exists()


def test_sa1b_tars_hold_images_and_json(plan: Plan, tmp_path: Path) -> None:
    export(plan, tmp_path / "tars", "sa1b", tar=True, with_images=True, images_per_file=4)
    tars = sorted((tmp_path / "tars").glob("sa_*.tar"))
    assert [tar.name for tar in tars] == ["sa_000000.tar", "sa_000001.tar", "sa_000002.tar"]
    members: dict[str, bytes] = {}
    for tar in tars:
        with tarfile.open(tar) as archive:
            members |= {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    wanted = {row["image"]["file_name"] for row in rows_of(plan)}
    assert {name for name in members if name.endswith(".png")} == wanted
    for name in wanted:
        assert members[name] == (tmp_path / "in" / name).read_bytes()
        assert json.loads(members[name.replace(".png", ".json")])["image"]["file_name"] == name


@pytest.mark.parametrize("options", [{}, {"polygons": True}, {"images_per_file": 4}])
def test_coco_loads_and_holds_the_very_masks(plan: Plan, tmp_path: Path, options: dict[str, Any]) -> None:
    report = export(plan, tmp_path / "coco", "coco", **options)
    files = sorted((tmp_path / "coco").glob("instances*.json"))
    assert report.files == [file.name for file in files]
    assert len(files) == (3 if "images_per_file" in options else 1)
    masks_of: dict[int, list[np.ndarray]] = {}
    ids: list[int] = []
    for file in files:
        with silent():
            coco = COCO(str(file))
        assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["object"]
        for image in coco.loadImgs(coco.getImgIds()):
            annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
            masks_of[image["id"]] = [coco.annToMask(mask).astype(bool) for mask in annotations]
            ids += [mask["id"] for mask in annotations]
            assert all(mask["iscrowd"] == 0 and mask["category_id"] == 1 for mask in annotations)
            assert all(isinstance(mask["segmentation"], list) == ("polygons" in options) for mask in annotations)
    assert len(set(ids)) == len(ids)
    assert min(ids) > 0  # 0 means "no match" to COCOeval
    rows = rows_of(plan)
    assert masks_of.keys() == {row["image"]["image_id"] for row in rows}
    for row in rows:
        wanted = [decoded(mask) for mask in row["annotations"]]
        assert all(np.array_equal(a, b) for a, b in zip(masks_of[row["image"]["image_id"]], wanted, strict=True))


@pytest.mark.parametrize("polygons", [False, True])
def test_coco_evaluated_against_itself_has_an_ap_of_one(tmp_path: Path, polygons: bool) -> None:
    plan = write_output(str(tmp_path), NAMES, masks=lambda index: masks_of_image(index + 4 * (index % 4 == 0) + 1))
    export(plan, tmp_path / "coco", "coco", polygons=polygons)
    file = tmp_path / "coco" / "instances.json"
    results = [{**mask, "score": mask["predicted_iou"]} for mask in json.loads(file.read_text())["annotations"]]
    with silent():
        truth = COCO(str(file))
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0, abs=1e-9)


def test_yolo_labels_fill_to_the_very_masks(plan: Plan, tmp_path: Path) -> None:
    export(plan, tmp_path / "yolo", "yolo", with_images=True)
    rows = rows_of(plan)
    for row in rows:
        stem = row["image"]["file_name"].removesuffix(".png")
        lines = (tmp_path / "yolo" / "labels" / f"{stem}.txt").read_text().splitlines()
        assert len(lines) == len(row["annotations"])
        for line, mask in zip(lines, row["annotations"], strict=True):
            label, *numbers = line.split(" ")
            assert label == "0"
            polygon = np.array(numbers, dtype=float).reshape(-1, 2)
            assert polygon.min() >= 0
            assert polygon.max() <= 1
            assert np.array_equal(fill(polygon * [WIDTH, HEIGHT], (HEIGHT, WIDTH)), decoded(mask))
    listed = (tmp_path / "yolo" / "train.txt").read_text().splitlines()
    assert listed == [f"./images/{row['image']['file_name']}" for row in rows]
    for name in listed:  # where YOLO looks for the labels of an image
        assert (tmp_path / "yolo" / name).is_file()
        assert (tmp_path / "yolo" / name.replace("/images/", "/labels/").replace(".png", ".txt")).is_file()
    assert "names:\n  0: object\n" in (tmp_path / "yolo" / "data.yaml").read_text()


def test_yolo_coordinates_of_a_wide_image_are_exact_enough() -> None:
    width, height = 8191, 3
    mask = np.zeros((height, width), dtype=bool)
    mask[1, ::2] = True
    image = LabelledImage(1, width, height, "a.jpg", "", [0], [annotation(mask)["segmentation"]["counts"]], *[[]] * 6)
    numbers = yolo.label_text(image, None, [0]).split()[1:]
    polygon = np.array(numbers, dtype=float).reshape(-1, 2) * [width, height]
    assert np.array_equal(fill(polygon, mask.shape), mask)


@pytest.mark.parametrize("partitions", [None, 3])
def test_flat_rows_are_the_masks(plan: Plan, tmp_path: Path, partitions: int | None) -> None:
    export(plan, tmp_path / "flat", "flat", partitions=partitions, images_per_file=4)
    pattern = f"{tmp_path}/flat/{'image_bucket=*/' if partitions else ''}part-*.parquet"
    query = f"select * from read_parquet('{pattern}', hive_partitioning = true) order by mask_id"
    table = duckdb.sql(query).to_arrow_table().to_pylist()
    wanted = [(row, mask) for row in rows_of(plan) for mask in row["annotations"]]
    assert len(table) == len(wanted)
    for row_of_mask, (row, mask) in zip(table, sorted(wanted, key=lambda pair: pair[1]["id"]), strict=True):
        if partitions:
            assert int(row_of_mask.pop("image_bucket")) == row["image"]["image_id"] % partitions
        assert row_of_mask == {
            **row["image"],
            "uri": row["uri"],
            "mask_id": mask["id"],
            **{f"bbox_{side}": value for side, value in zip("xywh", mask["bbox"], strict=True)},
            **{name: mask[name] for name in ("area", "predicted_iou", "stability_score")},
            **{f"point_{side}": value for side, value in zip("xy", mask["point_coords"][0], strict=True)},
            **{f"crop_{side}": value for side, value in zip("xywh", mask["crop_box"], strict=True)},
            **mask["segmentation"],
        }


def test_flat_rows_of_masks_without_a_point_have_null_there(tmp_path: Path) -> None:
    plan = write_output(
        str(tmp_path), NAMES[:4], masks=lambda i: [{**m, "point_coords": []} for m in masks_of_image(i)]
    )
    export(plan, tmp_path / "flat", "flat")
    query = f"select count(*), count(point_x), count(bbox_x) from '{tmp_path}/flat/*.parquet'"
    assert duckdb.sql(query).fetchall() == [(6, 0, 6)]


def test_label_maps_of_disjoint_masks_are_exact(tmp_path: Path) -> None:
    owner = np.random.default_rng(0).integers(0, 5, (HEIGHT, WIDTH))  # 0: nobody's
    plan = write_output(str(tmp_path), NAMES[:1], masks=lambda index: [annotation(owner == i) for i in range(1, 5)])
    export(plan, tmp_path / "maps", "label-map")
    with Image.open(tmp_path / "maps" / "photo 00.png") as image:
        assert image.mode == "I;16"
        assert np.array_equal(np.asarray(image), owner)
    about = json.loads((tmp_path / "maps" / "photo 00.json").read_text())
    assert [(mask["label"], mask["id"]) for mask in about["masks"]] == [(i + 1, i) for i in range(4)]
    assert [mask["visible_area"] for mask in about["masks"]] == [int((owner == i).sum()) for i in range(1, 5)]


@pytest.mark.parametrize(("on_top", "label"), [(None, 2), ("area", 2), ("predicted_iou", 1)])
def test_label_maps_of_overlapping_masks(tmp_path: Path, on_top: str | None, label: int) -> None:
    large, small = np.zeros((2, HEIGHT, WIDTH), dtype=bool)
    large[2:20, 2:20] = True
    small[5:10, 5:10] = True
    masks = [annotation(large, predicted_iou=0.99), annotation(small, predicted_iou=0.9)]
    plan = write_output(str(tmp_path), NAMES[:1], masks=lambda index: masks)
    export(plan, tmp_path / "maps", "label-map", on_top=on_top)
    with Image.open(tmp_path / "maps" / "photo 00.png") as image:
        pixels = np.asarray(image)
    assert set(pixels[small]) == {label}
    assert set(pixels[large & ~small]) == {1}
    assert not pixels[~large].any()


def test_more_masks_than_labels_is_one_sentence() -> None:
    many = label_map.MAX_LABEL + 1
    image = LabelledImage(7, 1, 1, "a.jpg", "", [0] * many, ["01"] * many, *[[]] * 6)
    with pytest.raises(ConfigError, match=r"image 7 has 65536 masks, and a label map of 16 bits allows 65535"):
        label_map.label_map(image, "area")


# --- names ------------------------------------------------------------------------------------------------------------


def test_equal_names_in_folders_and_of_other_endings_stay_apart(tmp_path: Path) -> None:
    names = ["a/x.png", "a/x.tif", "b/x.png", "b/y.png", "c/Y.png", "c/y.png"]
    plan = write_output(str(tmp_path), names)
    export(plan, tmp_path / "sa1b", "sa1b")
    files = sorted(str(f.relative_to(tmp_path / "sa1b")) for f in (tmp_path / "sa1b").rglob("*.json"))
    files = [name for name in files if not name.startswith("_export/")]
    assert files == ["a/x-0.json", "a/x-1.json", "b/x.json", "b/y.json", "c/Y-4.json", "c/y-5.json"]
    exported_names = sorted(json.loads((tmp_path / "sa1b" / name).read_text())["image"]["file_name"] for name in files)
    assert exported_names == sorted(names)
    with pytest.raises(ConfigError, match=r"4 images have names that differ only in extension or case.*with-images"):
        export(plan, tmp_path / "yolo", "yolo")
    assert not (tmp_path / "yolo").exists()
    export(plan, tmp_path / "yolo", "yolo", with_images=True)
    assert (tmp_path / "yolo" / "images" / "a" / "x-1.tif").is_file()


def test_yolo_finds_the_labels_of_images_in_folders_called_images(tmp_path: Path) -> None:
    names = ["a.png", "images/b.png", "new\nline.png", "train/images/c.png", "train/images_/c.png"]
    names += ["dot./d.png", "line\u2028separator.png", "page\x0cbreak.png", "next\x85line.png"]
    plan = write_output(str(tmp_path), names)
    with pytest.raises(ConfigError, match=r"7 images are in a folder `images` or .* have a line break.*with-images"):
        export(plan, tmp_path / "linked", "yolo")
    assert not (tmp_path / "linked").exists()
    export(plan, tmp_path / "yolo", "yolo", with_images=True)
    listed = (tmp_path / "yolo" / "train.txt").read_text().splitlines()
    assert len(listed) == len(set(listed)) == len(names)
    for line in listed:
        assert "./" not in line.removeprefix("./")
        assert (tmp_path / "yolo" / line).is_file()
        before, _, after = f"/yolo/{line}".rpartition("/images/")  # as YOLO's own tools do
        assert (tmp_path / f"{before}/labels/{after}".lstrip("/")).with_suffix(".txt").is_file()


def test_no_photo_is_copied_that_is_not_the_one_that_was_labelled(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), ["a.png", "b.png", "c.png"])
    (tmp_path / "in" / "b.png").write_bytes(make_image(1, (WIDTH + 1, HEIGHT)))
    (tmp_path / "in" / "c.png").write_bytes(b"no image any more")
    report = export(plan, tmp_path / "yolo", "yolo", with_images=True)
    assert report.num_unreadable == 2
    assert [path.name for path in (tmp_path / "yolo" / "images").iterdir()] == ["a.png"]
    assert (tmp_path / "yolo" / "train.txt").read_text() == "./images/a.png\n"


def test_what_waits_to_be_labelled_again_is_not_exported_unasked(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), [f"{i}.png" for i in range(6)])
    (tmp_path / "in" / "1.png").write_bytes(make_image(1, (WIDTH + 1, HEIGHT)))
    config = load_config("default", overrides=["output.images_per_shard=3"])
    where = str(tmp_path / "in")
    plan, _ = join_images(plan, where, config, config.identity(), append=False, redo_changed=True)
    with pytest.raises(ConfigError, match=r"1 of 2 shards of .* must be labelled again: finish the run"):
        export(plan, tmp_path / "flat", "flat")
    assert export(plan, tmp_path / "flat", "flat", partial=True).num_images == 6


def test_long_names_are_cut_and_stay_apart(tmp_path: Path) -> None:
    names = [f"{'x' * 230}{i}{'ü' * 9}.png" for i in range(3)]
    plan = write_output(str(tmp_path), names)
    assert export(plan, tmp_path / "sa1b", "sa1b").num_images == 3
    files = [path.name for path in (tmp_path / "sa1b").glob("x*.json")]
    assert len(files) == 3
    assert all(len(name.encode()) < 256 for name in files)


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a/b.jpg", "a/b"), ("../../x.jpg", "x"), ("/etc/x.jpg", "etc/x"), ("_export/x.jpg", "images/x"), ("..", "image")],
)
def test_no_name_leads_out_of_dest(name: str, stem: str) -> None:
    assert stem_of(name) == stem
