"""Is an output whole and sound? Every planned image exactly once; deep: every mask decodes, and agrees with its row.

Works through the output shard by shard, so its memory does not grow with the data set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.dataset import shards
from samray.dataset.joining import stale_shards
from samray.dataset.manifest import Plan, load_plan
from samray.dataset.runs import area, bbox_xywh, check_size, checked_runs
from samray.dataset.schema import ANNOTATIONS_PER_IMAGE, CHANGES, samray_metadata, schema_of
from samray.errors import NotFoundError, StorageError

_PROBLEMS_PER_SHARD: Final = 20


@dataclass
class VerifyReport:
    """What `verify` found. Problems are sentences that name the shard and the image."""

    num_images: int = 0
    """Rows in the shards."""
    num_masks: int = 0
    num_failed: int = 0
    """Rows with status `failed`: these are no problem, they say why."""
    num_shards: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(output: str, deep: bool = False) -> VerifyReport:
    """Check an output against its plan; `deep` also decodes every mask and recomputes its area and box.

    Raises: ConfigError where there is no plan, StorageError where storage cannot be read.
    """
    plan = load_plan(output)
    report = VerifyReport()
    names = storage.list_names(storage.join(plan.output, shards.FOLDER))
    done = {number for name in names if (number := shards.shard_number(name)) is not None}
    for name in sorted(names):
        number = shards.shard_number(name)
        if (number is None and not name.startswith(".")) or (number is not None and number >= plan.num_shards):
            report.problems.append(f"{shards.FOLDER}/{name} is not in the plan")
    for shard in range(plan.num_shards):
        if shard not in done:
            report.problems.append(f"{shards.FOLDER}/{shards.shard_name(shard)} is missing")
            continue
        report.num_shards += 1
        found = list(_check_shard(plan, shard, deep, report))
        more = len(found) - _PROBLEMS_PER_SHARD
        report.problems += found[:_PROBLEMS_PER_SHARD]
        if more > 0:
            report.problems.append(f"{shards.shard_name(shard)}: {more} more problems")
    report.problems += [
        f"{shards.shard_name(shard)} holds an image that has changed since: run the same command again"
        for shard in sorted(stale_shards(plan, done))
    ]
    report.problems += _check_success(plan, report.num_shards)
    return report


def _check_success(plan: Plan, num_done: int) -> Iterator[str]:
    try:
        text = storage.read_bytes(storage.join(plan.output, shards.SUCCESS))
    except NotFoundError:
        if num_done == plan.num_shards:
            yield f"every shard is there, but {shards.SUCCESS} is missing: run the same command again"
        return
    try:
        claimed = json.loads(text).get("num_shards") if text.strip() else None
    except (ValueError, AttributeError):
        claimed = None
    if num_done != plan.num_shards:
        yield f"{shards.SUCCESS} is there, but only {num_done} of {plan.num_shards} shards are"
    elif claimed != plan.num_shards:
        yield f"{shards.SUCCESS} speaks of {claimed} shards, the plan has {plan.num_shards}"


def _check_shard(plan: Plan, shard: int, deep: bool, report: VerifyReport) -> Iterator[str]:
    name = shards.shard_name(shard)
    try:
        table = shards.read_shard(plan.output, shard)
    except NotFoundError:
        yield f"{name} vanished while it was being checked"
        return
    except StorageError as error:
        if not isinstance(error.__cause__, pa.ArrowException | OSError | ValueError):
            raise
        yield f"{name} is no Parquet file: {error.__cause__}"
        return
    report.num_images += table.num_rows
    if not table.schema.equals(schema_of(plan.run)):
        yield f"{name} has other columns or types than samray writes: {table.schema.names}"
        return
    metadata = samray_metadata(table.schema)
    if metadata.get("identity") != plan.run["identity"]:
        yield f"{name} was written by a run with other settings"
    report.num_failed += pc.sum(pc.equal(table["status"], "failed")).as_py() or 0
    report.num_masks += pc.sum(pc.list_value_length(table["annotations"])).as_py() or 0
    yield from _check_rows(name, plan.read_shard(shard), table)
    yield from _check_status(name, table)
    for row in _rows_one_by_one(table):
        yield from _check_image(name, row, metadata.get("bbox_convention", "coco"), deep)


def _rows_one_by_one(table: pa.Table) -> Iterator[dict[str, Any]]:
    for i in range(table.num_rows):
        yield table.slice(i, 1).to_pylist()[0]


def _check_rows(name: str, planned: pa.Table, table: pa.Table) -> Iterator[str]:
    """The shard's images are those of the plan, each once, in order."""
    image = table["image"].combine_chunks()
    ids = image.field("image_id").to_pylist()
    wanted = planned["image_id"].to_pylist()
    if ids == wanted:
        columns = (("uri", table["uri"].to_pylist()), ("file_name", image.field("file_name").to_pylist()))
        for column, values in columns:
            for image_id, have, want in zip(ids, values, planned[column].to_pylist(), strict=True):
                if have != want:
                    yield f"{name}: image {image_id} has {column} {have!r}, planned was {want!r}"
        return
    known = set(wanted)
    seen: set[int] = set()
    for image_id in ids:
        if image_id in seen:
            yield f"{name}: image {image_id} is there more than once"
        elif image_id not in known:
            yield f"{name}: image {image_id} is not in the plan of this shard"
        seen.add(image_id)
    for image_id in wanted:
        if image_id not in seen:
            yield f"{name}: image {image_id} is missing"
    if seen == known and len(ids) == len(wanted):
        yield f"{name}: the images are not in the order of the plan"


