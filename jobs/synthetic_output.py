"""A large synthetic output for measurements: `python jobs/synthetic_output.py OUTPUT IMAGES MASKS`.

The masks are smooth blobs of all sizes from a pool, in images of 2250x1500 as in SA-1B; the images do not exist.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pycocotools import mask as coco_mask
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from samray.config import load_config
from samray.output.manifests import MANIFEST_SCHEMA
from samray.output.plan import write_plan
from samray.output.schema import ANNOTATION, ANNOTATIONS_PER_IMAGE, SCHEMA, shard_metadata
from samray.output.shards import commit_shard, mark_success

HEIGHT, WIDTH = 1500, 2250
POOL = 1000

ALL_SCALES = (0.8, 2.6)
"""Decimal logarithms of the smallest and largest radius; 90% of the RLEs are then 47 to 1,972 characters long."""


def blob(rng: np.random.Generator, log_radius: tuple[float, float] = ALL_SCALES) -> dict[str, Any]:
    """A wobbly disc, sometimes with a hole; the logarithm of its radius is uniform."""
    radius = 10 ** rng.uniform(*log_radius)
    side = min(int(3 * radius) + 8, HEIGHT)
    y, x = np.indices((side, side)) - side / 2
    wobble = ndimage.zoom(rng.standard_normal((9, 9)), (side / 9, side / 9), order=3)[:side, :side]
    inside = np.hypot(x, y) + 0.15 * radius * wobble < radius
    if rng.random() < 0.2:
        inside &= np.hypot(x - radius / 4, y) > radius / 4
    inside[side // 2, side // 2 + 1] = True
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    top, left = rng.integers(0, HEIGHT - side + 1), rng.integers(0, WIDTH - side + 1)
    mask[top : top + side, left : left + side] = inside
    rle = coco_mask.encode(mask)
    score = rng.uniform(0.88, 1.0, size=2)
    return {
        "id": 0,
        "segmentation": {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()},
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(coco_mask.area(rle)),
        "predicted_iou": float(score[0]),
        "stability_score": float(score[1]),
        "point_coords": [[float(left + side / 2), float(top + side / 2)]],
        "crop_box": [0.0, 0.0, float(WIDTH), float(HEIGHT)],
    }


def write_synthetic_output(
    output: str,
    num_images: int,
    masks_per_image: int,
    *,
    images_per_shard: int | None = None,
    log_radius: tuple[float, float] = ALL_SCALES,
    num_shapes: int = POOL,
    photos: Sequence[str] = (),
    name_of: Callable[[int], str] = "photos/{:07d}.jpg".format,
    edit: Callable[[pa.Table], pa.Table] = lambda table: table,
) -> dict[str, Any]:
    """Write a finished output; returns its counts. photos: URIs of existing images, used in turn. name_of: file names.

    edit: changes the rows of a shard.
    """
    rng = np.random.default_rng(0)
    pool = pa.array([blob(rng, log_radius) for _ in range(num_shapes)], ANNOTATION)
    names = [name_of(i) for i in range(num_images)]
    columns: dict[str, Any] = {
        name: pa.nulls(num_images, MANIFEST_SCHEMA.field(name).type) for name in MANIFEST_SCHEMA.names
    }
    uris = [photos[i % len(photos)] for i in range(num_images)] if photos else names
    columns |= {"image_id": pa.array(range(num_images), pa.int64()), "file_name": names, "uri": uris}
    del columns["shard"]
    config = load_config("sa1b")
    run = {"identity": config.identity(), "input": "synthetic", "config": config.model_dump(mode="json")}
    plan = write_plan(output, pa.table(columns), images_per_shard or config.output.images_per_shard, run)
    num_bytes = num_masks = 0
    for shard in range(plan.num_shards):
        rows = plan.read_shard(shard)
        table = edit(_table_of(rows, pool, masks_per_image, rng, plan.run))
        num_of_shard = pc.sum(pc.list_value_length(table["annotations"])).as_py()
        num_masks += num_of_shard
        stats = {"num_images": rows.num_rows, "num_masks": num_of_shard, "failures": {}}
        stats["stage_seconds"] = {"decode": 9.0, "encode": 2.0}
        num_bytes += commit_shard(plan.output, shard, table, stats)
    mark_success(plan.output, num_images=num_images, num_failed=0)
    counts_bytes = sum(map(len, pool.field("segmentation").field("counts").to_pylist())) / num_shapes
    return {
        "images": num_images,
        "masks": num_masks,
        "shards": plan.num_shards,
        "mb": num_bytes / 1e6,
        "mean_rle_bytes": counts_bytes,
    }


def _table_of(
    rows: pa.Table, pool: pa.StructArray, masks_per_image: int, rng: np.random.Generator, run: dict[str, Any]
) -> pa.Table:
    """The shard of these rows of a manifest, with random masks of the pool."""
    chosen = pool.take(pa.array(rng.integers(0, len(pool), rows.num_rows * masks_per_image)))
    ids = np.add.outer(rows["image_id"].to_numpy() * ANNOTATIONS_PER_IMAGE, np.arange(masks_per_image)).ravel()
    fields = [pa.array(ids) if field.name == "id" else chosen.field(field.name) for field in ANNOTATION]
    masks = pa.StructArray.from_arrays(fields, fields=list(ANNOTATION))
    offsets = pa.array(np.arange(rows.num_rows + 1, dtype=np.int32) * masks_per_image)
    sizes = [pa.array([side] * rows.num_rows, pa.int32()) for side in (WIDTH, HEIGHT)]
    image_type = SCHEMA.field("image").type
    arrays = [rows["image_id"].combine_chunks(), *sizes, rows["file_name"].combine_chunks()]
    return pa.Table.from_arrays(
        [
            pa.StructArray.from_arrays(arrays, fields=list(image_type)),
            pa.ListArray.from_arrays(offsets, masks),
            rows["uri"],
            pa.array(["ok"] * rows.num_rows),
            pa.nulls(rows.num_rows, pa.string()),
        ],
        schema=SCHEMA.with_metadata(shard_metadata(run)),
    )


def digest(folder: Path) -> str:
    """A digest of the names and contents of all files."""
    whole = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith("."):  # a partial file left by kill -9
            whole.update(str(file.relative_to(folder)).encode())
            with open(file, "rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


if __name__ == "__main__":
    print(write_synthetic_output(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
