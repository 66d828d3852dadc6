"""Stages 1 and 2: the shards to do, and their encoded images.

A shard is one row, because Ray Data never splits or merges rows. Encoded bytes are sent instead of pixels: they are a
tenth of the size.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data.block import BlockMetadata

from samray import storage
from samray.cluster.processes import end_with_ray
from samray.cluster.sizes import IO_CPUS
from samray.errors import ImageError
from samray.inputs.listing import fetch_images
from samray.output.credentials import reveal
from samray.output.schema import samray_metadata
from samray.output.shards import read_shard

if TYPE_CHECKING:
    from samray.config import Config
    from samray.output.plan import Plan
    from samray.prompts import Prompt

SOURCE = pa.schema(
    [
        ("shard", pa.int64()),
        ("retry", pa.bool_()),
        ("prompts", pa.string()),
        ("credentials", pa.string()),
        ("tiles", pa.string()),
        ("part", pa.string()),
    ]
)
"""retry: the shard is finished, and only some of its images must be labelled again. prompts: user prompts as JSON,
index in the shard -> list; null without prompts. credentials: of `read_credentials`, as JSON; null if none. tiles:
sizes of the images to label in tiles as JSON, index in the shard -> [height, width, version]; null if none. part: null
for the row of a shard; for a row with some tiles of one image, which comes before it, [number, index, first tile, last
tile], as JSON."""

FETCHED = pa.schema(
    [
        ("shard", pa.int64()),
        ("retry", pa.bool_()),
        ("fetch_s", pa.float64()),
        ("credentials", pa.string()),  # as in SOURCE, for images that the labeler fetches
        ("tiles", pa.string()),
        ("part", pa.string()),  # both as in SOURCE
        (
            "images",
            pa.large_list(
                pa.struct(
                    [
                        ("index", pa.int32()),  # index in the shard
                        ("image_id", pa.int64()),
                        ("file_name", pa.string()),
                        ("uri", pa.string()),
                        ("data", pa.large_binary()),  # null: see reason; if both are null, the labeler fetches it
                        ("reason", pa.string()),
                        ("message", pa.string()),
                        ("prompts", pa.string()),  # JSON; null without prompts
                    ]
                )
            ),
        ),
    ]
)

SHARDS_PER_TASK = 256
"""Shards per read task: 62 tasks for a million images in shards of 64."""

MAX_BYTES_AHEAD = 512 * 2**20
"""Maximum encoded bytes per shard in the object store; the labeler fetches the images beyond it."""


def shards_to_do(table: pa.Table) -> ray.data.Dataset:
    """Stage 1. Stream a source_table: one block with one row per shard."""
    source = _ShardSource(table)
    read: Any = ray.data.read_datasource
    # One block per row: a shard is never split, nor put together with another.
    dataset: ray.data.Dataset = read(source, num_cpus=IO_CPUS, concurrency=1, override_num_blocks=len(source))
    return dataset


def source_table(
    todo: Mapping[int, bool],
    prompts: Mapping[int, Mapping[int, list[Prompt]]] | None = None,
    credentials: Mapping[int, Mapping[str, str]] = {},
    tiles: Mapping[int, Mapping[int, Sequence[Any]]] = {},
    parts: Mapping[int, Sequence[tuple[int, int, int]]] = {},
) -> pa.Table:
    """A row of SOURCE for each shard. todo: whether the shard is finished, and only some of its images must be redone.

    Paths are not included: the fetch stage reads them from the manifest. prompts: shard -> index in it -> list; sent
    with the shard, because the prompt file may change during the run. credentials: shard -> those of its images, which
    are not stored anywhere. tiles: shard -> index in it -> height and width of the images to label in tiles. parts:
    shard -> index, first and last tile (exclusive) of each part that gets a row before that of the shard.
    """
    rows: list[dict[str, Any]] = []
    number = itertools.count(1)
    for shard, retry in todo.items():
        row: dict[str, Any] = {"shard": shard, "retry": retry}
        row["prompts"] = None if prompts is None else _to_json(prompts[shard])
        row["credentials"] = json.dumps(credentials[shard]) if shard in credentials else None
        row["tiles"] = json.dumps(tiles[shard]) if tiles.get(shard) else None
        for part in parts.get(shard, ()):
            # Only the size of its own image: a shard may have many large ones, each with many parts.
            tiles_of_image = json.dumps({part[0]: tiles[shard][part[0]]})
            rows.append({**row, "tiles": tiles_of_image, "part": json.dumps([next(number), *part])})
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=SOURCE)


def _to_json(prompts: Mapping[int, list[Prompt]]) -> str:
    return json.dumps({index: [prompt.to_json() for prompt in user_prompts] for index, user_prompts in prompts.items()})


class _ShardSource(ray.data.Datasource):
    """A few read tasks with many rows each; Ray Data splits their output into the requested number of blocks.

    With ray.data.from_blocks, which puts each shard into the object store separately, a large plan takes minutes before
    any actor starts (jobs/scale.py start).
    """

    def __init__(self, table: pa.Table) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def estimate_inmemory_data_size(self) -> int:
        return int(self.table.nbytes)

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ray.data.ReadTask]:
        """Tasks with nearly equal numbers of rows: Ray Data splits each into as many blocks as the largest one
        needs."""
        num_tasks = -(-len(self) // SHARDS_PER_TASK)
        ends = [len(self) * i // num_tasks for i in range(num_tasks + 1)]
        return [_read_task(self.table.slice(start, end - start)) for start, end in itertools.pairwise(ends)]


def _read_task(table: pa.Table) -> ray.data.ReadTask:
    # The true size of the table, so that Ray Data need not guess.
    metadata = BlockMetadata(num_rows=table.num_rows, size_bytes=table.nbytes, exec_stats=None, input_files=None)
    return ray.data.ReadTask(lambda: [table], metadata, SOURCE)


def fetch_shard(
    batch: pa.Table, *, plan: Plan, config: Config, retry_failed: bool, reads_images: bool = True
) -> pa.Table:
    """Stage 2. One row of SOURCE in, one row of FETCHED out: for each image its bytes, or why there are none.

    reads_images: False to leave the images to the labeler.
    """
    storage.configure(config.storage)
    end_with_ray()
    (source,) = batch.to_pylist()
    shard = source["shard"]
    started = time.monotonic()
    tiles = {int(index) for index in json.loads(source["tiles"] or "{}")}
    passed_on = {key: source[key] for key in ("shard", "retry", "credentials", "tiles", "part")}
    if source["part"] is not None:
        return pa.Table.from_pylist([{**passed_on, "fetch_s": 0.0, "images": []}], schema=FETCHED)
    table = plan.read_shard(shard)
    credentials = json.loads(source["credentials"] or "{}")
    prompts = None if source["prompts"] is None else json.loads(source["prompts"])
    indices = indices_to_redo(plan, shard, retry_failed) if source["retry"] else list(range(table.num_rows))
    images: list[dict[str, Any]] = []
    num_bytes = 0
    # A few at a time, so that the limit on bytes is noticed before much more than it is read.
    for start in range(0, len(indices), 16):
        part = indices[start : start + 16]
        rows = table.take(part)
        # An actor reads the image of tiles in parts, by itself.
        untiled = pa.array([i for i, index in enumerate(part) if index not in tiles], pa.int64())
        # Sizes of the listing; unknown ones count as soon as they are read.
        known = [row["size"] or 0 for row in rows.take(untiled).select(["size"]).to_pylist()]
        ahead = reads_images and num_bytes + sum(known) <= MAX_BYTES_AHEAD and len(untiled) > 0
        sample = functools.partial(sample_files, plan, credentials)
        fetched: dict[int, Any] = {}
        if ahead:
            data_of = fetch_images(reveal(rows.take(untiled), credentials), config.input, sample)
            fetched = dict(zip(untiled.to_pylist(), data_of, strict=True))
        num_bytes += sum(len(data) for data in fetched.values() if isinstance(data, bytes))
        for i, (index, row) in enumerate(zip(part, rows.to_pylist(), strict=True)):
            data = fetched.get(i)
            failed = isinstance(data, ImageError)
            images.append(
                {
                    "index": index,
                    "image_id": row["image_id"],
                    "file_name": row["file_name"],
                    "uri": row["uri"],
                    # None also for images beyond the limit.
                    "data": None if failed else data,
                    "reason": data.reason if isinstance(data, ImageError) else None,
                    "message": data.message if isinstance(data, ImageError) else None,
                    "prompts": None if prompts is None else json.dumps(prompts.get(str(index), [])),
                }
            )
    row = {**passed_on, "fetch_s": time.monotonic() - started, "images": images}
    return pa.Table.from_pylist([row], schema=FETCHED)


SAMPLED_SHARDS = 8

SAMPLED_FILES_PER_SHARD = 4


def sample_files(plan: Plan, credentials: Mapping[str, str]) -> list[str]:
    """Files of a few images from all over the plan, to check whether the input can be read at all.

    credentials: of one shard; files that need others are left out.
    """
    # From all over the plan: neighbours may all be in the same unreadable folder.
    shards = {plan.num_shards * i // SAMPLED_SHARDS for i in range(SAMPLED_SHARDS)}
    files: list[str] = []
    for shard in sorted(shards):
        rows = plan.read_shard(shard).select(["container", "uri"]).to_pylist()
        step = -(-len(rows) // SAMPLED_FILES_PER_SHARD)
        # A tar or Parquet file represents all images in it.
        files += [row["container"] or row["uri"] for row in rows[::step]]
    files += credentials
    files = [credentials.get(file, file) for file in dict.fromkeys(files) if file]
    return [file for file in files if not storage.is_redacted(file)]


def indices_to_redo(plan: Plan, shard: int, retry_failed: bool) -> list[int]:
    """Indices in a finished shard of the images that changed since and, with retry_failed, of failed images."""
    table = read_shard(plan.output, shard, ["image", "status"])
    # Generation of the plan when the shard was written: only later changes count.
    made_by = samray_metadata(table.schema).get("generation", 0)
    changed = plan.changed_images(shard, after=made_by)
    rows = zip(pc.struct_field(table["image"], "image_id").to_pylist(), table["status"].to_pylist(), strict=True)
    return [
        index
        for index, (image_id, status) in enumerate(rows)
        if image_id in changed or (retry_failed and status == "failed")
    ]
