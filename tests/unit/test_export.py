"""Exports, each read by the tools it is for: pycocotools and its COCOeval, a polygon filler, DuckDB, Pillow."""

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
from handmade import HEIGHT, WIDTH, annotation, blob, masks_of_place, write_output
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import samray
from samray import storage
from samray.cli import main
from samray.dataset.export import job as export_job
from samray.dataset.export import label_map, pieces, yolo
from samray.dataset.export.images import LabelledImage, Rows
from samray.dataset.export.names import stem_of
from samray.dataset.export.polygons import join, outlines, simplified
from samray.dataset.manifest import Plan
from samray.dataset.runs import run_lengths
from samray.dataset.shards import done_shards, read_shard
from samray.errors import ConfigError, StorageError
from samray.pipeline.export import ExportReport

NAMES = [f"photo {i:02d}.png" for i in range(10)]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Ten images in four shards, one of them failed, some without masks."""
    return write_output(str(tmp_path), NAMES, failed=(5,))


def export(plan: Plan, dest: object, format: str, **options: Any) -> ExportReport:
    return samray.export(plan.output, str(dest), format=format, progress=False, **options)


def rows_of(plan: Plan) -> list[dict[str, Any]]:
    rows = [row for shard in sorted(done_shards(plan.output)) for row in read_shard(plan.output, shard).to_pylist()]
    return [row for row in rows if row["status"] == "ok"]


def decoded(mask: dict[str, Any]) -> np.ndarray:
    return coco_mask.decode(mask["segmentation"]).astype(bool)


def fill(polygon: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre lies inside by the even-odd rule. polygon: (N, 2) x, y."""
    filled = np.zeros(shape, dtype=bool)
    x, y = polygon.astype(float).T
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    for row in range(shape[0]):
        centre = row + 0.5
        hit = (y <= centre) != (next_y <= centre)
        crossings = x[hit] + (centre - y[hit]) * (next_x[hit] - x[hit]) / (next_y[hit] - y[hit])
        filled[row] = ((np.arange(shape[1]) + 0.5)[:, None] > crossings).sum(axis=1) % 2 == 1
    return filled


@contextlib.contextmanager
def silent() -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


# --- polygons -------------------------------------------------------------------------------------------------------


def ring_with_island() -> np.ndarray:
    mask = np.zeros((12, 12), dtype=bool)
    mask[1:11, 1:11] = True
    mask[3:9, 3:9] = False
    mask[5:7, 5:7] = True
    mask[5, 5] = False
    return mask


def checkers() -> np.ndarray:
    return np.indices((9, 7)).sum(axis=0) % 2 == 0


SHAPES = {
    "one pixel": np.eye(1, dtype=bool),
    "one pixel of many": np.arange(20).reshape(4, 5) == 13,
    "everything": np.ones((4, 6), dtype=bool),
    "touching corners": np.eye(5, dtype=bool),
    "checkers": checkers(),
    "checkers inverted": ~checkers(),
    "a ring with an island that has a hole": ring_with_island(),
    "one row": np.array([[1, 0, 1, 1, 0, 1]], dtype=bool),
    "one column": np.array([[1], [0], [1]], dtype=bool),
    "frame at the border": np.pad(np.zeros((3, 3), dtype=bool), 1, constant_values=True),
    **{f"noise {seed}": np.random.default_rng(seed).random((17, 23)) < 0.5 for seed in range(20)},
    **{f"blob {seed}": blob(seed) for seed in range(20)},
}


@pytest.mark.parametrize("name", SHAPES)
def test_polygons_fill_to_the_very_mask(name: str) -> None:
    mask = SHAPES[name]
    height, width = mask.shape
    runs = run_lengths(annotation(mask)["segmentation"]["counts"])
    assert runs is not None
    (components,) = outlines([runs], (height, width))
    polygons = [join(rings) for rings in components]
    parts = [fill(polygon, mask.shape) for polygon in polygons]
    assert np.array_equal(np.sum(parts, axis=0), mask)  # each component by itself, and none over another
    assert np.array_equal(fill(join(polygons), mask.shape), mask)  # and all in one
    # pycocotools' own filling, in which a component's hole is a bridge away and no second polygon
    flat = [polygon.ravel().astype(float).tolist() for polygon in polygons]
    merged = coco_mask.merge(coco_mask.frPyObjects(flat, height, width))
    assert np.array_equal(coco_mask.decode(merged).astype(bool), mask)


