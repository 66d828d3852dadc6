"""Painted scenes with their known masks as an output of samray: what a training can learn from and be judged by."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from samray import storage
from samray.config import load_config
from samray.output.plan import Plan, make_plan
from samray.output.schema import ImageRecord, records_to_table
from samray.output.shards import commit_shard, mark_success
from samray.scenes.scene import Scene, make_scene
from tests.support.handmade import annotation


def paint(number: int, size: tuple[int, int] = (48, 64), first_seed: int = 0) -> list[Scene]:
    """Scenes that have a mask."""
    scenes, seed = [], first_seed
    while len(scenes) < number:
        scene = make_scene(seed, size)
        seed += 1
        if scene.kinds:
            scenes.append(scene)
    return scenes


def write_scenes(
    root: str, scenes: Sequence[Scene], masks: Callable[[Scene], np.ndarray] = lambda scene: scene.masks
) -> Plan:
    """root/in/scene-000.png ..., and root/labels with their masks, in shards of four."""
    for i, scene in enumerate(scenes):
        png = io.BytesIO()
        Image.fromarray(scene.image).save(png, "PNG")
        storage.put(storage.join(root, "in", f"scene-{i:03d}.png"), png.getvalue())
    config = load_config("default", overrides=["output.images_per_shard=4"])
    plan = make_plan(storage.join(root, "in"), storage.join(root, "labels"), config, config.identity())
    index = 0
    for shard in range(plan.num_shards):
        records = []
        for row in plan.read_shard(shard).to_pylist():
            scene = scenes[index]
            columns = {name: row[name] for name in ("image_id", "file_name", "uri")}
            h, w = scene.image.shape[:2]
            annotations = [annotation(mask) for mask in masks(scene)]
            records.append(ImageRecord(**columns, width=w, height=h, annotations=annotations))
            index += 1
        commit_shard(plan.output, shard, records_to_table(records, plan.run))
    mark_success(plan.output, num_images=plan.num_images, num_failed=0)
    return plan
