"""Many small shards into a few files of a given size, as an output of its own.

The compacted output lies beside the old one and is an output like any other: a plan with larger shards, the same rows
in the same order, `_SUCCESS` when all is there. Object stores cannot swap a set of files in one step, so nothing is
swapped: readers see the old set until they are given the new one, and neither is ever half of the other.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.errors import ConfigError, StorageError
from samray.output.append import missing_shards, stale_shards
from samray.output.manifests import MANIFEST_SCHEMA
from samray.output.plan import Plan, load_plan, write_plan
from samray.output.schema import STATS_SECONDS, samray_metadata, schema_of, shard_metadata
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactReport:
    """What `compact` did."""

    dest: str
    num_images: int
    num_files_before: int
    num_files: int
    num_files_skipped: int
    """Of `num_files`, found done."""


def compact(
    output: str, dest: str, file_bytes: int, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> CompactReport:
    """Write the rows of a finished OUTPUT into DEST, in files of about `file_bytes`; what is there already is kept.

    How many images a file gets is fixed when DEST is begun. on_progress(images done, images in all) is called after
    each file.

    Raises: ConfigError where OUTPUT is not finished or DEST holds something else, StorageError.
    """
    plan = load_plan(output)
    dest = storage.normalize(dest)
    if dest == plan.output:
        raise ConfigError("DEST must be another folder than OUTPUT: readers keep the old files until you switch")
    if storage.join(dest, "").startswith(storage.join(plan.output, FOLDER, "")):
        raise ConfigError(f"DEST must not lie within OUTPUT/{FOLDER}, where readers look for shards")
    fingerprint, num_bytes = look_at_finished(plan)
    target = _plan_of(plan, dest, max(1, plan.num_images * file_bytes // max(1, num_bytes)), fingerprint)
    storage.remove_leftovers(dest)
    done = done_shards(dest)
    starts = plan.starts()
    num_failed = 0
    num_done = 0
    for shard in range(target.num_shards):
        if shard in done:
            num_failed += sum(_failures(target, shard).values())
        else:
            start = shard * target.generations[0].images_per_shard
            table, stats = rows_between(plan, starts, start, target.num_images_of(shard))
            table = table.replace_schema_metadata(shard_metadata(target.run))
            commit_shard(dest, shard, table, {**stats, "shard": shard})
            num_failed += sum(stats["failures"].values())
        num_done += target.num_images_of(shard)
        on_progress(num_done, target.num_images)
    refuse_replaced(plan, fingerprint, dest)
    mark_success(dest, num_images=target.num_images, num_failed=num_failed)
    return CompactReport(
        dest=dest,
        num_images=plan.num_images,
        num_files_before=plan.num_shards,
        num_files=target.num_shards,
        num_files_skipped=len(done),
    )


def look_at_finished(plan: Plan) -> tuple[str, int]:
    """What changes when a shard of a finished output is replaced, and the bytes of all of them.

    Raises: ConfigError where one is missing or waits to be labelled again, StorageError.
    """
    where = storage.redact(plan.output)
    done = {shard: version for shard, version in shard_versions(plan.output).items() if shard < plan.num_shards}
    missing = len(missing_shards(plan, done))
    if missing:
        raise ConfigError(f"{where} is not finished: {missing} of {plan.num_shards} shards are missing; run it first")
    for shard in stale_shards(plan, done):
        raise ConfigError(f"{where} is not finished: shard {shard} waits to be labelled again; run it first")
    sizes = storage.list_names(storage.join(plan.output, FOLDER))
    held = [(shard, version, sizes.get(shard_name(shard))) for shard, version in sorted(done.items())]
    return hashlib.sha256(json.dumps(held).encode()).hexdigest(), sum(sizes.values())


def refuse_replaced(plan: Plan, fingerprint: str, dest: str) -> None:
    """Look once more, when all of an output was read, whether it still is what `look_at_finished` saw.

    Raises: StorageError if a shard was replaced: what was read may mix old rows with new ones.
    """
    try:
        unchanged = look_at_finished(plan)[0] == fingerprint
    except ConfigError:  # a shard is gone, or waits to be labelled again
        unchanged = False
    if not unchanged:
        raise StorageError(
            f"shards of {storage.redact(plan.output)} were replaced while they were read, so {storage.redact(dest)} "
            "may mix old rows with new ones and is not marked as finished; delete it and run again"
        )


def _plan_of(plan: Plan, dest: str, images_per_shard: int, fingerprint: str) -> Plan:
    """DEST's plan, as it was begun or, where there is nothing, with shards of `images_per_shard`.

    Raises: ConfigError, StorageError.
    """
    source = storage.redact(plan.output)
    if storage.exists(storage.join(dest, "_samray", "run.json")):
        target = load_plan(dest)
        if target.run.get("compacted_from") != source or target.num_images != plan.num_images:
            raise ConfigError(f"{storage.redact(dest)} holds something else than {source} compacted; give another DEST")
        if target.run.get("compacted_shards", fingerprint) != fingerprint:
            raise ConfigError(
                f"shards of {source} have been replaced since {storage.redact(dest)} was begun, which would mix old "
                "rows with new ones; give another DEST"
            )
        return target
    run = copy.deepcopy({key: value for key, value in plan.run.items() if key not in ("generation", "num_images")})
    for settings in (run["identity"], run.get("config", {})):
        settings.setdefault("output", {})["images_per_shard"] = images_per_shard
    run |= {"images_per_shard": images_per_shard, "compacted_from": source, "compacted_shards": fingerprint}
    images = plan.read_images([name for name in MANIFEST_SCHEMA.names if name != "shard"])
    return write_plan(dest, images, images_per_shard, run)


def rows_between(plan: Plan, starts: list[int], start: int, number: int) -> tuple[pa.Table, dict[str, Any]]:
    """`number` rows of the output from row `start` on, and the figures of how they were made, in proportion.

    starts: `plan.starts()`.
    """
    tables, sums = [], Counter[str]()
    stage_seconds: Counter[str] = Counter()
    for shard, first, count in _overlaps(starts, start, number):
        table, stats = _read_slice(plan.output, shard, first, count)
        tables.append(table.cast(schema_of(plan.run)))
        share = count / plan.num_images_of(shard)
        sums.update({key: stats.get(key, 0.0) * share for key in STATS_SECONDS})
        stage_seconds.update({name: seconds * share for name, seconds in stats.get("stage_seconds", {}).items()})
    rows = pa.concat_tables(tables)
    assert rows.num_rows == number, (rows.num_rows, number)
    failures = Counter(error.partition(":")[0] for error in rows["error"].drop_null().to_pylist())
    return rows, {
        "num_images": number,
        "num_masks": pc.sum(pc.list_value_length(rows["annotations"])).as_py() or 0,
        "failures": dict(failures),
        "stage_seconds": dict(stage_seconds),
        **{key: sums[key] for key in STATS_SECONDS},
    }


def _overlaps(starts: list[int], start: int, number: int) -> Iterator[tuple[int, int, int]]:
    """The shards that hold the rows from `start` on: shard, first row within it, number of rows."""
    for shard, (begin, end) in enumerate(pairwise(starts)):
        low, high = max(begin, start), min(end, start + number)
        if low < high:
            yield shard, low - begin, high - low


def _read_slice(output: str, shard: int, first: int, count: int) -> tuple[pa.Table, Mapping[str, Any]]:
    """Rows of a shard, by the row groups that hold them, without metadata; and the shard's stats."""
    with open_shard(output, shard) as file:
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
    return table.replace_schema_metadata(None), stats


def _failures(plan: Plan, shard: int) -> dict[str, int]:
    return dict(read_metadata(plan.output, shard).get("stats", {}).get("failures", {}))
