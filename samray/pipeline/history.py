"""What earlier runs left in an output: how many images of each finished shard failed, and why.

Each shard's own metadata say so. That a resume need not open a hundred thousand files, a run also keeps the counts of
all shards in `_samray/failures.parquet`, by the version of each shard's file. They may be old, few or gone, and several
runs may write them: a count is believed only of the very file that storage lists, all others are read from the shards.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from samray import storage
from samray.dataset.generations import FOLDER
from samray.dataset.shards import SUCCESS, read_metadata, read_shard
from samray.dataset.tables import read_parquet
from samray.errors import NotFoundError, StorageError
from samray.pipeline.report import reason_of

logger = logging.getLogger(__name__)

NUM_THREADS = 32

SAVE_EVERY_S: Final = 60.0
"""What a driver that is killed has not saved, the next one reads from the shards."""

SAVE_PATIENCE_S: Final = 5.0
"""The run does not wait longer for counts that only save time."""

_SCHEMA: Final = pa.schema([("shard", pa.int32()), ("version", pa.string()), ("failures", pa.string())])


class FailureCounts:
    """The counts of an output, and the file that keeps them."""

    def __init__(self, output: str) -> None:
        self.uri = storage.join(output, FOLDER, "failures.parquet")
        self._kept: dict[int, tuple[str, str]] = {}
        self._saved_at = time.monotonic()
        self._is_saved = True

    @classmethod
    def load(cls, output: str) -> FailureCounts:
        """As they were saved last; none where there are none that can be read. Raises: StorageError."""
        counts = cls(output)
        try:
            data = storage.read_bytes(counts.uri)
            table = read_parquet(data).select(_SCHEMA.names).cast(_SCHEMA)
        except (NotFoundError, pa.ArrowException, KeyError, OSError, ValueError):
            return counts
        counts._kept = {
            shard: (version, failures)
            for shard, version, failures in zip(*(table[name].to_pylist() for name in _SCHEMA.names), strict=True)
        }
        return counts

    def get(self, shard: int, version: str | None) -> dict[str, int] | None:
        """Reason -> number of failed images of a shard's file; None where nothing is known of that very file."""
        kept = self._kept.get(shard)
        return None if kept is None or kept[0] != version else dict(json.loads(kept[1]))

    def set(self, shard: int, version: str | None, failures: Mapping[str, int]) -> None:
        """Keep what is known of this version of a shard's file; nothing where storage knows no versions."""
        if version is not None:
            self._kept[shard] = (version, json.dumps(failures))
            self._is_saved = False

    def save(self, every_s: float = 0.0) -> None:
        """Write the counts down, unless they are, or were so less than every_s ago. Never raises StorageError."""
        if self._is_saved or time.monotonic() < self._saved_at + every_s:
            return
        shards = sorted(self._kept)
        versions, failures = ([self._kept[shard][i] for shard in shards] for i in range(2))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table([shards, versions, failures], schema=_SCHEMA), sink, compression="zstd")
        try:
            with storage.time_limit(SAVE_PATIENCE_S):
                storage.put(self.uri, bytes(sink.getvalue()))
            self._is_saved = True
        except StorageError as error:  # without them a resume is slower, and all else the same
            logger.warning("%s", error)
        self._saved_at = time.monotonic()


def failures_of_shards(
    output: str, done: Mapping[int, str | None], kept: FailureCounts | None = None, *, trust_success: bool = True
) -> dict[int, dict[str, int]]:
    """Reason -> number of failed images, for each of these finished shards. Raises StorageError.

    done: shard -> version of its file. Nothing is read where `_SUCCESS` says that no image failed and trust_success
    lets it; else the footers of those shards alone of which nothing is kept.
    """
    if not done or (trust_success and _success_without_failures(output, len(done))):
        return {shard: {} for shard in done}
    kept = kept or FailureCounts.load(output)
    failures = {shard: kept.get(shard, version) for shard, version in done.items()}
    unknown = [shard for shard, counts in failures.items() if counts is None]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for shard, counts in zip(unknown, pool.map(lambda shard: _failures_of(output, shard), unknown), strict=True):
            # Replaced between the listing and now, it is the old version's file that these counts are said of: that
            # version is gone, and nobody will ask for it.
            kept.set(shard, done[shard], counts)
            failures[shard] = counts
    kept.save()
    return {shard: counts or {} for shard, counts in failures.items()}


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
