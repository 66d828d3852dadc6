"""What earlier runs left in an output: the counts in its shards' metadata."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from samray import storage
from samray.dataset.shards import SUCCESS, read_metadata, read_shard
from samray.errors import NotFoundError
from samray.pipeline.report import reason_of

NUM_THREADS = 32


def failures_of_shards(output: str, shards: Collection[int]) -> dict[int, dict[str, int]]:
    """Reason -> number of failed images, for each of these finished shards. Reads their footers only.

    Nothing at all is read where `_SUCCESS` says that no image failed. Raises StorageError.
    """
    if not shards or _success_without_failures(output, len(shards)):
        return {shard: {} for shard in shards}
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return dict(zip(shards, pool.map(lambda shard: _failures_of(output, shard), shards), strict=True))


def _success_without_failures(output: str, num_shards: int) -> bool:
    try:
        counts = json.loads(storage.read_bytes(storage.join(output, SUCCESS)))
    except (NotFoundError, ValueError):
        return False
    return bool(counts.get("num_failed") == 0) and counts.get("num_shards") == num_shards


def _failures_of(output: str, shard: int) -> dict[str, int]:
    stats = read_metadata(output, shard).get("stats", {})
    if "failures" in stats:
        return dict(stats["failures"])
    errors = read_shard(output, shard, ["error"])["error"].to_pylist()
    return dict(Counter(reason_of(error) for error in errors if error is not None))
