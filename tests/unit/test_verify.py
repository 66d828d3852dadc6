"""Verify: a sound output passes, each fault of shards, rows and masks is found and named."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pycocotools import mask as coco_mask

from samray import storage
from samray.errors import ConfigError
from samray.output import shards
from samray.output.plan import Plan
from samray.output.schema import SCHEMA, ImageRecord, records_to_table
from samray.output.verify import verify
from samray.output.verify_rows import check_mask
from samray.rle.runs import run_lengths
from tests.support.handmade import annotation, blob, write_output
from tests.support.planned import finished_output, mask_of, records_for


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_output(storage_root: str, deep: bool) -> None:
    plan = finished_output(storage_root)
    report = verify(plan.output, deep)
    assert (report.ok, report.problems) == (True, [])
    assert (report.num_images, report.num_masks, report.num_failed, report.num_shards) == (10, 20, 0, 3)


def rewritten(plan: Plan, shard: int, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Write a shard again with its rows changed."""
    table = shards.read_shard(plan.output, shard)
    rows = table.to_pylist()
    change(rows)
    changed = pa.Table.from_pylist(rows, schema=SCHEMA).replace_schema_metadata(table.schema.metadata)
    shards.replace_shard(plan.output, shard, changed)
    shards.mark_success(plan.output)


def first_mask(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return rows[1]["annotations"][0]


SHALLOW: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "row lost": (lambda rows: rows.pop(2), "shard-000001.parquet: image 6 is missing"),
    "row twice": (lambda rows: rows.append(rows[0]), "image 4 occurs more than once"),
    "foreign row": (lambda rows: rows[3]["image"].update(image_id=99), "image 99 is not in the plan"),
    "order": (lambda rows: rows.reverse(), "not in the order of the plan"),
    "uri": (lambda rows: rows[0].update(uri="/other"), "image 4 has uri '/other', expected"),
    "name": (lambda rows: rows[0]["image"].update(file_name="z"), "image 4 has file_name 'z'"),
    "status": (lambda rows: rows[0].update(status="done"), "unknown status 'done'"),
    "no reason": (lambda rows: rows[0].update(status="failed", annotations=[]), "failed, but has no error"),
    "failed with masks": (lambda rows: rows[0].update(status="failed", error="x: y"), "'failed' and 2 masks"),
    "ok with error": (lambda rows: rows[0].update(error="x: y"), "is ok, but has an error"),
    "no width": (lambda rows: rows[0]["image"].update(width=0), "is ok, but has 0x"),
    "annotation id": (lambda rows: first_mask(rows).update(id=5), "image 5, annotation 0 has the id 5"),
    "mask size": (lambda rows: rows[1]["image"].update(height=99), "has a mask of size"),
    "score": (lambda rows: first_mask(rows).update(predicted_iou=float("nan")), "a score that is not a number"),
    "high score": (
        lambda rows: first_mask(rows).update(predicted_iou=1.5),
        "predicted_iou 1.5, expected -0.4 to 1.4",
    ),
    "low score": (lambda rows: first_mask(rows).update(stability_score=-0.1), "a score out of range: stability_score"),
    "NaN box": (lambda rows: first_mask(rows)["bbox"].__setitem__(2, float("nan")), "a box that is not four finite"),
    "short box": (lambda rows: first_mask(rows)["bbox"].pop(), "a box that is not four finite numbers: bbox"),
    "box outside": (lambda rows: first_mask(rows).update(bbox=[0.0, 0.0, 99.0, 1.0]), "a box outside the image"),
    "crop box": (
        lambda rows: first_mask(rows).update(crop_box=[-1.0, 0.0, 1.0, 1.0]),
        "outside the image: crop_box",
    ),
    "points": (lambda rows: first_mask(rows).update(point_coords=[[1.0]]), "points that are not pairs"),
    "no box": (lambda rows: first_mask(rows).update(bbox=[None] * 4), "has an empty field"),
    "no image": (lambda rows: rows[1].update(image=None), "a row has an image without id, size or name"),
    "no status": (lambda rows: rows[1].update(status=None), "unknown status None"),
    "null masks": (lambda rows: rows[1].update(annotations=None), "'ok' and None masks"),
}


DEEP: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "area": (lambda rows: first_mask(rows).update(area=1234), "has the area 1234, but"),
    "box": (lambda rows: first_mask(rows).update(bbox=[0.0, 0.0, 1.0, 1.0]), "has the box"),
    "counts": (lambda rows: first_mask(rows)["segmentation"].update(counts="no counts"), "cannot be decoded"),
    "too many": (
        lambda rows: first_mask(rows)["segmentation"].update(counts="ooooo0" * 3),
        "has run lengths|cannot be",
    ),
}


@pytest.mark.parametrize("fault", [*SHALLOW, *DEEP])
def test_each_fault_is_found_and_named(tmp_path: Path, fault: str) -> None:
    plan = finished_output(str(tmp_path))
    change, message = (SHALLOW | DEEP)[fault]
    rewritten(plan, 1, change)
    if fault in DEEP:
        assert verify(plan.output).ok
    report = verify(plan.output, deep=True)
    assert not report.ok
    assert any(pc.match_substring_regex([problem], message)[0].as_py() for problem in report.problems), report.problems
    assert all("shard-000001.parquet" in problem for problem in report.problems)


