"""Exports with images, opened by other tools as they are: by supervision itself, by datumaro's rules written down here.

These rules are also those of CVAT's fork of datumaro, which is not on PyPI. tests/other_tools starts datumaro itself,
and FiftyOne, in an environment of their own.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision
import yaml
from PIL import Image

from samray.errors import ConfigError
from samray.output.plan import Plan
from tests.support.exported import export, fill
from tests.support.handmade import HEIGHT, WIDTH, decoded, masks_of_image, read_rows, write_output

CATEGORIES = ("yes", "crème: brûlée")
CLASSES = [*CATEGORIES, "object"]
NAMES = [f"photo {i:02d}.png" for i in range(7)]


def named(index: int) -> list[dict[str, Any]]:
    masks = masks_of_image(index)
    labels = (*CATEGORIES, None)
    return [{**m, "label": labels[(index + i) % 3], "label_score": 0.5} for i, m in enumerate(masks)]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    root = tmp_path_factory.mktemp("layouts")
    return write_output(str(root), NAMES, masks=named, failed=(5,), categories=CATEGORIES)


def wanted(plan: Plan) -> dict[str, list[tuple[str, np.ndarray]]]:
    """File name -> class and pixels of each mask; images that did not fail."""
    rows = [row for row in read_rows(plan.output) if row["status"] == "ok"]
    assert len(rows) == 6
    return {
        row["image"]["file_name"]: [(mask["label"] or "object", decoded(mask)) for mask in row["annotations"]]
        for row in rows
    }


def same(loaded: dict[str, list[tuple[str, np.ndarray]]], masks: dict[str, list[tuple[str, np.ndarray]]]) -> bool:
    """Whether images, classes and pixels are the same, in the same order."""
    return loaded.keys() == masks.keys() and all(
        [name for name, _ in loaded[image]] == [name for name, _ in masks[image]]
        and all(np.array_equal(a, b) for (_, a), (_, b) in zip(loaded[image], masks[image], strict=True))
        for image in masks
    )


def of_supervision(data: supervision.DetectionDataset, folder: Path) -> dict[str, list[tuple[str, np.ndarray]]]:
    polygons = {}
    for path, pixels, detections in data:
        assert pixels.shape == (HEIGHT, WIDTH, 3), "the image was copied"
        masks = [] if detections.mask is None else list(detections.mask)
        names = [] if detections.class_id is None else [data.classes[index] for index in detections.class_id]
        polygons[Path(path).relative_to(folder).as_posix()] = list(zip(names, masks, strict=True))
    return polygons


LAYOUTS = [(None, "instances.json", ""), ("cvat", "annotations/instances_default.json", "/default")]


@pytest.mark.parametrize(("layout", "file", "subset"), LAYOUTS)
def test_supervision_reads_coco(plan: Plan, tmp_path: Path, layout: str | None, file: str, subset: str) -> None:
    export(plan, tmp_path / "coco", "coco", with_images=True, layout=layout)
    images = tmp_path / f"coco/images{subset}"
    data = supervision.DetectionDataset.from_coco(str(images), str(tmp_path / "coco" / file), force_masks=True)
    assert data.classes == CLASSES
    assert same(of_supervision(data, images), wanted(plan))


@pytest.mark.parametrize(("layout", "subset"), [(None, ""), ("cvat", "/train")])
def test_supervision_reads_yolo(plan: Plan, tmp_path: Path, layout: str | None, subset: str) -> None:
    export(plan, tmp_path / "yolo", "yolo", with_images=True, layout=layout)
    images, labels = (tmp_path / f"yolo/{name}{subset}" for name in ("images", "labels"))
    data = supervision.DetectionDataset.from_yolo(
        str(images), str(labels), str(tmp_path / "yolo/data.yaml"), force_masks=True
    )
    assert data.classes == CLASSES
    loaded, masks = of_supervision(data, images), wanted(plan)
    assert loaded.keys() == masks.keys()
    num_larger = 0
    for image, wanted_masks in masks.items():
        assert [name for name, _ in loaded[image]] == [name for name, _ in wanted_masks]
        for (_, filled), (_, mask) in zip(loaded[image], wanted_masks, strict=True):
            # OpenCV also fills the border of a polygon.
            assert filled[mask].all()
            num_larger += int(filled.sum() > mask.sum())
    assert num_larger


@pytest.mark.parametrize("polygons", [False, True])
def test_datumaro_finds_coco(plan: Plan, tmp_path: Path, polygons: bool) -> None:
    export(plan, tmp_path, "coco", with_images=True, layout="cvat", polygons=polygons)
    # Its importer: `instances_SUBSET.json` anywhere, and images in images/SUBSET next to the folder of that file.
    (file,) = tmp_path.glob("**/*_*.json")
    subset = file.stem.removeprefix("instances_")
    assert file.parent == tmp_path / "annotations", "where it detects the format"
    content = json.loads(file.read_text())
    for image in content["images"]:
        with Image.open(file.parent.parent / "images" / subset / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
    assert len(content["images"]) == 6
    assert all(one["iscrowd"] == 0 and one["category_id"] >= 1 for one in content["annotations"])


def test_cvats_datumaro_reads_yolo(tmp_path: Path) -> None:
    names = [f"{'sub/' if i % 2 else ''}{name}" for i, name in enumerate(NAMES)]
    plan = write_output(str(tmp_path), names, masks=named, failed=(5,), categories=CATEGORIES)
    root = tmp_path / "yolo"
    export(plan, root, "yolo", with_images=True, layout="cvat")
    config = yaml.safe_load((root / "data.yaml").read_text())
    # Every key but the reserved ones is a subset, whose images it would import: each image once.
    assert [key for key in config if key not in ("path", "names")] == ["train"]
    loaded = {}
    for line in (root / config["train"]).read_text(encoding="utf-8").splitlines():
        path = posixpath.normpath(line.strip())
        assert path.split("/")[:2] == ["images", "train"], "the parts that it takes off to get the name"
        with Image.open(root / path) as picture:
            width, height = picture.size
        masks = []
        for row in (root / re.sub(r"^images/(.*)\.\w+$", r"labels/\1.txt", path)).read_text().splitlines():
            index, *numbers = row.split()
            assert len(numbers) >= 6
            assert len(numbers) % 2 == 0
            polygon = np.array(numbers, float).reshape(-1, 2) * (width, height)
            masks.append((config["names"][int(index)], fill(polygon.round(3), (height, width))))
        loaded["/".join(path.split("/")[2:])] = masks
    assert same(loaded, wanted(plan))


def test_file_name_is_that_of_the_copy(tmp_path: Path) -> None:
    names = ["A.png", "a.png", "b/A.png"]  # the first two would be one file where case does not count
    plan = write_output(str(tmp_path), names, masks=named, categories=CATEGORIES)
    for layout, file, subset in LAYOUTS:
        dest = tmp_path / f"coco{layout}"
        export(plan, dest, "coco", with_images=True, layout=layout)
        file_names = [image["file_name"] for image in json.loads((dest / file).read_text())["images"]]
        assert len({name.lower() for name in file_names}) == 3
        assert sorted(file_names) == sorted(
            p.relative_to(dest / f"images{subset}").as_posix() for p in dest.rglob("images/**/*.png")
        )


def test_an_image_that_is_gone_stays_in_coco_and_is_counted(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), NAMES, masks=named, categories=CATEGORIES)
    (tmp_path / "in" / NAMES[2]).unlink()
    report = export(plan, tmp_path / "coco", "coco", with_images=True)
    assert report.num_unreadable == 1
    assert len(json.loads((tmp_path / "coco/instances.json").read_text())["images"]) == len(NAMES)


def test_the_layout_of_cvat_is_one_file(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--layout cvat is one JSON file for all images: leave out --images-per-f"):
        export(plan, tmp_path / "coco", "coco", layout="cvat", images_per_file=2)
    with pytest.raises(ConfigError, match=r"--layout=voc is not allowed; it takes one of cvat"):
        export(plan, tmp_path / "coco", "coco", layout="voc")
    assert not (tmp_path / "coco").exists()
