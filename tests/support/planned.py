"""Plans of images that nothing looks at, and shards of masks that are right in every field."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from samray import storage
from samray.config import Config, load_config
from samray.output import shards
from samray.output.plan import Plan, make_plan
from samray.output.schema import ImageRecord, records_to_table


def config_of(*overrides: str) -> Config:
    return load_config(None, None, ["output.images_per_shard=4", *overrides])


def mask_of(height: int, width: int, seed: int = 0, convention: str = "coco") -> dict[str, Any]:
    """One annotation, right in every field."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width), np.uint8, order="F")
    y, x = rng.integers(0, height - 1), rng.integers(0, width - 1)
    pixels[y : y + rng.integers(1, height), x : x + rng.integers(1, width)] = 1
    rle = coco_mask.encode(pixels)
    x, y, w, h = coco_mask.toBbox(rle).tolist()
    return {
        "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
        "bbox": [x, y, w, h] if convention == "coco" else [x, y, w - 1, h - 1],
        "area": int(pixels.sum()),
        "predicted_iou": 0.9,
        "stability_score": 0.97,
        "point_coords": [[x + 0.5, y + 0.5]],
        "crop_box": [0.0, 0.0, float(width), float(height)],
    }


def records_for(plan: Plan, shard: int, num_masks: int = 2) -> list[ImageRecord]:
    return [
        ImageRecord(
            image_id=row["image_id"],
            width=20,
            height=12 + row["image_id"] % 5,
            file_name=row["file_name"],
            uri=row["uri"],
            annotations=[mask_of(12 + row["image_id"] % 5, 20, row["image_id"] + i) for i in range(num_masks)],
        )
        for row in plan.read_shard(shard).to_pylist()
    ]


def make_input(root: str, number: int = 10) -> str:
    for i in range(number):
        storage.put(storage.join(root, "in", f"{i:03d}.jpg"), b"x")
    return storage.join(root, "in")


def finished_output(root: str) -> Plan:
    """Ten images in three shards, all there."""
    config = config_of()
    plan = make_plan(make_input(root), storage.join(root, "out"), config, config.identity())
    for shard in range(plan.num_shards):
        assert shards.commit_shard(plan.output, shard, records_to_table(records_for(plan, shard), plan.run))
    shards.mark_success(plan.output)
    return plan
