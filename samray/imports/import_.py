"""`samray.import_`: SA-1B or COCO annotations as an output of samray."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from samray import storage
from samray.cluster.tasks import run_tasks, wants_ray
from samray.config import InputConfig, OutputConfig
from samray.errors import ConfigError, ImageError
from samray.imports import coco, sa1b
from samray.imports.categories import names_in
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
    bounds = {"confident": confident, "stable": stable, "keep_rest": keep_rest}
    if corrects is not None:
        if images is not None or format not in (None, "coco"):
            raise ConfigError("with --corrects, SOURCE is COCO and the images are those of LABELS: leave out --images")
        options: dict[str, Any] = {**bounds, "images_per_shard": images_per_shard, "progress": progress}
        return correct(str(source), str(output), str(corrects), **options)
    for name, value in bounds.items():
        if value is not None and value is not False:
            raise ConfigError(
                f"--{name.replace('_', '-')} needs --corrects: it describes the export that was corrected"
            )
    size: dict[str, Any] = {} if images_per_shard is None else {"images_per_shard": images_per_shard}
    per_shard = OutputConfig(**size)
    root = None if images is None else storage.normalize(str(images))
    started = time.monotonic()
    job = _Job(open_source(str(source), format), str(output), root, allow_outside, ray, address)
    report = job.run(per_shard.images_per_shard, progress)
    report.wall_s = time.monotonic() - started
    return report


@dataclass
class _Job:
    """The import of annotations that no person corrected."""

    source: Source
    output: str
    root: str | None
    """Where `file_name` starts, if not next to the annotations."""
    allow_outside: bool
    ray: bool | None
    address: str | None
    in_coco: coco.CocoImages | None = None
    """The images that COCO names; None for SA-1B, where each is in a file of its own."""

    def run(self, images_per_shard: int, progress: bool) -> ImportReport:
        """As `import_`."""
        source, is_coco = self.source, self.source.format == "coco"
        check_fan_out(self.output, False if is_coco else self.ray, self.address)
        self.in_coco = coco.read_images(source) if is_coco else None
        identity = self._identity(images_per_shard)
        plan = _plan_there(self.output, identity)
        num_images = source.files.num_rows if self.in_coco is None else len(self.in_coco.images)
        # Cut as `write_plan` cuts: the sorting below needs the shards before there is a plan.
        ends = [min(start + images_per_shard, num_images) for start in range(0, num_images, images_per_shard)]
        done = {} if plan is None else shard_versions(plan.output)
        todo = [shard for shard in range(len(ends)) if shard not in done]
        report = ImportReport(
            output=storage.redact(storage.normalize(self.output)),
            format=source.format,
            num_images=num_images,
            num_shards=len(ends),
            num_shards_skipped=len(ends) - len(todo),
        )
        num_done = sum(ends[shard] - (ends[shard - 1] if shard else 0) for shard in done)
        view = ProgressView(num_images, num_done, enabled=progress)
        view.note = "importing"
        counts = coco.AnnotationCounts()
        with view, ExitStack() as stack:
            annotations: coco.Shards = iter(())
            if self.in_coco is not None:  # read completely before anything is written
                sorted_ = coco.sorted_annotations(source, self.in_coco, ends, todo, view.update)
                annotations, counts = stack.enter_context(sorted_)
                coco.refuse_if_nothing_is_kept(source, self.in_coco, counts)
            if plan is None:
                plan, report.warning = self._new_plan(identity)
            for failures in failures_of_shards(plan.output, done).values():
                report.add_failures(failures)
            num_left = num_images - num_done
            for summary, num_dropped in self._import_shards(plan, todo, annotations, num_left):
                report.add(summary, num_dropped)
                num_done += plan.num_images_of(summary.shard)
                view.update(num_done=num_done, num_failed=report.num_failed)
        report.num_dropped += counts.num_unknown
        # Before _SUCCESS: an import without any mask is an error.
        report.warning = self._refuse_if_all_was_dropped(plan, report, done) or report.warning
        mark_success(plan.output, num_images=plan.num_images, num_failed=report.num_failed)
        return report

    def _identity(self, images_per_shard: int) -> dict[str, Any]:
        """The identity that calls on the same OUTPUT must share."""
        return {
            "imported": self.source.format,
            "input_uri": storage.redact(self.source.uri),
            "files": self.source.fingerprint(),
            "images": storage.redact(self.root) if self.root else None,
            "output": {"images_per_shard": images_per_shard},
            "allow_outside": self.allow_outside or None,
        }

    def _import_shards(
        self, plan: Plan, todo: list[int], annotations: coco.Shards, num_left: int
    ) -> Iterator[tuple[ShardSummary, int]]:
        """Commit the shards; gives the summary of each and its annotations dropped. num_left: images in them."""
        convention = plan.run["identity"]["masks"]["bbox_convention"]
        # SA-1B has one file per image, so its shards are independent tasks; COCO is one stream.
        if self.in_coco is None:
            on_ray = bool(todo) and wants_ray(self.ray, self.address, num_left)
            options: dict[str, Any] = {"images_root": self.root, "allow_outside": self.allow_outside}
            task = functools.partial(_import_shard, plan=plan, bbox_convention=convention, **options)
            yield from run_tasks(task, _with_files(self.source, plan, todo), on_ray=on_ray, address=self.address)
            return
        roots = None if self.allow_outside else coco.roots_of(self.source, self.in_coco, self.root)
        for shard, records, dropped in _coco_records(plan, self.in_coco, annotations, roots, convention):
            yield _commit(plan, shard, records, dropped)

    def _new_plan(self, identity: dict[str, Any]) -> tuple[Plan, str]:
        """Write the plan; also gives the warning if no image is found. Raises: ConfigError, StorageError."""
        source, root, allow_outside = self.source, self.root, self.allow_outside
        if self.in_coco is None:
            table, convention = sa1b.planned_images(source, root, allow_outside)
            names = sa1b.categories_in(source)
        else:
            table, convention = coco.planned_images(source, self.in_coco, root, allow_outside)
            names = self.in_coco.categories.names
        warning = ""
        num_missing, example = missing_images(table, root or source.folder, allow_outside)
        if num_missing:
            warning = (
                f"no image was found: looked for {num_missing} of {table.num_rows}, for example "
                f"{storage.redact(example)}; the masks are imported, but reports, exports with images and training "
                "need the images: set --images to their folder, and import into another OUTPUT"
            )
        settings = InputConfig().model_dump(mode="json")  # for readers that fetch the images
        full = {**identity, "input": settings, "masks": {"bbox_convention": convention}}
        run = {"identity": full, "input": identity["input_uri"]}
        if names:
            full["labels"] = {"categories": names}
            run["categories"] = names
        plan = write_plan(self.output, table, identity["output"]["images_per_shard"], run)
        return plan, warning

    def _refuse_if_all_was_dropped(self, plan: Plan, report: ImportReport, done: Iterable[int]) -> str:
        """A warning if every image failed. done: shards of earlier calls.

        Raises: ConfigError if there were annotations, and OUTPUT holds no mask.
        """
        if report.num_masks or storage.exists(storage.join(plan.output, SUCCESS)):
            return ""
        # Shards of earlier calls record in their footers what was dropped.
        earlier = [read_metadata(plan.output, shard).get("stats", {}) for shard in done]
        num_dropped = report.num_dropped + sum(stats.get("num_dropped", 0) for stats in earlier)
        if num_dropped and not any(stats.get("num_masks") for stats in earlier):
            raise ConfigError(
                f"SOURCE {storage.redact(self.source.uri)}: no mask could be imported; {num_dropped:,} annotations have"
                f" no pixel or image; {report.num_failed:,} of {report.num_images:,} images failed; OUTPUT"
                f" {report.output} has no masks and can be deleted"
            )
        if report.num_failed != report.num_images:
            return ""
        reasons = ", ".join(f"{number} {reason}" for reason, number in report.failures.items())
        return f"every image failed ({reasons}); the column `error` of OUTPUT has the reasons"


def _plan_there(output: str, identity: dict[str, Any]) -> Plan | None:
    """The plan in output, if it belongs to this import. Raises: ConfigError if it is another one, StorageError."""
    where = storage.redact(storage.normalize(output))
    if not storage.exists(storage.join(storage.normalize(output), "_samray", "run.json")):
        if done_shards(output):
            raise ConfigError(f"{where} has shards without a description: choose another OUTPUT")
        return None
    plan = load_plan(output)
    recorded = plan.run["identity"]
    # Only these keys: the plan also records what was found in the source.
    for key, wanted in identity.items():
        if recorded.get(key) != wanted:
            raise ConfigError(
                f"{where} has another run or import ({key}: {recorded.get(key)} there, {wanted} now): "
                "choose another OUTPUT"
            )
    # Temporary files of an import that was killed.
    storage.remove_leftovers(plan.output)
    return plan


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
    # The plan's names, not the source's: an import that an older version began continues without names.
    names = names_in(plan)
    options: dict[str, Any] = {"images_root": images_root, "allow_outside": allow_outside, "categories": names}
    records, num_dropped = sa1b.read_records(files, plan.read_shard(shard), bbox_convention, **options)
    return _commit(plan, shard, records, num_dropped)


def _coco_records(
    plan: Plan, in_coco: coco.CocoImages, annotations: coco.Shards, roots: list[str] | None, bbox_convention: str
) -> Iterator[tuple[int, list[ImageRecord], int]]:
    """(shard, its rows, number of annotations dropped). roots: folder that each image must be in; None allows any."""
    names = names_in(plan)
    for shard, first, by_index in annotations:
        records, num_dropped = [], 0
        for index, row in enumerate(plan.read_shard(shard).to_pylist(), start=first):
            problem = None if row["uri"] else ImageError("missing", "the annotations have no file_name for the image")
            if problem is None and roots is not None:
                problem = outside_problem(row["uri"], roots[index])
            if problem is not None:
                records.append(failed(row, problem))
                continue
            record, dropped = record_of(row, in_coco.images[index], by_index.get(index, []), bbox_convention, names)
            records.append(record)
            num_dropped += dropped
        yield shard, records, num_dropped


def _commit(plan: Plan, shard: int, records: list[ImageRecord], num_dropped: int) -> tuple[ShardSummary, int]:
    summary = ShardSummary.of(shard, Labelled(records))
    stats = {**summary.to_dict(), "num_dropped": num_dropped}
    commit_shard(plan.output, shard, records_to_table(records, plan.run), stats)
    return summary, num_dropped