def test_polygons_are_those_of_opencv() -> None:
    """As many components and holes as OpenCV finds, where a component is joined by edges and not by corners."""
    cv2 = pytest.importorskip("cv2", reason="opencv is in the test extra: the count of outlines is NOT compared")
    for seed in range(20):
        mask = blob(seed)
        runs = run_lengths(annotation(mask)["segmentation"]["counts"])
        assert runs is not None
        (components,) = outlines([runs], mask.shape)
        num_components = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] - 1
        background = cv2.connectedComponents(np.pad(~mask, 1, constant_values=True).astype(np.uint8), connectivity=8)
        assert len(components) == num_components
        assert sum(len(rings) - 1 for rings in components) == background[0] - 2


def test_outlines_of_many_masks_are_those_of_each() -> None:
    runs = [run_lengths(annotation(blob(seed))["segmentation"]["counts"]) for seed in range(5)]
    together = outlines([*runs, np.array([HEIGHT * WIDTH])], (HEIGHT, WIDTH))  # the last one empty
    assert together[-1] == []
    for one, found in zip(runs, together, strict=False):
        (alone,) = outlines([one], (HEIGHT, WIDTH))
        flat = [[ring.tolist() for ring in rings] for rings in found]
        assert flat == [[ring.tolist() for ring in rings] for rings in alone]


