"""An output for a person to review: its export, what that person makes of it, and the import of what came back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import samray
from samray.output.plan import Plan
from samray.output.verify import verify
from samray.pipeline.report import ImportReport
from tests.support.handmade import HEIGHT, WIDTH, annotation, read_rows, write_output

NAMES = ["a/0.png", "a/1.png", "b/0.png", "c.png", "d.png"]
HW = (HEIGHT, WIDTH)


def square(x: int, y: int, side: int = 6) -> np.ndarray:
    mask = np.zeros(HW, dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


def masks_of(index: int) -> list[dict[str, Any]]:
    """Each image but the fourth has a sure mask, an unsure one, an unstable one, and two more sure ones."""
    scores = [(0.95, 0.98), (0.5, 0.99), (0.96, 0.5), (0.9, 0.95), (0.99, 0.99)]
    places = [(0, 0), (8, 0), (16, 0), (0, 10), (10, 10)]
    masks = [
        annotation(square(x, y, 5 + index), predicted_iou=iou, stability_score=stability)
        for (x, y), (iou, stability) in zip(places, scores, strict=True)
    ]
    return [] if index == 3 else masks


def five_images(root: str) -> Plan:
    """Five images in three shards; the fourth without masks, the fifth failed."""
    return write_output(root, NAMES, masks=masks_of, failed=(4,), images_per_shard=2)


def export(plan: Plan, dest: Path, **options: Any) -> dict[str, Any]:
    samray.export(plan.output, dest, format="coco", progress=False, **options)
    coco: dict[str, Any] = json.loads((dest / "instances.json").read_text())
    return coco


def import_(source: Path, dest: Path, plan: Plan, **options: Any) -> ImportReport:
    report = samray.import_(source, dest, corrects=plan.output, progress=False, **options)
    verified = verify(str(dest), deep=True)
    assert verified.ok, verified.problems
    assert (verified.num_images, verified.num_failed) == (report.num_images, report.num_failed)
    return report


def rows_of(output: object) -> dict[str, dict[str, Any]]:
    """file_name -> row."""
    return {row["image"]["file_name"]: row for row in read_rows(output)}


def write(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def a_person(content: dict[str, Any]) -> dict[str, Any]:
    """a/0.png: the first mask stays, the second is changed, the third goes, and a polygon comes. b/0.png: all go.
    The tool shows more of the failed image than samray could read: a mask is drawn there.
    """
    image = {image["file_name"]: image["id"] for image in content["images"]}
    edited = []
    for mask in content["annotations"]:
        index = mask["attributes"]["samray_id"] % 65536
        if mask["image_id"] == image["b/0.png"] or (mask["image_id"] == image["a/0.png"] and index == 4):
            continue
        if mask["image_id"] == image["a/0.png"] and index == 3:
            mask = {**mask, "segmentation": annotation(square(0, 10, 7))["segmentation"]}  # it was 5 wide
        edited.append(mask)
    polygon = {"id": 0, "image_id": image["a/0.png"], "segmentation": [[20, 12, 28, 12, 28, 20, 20, 20]]}
    rectangle = {"id": 0, "image_id": image["a/1.png"], "segmentation": []}
    of_failed = {"id": 0, "image_id": 77, "segmentation": [[0, 0, 4, 0, 4, 4]]}
    images = [*content["images"], {"id": 77, "width": WIDTH, "height": HEIGHT, "file_name": "d.png"}]
    return {**content, "images": images[::-1], "annotations": [*edited, polygon, rectangle, of_failed][::-1]}
