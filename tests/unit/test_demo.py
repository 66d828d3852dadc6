"""What the demo makes and how it judges; the run itself is tested with the pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samray.cli.demo import _encode as encode
from samray.cli.demo import compare, make_scenes, write_scenes
from samray.config import load_config
from samray.errors import ConfigError
from samray.evaluate.proposals import best_ious
from samray.output.plan import make_plan
from samray.output.schema import ImageRecord, records_to_table
from samray.output.shards import commit_shard


def test_scenes_are_written_once_and_stay_the_same(tmp_path: Path) -> None:
    scenes = make_scenes(3)
    write_scenes(tmp_path, scenes)
    files = sorted((tmp_path / "images").iterdir())
    assert [file.name for file in files] == ["scene-000.jpg", "scene-001.jpg", "scene-002.jpg"]
    before = [file.stat().st_mtime_ns for file in files]
    write_scenes(tmp_path, make_scenes(3))
    assert [file.stat().st_mtime_ns for file in files] == before
    known = json.loads((tmp_path / "known_masks.json").read_text())
    for file, scene in zip(files, scenes, strict=True):
        assert Image.open(file).size == scene.image.shape[1::-1]
        assert len(known[file.name]) == len(scene.masks)
        assert known[file.name][0]["size"] == list(scene.image.shape[:2])


def test_another_demos_directory_is_refused(tmp_path: Path) -> None:
    write_scenes(tmp_path, make_scenes(2))
    with pytest.raises(ConfigError, match="different demo"):
        write_scenes(tmp_path, make_scenes(3))
    (tmp_path / "other" / "images").mkdir(parents=True)
    with pytest.raises(ConfigError, match="choose another directory"):
        write_scenes(tmp_path / "other", make_scenes(2))


def test_best_iou_is_the_best_over_the_masks_found() -> None:
    known = np.zeros((2, 20, 20), bool)
    known[0, :10], known[1, 15:] = True, True
    half = np.zeros((20, 20), bool)
    half[:5] = True
    truth = [encode(mask) for mask in known]
    assert best_ious(truth, []).tolist() == [0, 0]
    assert best_ious(truth, [encode(half)]).tolist() == [0.5, 0]
    assert best_ious(truth, [encode(half), encode(known[0]), encode(known[1])]).tolist() == [1, 1]
    assert best_ious([], [encode(half)]).tolist() == []


def test_labels_are_compared_with_the_scenes_they_belong_to(tmp_path: Path) -> None:
    """The known masks themselves, but for one scene none: as good as the other scenes' share."""
    scenes = make_scenes(3)
    write_scenes(tmp_path, scenes)
    config = load_config("default")
    plan = make_plan(str(tmp_path / "images"), str(tmp_path / "labels"), config, config.identity())
    known = json.loads((tmp_path / "known_masks.json").read_text())
    records = [
        ImageRecord(
            image_id=row["image_id"],
            width=1,
            height=1,
            file_name=row["file_name"],
            uri=row["uri"],
            annotations=[
                {"segmentation": rle, "predicted_iou": 0.9}
                for rle in known[row["file_name"]]
                if row["file_name"] != "scene-001.jpg"
            ],
        )
        for row in plan.read_shard(0).to_pylist()
    ]
    commit_shard(plan.output, 0, records_to_table(records, plan.run))
    counts = [len(scene.masks) for scene in scenes]
    found = compare(tmp_path, plan.output)
    assert (found.num_objects, found.num_masks) == (sum(counts), counts[0] + counts[2])
    assert found.mean_best_iou == pytest.approx((counts[0] + counts[2]) / sum(counts))
    assert found.average_recall == pytest.approx(found.mean_best_iou)