def test_outer_rings_and_holes_run_opposite_ways() -> None:
    runs = run_lengths(annotation(ring_with_island())["segmentation"]["counts"])
    assert runs is not None
    (components,) = outlines([runs], (12, 12))

    def doubled_area(ring: np.ndarray) -> int:
        x, y = ring.T
        return int(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))

    areas = sorted([doubled_area(ring) // 2 for ring in rings] for rings in components)
    assert areas == [[-100, 36], [-3]]


def test_very_many_rings_are_joined_in_time() -> None:
    mask = np.random.default_rng(0).random((200, 200)) < 0.5
    runs = run_lengths(annotation(mask)["segmentation"]["counts"])
    assert runs is not None
    (components,) = outlines([runs], mask.shape)
    assert len(components) > 1000
    assert np.array_equal(fill(join([join(rings) for rings in components]), mask.shape), mask)


def test_simplified_rings_stay_within_the_tolerance() -> None:
    y, x = np.indices((80, 80))
    disc = (x - 40) ** 2 + (y - 40) ** 2 < 30**2
    runs = run_lengths(annotation(disc)["segmentation"]["counts"])
    assert runs is not None
    (((ring,),),) = outlines([runs], disc.shape)
    fewer = simplified(ring, 1.0)
    assert len(fewer) < len(ring) / 4
    filled = fill(fewer, disc.shape)
    assert (filled & disc).sum() / (filled | disc).sum() > 0.95


# --- formats --------------------------------------------------------------------------------------------------------


def test_sa1b_has_the_fields_types_and_order_of_the_published_files(plan: Plan, tmp_path: Path) -> None:
    report = export(plan, tmp_path / "sa1b", "sa1b")
    assert (report.num_images, report.num_failed) == (9, 1)
    rows = rows_of(plan)
    assert report.num_masks == sum(len(row["annotations"]) for row in rows)
    for row in rows:
        text = (tmp_path / "sa1b" / row["image"]["file_name"].replace(".png", ".json")).read_text()
        found = json.loads(text)
        assert found == {"image": row["image"], "annotations": row["annotations"]}
        assert list(found) == ["image", "annotations"]
        assert [(key, type(value)) for key, value in found["image"].items()] == [
            ("image_id", int),
            ("width", int),
            ("height", int),
            ("file_name", str),
        ]
        for mask in found["annotations"]:
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
    found: dict[int, list[np.ndarray]] = {}
    ids: list[int] = []
    for file in files:
        with silent():
            coco = COCO(str(file))
        assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["object"]
        for image in coco.loadImgs(coco.getImgIds()):
            annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
            found[image["id"]] = [coco.annToMask(mask).astype(bool) for mask in annotations]
            ids += [mask["id"] for mask in annotations]
            assert all(mask["iscrowd"] == 0 and mask["category_id"] == 1 for mask in annotations)
            assert all(isinstance(mask["segmentation"], list) == ("polygons" in options) for mask in annotations)
    assert len(set(ids)) == len(ids)
    assert min(ids) > 0  # 0 means "no match" to COCOeval
    rows = rows_of(plan)
    assert found.keys() == {row["image"]["image_id"] for row in rows}
    for row in rows:
        wanted = [decoded(mask) for mask in row["annotations"]]
        assert all(np.array_equal(a, b) for a, b in zip(found[row["image"]["image_id"]], wanted, strict=True))


@pytest.mark.parametrize("polygons", [False, True])
def test_coco_evaluated_against_itself_has_an_ap_of_one(tmp_path: Path, polygons: bool) -> None:
    plan = write_output(str(tmp_path), NAMES, masks=lambda place: masks_of_place(place + 4 * (place % 4 == 0) + 1))
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
    numbers = yolo.label_text(image, None).split()[1:]
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
    for found, (row, mask) in zip(table, sorted(wanted, key=lambda pair: pair[1]["id"]), strict=True):
        if partitions:
            assert int(found.pop("image_bucket")) == row["image"]["image_id"] % partitions
        assert found == {
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
        str(tmp_path), NAMES[:4], masks=lambda i: [{**m, "point_coords": []} for m in masks_of_place(i)]
    )
    export(plan, tmp_path / "flat", "flat")
    query = f"select count(*), count(point_x), count(bbox_x) from '{tmp_path}/flat/*.parquet'"
    assert duckdb.sql(query).fetchall() == [(6, 0, 6)]


def test_label_maps_of_disjoint_masks_are_exact(tmp_path: Path) -> None:
    owner = np.random.default_rng(0).integers(0, 5, (HEIGHT, WIDTH))  # 0: nobody's
    plan = write_output(str(tmp_path), NAMES[:1], masks=lambda place: [annotation(owner == i) for i in range(1, 5)])
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
    plan = write_output(str(tmp_path), NAMES[:1], masks=lambda place: masks)
    export(plan, tmp_path / "maps", "label-map", on_top=on_top)
    with Image.open(tmp_path / "maps" / "photo 00.png") as image:
        pixels = np.asarray(image)
    assert set(pixels[small]) == {label}
    assert set(pixels[large & ~small]) == {1}
    assert not pixels[~large].any()


def test_more_masks_than_labels_is_one_sentence() -> None:
    many = label_map.MAX_LABEL + 1
    image = LabelledImage(7, 1, 1, "a.jpg", "", [0] * many, ["01"] * many, *[[]] * 6)
    with pytest.raises(ConfigError, match=r"image 7 has 65536 masks, and a label map of 16 bits holds 65535"):
        label_map.label_map(image, "area")


# --- names ----------------------------------------------------------------------------------------------------------


def test_equal_names_in_folders_and_of_other_endings_stay_apart(tmp_path: Path) -> None:
    names = ["a/x.png", "a/x.tif", "b/x.png", "b/y.png", "c/Y.png", "c/y.png"]
    plan = write_output(str(tmp_path), names)
    export(plan, tmp_path / "sa1b", "sa1b")
    files = sorted(str(f.relative_to(tmp_path / "sa1b")) for f in (tmp_path / "sa1b").rglob("*.json"))
    files = [name for name in files if not name.startswith("_export/")]
    assert files == ["a/x-0.json", "a/x-1.json", "b/x.json", "b/y.json", "c/Y-4.json", "c/y-5.json"]
    found = sorted(json.loads((tmp_path / "sa1b" / name).read_text())["image"]["file_name"] for name in files)
    assert found == sorted(names)
    with pytest.raises(ConfigError, match=r"4 images have names that differ in their ending or case only.*with-images"):
        export(plan, tmp_path / "yolo", "yolo")
    assert not (tmp_path / "yolo").exists()
    export(plan, tmp_path / "yolo", "yolo", with_images=True)
    assert (tmp_path / "yolo" / "images" / "a" / "x-1.tif").is_file()


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a/b.jpg", "a/b"), ("../../x.jpg", "x"), ("/etc/x.jpg", "etc/x"), ("_export/x.jpg", "images/x"), ("..", "image")],
)
def test_no_name_leads_out_of_dest(name: str, stem: str) -> None:
    assert stem_of(name) == stem


# --- pieces, resume, refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("per_piece", "per_file"), [(4, None), (4, 6), (100, 7), (3, 3), (100, None), (1, 2)])
def test_pieces_hold_every_image_once_and_keep_to_files(per_piece: int, per_file: int | None) -> None:
    shards = [Rows(0, 0, 5, 5), Rows(3, 0, 1, 1), Rows(4, 0, 9, 9)]
    cut = list(pieces.cut(shards, per_piece, per_file))
    places = [(part.shard, i) for piece in cut for part in piece.rows for i in range(part.start, part.stop)]
    assert places == [(rows.shard, i) for rows in shards for i in range(rows.stop)]
    assert [piece.number for piece in cut] == list(range(len(cut)))
    assert max(piece.num_images for piece in cut) <= per_piece
    by_file: dict[int, int] = {}
    for piece in cut:
        by_file[piece.file] = by_file.get(piece.file, 0) + piece.num_images
    assert list(by_file) == list(range(len(by_file)))
    if per_file:
        assert all(number == per_file for number in list(by_file.values())[:-1])


CASES = [
    ("coco", {}),
    ("coco", {"images_per_file": 4}),
    ("coco", {"confident": 0.5}),
    ("sa1b", {}),
    ("yolo", {}),
    ("flat", {}),
    ("label-map", {}),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize(("format", "options"), CASES)
def test_an_export_that_died_goes_on_and_redoes_nothing(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(export_job, "sizes_of", lambda name, options: (2, options.images_per_file))
    export(plan, tmp_path / "whole", format, **options)
    real, done = export_job.run_piece, []

    def dies_after_two(job: Any, piece: Any) -> Any:
        if len(done) == 2:
            raise StorageError("the power went")
        done.append(piece.number)
        return real(job, piece)

    def counts(job: Any, piece: Any) -> Any:
        done.append(piece.number)
        return real(job, piece)

    monkeypatch.setattr("samray.pipeline.export.run_piece", dies_after_two)
    with pytest.raises(StorageError, match="the power went"):
        export(plan, tmp_path / "half", format, **options)
    before = {name: (tmp_path / "half" / name).stat().st_mtime_ns for name in contents(tmp_path / "half")}
    monkeypatch.setattr("samray.pipeline.export.run_piece", counts)
    report = export(plan, tmp_path / "half", format, **options)
    assert sorted(done) == list(range(5))  # each piece once, over both runs
    assert report.num_pieces_skipped == 2
    assert contents(tmp_path / "half") == contents(tmp_path / "whole")
    after = {name: (tmp_path / "half" / name).stat().st_mtime_ns for name in contents(tmp_path / "half")}
    assert all(after[name] == time for name, time in before.items() if name in after)
    done.clear()
    again = export(plan, tmp_path / "half", format, **options)
    assert done == []
    assert (again.num_images, again.num_masks, again.num_failed) == (9, report.num_masks, 1)


@pytest.mark.parametrize(("format", "options"), CASES)
def test_deleted_files_come_back(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(export_job, "sizes_of", lambda name, options: (2, options.images_per_file))
    export(plan, tmp_path / "x", format, **options)
    whole = contents(tmp_path / "x")
    victims = [name for name in sorted(whole) if not name.startswith("_export")][::3]
    for name in victims:
        (tmp_path / "x" / name).unlink()
    report = export(plan, tmp_path / "x", format, **options)
    assert contents(tmp_path / "x") == whole
    assert report.num_pieces_skipped < report.num_pieces


def test_a_deleted_file_of_fragments_comes_back_also_where_marks_are_believed(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_job, "MAX_LISTED", 1)
    export(plan, tmp_path / "coco", "coco")
    assert export(plan, tmp_path / "coco", "coco").num_pieces_skipped == 1
    (tmp_path / "coco" / "instances.json").unlink()
    export(plan, tmp_path / "coco", "coco")
    assert len(COCO(tmp_path / "coco" / "instances.json").getImgIds()) == 9


def test_no_fragment_stays_and_a_torn_assembly_leaves_no_file(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pieces.read_fragments

    def torn(*args: Any) -> Any:
        yield next(real(*args))
        raise StorageError("the power went")

    monkeypatch.setattr("samray.dataset.export.coco.read_fragments", torn)
    with pytest.raises(StorageError, match="the power went"):
        export(plan, tmp_path / "coco", "coco")
    assert [f.name for f in (tmp_path / "coco").iterdir()] == ["_export"]
    monkeypatch.undo()
    export(plan, tmp_path / "coco", "coco")
    assert not list((tmp_path / "coco" / "_export" / "pieces").iterdir())
    assert sorted(f.name for f in (tmp_path / "coco").iterdir()) == ["_export", "instances.json"]


def test_wrong_exports_are_one_sentence(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*arguments: str) -> str:
        assert main(["export", plan.output, *arguments]) == 2
        return " ".join(capsys.readouterr().err.split())

    dest = str(tmp_path / "dest")
    assert "there is no format 'coc'; did you mean coco?" in refusal(dest, "--format", "coc")
    assert "--polygons is an option of coco, not of yolo" in refusal(dest, "--format", "yolo", "--polygons")
    assert "--images-per-file needs --tar" in refusal(dest, "--format", "sa1b", "--images-per-file", "3")
    assert "--simplify=-1.0 is not allowed" in refusal(dest, "--format", "yolo", "--simplify", "-1")
    assert "--simplify=0.0 is not allowed" in refusal(dest, "--format", "yolo", "--simplify", "0")
    with pytest.raises(ConfigError, match="--images-per-file=0 is not allowed"):
        export(plan, dest, "coco", images_per_file=0)
    assert not Path(dest).exists()
    assert main(["export", plan.output, dest, "--format", "coco", "--no-progress"]) == 0
    capsys.readouterr()
    assert "holds another export (format: coco there, yolo now)" in refusal(dest, "--format", "yolo")
    assert "holds another export (options: {} there" in refusal(dest, "--format", "coco", "--polygons")
    other = write_output(str(tmp_path / "other"), NAMES[:2])
    with pytest.raises(ConfigError, match="holds an export of another run's masks"):
        export(other, dest, "coco")
    assert "is not empty" in refusal(str(tmp_path / "in"), "--format", "coco")
    assert main(["export", str(tmp_path / "in"), dest, "--format", "coco"]) == 2
    assert "holds no samray run" in capsys.readouterr().err


def test_an_output_that_changed_is_refused(plan: Plan, tmp_path: Path) -> None:
    export(plan, tmp_path / "coco", "coco")
    shard = Path(plan.output) / "annotations" / "shard-000001.parquet"
    shard.write_bytes(shard.read_bytes() + b"x")
    with pytest.raises(ConfigError, match="has changed since the export"):
        export(plan, tmp_path / "coco", "coco")


def test_an_unfinished_output_is_refused_unless_what_is_there_is_asked_for(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), NAMES, missing_shards=(1,))
    with pytest.raises(ConfigError, match=r"1 of 4 shards .* are missing.*--partial"):
        export(plan, tmp_path / "coco", "coco")
    assert export(plan, tmp_path / "coco", "coco", partial=True).num_images == 7
    nothing = write_output(str(tmp_path / "nothing"), NAMES, missing_shards=(0, 1, 2, 3))
    with pytest.raises(ConfigError, match="holds no finished shard yet"):
        export(nothing, tmp_path / "none", "coco", partial=True)


def test_images_that_are_gone_are_counted(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "in" / NAMES[3]).unlink()
    report = export(plan, tmp_path / "yolo", "yolo", with_images=True)
    assert report.num_unreadable == 1
    assert not (tmp_path / "yolo" / "images" / NAMES[3]).exists()
    assert NAMES[3] not in (tmp_path / "yolo" / "train.txt").read_text()


def test_a_damaged_shard_is_one_sentence(plan: Plan, tmp_path: Path) -> None:
    (Path(plan.output) / "annotations" / "shard-000002.parquet").write_bytes(b"PAR1 is all that is left PAR1")
    with pytest.raises(StorageError, match=r"shard-000002\.parquet is damaged"):
        export(plan, tmp_path / "coco", "coco")


def test_large_shards_are_read_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one shard of many row groups, a piece reads those it needs and no more rows at once than a batch."""
    from samray.dataset.export import images

    plan = write_output(str(tmp_path), [f"{i:03d}.png" for i in range(150)], images_per_shard=150)
    images.pq.write_table(read_shard(plan.output, 0), images.shard_uri(plan.output, 0), row_group_size=64)
    groups: list[int] = []
    real = images.pq.ParquetFile.iter_batches

    def spy(self: Any, *args: Any, row_groups: list[int], **options: Any) -> Any:
        groups.extend(row_groups)
        return real(self, *args, row_groups=row_groups, **options)

    monkeypatch.setattr(images.pq.ParquetFile, "iter_batches", spy)
    tables = list(images.read_rows(plan.output, [Rows(0, 70, 150, 150)]))
    assert groups == [1, 2]
    assert [table.num_rows for table in tables] == [58, 22]
    ids = [row["image"]["image_id"] for table in tables for row in table.to_pylist()]
    assert ids == list(range(70, 150))


def test_storage_writes_chunks_whole_or_not_at_all(storage_root: str) -> None:
    uri = storage.join(storage_root, "folder", "file")

    def torn() -> Any:
        yield b"half"
        raise ValueError("torn")

    with pytest.raises(ValueError, match="torn"):
        storage.put_chunks(uri, torn())
    assert not storage.exists(uri)
    storage.put_chunks(uri, (bytes([i]) * 1000 for i in range(100)))
    storage.put_chunks(uri, (bytes([i]) * 3 for i in range(3)))  # replaces
    assert storage.read_bytes(uri) == b"\0\0\0\1\1\1\2\2\2"
    assert list(storage.list_names(storage.join(storage_root, "folder"))) == ["file"]
