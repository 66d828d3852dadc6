"""The whole loop on a small world of a kind that the model has not seen: after it, the model labels it better.

Its training runs on Ray.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samray.cli.demo_train import ACCEPTED, Rounds, draw_before_and_after, make_world, run_rounds
from samray.config import load_config
from samray.evaluate.proposals import best_ious
from samray.output.shards import done_shards, read_shard


@pytest.mark.timeout(1200)
def test_label_correct_train_label_again(tmp_path: Path, local_ray: None, here: None) -> None:
    rounds = Rounds(
        num_images=8, num_heldout=4, steps=16, training=("train.learning_rate=5e-4", "cluster.num_cpus_per_worker=1")
    )
    config = load_config("tiny", None, ["output.images_per_shard=8"])
    report = run_rounds(tmp_path, config, rounds, progress=False)

    rows = [
        row
        for shard in done_shards(str(tmp_path / "round1-corrected"))
        for row in read_shard(str(tmp_path / "round1-corrected"), shard).to_pylist()
    ]
    known = make_world(tmp_path / "images", range(8))
    corrected = {row["image"]["file_name"].rpartition("/")[2]: row for row in rows}
    for name, blobs in known.items():
        assert len(corrected[name]["annotations"]) == len(blobs)
        best = best_ious(blobs, [mask["segmentation"] for mask in corrected[name]["annotations"]])
        assert best.min() >= ACCEPTED
    assert {change["change"] for row in rows for change in row["corrections"] or []} >= {"added", "removed"}

    assert report.after["miou"] > report.before["miou"] + 0.02
    assert report.after["mean_best_iou"] > report.before["mean_best_iou"] + 0.02, "and what is labelled is better, too"

    # Four images of 230 pixels, 10 apart, in three rows with titles.
    picture = np.asarray(Image.open(io.BytesIO(draw_before_and_after(tmp_path, rounds))))
    assert picture.shape == (3 * (230 + 26) + 2 * 10, 4 * 230 + 3 * 10, 3)
