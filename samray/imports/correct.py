"""`samray.import_` with `corrects`: a manually corrected output, written as a new output.

The second phase of the SAM paper's data engine (section 4, "semi-automatic"): confident masks go to an annotator
(`samray export --confident`) and come back corrected, with missing masks added. The plan is that of the first output,
which preserves image ids. Images that the corrected file lacks are copied unchanged.
"""

from __future__ import annotations

import copy
import time
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.errors import ConfigError
from samray.exports.review import ID_ATTRIBUTE, is_sure
from samray.imports import coco
from samray.imports.categories import names_in
from samray.imports.corrections import corrected_record, id_of, unchanged_record
from samray.imports.places import printable
from samray.imports.source import Source, open_source
from samray.inputs.rows import indices_of
from samray.output.classes import looks_unnamed
from samray.output.compact import fingerprint_finished, refuse_replaced, rows_between
from samray.output.failures import failures_of_shards
from samray.output.manifests import MANIFEST_SCHEMA
from samray.output.plan import Plan, load_plan, write_plan
from samray.output.schema import ANNOTATIONS_PER_IMAGE, ImageRecord, categories_of, records_to_table
from samray.output.shards import commit_shard, done_shards, mark_success, open_shard, shard_versions
from samray.pipeline.report import ImportReport, Labelled, ShardSummary
from samray.progress import ProgressView


def correct(
    source: str,
    dest: str,
    output: str,
    *,
    confident: float | None,
    stable: float | None,
    keep_rest: bool,
    images_per_shard: int | None,
    progress: bool,
) -> ImportReport:
    """Write OUTPUT with the corrections in source (COCO instances JSON) to dest, or finish an earlier call.

    confident, stable: as for the export. keep_rest: keep masks that were not exported.
    Raises: ConfigError before anything is written, StorageError.
    """
    started = time.monotonic()
    plan = load_plan(output)
    source_files = open_source(source, "coco")
    # Before DEST is written: OUTPUT must be finished, and the corrections must fit it.
    fingerprint, _ = fingerprint_finished(plan)
    in_coco, image_at, num_unknown = _find_images(coco.read_images(source_files), plan, source_files)
    _refuse_masks_not_shown(source_files, in_coco, image_at, plan, confident, stable)
    options: dict[str, Any] = {"confident": confident, "stable": stable, "keep_rest": keep_rest}
    per_shard = images_per_shard or plan.generations[0].images_per_shard
    begun = load_plan(dest) if _check_dest(plan, dest) else None
    done = {} if begun is None else shard_versions(dest)
    ends = [min(start + per_shard, plan.num_images) for start in range(0, plan.num_images, per_shard)]
    todo = [shard for shard in range(len(ends)) if shard not in done]
    num_done = sum(ends[shard] - (ends[shard - 1] if shard else 0) for shard in done if shard < len(ends))
    settings: dict[str, Any] = {
        **options,
        "bbox_convention": plan.run["identity"].get("masks", {}).get("bbox_convention", "coco"),
    }
    view = ProgressView(plan.num_images, num_done, enabled=progress)
    view.note = "correcting"
    with view, coco.sorted_annotations(source_files, in_coco, ends, todo, view.update) as (shards, counts):
        # After all annotations were read: damaged JSON leaves no plan in DEST.
        labels = _labels(plan, begun, in_coco.categories.names)
        target = _plan(plan, dest, source_files, fingerprint, options, per_shard, labels)
        settings["categories"] = names_in(target)
        report = _begin_report(target, done, len(todo))
        report.num_corrected, report.num_unknown_images = len(image_at), num_unknown
        starts = plan.starts()
        for shard, first, annotations in shards:
            # By position, because DEST may have shards of another size.
            table, _ = rows_between(plan, starts, first, target.num_images_of(shard))
            records, changes = _records(table.to_pylist(), first, image_at, annotations, settings)
            summary = ShardSummary.of(shard, Labelled(records))
            commit_shard(target.output, shard, records_to_table(records, target.run), summary.to_dict())
            report.add(summary, changes.pop("dropped", 0))
            report.changes = dict(Counter(report.changes) + changes)
            num_done += target.num_images_of(shard)
            view.update(num_done=num_done, num_failed=report.num_failed)
    report.num_dropped += counts.num_unknown
    # At the end: a shard of OUTPUT could be replaced at any time before.
    refuse_replaced(plan, fingerprint, target.output)
    mark_success(target.output, num_images=target.num_images, num_failed=report.num_failed)
    report.wall_s = time.monotonic() - started
    return report


