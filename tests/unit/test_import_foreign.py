"""COCO and SA-1B as other tools write them, and as somebody would who means harm.

The file is long because its cases share their helpers.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import samray
from samray import storage
from samray.cli.main import main
from samray.errors import ConfigError
from samray.imports import json_stream
from samray.output.shards import done_shards
from samray.output.verify import verify
from tests.support.handmade import read_rows

H, W = 30, 40
IMAGE: dict[str, Any] = {"id": 1, "width": W, "height": H, "file_name": "a.png"}
SQUARE: dict[str, Any] = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[5, 5, 15, 5, 15, 12, 5, 12]]}
NUM_PIXELS = 70
RUNS = {"size": [H, W], "counts": [155, 10, 1035]}


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (W, H), colour).save(path)
    return path


def write(folder: Path, images: Any, annotations: Any, name: str = "instances.json", **more: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(json.dumps({"images": images, "annotations": annotations, **more}))
    return folder / name


def imported(source: object, output: Path, **options: Any) -> list[dict[str, Any]]:
    samray.import_(str(source), str(output), progress=False, **options)
    verified = verify(str(output), deep=True)
    assert verified.ok, verified.problems
    return read_rows(output)


# --- forms that other tools write ----------------------------------------------------------------------------------

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "image_id is a float": ({}, {"image_id": 1.0}),
    "sizes are floats": ({"width": 40.0, "height": 30.0}, {}),
    "id is a float": ({"id": 1.0}, {}),
    "all are floats": ({"id": 1.0, "width": 40.0, "height": 30.0}, {"image_id": 1.0}),
    "runs are floats": ({}, {"segmentation": {"size": [H, W], "counts": [155.0, 10.0, 1035.0]}}),
    "the size of the mask is floats": ({}, {"segmentation": {**RUNS, "size": [30.0, 40.0]}}),
    "the image's id is text": ({"id": "1"}, {}),
    "image_id is text": ({}, {"image_id": "1"}),
    "both are text": ({"id": "img-1"}, {"image_id": "img-1"}),
    "a polygon without a list around it": ({}, {"segmentation": SQUARE["segmentation"][0]}),
    "a crowd": ({}, {"iscrowd": 1, "segmentation": RUNS}),
    "a score that is null": ({}, {"score": None}),
    "extra fields": ({"license": None, "date_captured": []}, {"keypoints": [1, 2], "attributes": {"occluded": False}}),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_pycocotools_takes_is_taken(tmp_path: Path, form: str) -> None:
    picture(tmp_path / "a.png")
    image, mask = FORMS[form]
    (row,) = imported(write(tmp_path, [IMAGE | image], [SQUARE | mask]), tmp_path / "out")
    assert row["status"] == "ok"
    area = 10 if "counts" in mask.get("segmentation", {}) else NUM_PIXELS
    assert [mask["area"] for mask in row["annotations"]] == [area]
    assert row["uri"] == str(tmp_path / "a.png")


def test_the_repro(tmp_path: Path) -> None:
    """float_ref, float_size, float_id, float_runs: one mask. surrogate: an escaped name. windows: no image is found."""
    picture(tmp_path / "a.png")
    (row,) = imported(write(tmp_path, [{**IMAGE, "file_name": "b\udce4r.png"}], [SQUARE]), tmp_path / "surrogate")
    assert (row["status"], row["image"]["file_name"], len(row["annotations"])) == ("ok", "b\\udce4r.png", 1)
    source = write(tmp_path, [{**IMAGE, "file_name": "images\\a.png"}], [SQUARE], "windows.json")
    report = samray.import_(str(source), str(tmp_path / "windows"), progress=False)
    assert report.warning.startswith(f"no image was found: looked for 1 of 1, for example {tmp_path}/images/a.png")
    picture(tmp_path / "images/a.png")
    assert samray.import_(str(source), str(tmp_path / "again"), progress=False).warning == ""


def test_backslashes_are_folders_unless_a_file_has_that_name(tmp_path: Path) -> None:
    source = write(tmp_path, [{**IMAGE, "file_name": "images\\a.png"}], [SQUARE])
    picture(tmp_path / "images\\a.png")
    (row,) = imported(source, tmp_path / "literal")
    assert row["uri"] == str(tmp_path / "images\\a.png")


@pytest.mark.parametrize("folder", ["val2017", ""])
def test_lvis_has_a_coco_url_and_no_name(tmp_path: Path, folder: str) -> None:
    image = {"id": 1, "width": W, "height": H, "coco_url": "http://images.cocodataset.org/val2017/000000000001.jpg"}
    picture(tmp_path / folder / "000000000001.jpg")
    (row,) = imported(write(tmp_path, [image], [SQUARE]), tmp_path / "out")
    assert row["uri"] == str(tmp_path / folder / "000000000001.jpg")
    assert row["image"]["file_name"].endswith("000000000001.jpg")


@pytest.mark.parametrize(
    "wrong",
    [{"score": 87.5}, {"predicted_iou": -3}, {"stability_score": 1.5}, {"crop_box": [0, 0, W + 9, H]}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_score_or_crop_box_that_cannot_be_fails_the_image(tmp_path: Path, wrong: dict[str, Any]) -> None:
    """`verify` would find fault with the row otherwise."""
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    images = [IMAGE, {**IMAGE, "id": 2, "file_name": "b.png"}]
    bad, good = imported(write(tmp_path, images, [SQUARE | wrong, {**SQUARE, "image_id": 2}]), tmp_path / "out")
    assert (bad["status"], good["status"]) == ("failed", "ok")
    assert bad["error"].startswith("unreadable: annotation 0 is not valid: it has a ")


def test_an_image_without_a_name_is_a_failed_row(tmp_path: Path) -> None:
    images = [IMAGE, {**IMAGE, "id": 2, "file_name": None}, {**IMAGE, "id": 3, "file_name": 7}]
    rows = imported(write(tmp_path, images, [SQUARE]), tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "failed", "failed"]
    assert rows[1]["error"] == "missing: the annotations have no file_name for the image"


def test_results_belong_to_the_images_next_to_them(tmp_path: Path) -> None:
    folder = tmp_path / "coco"
    write(folder, [IMAGE, {**IMAGE, "id": 2, "file_name": "b.png"}], [])
    (folder / "results.json").write_text(
        json.dumps([{**SQUARE, "image_id": 2, "score": 0.25}, {**SQUARE, "image_id": 9}])
    )
    report = samray.import_(str(folder), str(tmp_path / "out"), progress=False)
    one, two = read_rows(tmp_path / "out")
    assert (one["annotations"], report.num_dropped) == ([], 1)
    assert [mask["predicted_iou"] for mask in two["annotations"]] == [0.25]
    with pytest.raises(ConfigError, match="a list of results, without the names and sizes of its images"):
        samray.import_(str(folder / "results.json"), str(tmp_path / "alone"), progress=False)
    write(folder, [IMAGE], [], "more.json")
    with pytest.raises(ConfigError, match="several other files have images with the same ids"):
        samray.import_(str(folder), str(tmp_path / "three"), progress=False)


# --- imports that come to nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotations", "said"),
    [
        ([{**SQUARE, "image_id": 7}], r"none of its 1 annotations belongs to one of its 1 images; an image_id is 7"),
        ([{**SQUARE, "image_id": 1.5}], r"an image_id is 1\.5, an image has the id 1"),
        ([{**SQUARE, "image_id": "a" * 10_000}], r"an image_id is 'aaa"),
        (["x"], "none of its 1 annotations belongs"),
        (
            [{"id": 1, "image_id": 1, "bbox": [1, 2, 3, 4]}] * 3,
            r"none of its 3 annotations has a mask in `segmentation`",
        ),
        ([{**SQUARE, "segmentation": []}], "boxes alone are not imported"),
        (
            [{**SQUARE, "segmentation": [[1, 1, 2, 2]]}] * 2,
            "no mask could be imported; 2 annotations",
        ),
        ([{**SQUARE, "segmentation": {"size": [H, W], "counts": [H * W]}}], "no mask could be imported"),
    ],
)
def test_an_import_that_drops_everything_fails(tmp_path: Path, annotations: Any, said: str) -> None:
    source = write(tmp_path, [IMAGE], annotations)
    for _ in range(2):  # also when it is tried again
        with pytest.raises(ConfigError, match=said):
            samray.import_(str(source), str(tmp_path / "out"), progress=False)
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_images_alone_are_no_fault(tmp_path: Path) -> None:
    (row,) = imported(write(tmp_path, [IMAGE], []), tmp_path / "out")
    assert (row["status"], row["annotations"]) == ("ok", [])


def test_an_import_of_failed_images_alone_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path, [{**IMAGE, "width": 0}], [SQUARE])
    assert main(["import", str(source), str(tmp_path / "out")]) == 1
    assert "every image failed (1 unreadable)" in " ".join(capsys.readouterr().err.split())


def whole_file() -> bytes:
    return json.dumps({"info": {}, "images": [IMAGE], "annotations": [SQUARE] * 200}).encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            whole_file()[:-2],
            r"ends too early: after \d[\d,]* bytes, inside the list 'annotations', after 200 whole",
        ),
        (whole_file()[:9_000], r"after 9,000 bytes, inside the list 'annotations', after \d+ whole elements; the file"),
        (whole_file()[:40], r"after 40 bytes, inside the list 'images', after 0 whole elements; .* fetch or export it"),
        (whole_file()[:-2] + b"\xc3", r"ends too early|damaged"),
        (b'{"images": [' + b"[" * 5_000_000, r"nested too deeply at about byte 12, inside the list 'images'"),
        (b'{"images": [{"id": 1, "x": ' + b"[" * 900 + b"]" * 900 + b"}]}", r"no file_name|nested too deep(ly)?"),
        (b'{"images": ' + b'{"a":' * 100_000, "nested too deep(ly)?"),
        (b'{"info": "\xff", "images": []}', "damaged, or not UTF-8, near byte 10"),
        ('{"images": []}'.encode("utf-16"), "neither SA-1B nor COCO"),
        (b"[" * 100_000, "nested too deep(ly)?"),
        (b"[1, 2]", "a list of results"),
        (b"", "neither SA-1B nor COCO"),
    ],
)
def test_files_that_cannot_be_read_are_one_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        samray.import_(str(tmp_path / "x.json"), str(tmp_path / "out"), progress=False)
    assert not (tmp_path / "out").exists()


def test_deep_json_in_an_annotation_is_one_sentence(tmp_path: Path) -> None:
    deep = b"[" * 5_000 + b"]" * 5_000
    text = json.dumps({"images": [IMAGE], "annotations": [{**SQUARE, "attributes": "HERE"}]}).encode()
    (tmp_path / "x.json").write_bytes(text.replace(b'"HERE"', deep))
    with pytest.raises(ConfigError, match=r"nested too deep(ly)?"):
        samray.import_(str(tmp_path / "x.json"), str(tmp_path / "out"), progress=False)


def test_sa1b_files_that_cannot_be_read_are_failed_rows(tmp_path: Path) -> None:
    about = {"image_id": 1, "width": W, "height": H, "file_name": "a.png"}
    texts = {
        "a": json.dumps({"image": about, "annotations": []}).encode(),
        "deep": b'{"image": ' + b"[" * 100_000,
        "deep-annotation": json.dumps({"image": {**about, "image_id": 3}, "annotations": "H"}).encode().replace(
            b'"H"', b"[" * 100_000
        ),
        "latin": b'{"image": {"image_id": 4, "file_name": "\xe4.png"}, "annotations": []}' * 1000,
        "cut": json.dumps({"image": {**about, "image_id": 5}, "annotations": [SQUARE]}).encode()[:-9],
    }  # fmt: skip
    (tmp_path / "in").mkdir()
    for name, text in texts.items():
        (tmp_path / "in" / f"{name}.json").write_bytes(text)
    rows = imported(tmp_path / "in", tmp_path / "out", format="sa1b")
    assert sorted(row["status"] for row in rows) == ["failed"] * 4 + ["ok"]
    assert all(len(row["error"]) < 400 for row in rows if row["error"])


# --- names ---------------------------------------------------------------------------------------------------------

NAMES = {
    "a lone surrogate": "b\ud800.png",
    "bytes that are not UTF-8": os.fsdecode(b"b\xe4r.png"),
    "NUL": "b\x00.png",
    "1,500 folders": "x/" * 1500 + "b.png",
    "a name of 100,000 characters": "b" * 100_000 + ".png",
    "a line break": "b\n.png",
    "our own folder": "_export/done/000000.json",
    "our own temporary file": ".samray-abcdefgh.tmp",
    "the name of a folder of ours": "_samray/run.json",
    "a formula": "=cmd|'/c calc'!A1.png",
    "a folder that another image's file would be": "a.json/b.png",
    "another that would be": "a.png/b.png",
    "trailing dots": "b./c...",
    "only spaces": "   ",
    "an emoji": "\U0001f600.png",
    "right to left": "b\u202egnp.exe",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_one_bad_name_stops_nothing(tmp_path: Path, name: str) -> None:
    """Import, report, and every export: the other image is there, and so is everything below DEST."""
    folder = tmp_path / "in"
    picture(folder / "a.png")
    masks = [SQUARE, {**SQUARE, "id": 2, "image_id": 2}]
    source = write(folder, [IMAGE, {**IMAGE, "id": 2, "file_name": name}], masks)
    rows = imported(source, tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert main(["report", str(tmp_path / "out")]) == 0
    exports: dict[str, dict[str, Any]] = {
        "sa1b": {"with_images": True},
        "yolo": {"with_images": True},
        "label-map": {},
        "coco": {"confident": 0.1},
        "flat": {},
    }
    for format, options in exports.items():
        dest = tmp_path / format
        report = samray.export(str(tmp_path / "out"), str(dest), format=format, progress=False, **options)
        assert report.num_images == 2
        again = samray.export(str(tmp_path / "out"), str(dest), format=format, progress=False, **options)
        assert again.num_pieces_skipped == again.num_pieces
    assert len([file for file in (tmp_path / "label-map").rglob("*.png") if file.is_file()]) == 2
    assert len([file for file in (tmp_path / "yolo" / "labels").rglob("*.txt") if file.is_file()]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in", "out", *exports])


# --- reading outside -----------------------------------------------------------------------------------------------


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A picture that nobody who imports may see."""
    return picture(tmp_path / "private" / "secret.png", "blue")


