"""Outputs written by hand, for tests of what reads them: known masks, no model, no Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from scipy import ndimage

from samray import storage
from samray.config import load_config
from samray.output.plan import Plan, make_plan
from samray.output.schema import ImageRecord, records_to_table
from samray.output.shards import commit_shard, done_shards, mark_success, read_shard
from tests.support.standin import make_image

HEIGHT, WIDTH = 24, 31


def annotation(mask: np.ndarray, **scores: float) -> dict[str, Any]:
    """One mask as `MaskGenerator` would write it, without id."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "segmentation": {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()},
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(coco_mask.area(rle)),
        "predicted_iou": scores.get("predicted_iou", 0.9),
        "stability_score": scores.get("stability_score", 0.96),
        "point_coords": [[1.25, 2.5]],
        "crop_box": [0.0, 0.0, float(mask.shape[1]), float(mask.shape[0])],
    }


def decoded(mask: dict[str, Any]) -> np.ndarray:
    """The pixels of a mask as an output has it: what `annotation` was made from."""
    return coco_mask.decode(mask["segmentation"]).astype(bool)


def blob(seed: int, shape: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """A mask of several components with holes, some of them of a pixel, some at the border."""
    rng = np.random.default_rng(seed)
    mask = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5) > 0.03
    mask ^= rng.random(shape) < 0.02
    return mask if mask.any() else np.ones(shape, dtype=bool)


def masks_of_image(index: int) -> list[dict[str, Any]]:
    """Masks of the image at this position of the plan: 0 to 3 blobs, each with its own scores."""
    rng = np.random.default_rng(index)
    return [
        annotation(blob(10 * index + i), predicted_iou=float(rng.random()), stability_score=float(rng.random()))
        for i in range(index % 4)
    ]


def write_output(
    root: str,
    names: list[str],
    *,
    masks: Callable[[int], list[dict[str, Any]]] = masks_of_image,
    failed: tuple[int, ...] = (),
    missing_shards: tuple[int, ...] = (),
    images_per_shard: int = 3,
    settings: tuple[str, ...] = (),
    categories: tuple[str, ...] = (),
    num_common: int | None = None,
    phrases: Callable[[int], list[str]] = lambda index: [],
    presence: Callable[[int], list[dict[str, Any]]] | None = None,
    geo: Callable[[int], dict[str, Any] | None] = lambda index: None,
) -> Plan:
    """An output below root/out, of images below root/in, on any storage. failed: indices. categories: of a run that
    names; the first num_common were asked of every image, and phrases(index) of this one. presence: None for no such
    column. geo: where an image is, stored if names has TIFFs."""
    for seed, name in enumerate(names):
        storage.put(storage.join(root, "in", name), make_image(seed, (WIDTH, HEIGHT)))
    config = load_config("default", overrides=[f"output.images_per_shard={images_per_shard}", *settings])
    labels: dict[str, Any] = {"categories": list(categories)} if categories else {}
    labels |= {} if num_common is None else {"asked_of_all": num_common}
    labels |= {} if presence is None else {"presence": True}
    identity = {**config.identity(), **({"labels": labels} if labels else {})}
    plan = make_plan(storage.join(root, "in"), storage.join(root, "out"), config, identity)
    index = 0
    for shard in range(plan.num_shards):
        records = []
        for row in plan.read_shard(shard).to_pylist():
            error = "truncated: the file ends" if index in failed else None
            records.append(
                ImageRecord(
                    image_id=row["image_id"],
                    width=0 if error else WIDTH,
                    height=0 if error else HEIGHT,
                    file_name=row["file_name"],
                    uri=row["uri"],
                    annotations=[] if error else masks(index),
                    error=error,
                    phrases=phrases(index),
                    presence=None if presence is None else presence(index),
                    geo=geo(index),
                )
            )
            index += 1
        if shard not in missing_shards:
            commit_shard(plan.output, shard, records_to_table(records, plan.run))
    if not missing_shards:
        mark_success(plan.output, num_images=plan.num_images, num_failed=len(failed))
    return plan


def read_rows(output: object) -> list[dict[str, Any]]:
    """Every row of every finished shard, in order."""
    shards = sorted(done_shards(str(output)))
    return [row for shard in shards for row in read_shard(str(output), shard).to_pylist()]
