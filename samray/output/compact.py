"""Combine many small shards into a few files of a given size, as a new output.

The compacted output is a separate and complete output: a plan with larger shards, the same rows in the same order, and
`_SUCCESS` when all is written. Object stores cannot replace a set of files in one step, so nothing is replaced: readers
use the old set until they are given the new one.

With a selection (`samray.output.where`) the compacted output has only those images and masks, with the ids they had.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.errors import ConfigError, StorageError
from samray.inputs.rows import take
from samray.output.append import missing_shards, stale_shards
from samray.output.manifests import MANIFEST_SCHEMA
from samray.output.plan import Plan, load_plan, write_plan
from samray.output.schema import STATS_SECONDS, reason_of, samray_metadata, schema_of, shard_metadata
from samray.output.selected import selected_images
from samray.output.shards import (
    FOLDER,
    commit_shard,
    done_shards,
    mark_success,
    open_shard,
    read_metadata,
    shard_name,
    shard_versions,
)
from samray.output.where import Where

_LEAST_IMAGE_BYTES: Final = 100
"""About what the URI and the name of an image without masks take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactReport:
    """Result of `compact`."""

    dest: str
    num_images: int
    num_files_before: int
    num_files: int
    num_files_skipped: int
    """Files, out of `num_files`, that existed already."""


