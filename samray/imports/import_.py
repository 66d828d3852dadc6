"""`samray.import_`: SA-1B or COCO annotations as an output of samray."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from samray import storage
from samray.cluster.tasks import run_tasks, wants_ray
from samray.config import InputConfig, OutputConfig
from samray.errors import ConfigError, ImageError
from samray.imports import coco, sa1b
from samray.imports.correct import correct
from samray.imports.places import missing_images, outside_problem
from samray.imports.records import failed, record_of
from samray.imports.source import Source, open_source
from samray.output.failures import failures_of_shards
from samray.output.plan import Plan, load_plan, write_plan
from samray.output.schema import ImageRecord, records_to_table
from samray.output.shards import SUCCESS, commit_shard, done_shards, mark_success, read_metadata, shard_versions
from samray.pipeline.preflight import check_fan_out
from samray.pipeline.report import ImportReport, Labelled, ShardSummary
from samray.progress import ProgressView


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
    allow_outside: bool = False,
    ray: bool | None = None,
    address: str | None = None,
    progress: bool = True,
) -> ImportReport:
    """Convert annotations to an output of samray, or finish an earlier call.

    source: SA-1B JSON files (a folder, a glob, tars) or COCO instances JSON. format: sa1b or coco; None detects it.
    images: folder that `file_name` is relative to, if not next to the annotations. ray: read SA-1B with Ray Data tasks
    (None: for large sources, or if address names a cluster); COCO is one stream and is read in this process.
    corrects: an output; source (COCO) is its manually corrected export. confident, stable: as for that export;
    keep_rest: keep masks that were not exported.
    allow_outside: accept images outside of `images`; for annotations that you trust.
    Raises: ConfigError, before anything is written unless it turns out that no annotation has a pixel; StorageError if
    storage is unavailable.
    """
    given = {"confident": confident, "stable": stable, "keep_rest": keep_rest}
    if corrects is not None:
        if images is not None or format not in (None, "coco"):
            raise ConfigError("with --corrects, SOURCE is COCO and the images are those of LABELS: leave out --images")
        own: dict[str, Any] = {**given, "images_per_shard": images_per_shard, "progress": progress}
        return correct(str(source), str(output), str(corrects), **own)
    for name, value in given.items():
        if value is not None and value is not False:
            raise ConfigError(
                f"--{name.replace('_', '-')} needs --corrects: it describes the export that was corrected"
            )
    started = time.monotonic()
    found = open_source(str(source), format)
    per_shard = OutputConfig(**({} if images_per_shard is None else {"images_per_shard": images_per_shard}))
    root = None if images is None else storage.normalize(str(images))
    check_fan_out(str(output), ray if found.format == "sa1b" else False, address)
    in_coco = coco.read_images(found) if found.format == "coco" else None
    identity = {
        "imported": found.format,
        "input_uri": storage.redact(found.uri),
        "files": found.fingerprint(),
        "images": storage.redact(root) if root else None,
        "output": {"images_per_shard": per_shard.images_per_shard},
        "allow_outside": allow_outside or None,
    }
    plan = _plan_there(str(output), identity)
    num_images = len(in_coco.images) if in_coco is not None else found.files.num_rows
    step = per_shard.images_per_shard
    ends = [min(start + step, num_images) for start in range(0, num_images, step)]
    done = {} if plan is None else shard_versions(plan.output)
    todo = [shard for shard in range(len(ends)) if shard not in done]
    report = ImportReport(
        output=storage.redact(storage.normalize(str(output))),
        format=found.format,
        num_images=num_images,
        num_shards=len(ends),
        num_shards_skipped=len(ends) - len(todo),
    )
    num_done = sum(ends[shard] - (ends[shard - 1] if shard else 0) for shard in done)
    view = ProgressView(num_images, num_done, enabled=progress)
    view.note = "importing"
    with view, ExitStack() as stack:
        annotations: coco.Shards = iter(())
        if in_coco is not None:  # read completely before anything is written
            annotations = stack.enter_context(coco.sorted_annotations(found, in_coco, ends, todo, view.update))
            coco.refuse_if_nothing_is_kept(found, in_coco)
        if plan is None:
            plan = _new_plan(found, in_coco, str(output), root, identity, report)
        for failures in failures_of_shards(plan.output, done).values():
            report.add_failures(failures)
        convention = plan.run["identity"]["masks"]["bbox_convention"]
        results: Iterator[tuple[ShardSummary, int]]
        if in_coco is None:
            on_ray = bool(todo) and wants_ray(ray, address, num_images - num_done)
            options: dict[str, Any] = {"images_root": root, "allow_outside": allow_outside}
            task = functools.partial(_import_shard, plan=plan, bbox_convention=convention, **options)
            results = run_tasks(task, _with_files(found, plan, todo), on_ray=on_ray, address=address)
        else:
            roots = None if allow_outside else coco.roots_of(found, in_coco, root)
            rows = _coco_records(plan, in_coco, annotations, roots, convention)
            results = (_commit(plan, shard, records, dropped) for shard, records, dropped in rows)
        for summary, num_dropped in results:
            report.add(summary, num_dropped)
            num_done += plan.num_images_of(summary.shard)
            view.update(num_done=num_done, num_failed=report.num_failed)
    if in_coco is not None:
        report.num_dropped += in_coco.num_unknown
    _refuse_if_all_was_dropped(found, plan, report, done)
    mark_success(plan.output, num_images=plan.num_images, num_failed=report.num_failed)
    report.wall_s = time.monotonic() - started
    return report


def _plan_there(output: str, identity: dict[str, Any]) -> Plan | None:
    """The plan in output, if it belongs to this import. Raises: ConfigError if it is another one, StorageError."""
    where = storage.redact(storage.normalize(output))
    if not storage.exists(storage.join(storage.normalize(output), "_samray", "run.json")):
        if done_shards(output):
            raise ConfigError(f"{where} has shards without a description: choose another OUTPUT")
        return None
    plan = load_plan(output)
    held = plan.run["identity"]
    for key, wanted in identity.items():
        if held.get(key) != wanted:
            raise ConfigError(
                f"{where} has another run or import ({key}: {held.get(key)} there, {wanted} now): choose another OUTPUT"
            )
    storage.remove_leftovers(plan.output)
    return plan


def _new_plan(
    source: Source,
    in_coco: coco.CocoImages | None,
    output: str,
    root: str | None,
    own: dict[str, Any],
    report: ImportReport,
) -> Plan:
    """Write the plan, and warn in the report if no image is found. Raises: ConfigError, StorageError."""
    allow_outside = bool(own["allow_outside"])
    if in_coco is None:
        table, convention = sa1b.planned_images(source, root, allow_outside)
    else:
        table, convention = coco.planned_images(source, in_coco, root, allow_outside)
    num_missing, example = missing_images(table, root or source.folder, allow_outside)
    if num_missing:
        report.warning = (
            f"no image was found: looked for {num_missing} of {table.num_rows}, for example "
            f"{storage.redact(example)}; the masks are imported, but reports, exports with images and training need "
            "the images: set --images to their folder, and import into another OUTPUT"
        )
    settings = InputConfig().model_dump(mode="json")  # for readers that fetch the images
    identity = {**own, "input": settings, "masks": {"bbox_convention": convention}}
    per_shard = own["output"]["images_per_shard"]
    return write_plan(output, table, per_shard, {"identity": identity, "input": own["input_uri"]})


def _refuse_if_all_was_dropped(source: Source, plan: Plan, report: ImportReport, done: Iterable[int]) -> None:
    """Raises: ConfigError if there were annotations, but OUTPUT has no mask. done: shards of earlier calls."""
    if report.num_masks or storage.exists(storage.join(plan.output, SUCCESS)):
        return
    earlier = [read_metadata(plan.output, shard).get("stats", {}) for shard in done]
    num_dropped = report.num_dropped + sum(stats.get("num_dropped", 0) for stats in earlier)
    if num_dropped and not any(stats.get("num_masks") for stats in earlier):
        raise ConfigError(
            f"SOURCE {storage.redact(source.uri)}: no mask could be imported; {num_dropped:,} annotations have no "
            f"pixel or image; {report.num_failed:,} of {report.num_images:,} images failed; OUTPUT {report.output} has "
            "no masks and can be deleted"
        )
    if report.num_failed == report.num_images:
        reasons = ", ".join(f"{number} {reason}" for reason, number in report.failures.items())
        report.warning = f"every image failed ({reasons}); the column `error` of OUTPUT has the reasons"


def _with_files(source: Source, plan: Plan, todo: list[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Each shard to do, with the files of its images."""
    starts = np.cumsum([0, *(plan.num_images_of(shard) for shard in range(plan.num_shards))]).tolist()
    for shard in todo:
        yield shard, source.files.slice(starts[shard], plan.num_images_of(shard)).to_pylist()


