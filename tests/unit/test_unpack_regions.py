"""The job that unpacks Parquet of photographs with regions: what it writes becomes an OUTPUT to train on."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import samray
from tests.support import REPOSITORY
from tests.support.handmade import read_rows

JOBS = REPOSITORY / "jobs"


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(JOBS))
    yield importlib.import_module("unpack_regions")
    sys.modules.pop("unpack_regions")


def row(number: int, masks: list[list[np.ndarray]]) -> dict[str, Any]:
    """masks: of each annotator, (H, W) bool."""
    height, width = masks[0][0].shape
    jpeg = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), number % 256, np.uint8)).save(jpeg, "JPEG")
    counts = [
        [coco_mask.encode(np.asfortranarray(m))["counts"].decode() for m in masks_of_annotator]
        for masks_of_annotator in masks
    ]
    annotators = [{"annotator": i, "regions": regions} for i, regions in enumerate(counts)]
    return {"image_id": number, "width": width, "height": height, "jpeg": jpeg.getvalue(), "annotators": annotators}


def rectangle(top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros((40, 60), bool)
    mask[top : top + height, left : left + width] = True
    return mask


def test_regions_of_all_annotators_become_an_output(job: ModuleType, tmp_path: Path) -> None:
    masks = [[rectangle(5, 10, 20, 30), rectangle(30, 0, 6, 9)], [rectangle(0, 0, 40, 5)]]
    rows = [row(7, masks), row(70_000_123, [[rectangle(1, 2, 3, 4)]])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pack.parquet")
    pictures = tmp_path / "pictures"
    assert job.main([str(pictures), str(tmp_path / "pack.parquet")]) == 0
    assert (pictures / "sa_7.jpg").read_bytes() == rows[0]["jpeg"]
    before = {path: path.stat().st_mtime_ns for path in pictures.iterdir()}
    assert job.main([str(pictures), str(tmp_path / "pack.parquet")]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in pictures.iterdir()}

    samray.import_(str(pictures), str(tmp_path / "labels"))
    labelled = {r["image"]["image_id"]: r for r in read_rows(tmp_path / "labels")}
    assert set(labelled) == {7, 70_000_123}
    annotations = labelled[7]["annotations"]
    unpacked = [coco_mask.decode(dict(a["segmentation"])).astype(bool) for a in annotations]
    for mask, wanted in zip(unpacked, [mask for masks_of_image in masks for mask in masks_of_image], strict=True):
        np.testing.assert_array_equal(mask, wanted)
    assert {(a["predicted_iou"], a["stability_score"]) for a in annotations} == {(1.0, 1.0)}
    for a, mask in zip(annotations, unpacked, strict=True):
        (x, y) = a["point_coords"][0]
        assert mask[int(y), int(x)]
