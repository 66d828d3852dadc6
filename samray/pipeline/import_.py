"""`samray.import_`: SA-1B's or COCO's annotations as an output of samray."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from samray import storage
from samray.config import InputConfig, OutputConfig
from samray.dataset.imports import coco, sa1b
from samray.dataset.imports.source import Source, open_source
from samray.dataset.manifest import Plan, load_plan, write_plan
from samray.dataset.schema import ImageRecord, records_to_table
from samray.dataset.shards import commit_shard, done_shards, mark_success, shard_versions
from samray.errors import ConfigError
from samray.pipeline.correct import correct
from samray.pipeline.fan_out import run_tasks, wants_ray
from samray.pipeline.history import failures_of_shards
from samray.pipeline.progress import ProgressView
from samray.pipeline.report import ImportReport, Labelled, ShardSummary


def import_(
    source: str | Path,
    output: str | Path,
    *,
    format: str | None = None,
    images: str | Path | None = None,
    images_per_shard: int | None = None,
    corrects: str | Path | None = None,
    confident: float | None = None,
    stable: float | None = None,
    keep_rest: bool = False,
    ray: bool | None = None,
    address: str | None = None,
    progress: bool = True,
) -> ImportReport:
    """Turn annotations into an output of samray, or finish what an earlier call left undone.

    source: SA-1B's JSON files (a folder, a glob, tars) or COCO instances JSON. format: sa1b or coco; None looks.
    images: where `file_name` lies, if not beside the annotations. ray: fan SA-1B out as Ray Data tasks (None: when
    large, or where address names a cluster); COCO is one stream, and read here.
    corrects: an output, of which source (COCO) is what a person made of an export. confident, stable: what that was
    made with; keep_rest: masks that were not in it stay.
    Raises: ConfigError before anything is written (COCO's annotations are read after the plan is: damage there leaves
    a plan), StorageError when storage stays away.
    """
    given = {"confident": confident, "stable": stable, "keep_rest": keep_rest}
    if corrects is not None:
        if images is not None or format not in (None, "coco"):
            raise ConfigError(
                "with --corrects SOURCE is COCO, and the images lie where OUTPUT says: leave out --images"
            )
        own: dict[str, Any] = {**given, "images_per_shard": images_per_shard, "progress": progress}
        return correct(str(source), str(output), str(corrects), **own)
    for name, value in given.items():
        if value is not None and value is not False:
            raise ConfigError(f"--{name.replace('_', '-')} needs --corrects: it says what a person was shown")
    started = time.monotonic()
    found = open_source(str(source), format)
    per_shard = OutputConfig(**({} if images_per_shard is None else {"images_per_shard": images_per_shard}))
    root = None if images is None else storage.normalize(str(images))
    in_coco = coco.read_images(found) if found.format == "coco" else None
    plan = _plan(found, in_coco, str(output), root, per_shard.images_per_shard)
    convention = plan.run["identity"]["masks"]["bbox_convention"]
    done = shard_versions(plan.output)
    todo = [shard for shard in range(plan.num_shards) if shard not in done]
    report = ImportReport(
        output=storage.redact(plan.output),
        format=found.format,
        num_images=plan.num_images,
        num_shards=plan.num_shards,
        num_shards_skipped=plan.num_shards - len(todo),
    )
    for failures in failures_of_shards(plan.output, done).values():
        report.add_failures(failures)
    num_done = sum(plan.num_images_of(shard) for shard in done)
    view = ProgressView(plan.num_images, num_done, enabled=progress)
    view.note = "importing"
    with view:
        results: Iterator[tuple[ShardSummary, int]]
        if in_coco is None:
            on_ray = bool(todo) and wants_ray(ray, address, plan.num_images - num_done)
            task = functools.partial(_import_shard, plan=plan, bbox_convention=convention)
            results = run_tasks(task, _with_files(found, plan, todo), on_ray=on_ray, address=address)
        else:
            shards = coco.shard_records(found, in_coco, plan, todo, convention, view.update)
            results = (_commit(plan, shard, records, dropped) for shard, records, dropped in shards)
        for summary, num_dropped in results:
            report.add(summary, num_dropped)
            num_done += plan.num_images_of(summary.shard)
            view.update(num_done=num_done, num_failed=report.num_failed)
    if in_coco is not None:
        report.num_dropped += in_coco.num_unknown
    mark_success(plan.output, num_images=plan.num_images, num_failed=report.num_failed)
    report.wall_s = time.monotonic() - started
    return report


def _plan(source: Source, in_coco: coco.CocoImages | None, output: str, root: str | None, per_shard: int) -> Plan:
    """The plan that lies in output, if it is of this very import; else a new one. Raises: ConfigError, StorageError."""
    own: dict[str, Any] = {
        "imported": source.format,
        "input_uri": storage.redact(source.uri),
        "files": source.fingerprint(),
        "images": storage.redact(root) if root else None,
        "output": {"images_per_shard": per_shard},
    }
    if storage.exists(storage.join(storage.normalize(output), "_samray", "run.json")):
        plan = load_plan(output)
        held = plan.run["identity"]
        for key, wanted in own.items():
            if held.get(key) != wanted:
                raise ConfigError(
                    f"{storage.redact(plan.output)} holds another run or import ({key}: {held.get(key)} there, "
                    f"{wanted} now): give another OUTPUT"
                )
        return plan
    if done_shards(output):
        raise ConfigError(f"{storage.redact(output)} holds shards of which nothing says what they are: give another")
    if in_coco is None:
        table, convention = sa1b.planned_images(source, root)
    else:
        table, convention = coco.planned_images(source, in_coco, root)
    settings = InputConfig().model_dump(mode="json")  # for readers that fetch the images
    identity = {**own, "input": settings, "masks": {"bbox_convention": convention}}
    return write_plan(output, table, per_shard, {"identity": identity, "input": own["input_uri"]})


def _with_files(source: Source, plan: Plan, todo: list[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Each shard to do, and its images' files."""
    starts = np.cumsum([0, *(plan.num_images_of(shard) for shard in range(plan.num_shards))]).tolist()
    for shard in todo:
        yield shard, source.files.slice(starts[shard], plan.num_images_of(shard)).to_pylist()


def _import_shard(
    item: tuple[int, list[dict[str, Any]]], *, plan: Plan, bbox_convention: str
) -> tuple[ShardSummary, int]:
    shard, files = item
    records, num_dropped = sa1b.read_records(files, plan.read_shard(shard), bbox_convention)
    return _commit(plan, shard, records, num_dropped)


def _commit(plan: Plan, shard: int, records: list[ImageRecord], num_dropped: int) -> tuple[ShardSummary, int]:
    summary = ShardSummary.of(shard, Labelled(records))
    commit_shard(plan.output, shard, records_to_table(records, plan.run), summary.to_dict())
    return summary, num_dropped
