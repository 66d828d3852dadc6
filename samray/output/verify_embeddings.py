"""The checks of `verify` on the embedding files of an output; each yields one sentence per problem."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa

from samray import storage
from samray.errors import NotFoundError, StorageError
from samray.output.embeddings import (
    EMBEDDING,
    FOLDER,
    IMAGES_PER_FILE,
    SCHEMA,
    embedding_of,
    file_name,
    file_uri,
    kind_of,
    num_files,
)
from samray.output.plan import Plan
from samray.output.schema import samray_metadata
from samray.output.seals import is_intact
from samray.storage.tables import open_parquet

_AGAIN: Final = "delete the shard of these images, too, and run the same command again"


def has_embeddings(plan: Plan) -> bool:
    """Whether the run of an output stores embeddings."""
    return kind_of(plan.run["identity"]) != "none"


def check_embeddings(plan: Plan, shard: int, sizes: Mapping[int, tuple[int, int]], deep: bool) -> Iterator[str]:
    """Check the embedding files of a finished shard.

    sizes: image_id -> (height, width) of its images that did not fail. deep: also decode all values.
    """
    ids = plan.read_shard(shard)["image_id"].to_pylist()
    for file in range(num_files(plan, shard)):
        places = ids[file * IMAGES_PER_FILE : (file + 1) * IMAGES_PER_FILE]
        yield from _check_file(plan, shard, file, places, sizes, deep)


def check_names(plan: Plan) -> Iterator[str]:
    """Check that there are no other files than those of the plan's shards, finished or not."""
    wanted = {file_name(shard, file) for shard in range(plan.num_shards) for file in range(num_files(plan, shard))}
    for name in sorted(storage.list_names(storage.join(plan.output, FOLDER))):
        if name not in wanted and not name.startswith("."):
            yield f"{FOLDER}/{name} is not in the plan"


def _check_file(
    plan: Plan, shard: int, file: int, ids: list[int], sizes: Mapping[int, tuple[int, int]], deep: bool
) -> Iterator[str]:
    name = f"{FOLDER}/{file_name(shard, file)}"
    try:
        data = storage.read_bytes(file_uri(plan.output, shard, file))
    except NotFoundError:
        yield f"{name} is missing; {_AGAIN}"
        return
    if not is_intact(data):
        yield f"{name} is damaged: its checksum does not match; {_AGAIN}"
        return
    try:
        table = open_parquet(data).read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        yield f"{name} cannot be read as Parquet: {error}"
        return
    if not table.schema.equals(SCHEMA):
        yield f"{name} has columns or types that samray does not write: {table.schema.names}"
        return
    if samray_metadata(table.schema).get("identity") != plan.run["identity"]:
        yield f"{name} was written by a run with other settings"
    have = table["image_id"].to_pylist()
    wanted = [image_id for image_id in ids if image_id in sizes]
    for image_id in sorted(set(wanted) - set(have)):
        yield f"{name}: image {image_id} has no embedding"
    # An image that failed when it was redone may have one left: its row says that it failed.
    if [image_id for image_id in ids if image_id in set(have)] != have:
        yield f"{name} has images twice, in another order than the plan, or of other files: {have}"
    for i in range(table.num_rows):
        row = table.slice(i, 1).to_pylist()[0]
        yield from _check_row(plan, f"{name}: image {row['image_id']}", row, sizes, deep)


def _check_row(
    plan: Plan, name: str, row: Mapping[str, Any], sizes: Mapping[int, tuple[int, int]], deep: bool
) -> Iterator[str]:
    identity = plan.run["identity"]
    if row["dtype"] != kind_of(identity):
        yield f"{name} is stored as {row['dtype']}, the run asks for {kind_of(identity)}"
    if sizes.get(row["image_id"], hw := (row["height"], row["width"])) != hw:
        yield f"{name} is of {hw[1]}x{hw[0]} pixels, its row has another size"
    if not deep:
        return
    try:
        embedding = embedding_of(row, identity, name)
    except StorageError as error:
        yield str(error)
        return
    if EMBEDDING not in embedding.features:
        yield f"{name} has no {EMBEDDING}"
    for feature, values in embedding.features.items():
        if not np.isfinite(values).all():
            yield f"{name} has values in {feature} that are not finite"