def _begin_report(target: Plan, done: Mapping[int, str | None], num_todo: int) -> ImportReport:
    """The report before the first shard. done: finished shards of DEST, with their versions."""
    report = ImportReport(
        output=storage.redact(target.output),
        format="coco",
        num_images=target.num_images,
        num_shards=target.num_shards,
        num_shards_skipped=target.num_shards - num_todo,
    )
    for failures in failures_of_shards(target.output, done).values():
        report.add_failures(failures)
    return report


def _records(
    rows: list[dict[str, Any]],
    first: int,
    image_at: dict[int, dict[str, Any]],
    annotations: dict[int, list[Any]],
    settings: dict[str, Any],
) -> tuple[list[ImageRecord], Counter[str]]:
    """The corrected rows of a shard, and counts of what happened to the masks. first: index of the first row."""
    records: list[ImageRecord] = []
    total: Counter[str] = Counter()
    for index, row in enumerate(rows, start=first):
        # Only a labelled image that came back can be corrected.
        if index not in image_at or row["status"] != "ok":
            records.append(unchanged_record(row))
            total["dropped"] += len(annotations.get(index, []))
            continue
        record, numbers = corrected_record(row, image_at[index], annotations.get(index, []), **settings)
        records.append(record)
        total += numbers
    return records, total


def _find_images(
    in_coco: coco.CocoImages, plan: Plan, source: Source
) -> tuple[coco.CocoImages, dict[int, dict[str, Any]], int]:
    """Match the corrected images with the plan, by file_name because tools assign new ids.

    If several images have that name, the one with the corrected image's id is used. Returns in_coco with `index_of` as
    indices in the plan; index in the plan -> corrected image; and the number not found. Raises: ConfigError if an image
    has no name, a name is ambiguous, an image occurs twice, or none is found.
    """
    where = f"SOURCE {storage.redact(source.uri)}"
    planned = plan.read_images(["image_id", "file_name"])
    for image in in_coco.images:
        if not isinstance(image["file_name"], str) or not image["file_name"]:
            raise ConfigError(f"{where}: the image {image['id']} has no file_name")
        image["file_name"] = printable(image["file_name"])
    matches = indices_of([image["file_name"] for image in in_coco.images], planned["file_name"])
    image_at: dict[int, dict[str, Any]] = {}
    index_in_plan: dict[int, int] = {}
    for number, image in enumerate(in_coco.images):
        candidates = matches.get(number, [])
        if len(candidates) > 1:
            candidates = [index for index in candidates if planned["image_id"][index].as_py() == image["id"]]
            if not candidates:
                raise ConfigError(
                    f"{where}: the file_name {image['file_name']!r} matches several images of "
                    f"{storage.redact(plan.output)}, none with the id {image['id']}"
                )
        if candidates:
            if candidates[0] in image_at:
                raise ConfigError(f"{where} has the image {image['file_name']!r} twice")
            image_at[candidates[0]] = image
            index_in_plan[number] = candidates[0]
    if not image_at:
        raise ConfigError(
            f"{where}: none of its {len(in_coco.images)} images is in {storage.redact(plan.output)}; its first is "
            f"{in_coco.images[0]['file_name']!r}, the output's first is {planned['file_name'][0].as_py()!r}"
        )
    # COCO's ids now lead to the plan's images; those that were not found drop out.
    in_plan = [
        {id: index_in_plan[number] for id, number in numbers.items() if number in index_in_plan}
        for numbers in in_coco.index_of
    ]
    return replace(in_coco, index_of=in_plan), image_at, len(in_coco.images) - len(image_at)