def test_missing_foreign_and_torn_shards(storage_root: str) -> None:
    plan = finished_output(storage_root)
    storage.delete(shards.shard_uri(plan.output, 0))
    storage.put(shards.shard_uri(plan.output, 1), b"PAR1 torn")
    storage.put(shards.shard_uri(plan.output, 7), b"")
    storage.put(storage.join(plan.output, "annotations", "notes.txt"), b"")
    problems = verify(plan.output).problems
    assert len(problems) == 5, problems
    for part in (
        "shard-000000.parquet is missing",
        "shard-000001.parquet cannot be read as Parquet",
        "_SUCCESS is there, but only 2 of 3",
        "annotations/shard-000007.parquet is not in the plan",
        "annotations/notes.txt is not in the plan",
    ):
        assert any(part in problem for problem in problems), part


def test_success_agrees(tmp_path: Path) -> None:
    plan = finished_output(str(tmp_path))
    storage.put(storage.join(plan.output, "_SUCCESS"), b'{"num_shards": 2}')
    assert verify(plan.output).problems == ["_SUCCESS names 2 shards, the plan has 3"]
    storage.delete(storage.join(plan.output, "_SUCCESS"))
    assert len(verify(plan.output).problems) == 1
    storage.delete(shards.shard_uri(plan.output, 2))
    assert verify(plan.output).problems == ["annotations/shard-000002.parquet is missing"]


def test_shards_of_another_run_are_noticed(tmp_path: Path) -> None:
    plan = finished_output(str(tmp_path))
    other = records_to_table(records_for(plan, 1), {**plan.run, "identity": {"masks": {}}})
    shards.replace_shard(plan.output, 1, other)
    shards.mark_success(plan.output)
    assert verify(plan.output).problems == ["shard-000001.parquet was written by a run with other settings"]


def test_failed_rows_are_counted_and_no_problem(tmp_path: Path) -> None:
    plan = finished_output(str(tmp_path))
    row = plan.read_shard(2).to_pylist()[0]
    records = records_for(plan, 2)
    records[0] = ImageRecord(
        image_id=row["image_id"], width=0, height=0, file_name=row["file_name"], uri=row["uri"], error="empty: no bytes"
    )
    shards.replace_shard(plan.output, 2, records_to_table(records, plan.run))
    shards.mark_success(plan.output)
    report = verify(plan.output, deep=True)
    assert (report.ok, report.num_failed, report.num_masks) == (True, 1, 18)


def test_problems_are_bounded_a_shard(tmp_path: Path) -> None:
    plan = finished_output(str(tmp_path))

    def break_all(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["annotations"] = [{**row["annotations"][0], "id": -1} for _ in range(100)]

    rewritten(plan, 0, break_all)
    problems = verify(plan.output).problems
    assert len(problems) == 21
    assert problems[-1] == "shard-000000.parquet: 380 more problems"


def test_verify_needs_a_plan(output_root: str) -> None:
    with pytest.raises(ConfigError, match="not the output of a samray run"):
        verify(output_root)


@pytest.mark.parametrize("convention", ["coco", "sam"])
def test_check_mask_knows_both_box_conventions(convention: str) -> None:
    other = {"coco": "sam", "sam": "coco"}[convention]
    for seed in range(20):
        mask = mask_of(17, 23, seed, convention)
        assert check_mask(mask, convention) is None
        assert "has the box" in (check_mask(mask, other) or "")


def test_run_lengths_agree_with_pycocotools_and_reject_nonsense() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = rng.integers(1, 90, 2)
        pixels = np.asfortranarray(rng.random((height, width)) < rng.random()).astype(np.uint8)
        counts = coco_mask.encode(pixels)["counts"].decode()
        runs = run_lengths(counts)
        assert runs is not None
        values = np.arange(len(runs)) % 2
        np.testing.assert_array_equal(np.repeat(values, runs), pixels.flatten(order="F"))
    for bad in ("", "o", "oooooooooooooooooooo", "é", " ", "0\n"):
        assert run_lengths(bad) is None
    hostile = random_strings(500)
    assert all(runs is None or runs.dtype == np.int64 for runs in map(run_lengths, hostile))
    for counts in hostile:  # must not crash, and cannot be sound
        mask = {**mask_of(9, 9), "segmentation": {"size": [9, 9], "counts": counts}}
        assert check_mask(mask, "coco") is not None


def random_strings(number: int) -> list[str]:
    rng = np.random.default_rng(1)
    return [base64.b85encode(rng.bytes(int(rng.integers(1, 40)))).decode() for _ in range(number)]


def test_names_that_cannot_be(tmp_path: Path) -> None:
    marks: list[tuple[str | None, float | None]] = [
        ("dog", 0.5), (None, None), ("wolf", 0.5), ("dog", float("nan")), ("dog", None), (None, 0.5), ("", 0.5)
    ]  # fmt: skip
    masks = [{**annotation(blob(i)), "label": name, "label_score": score} for i, (name, score) in enumerate(marks)]
    plan = write_output(str(tmp_path), ["a.png"], masks=lambda _: masks, categories=("dog", "cat"))
    problems = verify(plan.output).problems
    which = "shard-000000.parquet: image 0, annotation"
    assert sorted(problems) == [
        "shard-000000.parquet has the name '', which is not one of those asked for: dog, cat",
        "shard-000000.parquet has the name 'wolf', which is not one of those asked for: dog, cat",
        f"{which} 3 has a score that is not a number: label_score nan",
        f"{which} 4 has the name 'dog' with the score None; expected both or none",
        f"{which} 5 has the name None with the score 0.5; expected both or none",
        f"{which} 6 has an empty name",
    ]