def outside_names(tmp_path: Path) -> dict[str, str]:
    return {
        "absolute": str(tmp_path / "private/secret.png"),
        "dots": "../private/secret.png",
        "dots in the middle": "a/../../private/secret.png",
        "backslashes": "..\\private\\secret.png",
        "file://": f"file://{tmp_path}/private/secret.png",
        "FILE://": f"FILE://{tmp_path}/private/secret.png",
        "local://": f"local://{tmp_path}/private/secret.png",
        "a link": "link.png",
        "a linked folder": "folder/secret.png",
        "home": "~/secret.png",
        "http://": "http://127.0.0.1:1/secret.png",
        "s3://": "s3://bucket/secret.png",
        "tar://": f"tar://secret.png::{tmp_path}/private.tar",
        "a sibling with the same beginning": "../images-2/secret.png",
        "the folder itself": ".",
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", outside_names(Path("/")))
@pytest.mark.parametrize("format", ["coco", "sa1b"])
def test_nothing_outside_is_read(
    tmp_path: Path, private: Path, form: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(private.parent))
    root = tmp_path / "images"
    picture(root / "a.png")
    picture(tmp_path / "images-2" / "secret.png", "blue")
    (root / "link.png").symlink_to(private)
    (root / "folder").symlink_to(private.parent)
    with tarfile.open(tmp_path / "private.tar", "w") as archive:
        archive.add(private, "secret.png")
    asked: list[str] = []
    read = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri, *rest: asked.append(uri) or read(uri, *rest))
    name = outside_names(tmp_path)[form]
    source: Path = tmp_path / "in"
    if format == "coco":
        source = write(source, [IMAGE, {**IMAGE, "id": 2, "file_name": name}], [SQUARE, {**SQUARE, "image_id": 2}])
    else:
        source.mkdir()
        for number, file_name in enumerate(("a.png", name)):
            image = {"image_id": number, "width": W, "height": H, "file_name": file_name}
            (source / f"{number}.json").write_text(json.dumps({"image": image, "annotations": [SQUARE]}))
    rows = imported(source, tmp_path / "out", images=root, format=format)
    if (format, form) == ("sa1b", "backslashes"):  # a name as any other, which no image has
        assert rows[1]["uri"] == f"{root}/{name}"
    else:
        assert [row["status"] for row in rows] == ["ok", "failed"]
        assert rows[1]["error"].startswith("not_allowed: its annotations name a file outside ")
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "report.html")]) == 0
    samray.export(str(tmp_path / "out"), str(tmp_path / "there"), format="sa1b", with_images=True, progress=False)
    assert [path.name for path in (tmp_path / "there").glob("*.png")] == ["a.png"]
    assert not [uri for uri in asked if "private/secret" in uri or "link.png" in uri]