def _import_shard(
    item: tuple[int, list[dict[str, Any]]],
    *,
    plan: Plan,
    bbox_convention: str,
    images_root: str | None,
    allow_outside: bool,
) -> tuple[ShardSummary, int]:
    shard, files = item
    options: dict[str, Any] = {"images_root": images_root, "allow_outside": allow_outside}
    records, num_dropped = sa1b.read_records(files, plan.read_shard(shard), bbox_convention, **options)
    return _commit(plan, shard, records, num_dropped)


def _coco_records(
    plan: Plan, found: coco.CocoImages, annotations: coco.Shards, roots: list[str] | None, bbox_convention: str
) -> Iterator[tuple[int, list[ImageRecord], int]]:
    """(shard, its rows, number of annotations dropped). roots: folder that each image must be in; None allows any."""
    for shard, first, by_place in annotations:
        records, num_dropped = [], 0
        for place, row in enumerate(plan.read_shard(shard).to_pylist(), start=first):
            problem = None if row["uri"] else ImageError("missing", "the annotations have no file_name for the image")
            if problem is None and roots is not None:
                problem = outside_problem(row["uri"], roots[place])
            if problem is not None:
                records.append(failed(row, problem))
                continue
            record, dropped = record_of(row, found.images[place], by_place.get(place, []), bbox_convention)
            records.append(record)
            num_dropped += dropped
        yield shard, records, num_dropped


def _commit(plan: Plan, shard: int, records: list[ImageRecord], num_dropped: int) -> tuple[ShardSummary, int]:
    summary = ShardSummary.of(shard, Labelled(records))
    stats = {**summary.to_dict(), "num_dropped": num_dropped}
    commit_shard(plan.output, shard, records_to_table(records, plan.run), stats)
    return summary, num_dropped
