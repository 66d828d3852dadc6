"""Exports opened by other tools as they are: datumaro and FiftyOne, in an environment of their own.

Names of images, sizes, classes, boxes and masks are compared with the Parquet. supervision is tested in
tests/unit/test_export_layouts.py. CVAT imports by a fork of datumaro that is not on PyPI; the rules
by which it reads YOLO are tested there.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.benchmarks.s3_server import free_ports
from samray.output.plan import Plan
from tests.other_tools.environment import python_of_the_tools, read_by
from tests.support.exported import export
from tests.support.handmade import HEIGHT, WIDTH, annotation, blob, read_rows, write_output

CATEGORIES = ("yes", "crème: brûlée")
NAMES = [f"{'sub/' if i % 2 else ''}photo {i:02d}.png" for i in range(7)]
BOX_TOLERANCE = 1e-6
"""Pixels. FiftyOne keeps fractions of the image."""


def masks_of(index: int) -> list[dict[str, Any]]:
    """0 to 3 masks somewhere in the image, by both names and without."""
    labels, masks = (*CATEGORIES, None), []
    for i in range(index % 4):
        mask, (top, left) = np.zeros((HEIGHT, WIDTH), bool), (3 * i, 5 * i + index)
        mask[top : top + 12, left : left + 13] = blob(10 * index + i)[:12, :13]
        masks.append({**annotation(mask), "label": labels[(index + i) % 3], "label_score": 0.5})
    return masks


@pytest.fixture(scope="session")
def python() -> Path:
    return python_of_the_tools()


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    root = str(tmp_path_factory.mktemp("other_tools"))
    return write_output(root, NAMES, masks=masks_of, failed=(5,), categories=CATEGORIES)


def expected(plan: Plan) -> dict[str, Any]:
    """What a reader must find, from the Parquet."""
    rows = [row for row in read_rows(plan.output) if row["status"] == "ok"]
    assert len(rows) == 6
    assert sum(len(row["annotations"]) for row in rows) == 8
    return {
        row["image"]["file_name"]: {
            "size": [row["image"]["width"], row["image"]["height"]],
            "masks": [
                {
                    "name": mask["label"] or "object",
                    "bbox": mask["bbox"],
                    "counts": mask["segmentation"]["counts"],
                }
                for mask in row["annotations"]
            ],
        }
        for row in rows
    }


def check(images: dict[str, Any], plan: Plan, *, boxes: bool = True, names: bool = True, ordered: bool = True) -> None:
    """boxes, names: whether the format has them. ordered: whether the tool keeps the order of masks."""
    wanted = expected(plan)
    assert sorted(images) == sorted(wanted)
    for name, image in wanted.items():
        assert images[name]["size"] == image["size"]
        masks = images[name]["masks"]
        if not ordered:
            masks, image["masks"] = (sorted(some, key=lambda mask: mask["counts"]) for some in (masks, image["masks"]))
        assert [mask["name"] for mask in masks] == [mask["name"] if names else None for mask in image["masks"]]
        assert [mask["counts"] for mask in masks] == [mask["counts"] for mask in image["masks"]]
        if boxes:
            bboxes = [mask["bbox"] for mask in masks]
            assert bboxes == [pytest.approx(mask["bbox"], abs=BOX_TOLERANCE) for mask in image["masks"]]


LAYOUTS = {None: ("instances.json", "images"), "cvat": ("annotations/instances_default.json", "images/default")}


@pytest.mark.parametrize("polygons", [False, True])
def test_datumaro_reads_coco(python: Path, plan: Plan, tmp_path: Path, polygons: bool) -> None:
    export(plan, tmp_path / "coco", "coco", with_images=True, layout="cvat", polygons=polygons)
    images = read_by(python, "datumaro", tmp_path, tmp_path / "coco", "coco")
    check(images, plan, boxes=not polygons, ordered=False)  # it leaves out the boxes of polygons


def test_datumaro_reads_sa1b(python: Path, tmp_path: Path) -> None:
    names = [name.removeprefix("sub/") for name in NAMES]  # it does not look into subfolders
    plan = write_output(str(tmp_path), names, masks=masks_of, failed=(5,), categories=CATEGORIES)
    export(plan, tmp_path / "sa1b", "sa1b", with_images=True)
    check(read_by(python, "datumaro", tmp_path, tmp_path / "sa1b", "segment_anything"), plan, names=False)


@pytest.mark.parametrize("polygons", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fiftyone_reads_coco(python: Path, plan: Plan, tmp_path: Path, layout: str | None, polygons: bool) -> None:
    export(plan, tmp_path / "coco", "coco", with_images=True, layout=layout, polygons=polygons)
    file, folder = LAYOUTS[layout]
    check(read_by(python, "fiftyone_coco", tmp_path, tmp_path / "coco" / folder, tmp_path / "coco" / file), plan)


@pytest.mark.parametrize(("layout", "subset"), [(None, ""), ("cvat", "/train")])
def test_fiftyone_reads_yolo(python: Path, plan: Plan, tmp_path: Path, layout: str | None, subset: str) -> None:
    export(plan, tmp_path / "yolo", "yolo", with_images=True, layout=layout)
    check(read_by(python, "fiftyone_yolo", tmp_path, tmp_path / "yolo", subset), plan, boxes=False)


def test_fiftyone_reads_label_maps(python: Path, tmp_path: Path) -> None:
    names = [name.removeprefix("sub/") for name in NAMES]
    plan = write_output(str(tmp_path), names, masks=lambda index: masks_of(index)[:1])  # none covers another
    export(plan, tmp_path / "maps", "label-map")
    images = read_by(python, "fiftyone_label_maps", tmp_path, tmp_path / "in", tmp_path / "maps")
    masks = {name: [mask["counts"] for mask in image["masks"]] for name, image in images.items()}
    rows = read_rows(plan.output)
    assert masks == {
        row["image"]["file_name"]: [mask["segmentation"]["counts"] for mask in row["annotations"]] for row in rows
    }
    assert {mask["name"] for image in images.values() for mask in image["masks"]} == {"1"}


@pytest.fixture
def mongodb(tmp_path: Path) -> Iterator[str]:
    """The URI of a MongoDB that runs."""
    program = shutil.which("mongod")
    if program is None:
        pytest.skip(
            "FiftyOne's database is NOT tested, because mongod is not on PATH, and neither PyPI nor Debian has it. Its"
            " importers, which read the files, are tested without it"
        )
    (port,) = free_ports(1)
    (tmp_path / "db").mkdir()
    server = subprocess.Popen([program, "--dbpath", tmp_path / "db", "--port", str(port), "--bind_ip", "127.0.0.1"])
    try:
        yield f"mongodb://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def test_fiftyones_database_takes_coco(python: Path, plan: Plan, tmp_path: Path, mongodb: str) -> None:
    export(plan, tmp_path / "coco", "coco", with_images=True)
    paths = (tmp_path / "coco/images", tmp_path / "coco/instances.json")
    check(read_by(python, "fiftyone_database", tmp_path, *paths, FIFTYONE_DATABASE_URI=mongodb), plan)