def test_what_is_next_to_the_annotations_may_be_no_link(tmp_path: Path, private: Path) -> None:
    source = tmp_path / "in"
    for name in ("a", "b"):
        picture(source / "a.png")
        image = {"image_id": ord(name), "width": W, "height": H, "file_name": f"{name}.png"}
        (source / f"{name}.json").write_text(json.dumps({"image": image, "annotations": [SQUARE]}))
    (source / "b.png").symlink_to(private)
    rows = imported(source, tmp_path / "out")
    assert [(row["status"], (row["error"] or "")[:11]) for row in rows] == [("ok", ""), ("failed", "not_allowed")]


def test_links_within_the_folder_are_inside(tmp_path: Path) -> None:
    picture(tmp_path / "real" / "photos" / "a.png")
    (tmp_path / "real" / "link.png").symlink_to("photos/a.png")
    (tmp_path / "images").symlink_to("real")
    source = write(tmp_path / "in", [{**IMAGE, "file_name": "link.png"}], [SQUARE])
    (row,) = imported(source, tmp_path / "out", images=tmp_path / "images")
    assert row["status"] == "ok"


def test_a_flag_allows_it(tmp_path: Path, private: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", [{**IMAGE, "file_name": str(private)}], [SQUARE])
    assert main(["import", str(source), str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no image is below" in said
    assert "--allow-outside" in said
    assert not (tmp_path / "out").exists()
    assert main(["import", str(source), str(tmp_path / "out"), "--allow-outside"]) == 0
    (row,) = read_rows(tmp_path / "out")
    assert (row["status"], row["uri"]) == ("ok", str(private))
    with pytest.raises(ConfigError, match="allow_outside"):
        samray.import_(str(source), str(tmp_path / "out"), progress=False)


def test_an_output_imported_before_the_flag_is_resumed(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    source = write(tmp_path, [IMAGE], [SQUARE])
    imported(source, tmp_path / "out")
    run = tmp_path / "out" / "_samray" / "run.json"
    content = json.loads(run.read_text())
    del content["identity"]["allow_outside"]
    run.write_text(json.dumps(content))
    report = samray.import_(str(source), str(tmp_path / "out"), progress=False)
    assert report.num_shards_skipped == len(done_shards(str(tmp_path / "out"))) == 1


def test_memory_of_a_value_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_VALUE_CHARS", 1000)
    monkeypatch.setattr(json_stream, "_CHUNK_BYTES", 100)
    with pytest.raises(ValueError, match="a value of more than 1,000 characters"):
        list(json_stream.JsonStream(io.BytesIO(b'{"images": ["' + b"x" * 5000)).items())


@pytest.mark.parametrize("nested", [False, True])
def test_polygons_may_be_lists_of_points(tmp_path: Path, nested: bool) -> None:
    points = [[1, 1], [6, 1], [6, 6], [1, 6]]
    flat = [number for point in points for number in point]
    picture(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        size = {"width": image.width, "height": image.height}
    masks = [
        {"id": i, "image_id": 1, "segmentation": segmentation}
        for i, segmentation in enumerate([[flat], [points] if nested else points])
    ]
    source = write(tmp_path, [{"id": 1, "file_name": "a.png", **size}], masks)
    (row,) = imported(source, tmp_path / "out")
    flat_mask, points_mask = row["annotations"]
    assert points_mask["segmentation"] == flat_mask["segmentation"]


@pytest.mark.parametrize("rest", [b"x", b"{}", b"\0"])
def test_a_file_that_goes_on_after_its_end_is_not_half_read(tmp_path: Path, rest: bytes) -> None:
    (tmp_path / "two.json").write_bytes(whole_file() + b"\n" + rest)
    with pytest.raises(ConfigError, match="after its end"):
        samray.import_(tmp_path / "two.json", tmp_path / "out", progress=False)