def _check_status(name: str, table: pa.Table) -> Iterator[str]:
    columns = (table["image"], table["status"], table["error"], pc.list_value_length(table["annotations"]))
    for image, status, error, num_masks in zip(*(column.to_pylist() for column in columns), strict=True):
        which = f"{name}: image {image['image_id']}"
        if status == "ok":
            if error is not None:
                yield f"{which} is ok, but has an error: {error}"
            if image["width"] < 1 or image["height"] < 1:
                yield f"{which} is ok, but {image['width']}x{image['height']} pixels"
        elif status != "failed":
            yield f"{which} has the unknown status {status!r}"
        elif not error:
            yield f"{which} failed, but does not say why"
        if num_masks is None or (status == "failed" and num_masks):
            yield f"{which} has status {status!r} and {num_masks} masks"


def _check_image(name: str, row: dict[str, Any], bbox_convention: str, deep: bool) -> Iterator[str]:
    image = row["image"]
    corrected = "corrections" in row
    if corrected:
        yield from _check_corrections(f"{name}: image {image['image_id']}", row)
    for i, mask in enumerate(row["annotations"] or []):
        which = f"{name}: image {image['image_id']}, annotation {i}"
        if mask is None or any(value is None for value in mask.values()):
            yield f"{which} has an empty field"
            continue
        if not corrected and mask["id"] != image["image_id"] * ANNOTATIONS_PER_IMAGE + i:
            yield f"{which} has the id {mask['id']}, not image_id * {ANNOTATIONS_PER_IMAGE} + index"
        if mask["segmentation"]["size"] != [image["height"], image["width"]]:
            size = mask["segmentation"]["size"]
            yield f"{which} is a mask of size {size}, the image is {[image['height'], image['width']]} high and wide"
        if not (math.isfinite(mask["predicted_iou"]) and math.isfinite(mask["stability_score"])):
            yield f"{which} has a score that is no number"
        if deep:
            problem = check_mask(mask, bbox_convention)
            if problem:
                yield f"{which} {problem}"


def _check_corrections(which: str, row: dict[str, Any]) -> Iterator[str]:
    """Masks keep their ids when others go, so those have gaps; and what is said of them agrees with what is there."""
    ids = [mask["id"] for mask in row["annotations"] or [] if mask is not None and mask["id"] is not None]
    first = row["image"]["image_id"] * ANNOTATIONS_PER_IMAGE
    if any(not first <= id < first + ANNOTATIONS_PER_IMAGE for id in ids) or any(b <= a for a, b in pairwise(ids)):
        yield f"{which} has annotations whose ids do not rise from image_id * {ANNOTATIONS_PER_IMAGE} on"
    for entry in row["corrections"] or []:
        id, change = entry["id"], entry["change"]
        if change not in CHANGES or (id in ids) != (change in ("added", "changed")):
            yield f"{which} says that annotation {id} was {change}, and it is {'' if id in ids else 'not '}there"


def check_mask(mask: dict[str, Any], bbox_convention: str) -> str | None:
    """What is wrong with one annotation's mask, area or box; None if nothing is."""
    try:
        hw = check_size(mask["segmentation"]["size"])
        runs = checked_runs(mask["segmentation"]["counts"], hw)
    except ValueError as error:
        return f"has {error}"
    num_pixels = area(runs)
    if num_pixels != mask["area"]:
        return f"has the area {mask['area']}, but {num_pixels} pixels"
    if num_pixels == 0:
        return "is empty"
    x, y, w, h = bbox_xywh(runs, hw)
    box = [x, y, w, h] if bbox_convention == "coco" else [x, y, w - 1, h - 1]
    if mask["bbox"] != box:
        return f"has the box {mask['bbox']}, but lies in {box}"
    return None