def compact(
    output: str,
    dest: str,
    file_bytes: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    where: Where | None = None,
) -> CompactReport:
    """Write the rows of a finished OUTPUT to DEST, in files of about `file_bytes`; existing files are kept.

    The number of images per file is fixed when DEST is begun. on_progress(images done, all images) is called after each
    file. where: the images and masks to write; None writes all.

    Raises: ConfigError if OUTPUT is not finished or DEST has something else, StorageError.
    """
    plan = load_plan(output)
    dest = storage.normalize(dest)
    if dest == plan.output:
        raise ConfigError("DEST and OUTPUT must be different folders: readers keep the old files until you switch")
    if storage.join(dest, "").startswith(storage.join(plan.output, FOLDER, "")):
        raise ConfigError(f"DEST must not be inside OUTPUT/{FOLDER}, where readers look for shards")
    # An unfinished OUTPUT is refused before DEST is written.
    fingerprint, num_bytes = fingerprint_finished(plan)
    places, share = _places(plan, where)
    # Not less, however few masks are selected: a file's rows are in memory together.
    bytes_per_image = max(share * num_bytes / plan.num_images, _LEAST_IMAGE_BYTES)
    images_per_shard = max(1, min(int(file_bytes // bytes_per_image), len(places)))
    target = _plan_of(plan, dest, images_per_shard, fingerprint, places, where)
    # Temporary files of a compaction that was killed.
    storage.remove_leftovers(dest)
    done = done_shards(dest)
    starts = plan.starts()
    num_failed = 0
    num_done = 0
    for shard in range(target.num_shards):
        if shard in done:
            # A file of an earlier try: _SUCCESS counts the failures of all files.
            num_failed += sum(_failures(target, shard).values())
        else:
            start = shard * target.generations[0].images_per_shard
            table, stats = rows_at(plan, starts, places[start : start + target.num_images_of(shard)], where)
            # The metadata name DEST's own run, which has another shard size.
            table = table.replace_schema_metadata(shard_metadata(target.run))
            commit_shard(dest, shard, table, {**stats, "shard": shard})
            num_failed += sum(stats["failures"].values())
        num_done += target.num_images_of(shard)
        on_progress(num_done, target.num_images)
    # Checked at the end, after the last read: a shard could be replaced at any time before.
    refuse_replaced(plan, fingerprint, dest)
    mark_success(dest, num_images=target.num_images, num_failed=num_failed)
    return CompactReport(
        dest=dest,
        num_images=target.num_images,
        num_files_before=plan.num_shards,
        num_files=target.num_shards,
        num_files_skipped=len(done),
    )


def _places(plan: Plan, where: Where | None) -> tuple[npt.NDArray[np.int64], float]:
    """Indices in the plan of the images to write, and the fraction of their masks to write.

    Raises: ConfigError if nothing is selected.
    """
    if where is None:
        return np.arange(plan.num_images), 1.0
    where.check(schema_of(plan.run))
    places, share = selected_images(plan, where)
    if not len(places):
        raise ConfigError(f"where: {where.text} selects none of the {plan.num_images:,} images")
    return places, share


def fingerprint_finished(plan: Plan) -> tuple[str, int]:
    """A fingerprint that changes if a shard of a finished output is replaced, and the bytes of all shards.

    Raises: ConfigError if a shard is missing or must be labelled again, StorageError.
    """
    where = storage.redact(plan.output)
    done = {shard: version for shard, version in shard_versions(plan.output).items() if shard < plan.num_shards}
    missing = len(missing_shards(plan, done))
    if missing:
        raise ConfigError(f"{where} is not finished: {missing} of {plan.num_shards} shards are missing; run it first")
    for shard in stale_shards(plan, done):
        raise ConfigError(f"{where} is not finished: shard {shard} must be labelled again; run it first")
    # If storage reports no versions, a size may still show that a shard was replaced.
    sizes = storage.list_names(storage.join(plan.output, FOLDER))
    shard_files = [(shard, version, sizes.get(shard_name(shard))) for shard, version in sorted(done.items())]
    return hashlib.sha256(json.dumps(shard_files).encode()).hexdigest(), sum(sizes.values())


def refuse_replaced(plan: Plan, fingerprint: str, dest: str) -> None:
    """Check, after reading all of an output, that it is still what `fingerprint_finished` saw.

    Raises: StorageError if a shard was replaced: the data that was read may mix old and new rows.
    """
    try:
        unchanged = fingerprint_finished(plan)[0] == fingerprint
    except ConfigError:  # a shard is gone, or must be labelled again
        unchanged = False
    if not unchanged:
        raise StorageError(
            f"shards of {storage.redact(plan.output)} were replaced while they were read, so {storage.redact(dest)} "
            "may mix old rows with new ones and is not marked as finished; delete it and run again"
        )


def _plan_of(
    plan: Plan,
    dest: str,
    images_per_shard: int,
    fingerprint: str,
    places: npt.NDArray[np.int64],
    where: Where | None,
) -> Plan:
    """The plan in DEST or, if it has none, a new one with shards of `images_per_shard`.

    Raises: ConfigError, StorageError.
    """
    source = storage.redact(plan.output)
    if storage.exists(storage.join(dest, "_samray", "run.json")):
        target = load_plan(dest)
        # DEST of an earlier try: go on only if it copies the same rows of the same OUTPUT.
        recorded, wanted = target.run.get("compacted_where", {}), _selection(plan, where)
        if recorded != wanted:
            raise ConfigError(
                f"{storage.redact(dest)} was begun with another selection (--where "
                f"{recorded.get('where', 'not given')} there, {wanted.get('where', 'not given')} now); choose another "
                "DEST"
            )
        if target.run.get("compacted_from") != source or target.num_images != len(places):
            raise ConfigError(f"{storage.redact(dest)} is not empty, and not a compacted {source}; choose another DEST")
        # DEST of an older version has no fingerprint, and is resumed, too.
        if target.run.get("compacted_shards", fingerprint) != fingerprint:
            raise ConfigError(
                f"shards of {source} have been replaced since {storage.redact(dest)} was begun, which would mix old "
                "rows with new ones; choose another DEST"
            )
        return target
    run = copy.deepcopy({key: value for key, value in plan.run.items() if key not in ("generation", "num_images")})
    for settings in (run["identity"], run.get("config", {})):
        settings.setdefault("output", {})["images_per_shard"] = images_per_shard
        # Embeddings are not copied: they would be most of the bytes, and OUTPUT has them.
        settings["output"].pop("embeddings", None)
    run |= {"images_per_shard": images_per_shard, "compacted_from": source, "compacted_shards": fingerprint}
    if selection := _selection(plan, where):
        run["compacted_where"] = selection
    images = plan.read_images([name for name in MANIFEST_SCHEMA.names if name != "shard"])
    if where is not None:
        images = take(images, pa.array(places))
    return write_plan(dest, images, images_per_shard, run)


def _selection(plan: Plan, where: Where | None) -> dict[str, Any]:
    """The selection as DEST records it; `of`: that of OUTPUT, if OUTPUT is a compacted selection itself."""
    before = plan.run.get("compacted_where")
    return {**(where.to_json() if where else {}), **({"of": before} if before else {})}


def rows_between(plan: Plan, starts: list[int], start: int, number: int) -> tuple[pa.Table, dict[str, Any]]:
    """`number` rows of the output from row `start`, and their share of the figures about how they were made.

    starts: from `plan.starts()`.
    """
    return rows_at(plan, starts, np.arange(start, start + number), None)


def rows_at(
    plan: Plan, starts: list[int], places: npt.NDArray[np.int64], where: Where | None
) -> tuple[pa.Table, dict[str, Any]]:
    """`rows_between`, for images at any places of the plan, ascending, with the masks that `where` selects."""
    tables, sums = [], Counter[str]()
    stage_seconds: Counter[str] = Counter()
    number = len(places)
    for shard, rows in rows_by_shard(starts, places):
        count = len(rows)
        table, stats = _read_slice(plan, shard, int(rows[0]), int(rows[-1] - rows[0]) + 1)
        if count < table.num_rows:
            table = table.take(pa.array(rows - rows[0]))
        if where is not None:
            table = where.take(table, np.ones(count, bool), where.flags(table)[1])
        tables.append(table)
        # A row has no times of its own: each gets an equal part of its shard's.
        share = count / plan.num_images_of(shard)
        sums.update({key: stats.get(key, 0.0) * share for key in STATS_SECONDS})
        stage_seconds.update({name: seconds * share for name, seconds in stats.get("stage_seconds", {}).items()})
    rows = pa.concat_tables(tables)
    assert rows.num_rows == number, (rows.num_rows, number)
    failures = Counter(reason_of(error) for error in rows["error"].drop_null().to_pylist())
    return rows, {
        "num_images": number,
        "num_masks": pc.sum(pc.list_value_length(rows["annotations"])).as_py() or 0,
        "failures": dict(failures),
        "stage_seconds": dict(stage_seconds),
        **{key: sums[key] for key in STATS_SECONDS},
    }


def rows_by_shard(starts: list[int], places: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """The shards that have images of these places, each with their rows in it."""
    shards = np.searchsorted(starts, places, side="right") - 1
    for shard in np.unique(shards).tolist():
        yield shard, places[shards == shard] - starts[shard]


def _read_slice(plan: Plan, shard: int, first: int, count: int) -> tuple[pa.Table, Mapping[str, Any]]:
    """Rows of a shard without metadata, read by row groups, and the shard's stats."""
    with open_shard(plan.output, shard) as file:
        # Only the groups with wanted rows; `skipped` is the number of rows before the first of them.
        groups, skipped, begin = [], 0, 0
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            if end <= first:
                skipped = end
            elif begin < first + count:
                groups.append(group)
            begin = end
        stats = samray_metadata(file.schema_arrow).get("stats", {})
        table = file.read_row_groups(groups).slice(first - skipped, count)
        # Other writers may have chosen large strings and lists. Here, because a column of another type does not cast.
        return table.replace_schema_metadata(None).cast(schema_of(plan.run)), stats


def _failures(plan: Plan, shard: int) -> dict[str, int]:
    return dict(read_metadata(plan.output, shard).get("stats", {}).get("failures", {}))
