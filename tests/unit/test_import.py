"""Imports: what SA-1B, COCO and samray's own exports hold comes back as an output that verifies.

The file is long because its cases share their helpers.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pycocotools import mask as coco_mask

import samray
from samray.cli.main import main
from samray.errors import ConfigError, StorageError
from samray.imports import json_stream
from samray.imports.import_ import ImportReport
from samray.imports.json_stream import JsonStream
from samray.imports.records import bbox_convention_of
from samray.imports.source import image_ids
from samray.inputs.listing import fetch_images
from samray.output.plan import load_plan
from samray.output.shards import done_shards, read_shard
from samray.output.verify import verify
from samray.rle.runs import run_lengths
from tests.support.handmade import HEIGHT, WIDTH, annotation, blob, write_output
from tests.support.standin import make_image

NAMES = ["a/0 first.png", "a/1.tif", "b/1.png", "b/2.png", "c.png", "d.png", "e.png"]


def import_(source: object, output: object, **options: Any) -> ImportReport:
    report = samray.import_(str(source), str(output), progress=False, **options)
    verified = verify(str(output), deep=True)
    assert verified.ok, verified.problems
    assert (verified.num_images, verified.num_failed) == (report.num_images, report.num_failed)
    return report


def table_of(output: object) -> pa.Table:
    return pa.concat_tables(read_shard(str(output), shard) for shard in sorted(done_shards(str(output))))


def images_and_annotations(output: object) -> pa.Table:
    table = table_of(output)
    return table.filter(pc.equal(table["status"], "ok")).select(["image", "annotations"]).combine_chunks()


# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["coco", "sam"])
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("sa1b", {}),
        ("sa1b", {"tar": True, "images_per_file": 2}),
        ("coco", {}),
        ("coco", {"images_per_file": 3}),
        ("coco", {"polygons": True}),
    ],
)
def test_there_and_back_is_the_identity(tmp_path: Path, format: str, options: dict[str, Any], convention: str) -> None:
    def masks(index: int) -> list[dict[str, Any]]:
        short = 1.0 if convention == "sam" else 0.0
        annotations = [annotation(blob(10 * index + i), predicted_iou=0.1 + index / 7) for i in range(index % 4)]
        for mask in annotations:
            mask["bbox"] = [*mask["bbox"][:2], mask["bbox"][2] - short, mask["bbox"][3] - short]
        return annotations

    settings = (f"masks.bbox_convention={convention}",)
    plan = write_output(str(tmp_path), NAMES, masks=masks, failed=(4,), settings=settings)
    samray.export(plan.output, str(tmp_path / "there"), format=format, progress=False, **options)
    report = import_(tmp_path / "there", tmp_path / "back", images=tmp_path / "in", images_per_shard=2)
    assert (report.format, report.num_images, report.num_dropped) == (format, 6, 0)
    assert images_and_annotations(tmp_path / "back").equals(images_and_annotations(plan.output))
    ok = [uri for uri, status in zip(*table_of(plan.output).select(["uri", "status"]).to_pydict().values(), strict=True)
          if status == "ok"]  # fmt: skip
    assert table_of(tmp_path / "back")["uri"].to_pylist() == ok
    imported = load_plan(str(tmp_path / "back"))
    assert imported.run["identity"]["imported"] == format
    assert imported.run["identity"]["masks"]["bbox_convention"] == convention


def test_images_next_to_the_json_and_in_tars_are_found(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), NAMES[4:])
    wanted = [(tmp_path / "in" / name).read_bytes() for name in NAMES[4:]]
    for tar in (False, True):
        samray.export(plan.output, tmp_path / f"{tar}", format="sa1b", tar=tar, with_images=True, progress=False)
        import_(tmp_path / f"{tar}", tmp_path / f"back-{tar}")
        imported = load_plan(str(tmp_path / f"back-{tar}"))
        rows = pa.concat_tables(imported.read_shard(shard) for shard in range(imported.num_shards))
        assert fetch_images(rows, samray.load_config().input) == wanted
        assert rows["file_name"].to_pylist() == NAMES[4:]


def test_a_glob_takes_what_it_names_and_no_marks_of_the_export(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path / ".hidden"), NAMES)
    samray.export(plan.output, tmp_path / ".hidden" / "there", format="sa1b", progress=False)
    assert import_(tmp_path / ".hidden" / "there", tmp_path / "all").num_images == 7
    assert import_(tmp_path / ".hidden" / "*" / "b" / "*.json", tmp_path / "some").num_images == 2


def test_an_import_reports_and_exports_again(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), NAMES)
    samray.export(plan.output, tmp_path / "coco", format="coco", progress=False)
    assert main(["import", str(tmp_path / "coco"), str(tmp_path / "back"), "--images", str(tmp_path / "in")]) == 0
    assert main(["report", str(tmp_path / "back")]) == 0
    samray.export(tmp_path / "back", tmp_path / "again", format="coco", progress=False)
    assert (tmp_path / "again/instances.json").read_bytes() == (tmp_path / "coco/instances.json").read_bytes()


# --- foreign files --------------------------------------------------------------------------------------------------

PUBLISHED = {
    "segmentation": {
        "size": [1500, 2250],
        "counts": "hf]e1>W^19L4J7K7I4L4L4L3N2M2O2N2N2N1O2N1O2O1N1N2O2N1O2N1O1N3N1O0O10J5O2N110O01O1N200O101N1O1O2N101N"
        "2N2O101N1O10001N101N1O2O0O100O10000O101O1O1O0001O2N2N4L1N3N1O001O001N2O1O3M3iMSdNY1R\\1^NSdN`1f\\1O1O2N2N3L5L4L4"
        "L2N1O1O1O0O2N1N2O2M2N2N3M3L5Lfoc\\1",
    },
    "bbox": [1167.0, 157.0, 107.0, 129.0],
    "area": 7948,
    "predicted_iou": 0.8973201513290405,
    "point_coords": [[1233.9375, 177.1875]],
    "crop_box": [998, 0, 755, 567],
    "id": 1103484716,
    "stability_score": 0.9846441745758057,
}
"""An annotation of sa_560.jpg, as the data set was published: ids of its own, boxes one pixel short."""


def sa1b_json(number: int, annotations: list[Any], hw: tuple[int, int] = (1500, 2250)) -> bytes:
    image = {"image_id": number, "width": hw[1], "height": hw[0], "file_name": f"sa_{number}.jpg"}
    return json.dumps({"image": image, "annotations": annotations}).encode()


def test_the_published_tars(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "sa_000000.tar", "w") as archive:
        for number in (560, 77):
            members = {".jpg": make_image(number), ".json": sa1b_json(number, [PUBLISHED, PUBLISHED])}
            for ending, data in members.items():
                member = tarfile.TarInfo(f"./sa_{number}{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    import_(tmp_path / "sa_000000.tar", tmp_path / "out")
    table = table_of(tmp_path / "out").to_pylist()
    assert [row["image"]["file_name"] for row in table] == ["sa_560.jpg", "sa_77.jpg"]
    assert table[0]["uri"] == f"tar://sa_560.jpg::{tmp_path}/sa_000000.tar"
    assert load_plan(str(tmp_path / "out")).run["identity"]["masks"]["bbox_convention"] == "sam"
    for row, number in zip(table, (560, 77), strict=True):
        assert row["image"]["image_id"] == number
        ids = [number * 65536, number * 65536 + 1]
        crop = [float(value) for value in PUBLISHED["crop_box"]]  # type: ignore[attr-defined]
        assert row["annotations"] == [{**PUBLISHED, "id": id, "crop_box": crop} for id in ids]


def test_broken_annotation_files_are_failed_rows(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    wrong_size = {**PUBLISHED, "segmentation": {**PUBLISHED["segmentation"], "size": [10, 10]}}  # type: ignore[dict-item]
    evil = {**PUBLISHED, "segmentation": {"size": [1500, 2250], "counts": "oooooooo0"}}
    empty = {**PUBLISHED, "segmentation": {"size": [1500, 2250], "counts": [1500 * 2250]}}
    files = {
        "sa_1.json": sa1b_json(1, [PUBLISHED, empty]),
        "sa_2.json": sa1b_json(2, [wrong_size]),
        "sa_3.json": sa1b_json(3, [evil]),
        "sa_4.json": b'{"image": {"image_id": 4,',
        "sa_5.json": sa1b_json(5, [{"bbox": [1, 2, 3, 4]}]),
        "sa_6.json": sa1b_json(6, [], hw=(0, 5)),
        "sa_7.json": sa1b_json(7, ["mask"]),
    }
    for name, data in files.items():
        (source / name).write_bytes(data)
    report = import_(source, tmp_path / "out", format="sa1b")
    assert (report.num_images, report.num_masks, report.num_dropped) == (7, 1, 2)
    assert report.failures == {"unreadable": 5}
    rows = table_of(tmp_path / "out").to_pylist()
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "failed", "ok", "failed", "failed"]
    assert "annotation 0 is not valid: a mask of size [10, 10]" in rows[1]["error"]
    assert [row["image"]["image_id"] for row in rows] == [1, 2, 3, 8, 5, 6, 7]  # of the torn one nobody knows


def coco_source(folder: Path, **changes: Any) -> Path:
    """Three images; one mask as RLE, one as plain run lengths, one of two polygons, one crowd, some without pixels."""
    mask = blob(1)
    runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    plain = run_lengths(runs["counts"].decode())
    assert plain is not None
    polygons = [[1, 1, 5, 1, 5, 4, 1, 4], [10, 10, 12, 10, 12, 12]]
    size = [HEIGHT, WIDTH]
    content = {
        "annotations": [
            {"id": 5, "image_id": 42, "category_id": 3, "segmentation": polygons},
            {"id": 6, "image_id": 7, "segmentation": {"size": size, "counts": runs["counts"].decode()},
             "bbox": [0.5, 0.25, 3, 3], "area": 12.75, "iscrowd": 0, "score": 0.5},
            {"id": 7, "image_id": 42, "iscrowd": 1, "segmentation": {"size": size, "counts": plain.tolist()}},
            {"id": 8, "image_id": 42, "segmentation": []},
            {"id": 9, "image_id": 42, "segmentation": [[1.0, 2.0, 3.0, 4.0]]},
            {"id": 10, "image_id": 99, "segmentation": [[1, 1, 5, 1, 5, 4]]},
            {"id": 11, "image_id": [7], "segmentation": [[1, 1, 5, 1, 5, 4]]},
            "nonsense",
        ],
        "info": {"year": 2017},
        "images": [
            {"id": i, "width": WIDTH, "height": HEIGHT, "file_name": f"val/{i:012d}.jpg"} for i in (42, 7, 8)
        ],
        "categories": [{"id": 1, "name": "person"}],
        **changes,
    }  # fmt: skip
    folder.mkdir()
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def test_coco_of_all_kinds_of_masks(tmp_path: Path) -> None:
    source = coco_source(tmp_path / "coco")
    report = import_(source, tmp_path / "out", images=tmp_path / "photos", images_per_shard=2)
    assert (report.format, report.num_images, report.num_masks, report.num_dropped) == ("coco", 3, 3, 5)
    rows = table_of(tmp_path / "out").to_pylist()
    assert [row["image"]["image_id"] for row in rows] == [42, 7, 8]
    assert rows[0]["uri"] == f"{tmp_path}/photos/val/000000000042.jpg"
    polygons, crowd = rows[0]["annotations"]
    wanted = coco_mask.merge(
        coco_mask.frPyObjects([[1.0, 1, 5, 1, 5, 4, 1, 4], [10.0, 10, 12, 10, 12, 12]], HEIGHT, WIDTH)
    )
    assert np.array_equal(coco_mask.decode(polygons["segmentation"]), coco_mask.decode(wanted))
    assert np.array_equal(coco_mask.decode(crowd["segmentation"]).astype(bool), blob(1))
    (rle,) = rows[1]["annotations"]
    assert rle["predicted_iou"] == 0.5  # COCO's score
    assert (rle["stability_score"], rle["point_coords"], rle["crop_box"]) == (1.0, [], [0.0, 0.0, WIDTH, HEIGHT])
    assert rle["area"] == blob(1).sum()  # measured, not as given
    assert rows[2]["annotations"] == []


@pytest.mark.parametrize("order", [["images", "categories", "annotations"], ["annotations", "categories", "images"]])
def test_coco_boxes_keep_their_convention_in_any_order_of_lists(tmp_path: Path, order: list[str]) -> None:
    box = [0.0, 0.0, 4.0, 3.0]
    rle = coco_mask.encode(np.asfortranarray(np.pad(np.ones((4, 5), np.uint8), ((0, HEIGHT - 4), (0, WIDTH - 5)))))
    segmentation = {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}
    content = {
        "images": [{"id": 1, "width": WIDTH, "height": HEIGHT, "file_name": "1.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "segmentation": segmentation, "bbox": box}],
        "categories": [{"id": 1, "name": "person"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps({key: content[key] for key in order}))
    import_(tmp_path / "instances.json", tmp_path / "out")
    (row,) = table_of(tmp_path / "out").to_pylist()
    assert row["annotations"][0]["bbox"] == box


def test_a_finished_coco_import_drops_nothing_again(tmp_path: Path) -> None:
    source = coco_source(tmp_path / "coco")
    assert import_(source, tmp_path / "out").num_dropped == 5
    assert import_(source, tmp_path / "out").num_dropped == 0


def test_a_large_coco_file_is_read_in_small_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK_BYTES", 7)
    source = coco_source(tmp_path / "coco")
    assert import_(source, tmp_path / "out").num_masks == 3


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("{}", []),
        ('{"a": [], "b": {"c": [1]}, "d": [1, "}]", {"e": null}]}',
         [("b", {"c": [1]}), ("d", 1), ("d", "}]"), ("d", {"e": None})]),
        ('\ufeff {"a" : 12345678901234567890 , "ü": ["\\u00fc", -1.5e3]}',
         [("a", 12345678901234567890), ("ü", "ü"), ("ü", -1500.0)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
def test_json_streams(monkeypatch: pytest.MonkeyPatch, text: str, items: list[Any], chunk: int) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK_BYTES", chunk)
    assert list(JsonStream(io.BytesIO(text.encode())).items()) == items


@pytest.mark.parametrize("text", ["", "[1]", '{"a": [1, 2}', '{"a": [1', '{"a" 1}', '{"a": nope}', "{1: 2}", '{"a": 1'])
def test_what_is_no_json_object_is_said(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|damaged|too early|not a JSON object"):
        list(JsonStream(io.BytesIO(text.encode())).items())


def test_ids_that_cannot_be() -> None:
    assert image_ids([5, 3]) == [5, 3]
    assert image_ids([5, None, 3, None]) == [5, 6, 3, 7]
    for impossible in ([1, 1], [-1, 2], ["a", "b"], [2**60, 1]):
        assert image_ids(impossible) == [0, 1]


def test_conventions_of_boxes() -> None:
    mask = annotation(blob(3))
    short = {**mask, "bbox": [*mask["bbox"][:2], mask["bbox"][2] - 1, mask["bbox"][3] - 1]}
    hw = (HEIGHT, WIDTH)
    assert bbox_convention_of([(mask, hw)]) == "coco"
    assert bbox_convention_of([(short, hw), (short, hw), (mask, hw)]) == "sam"
    assert bbox_convention_of([]) is None
    assert bbox_convention_of([(x, hw) for x in ("nonsense", {}, {"segmentation": [[1, 2]]})]) is None


# --- resume and refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["sa1b", "coco"])
def test_an_import_that_died_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    plan = write_output(str(tmp_path), NAMES)
    samray.export(plan.output, tmp_path / "there", format=format, progress=False)
    from samray.imports import import_ as module

    real, committed = module.commit_shard, []

    def dies(output: str, shard: int, *rest: Any) -> Any:
        if len(committed) == 2:
            raise StorageError("the power went")
        committed.append(shard)
        return real(output, shard, *rest)

    monkeypatch.setattr(module, "commit_shard", dies)
    with pytest.raises(StorageError, match="the power went"):
        samray.import_(tmp_path / "there", tmp_path / "back", images_per_shard=2, progress=False)
    assert not (tmp_path / "back" / "_SUCCESS").exists()
    monkeypatch.setattr(module, "commit_shard", lambda *args: committed.append(args[1]) or real(*args))
    report = import_(tmp_path / "there", tmp_path / "back", images_per_shard=2)
    assert sorted(committed) == [0, 1, 2, 3]
    assert report.num_shards_skipped == 2
    assert images_and_annotations(tmp_path / "back").equals(images_and_annotations(plan.output))


def test_wrong_imports_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(source: object, *arguments: str) -> str:
        assert main(["import", str(source), str(tmp_path / "out"), *arguments]) == 2
        return " ".join(capsys.readouterr().err.split())

    source = coco_source(tmp_path / "coco")
    assert "does not exist" in refusal(tmp_path / "nothing")
    assert "unknown import format 'yolo'" in refusal(source, "--format", "yolo")
    (tmp_path / "empty").mkdir()
    assert "no JSON file found, among 0 files" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "x.json").write_text('{"a": 1}')
    assert "neither SA-1B nor COCO" in refusal(tmp_path / "empty")
    assert "has no list of images" in refusal(tmp_path / "empty", "--format", "coco")
    (tmp_path / "empty" / "x.json").write_text('{"annotations": [%s], "image": {"image_id": 1}}' % (" " * 5000))
    assert "use --format sa1b if it is SA-1B" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "x.json").write_text('{"images": [{"id": 1}, {"id": 1}]}')
    assert "two images with the id 1" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "x.json").write_text('{"images": [{"id": 1}')
    assert "ends too early: after 21 bytes, inside the list 'images', after 1 whole" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "x.json").write_text('{"images": [{"id": 1}]}')
    assert "the image 1 has no file_name" in refusal(tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_another_import_into_the_same_output_is_refused(tmp_path: Path) -> None:
    source = coco_source(tmp_path / "coco")
    import_(source, tmp_path / "out")
    import_(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="has another run or import"):
        samray.import_(source, tmp_path / "out", images_per_shard=5, progress=False)
    shutil.copy(source, tmp_path / "coco" / "more.json")
    with pytest.raises(ConfigError, match="has another run or import"):
        samray.import_(tmp_path / "coco", tmp_path / "out", progress=False)
    plan = write_output(str(tmp_path / "labels"), NAMES[:2])
    with pytest.raises(ConfigError, match="has another run or import"):
        samray.import_(source, plan.output, progress=False)


def test_a_brace_in_a_name_is_part_of_it(tmp_path: Path) -> None:
    mask = annotation(blob(1))
    for number, name in ((7, "a}b.png"), (8, "c{d}.png")):
        image = {"image_id": number, "width": WIDTH, "height": HEIGHT, "file_name": name}
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.json").write_text(json.dumps({"image": image, "annotations": [mask]}))
    import_(tmp_path / "in", tmp_path / "out")
    images = table_of(tmp_path / "out")["image"].to_pylist()
    assert [(image["image_id"], image["file_name"]) for image in images] == [(7, "a}b.png"), (8, "c{d}.png")]


@pytest.mark.parametrize(("key", "value"), [("point_coords", "[[NaN, 1]]"), ("crop_box", "[0, 0, Infinity, 4]")])
def test_numbers_that_are_no_json_are_a_failed_row(tmp_path: Path, key: str, value: str) -> None:
    image = {"image_id": 7, "width": WIDTH, "height": HEIGHT, "file_name": "a.png"}
    text = json.dumps({"image": image, "annotations": [annotation(blob(1)) | {key: "HERE"}]}).replace('"HERE"', value)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_text(text)
    report = import_(tmp_path / "in", tmp_path / "out")
    assert report.failures == {"unreadable": 1}


def test_a_dry_run_of_label_onto_an_import_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = write_output(str(tmp_path), NAMES)
    samray.export(plan.output, str(tmp_path / "sa1b"), format="sa1b", progress=False)
    import_(tmp_path / "sa1b", tmp_path / "back")
    for more in ([], ["--dry-run"]):
        assert main(["label", str(tmp_path / "in"), str(tmp_path / "back"), *more]) == 2
        assert "unexpected" not in capsys.readouterr().err
