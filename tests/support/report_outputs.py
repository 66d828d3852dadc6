"""Outputs with known masks, for tests of the report: no model, no Ray."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from samray import storage
from samray.config import load_config
from samray.output.plan import Plan, make_plan
from samray.output.schema import ImageRecord, records_to_table
from samray.output.shards import commit_shard, mark_success

HEIGHT, WIDTH = 60, 80
IMAGES_PER_SHARD = 2


def annotation(mask: np.ndarray, **fields: Any) -> dict[str, Any]:
    """One mask as `MaskGenerator` would write it, without id."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "segmentation": {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()},
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(coco_mask.area(rle)),
        "predicted_iou": 0.9,
        "stability_score": 0.96,
        "point_coords": [[1.0, 2.0]],
        "crop_box": [0.0, 0.0, float(mask.shape[1]), float(mask.shape[0])],
        **fields,
    }


def block(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


def nested_masks(index: int) -> list[dict[str, Any]]:
    """A part on its whole, and a third mask apart; scores differ from image to image."""
    shift = index / 1000
    return [
        annotation(block(5, 5, 15, 15), predicted_iou=0.75 + shift, stability_score=0.91, point_coords=[[9.0, 10.0]]),
        annotation(block(0, 0, 30, 40), predicted_iou=0.9 + shift, stability_score=0.96, point_coords=[[30.0, 20.0]]),
        annotation(block(40, 50, 60, 80), predicted_iou=0.82, stability_score=0.99, point_coords=[[64.5, 50.0]]),
    ]


NAMES = ("whole", "part")


def named_masks(index: int) -> list[dict[str, Any]]:
    """As `nested_masks`; the third mask has no name."""
    names = [("part", 0.5), ("whole", 0.25), (None, None)]
    return [{**m, "label": n, "label_score": s} for m, (n, s) in zip(nested_masks(index), names, strict=True)]


def write_output(
    root: str,
    num_images: int = 6,
    *,
    errors: Mapping[int, str] | None = None,
    masks: Callable[[int], list[dict[str, Any]]] = nested_masks,
    missing_shards: tuple[int, ...] = (),
    name: Callable[[int], str] = "photo {}.png".format,
    with_stats: bool = True,
    categories: tuple[str, ...] = (),
) -> Plan:
    """An output of IMAGES_PER_SHARD images per shard below root/out, of images below root/in, on any storage.

    errors: place -> `error` column. with_stats: leave counts in the footers, as a run does and an import does not.
    categories: of a run that names.
    """
    for i in range(num_images):
        data = io.BytesIO()
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 40 * i % 256, np.uint8)).save(data, "PNG")
        storage.put(storage.join(root, "in", name(i)), data.getvalue())
    overrides = [f"output.images_per_shard={IMAGES_PER_SHARD}", "masks.points_per_side=8"]
    config = load_config("default", overrides=overrides)
    identity = {**config.identity(), **({"labels": {"categories": list(categories)}} if categories else {})}
    plan = make_plan(storage.join(root, "in"), storage.join(root, "out"), config, identity)
    for shard in set(range(plan.num_shards)) - set(missing_shards):
        records = []
        for index, row in enumerate(plan.read_shard(shard).to_pylist(), start=IMAGES_PER_SHARD * shard):
            error = (errors or {}).get(index)
            records.append(
                ImageRecord(
                    image_id=row["image_id"],
                    width=0 if error else WIDTH,
                    height=0 if error else HEIGHT,
                    file_name=row["file_name"],
                    uri=row["uri"],
                    annotations=[] if error else masks(index),
                    error=error,
                )
            )
        stats = {
            "num_images": len(records),
            "num_masks": sum(len(record.annotations) for record in records),
            "failures": dict(Counter(r.error.partition(":")[0] for r in records if r.error)),
            "device_seconds": 1.5,
            "stage_seconds": {"encode": 0.5, "decode": 1.0},
        }
        commit_shard(plan.output, shard, records_to_table(records, plan.run), stats if with_stats else None)
    if not missing_shards:
        mark_success(plan.output)
    return plan