def _refuse_masks_not_shown(
    source: Source,
    in_coco: coco.CocoImages,
    image_at: dict[int, dict[str, Any]],
    plan: Plan,
    confident: float | None,
    stable: float | None,
) -> None:
    """Raises: ConfigError if a mask came back that these thresholds would not have exported: they differ from the
    export's.

    With wrong thresholds that mask would be added next to the old one, or replace it. in_coco, image_at: from
    `_find_images`.
    """
    if confident is None and stable is None:
        return
    image_ids = plan.read_images(["image_id"])["image_id"].to_numpy()
    # 8 bytes per id, because there may be millions.
    returned = array("q")
    for index, annotation in coco.annotations_of_images(source, in_coco):
        id = id_of(annotation.get("attributes"))
        if id is not None and id // ANNOTATIONS_PER_IMAGE == image_ids[index]:
            returned.append(id)
    ids = pa.array(returned, pa.int64())
    starts = plan.starts()
    columns = [f"annotations.list.element.{name}" for name in ("id", "predicted_iou", "stability_score")]
    # Only shards with images that came back, and only three small columns of them.
    for shard in sorted({bisect_right(starts, index) - 1 for index in image_at}):
        with open_shard(plan.output, shard) as file:
            masks = pc.list_flatten(file.read(columns=columns)["annotations"])
        for mask in masks.filter(pc.is_in(pc.struct_field(masks, "id"), value_set=ids)).to_pylist():
            if not is_sure(mask["predicted_iou"], mask["stability_score"], confident, stable):
                bounds = {"--confident": confident, "--stable": stable}
                limits = " ".join(f"{name} {value}" for name, value in bounds.items() if value is not None)
                raise ConfigError(
                    f"SOURCE {storage.redact(source.uri)} has masks that {limits} would not have exported: the one "
                    f"with {ID_ATTRIBUTE} {mask['id']} has a predicted IoU of {mask['predicted_iou']} and a stability "
                    f"of {mask['stability_score']}; give the thresholds of the export"
                )


def _check_dest(plan: Plan, dest: str) -> bool:
    """Whether an earlier call began DEST. Raises: ConfigError if it cannot be used for the corrected output."""
    if storage.normalize(dest) == plan.output:
        raise ConfigError("DEST and the OUTPUT to correct must be different folders")
    is_begun = storage.exists(storage.join(storage.normalize(dest), "_samray", "run.json"))
    if not is_begun and done_shards(dest):
        raise ConfigError(f"{storage.redact(dest)} has shards without a description: choose another DEST")
    return is_begun


def _labels(plan: Plan, begun: Plan | None, names: list[str]) -> dict[str, Any] | None:
    """The part of the identity about names: those of OUTPUT, then new ones of the person; None without any.

    begun: DEST if an earlier call began it, which decides. names: of the corrected file.
    """
    if begun is not None:
        recorded: dict[str, Any] | None = begun.run["identity"].get("labels")
        return recorded
    known = categories_of(plan.run["identity"]) or []
    # "object" is what an export calls masks without a name.
    new = [name for name in names if name not in known and not looks_unnamed(name)]
    if not known and not new:
        return None
    labels = {**plan.run["identity"].get("labels", {}), "categories": [*known, *new]}
    # The new ones were not asked of every image: without this SA-Co would have each as a negative of all other images.
    return {"asked_of_all": len(known), **labels} if new else labels


def _plan(
    plan: Plan,
    dest: str,
    source: Source,
    fingerprint: str,
    options: dict[str, Any],
    per_shard: int,
    labels: dict[str, Any] | None,
) -> Plan:
    """The plan of the corrected output: the same images. labels: as from `_labels`. Raises: ConfigError if dest has
    something else."""
    run = copy.deepcopy({key: value for key, value in plan.run.items() if key not in ("generation", "num_images")})
    run["identity"]["output"] = {"images_per_shard": per_shard}
    run.get("config", {}).get("output", {}).pop("embeddings", None)  # they are not copied
    run["identity"]["corrects"] = {
        "output": storage.redact(plan.output),
        "shards": fingerprint,
        "input_uri": storage.redact(source.uri),
        "files": source.fingerprint(),
        "sha256": source.sha256(),  # moving a mask may not change the file's size
        **options,
        # Corrections of corrections: the chain is part of the identity.
        "corrects": plan.run["identity"].get("corrects"),
    }
    run["images_per_shard"] = per_shard
    if labels is not None:
        run["identity"]["labels"] = labels
        run["categories"] = labels["categories"]
    storage.remove_leftovers(dest)
    images = plan.read_images([name for name in MANIFEST_SCHEMA.names if name != "shard"])
    return write_plan(dest, images, per_shard, run)
