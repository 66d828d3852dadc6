"""Export of confident masks for a person, and the list of what is left to look at."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

import samray
from samray.errors import ConfigError
from samray.exports import job as export_job
from samray.exports.review import chunks, is_sure, plain_cell
from samray.output.plan import Plan
from samray.rle.runs import runs_of_image, union_area
from tests.support.handmade import HEIGHT, WIDTH, annotation, blob, decoded, write_output
from tests.support.reviewed import NAMES, export, five_images, rows_of, square


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return five_images(str(tmp_path))


def test_only_sure_masks_are_exported_and_the_rest_is_listed_by_need(plan: Plan, tmp_path: Path) -> None:
    report = samray.export(plan.output, tmp_path / "coco", format="coco", confident=0.9, stable=0.95, progress=False)
    assert report.files == ["instances.json", "review.csv"]
    assert (report.num_images, report.num_masks, report.num_left_out, report.num_failed) == (4, 9, 6, 1)
    coco = COCO(str(tmp_path / "coco" / "instances.json"))
    assert len(coco.getImgIds()) == 4
    rows = rows_of(plan.output)
    for image in coco.loadImgs(coco.getImgIds()):
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert [mask["attributes"]["samray_id"] % 65536 for mask in annotations] == (
            [] if image["id"] == 3 else [0, 3, 4]
        )
        wanted = {mask["id"]: mask for mask in rows[image["file_name"]]["annotations"]}
        for mask in annotations:
            assert mask["id"] == mask["attributes"]["samray_id"] + 1
            assert np.array_equal(decoded(mask), decoded(wanted[mask["attributes"]["samray_id"]]))
    listed = list(csv.reader((tmp_path / "coco" / "review.csv").read_text().splitlines()))
    sides = {0: 5, 1: 6, 2: 7}
    covered = {index: int(sum(square(x, y, side) for x, y in ((0, 0), (0, 10), (10, 10))).astype(bool).sum())
               for index, side in sides.items()}  # fmt: skip
    assert listed == [
        ["image_id", "file_name", "kept", "left_out", "uncovered"],
        ["3", "c.png", "0", "0", "1.0000"],
        *[[str(i), NAMES[i], "3", "2", f"{1 - covered[i] / (HEIGHT * WIDTH):.4f}"] for i in (0, 1, 2)],
    ]


@pytest.mark.parametrize("per_piece", [1, 2, 128])
def test_bounds_are_inclusive_and_of_equal_need_more_left_out_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_piece: int
) -> None:
    monkeypatch.setattr(export_job, "sizes_of", lambda fmt, options: (per_piece, None))

    def masks(index: int) -> list[dict[str, Any]]:
        sure = annotation(square(2, 2), predicted_iou=0.9, stability_score=0.95)
        return [sure] + [annotation(square(4, 4), predicted_iou=0.89)] * index

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
    with pytest.raises(ConfigError, match="has a different export"):
        export(plan, tmp_path / "plain", confident=0)


def test_each_file_has_a_list_next_to_it(plan: Plan, tmp_path: Path) -> None:
    report = samray.export(
        plan.output, tmp_path / "x", format="coco", stable=0.95, images_per_file=3, polygons=True, progress=False
    )
    assert report.files == [
        "instances-000000.json", "review-000000.csv", "instances-000001.json", "review-000001.csv"
    ]  # fmt: skip
    lines = [(tmp_path / "x" / f"review-00000{i}.csv").read_text().splitlines() for i in (0, 1)]
    assert [len(rows) for rows in lines] == [4, 2]  # with the header; the second file's last image failed


def test_areas_of_unions() -> None:
    masks = [blob(seed) for seed in range(6)]
    for number in (1, 2, 6):
        counts = [annotation(mask)["segmentation"]["counts"] for mask in masks[:number]]
        assert union_area(runs_of_image(0, counts, (HEIGHT, WIDTH))) == np.any(masks[:number], axis=0).sum()
    assert union_area([]) == 0


@pytest.mark.parametrize(
    "name",
    [
        "=1+1",
        "+1",
        "-1+1|cmd",
        "@SUM(A1)",
        " =1",
        "\t=1",
        "\r=1",
        "\n=1",
        "\uff1d1",
        "\x00=1",
        "\ufeff=1",
        "'=1",
        '"=1',
    ],
)
def test_no_name_is_a_formula_in_a_spreadsheet(name: str) -> None:
    (header, line) = csv.reader(io.StringIO(b"".join(chunks([json.dumps([0, name, 1, 0, 0.5]).encode()])).decode(), ""))
    assert header[1] == "file_name"
    assert line == ["0", f"'{name}", "1", "0", "0.5000"]


@pytest.mark.parametrize("name", ["a.png", "a=b.png", "a-b/c+d@e.png", "0=.png", "(1).png", "\u00fc.png"])
def test_other_names_are_as_they_are(name: str) -> None:
    assert plain_cell(name) == name
