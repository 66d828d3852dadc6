"""Stage 5: one conditional PUT of the finished Parquet file. Its existence is the only mark that the shard is done."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.cluster.processes import end_with_ray
from samray.errors import NotFoundError
from samray.output.schema import STATS_SECONDS, count_named, reason_of, samray_metadata, with_stats
from samray.output.seals import digest_in
from samray.output.shards import put_shard, read_shard, shard_bytes, shard_uri
from samray.output.tile_files import remove_tiles
from samray.pipeline.attempts import ShardAttempts
from samray.pipeline.metrics import record, record_stages
from samray.pipeline.report import ShardSummary
from samray.pipeline.tiling import STAGE, merge_tiles, sizes_from
from samray.storage.tables import from_stream

if TYPE_CHECKING:
    from samray.config import Config
    from samray.output.plan import Plan

WRITTEN = pa.schema(
    [
        ("shard", pa.int64()),
        ("summary", pa.string()),  # of the newly labelled images
        ("failures", pa.string()),  # of the shard as stored: JSON, reason -> number of images
        ("version", pa.string()),  # of the file that failures describes; null if another attempt had written it
        ("digest", pa.string()),  # the checksum in that file
    ]
)


def write_shard(batch: pa.Table, *, plan: Plan, config: Config, run_id: str) -> pa.Table:
    """One row of LABELLED in; commits the shard; one row of WRITTEN out, all null if the shard was skipped.

    If the shard exists already, another attempt committed the same images: that is success.
    """
    end_with_ray()
    (labelled,) = batch.to_pylist()
    shard: int = labelled["shard"]
    if labelled["attempt"] == 0:
        return pa.Table.from_pylist([{"shard": shard}], schema=WRITTEN)
    storage.configure(config.storage)
    compression_level = config.output.compression_level
    started = time.monotonic()
    summary = ShardSummary.from_json(labelled["summary"])
    table = from_stream(labelled["rows"])
    sizes, indices = sizes_from(labelled["tiles"]), labelled["indices"]
    if sizes:
        try:
            table, indices, costs = merge_tiles(table, indices, sizes, plan, config, shard, labelled["retry"])
            is_committed = not indices
        except NotFoundError:
            if not storage.exists(shard_uri(plan.output, shard)):
                raise
            is_committed = True
        if is_committed:
            # Another attempt or driver has committed the shard and removed the tiles: success, as below.
            row = {"shard": shard, "summary": summary.to_json(), "failures": json.dumps(summary.failures)}
            return pa.Table.from_pylist([row], schema=WRITTEN)
        summary = _with_costs(summary, table, costs)
    # A shard that exists is replaced as a whole: its other rows are kept as they are.
    if labelled["retry"]:
        old = read_shard(plan.output, shard)
        metadata = old.schema.metadata if indices != labelled["indices"] else table.schema.metadata
        table = put_rows(old, indices, table)
        # With earlier rows, the shard keeps their generation: the next run does the rest.
        table = table.replace_schema_metadata(metadata)
        stats = merged_stats(samray_metadata(old.schema).get("stats", {}), summary, table)
        data = shard_bytes(with_stats(table, stats), compression_level)
        storage.put(shard_uri(plan.output, shard), data)
        num_bytes = len(data)
    else:
        stats = summary.to_dict()
        assert table.num_rows == plan.num_images_of(shard), (shard, table.num_rows)  # rows out = images in
        # Built in memory, because a conditional PUT takes the whole object at once.
        data = shard_bytes(with_stats(table, stats), compression_level)
        num_bytes = put_shard(plan.output, shard, data)
    version = _version_of(plan.output, shard, num_bytes)
    # After the commit: a death in between leaves marks of a shard that is done, which do no harm.
    ShardAttempts(plan.output, shard, run_id, number=labelled["attempt"]).clear(has_parts=bool(sizes))
    if sizes:
        remove_tiles(plan.output, shard)
    write_s = time.monotonic() - started
    record("samray_shards", num_bytes > 0)
    record("samray_written_bytes", num_bytes)
    record_stages({"write": write_s})
    seconds = {**summary.stage_seconds, "write": write_s}
    row = {"shard": shard, "summary": replace(summary, stage_seconds=seconds).to_json()}
    row |= {"failures": json.dumps(stats["failures"]), "version": version, "digest": digest_in(data)}
    return pa.Table.from_pylist([row], schema=WRITTEN)


def _with_costs(summary: ShardSummary, table: pa.Table, costs: Mapping[str, float]) -> ShardSummary:
    """The summary of a shard with the masks and costs of its tiles."""
    num_masks = pc.sum(pc.list_value_length(table["annotations"])).as_py() or 0
    sums = {key: getattr(summary, key) + costs.get(key, 0.0) for key in STATS_SECONDS}
    stages = {key.removeprefix(STAGE): value for key, value in costs.items() if key.startswith(STAGE)}
    stages = dict(Counter(summary.stage_seconds) + Counter(stages))
    return replace(summary, num_masks=num_masks, stage_seconds=stages, **sums)


def _version_of(output: str, shard: int, num_bytes: int) -> str | None:
    """The version of the file of num_bytes just written; None if it is another attempt's, or was replaced since."""
    if num_bytes == 0:
        return None
    version = storage.file_version(shard_uri(output, shard))
    # A version begins with the size: another one means that another attempt's file is there.
    return version if version is not None and version.split()[0] == str(num_bytes) else None


def put_rows(old: pa.Table, indices: list[int], new: pa.Table) -> pa.Table:
    """Replace the rows of old at these indices by those of new, in order; keeps the metadata of new."""
    assert new.num_rows == len(indices), (new.num_rows, indices)
    order = list(range(old.num_rows))
    for i, index in enumerate(indices):
        # New rows come after all old ones in the joined table.
        order[index] = old.num_rows + i
    joined = pa.concat_tables([old.replace_schema_metadata(new.schema.metadata), new])
    return joined.take(pa.array(order, pa.int64()))


def merged_stats(old: dict[str, Any], new: ShardSummary, table: pa.Table) -> dict[str, Any]:
    """Counts of the current table; times of both runs together."""
    # Counted again, because an image may have changed from failed to labelled or back.
    errors = table["error"].drop_null().to_pylist()
    merged = replace(
        new,
        num_images=table.num_rows,
        num_masks=pc.sum(pc.list_value_length(table["annotations"])).as_py() or 0,
        num_named=count_named(table),
        failures=dict(Counter(reason_of(error) for error in errors)),
        stage_seconds=dict(Counter(old.get("stage_seconds", {})) + Counter(new.stage_seconds)),
        device_seconds=old.get("device_seconds", 0.0) + new.device_seconds,
        held_seconds=old.get("held_seconds", 0.0) + new.held_seconds,
        gpu_seconds=old.get("gpu_seconds", 0.0) + new.gpu_seconds,
    )
    return merged.to_dict()
