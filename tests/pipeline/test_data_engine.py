"""The whole loop on a small world of a kind that the model has not seen: after it, the model labels it better."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from samray.output.shards import done_shards, read_shard
from tests.support import REPOSITORY

JOBS = REPOSITORY / "jobs"


@pytest.mark.timeout(1200)
def test_label_correct_train_label_again(tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(JOBS))
    import data_engine

    figures = data_engine.run(tmp_path, num_images=8, num_heldout=4, steps=16, progress=False)
    sys.modules.pop("data_engine")

    rows = [
        row
        for shard in done_shards(str(tmp_path / "round1-corrected"))
        for row in read_shard(str(tmp_path / "round1-corrected"), shard).to_pylist()
    ]
    known = data_engine.make_world(tmp_path / "images", range(8))
    corrected = {row["image"]["file_name"].rpartition("/")[2]: row for row in rows}
    for name, blobs in known.items():
        assert len(corrected[name]["annotations"]) == len(blobs)
        best = data_engine.best_ious(blobs, [mask["segmentation"] for mask in corrected[name]["annotations"]])
        assert best.min() >= data_engine.ACCEPTED
    assert {change["change"] for row in rows for change in row["corrections"] or []} >= {"added", "removed"}

    before, after = figures["before"], figures["after"]
    assert after["miou"] > before["miou"] + 0.02
    assert after["mean_best_iou"] > before["mean_best_iou"] + 0.02, "and what is labelled is better, too"
