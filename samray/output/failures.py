"""Failed images of earlier runs in an output: how many per finished shard, and why.

Each shard's metadata have these counts. To avoid opening 100,000 files on resume, a run also stores the counts of all
shards in `_samray/failures.parquet`, by the version of each shard's file. That file may be outdated, incomplete or
missing, and several runs may write it: a count is used only if the version matches; else the shard is read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from samray import storage
from samray.errors import NotFoundError, StorageError
from samray.output.manifests import FOLDER
from samray.output.schema import reason_of, samray_metadata
from samray.output.seals import CHECKSUM_KEY, is_intact, leave_room, seal, seal_of
from samray.output.shards import open_shard, read_success, shard_uri
from samray.storage.strict_json import parse_json
from samray.storage.tables import footer_value, read_parquet

logger = logging.getLogger(__name__)

NUM_THREADS = 32

_TAIL_BYTES: Final = 32 * 1024
"""Read from the end of each shard. The metadata are the last part of a footer."""

SAVE_EVERY_S: Final = 60.0
"""Seconds between saves. After a crash, the next driver reads the unsaved counts from the shards."""

SAVE_PATIENCE_S: Final = 5.0
"""Maximum seconds that the run waits for these counts, which only save time."""

_SCHEMA: Final = pa.schema(
    [("shard", pa.int32()), ("version", pa.string()), ("failures", pa.string()), ("digest", pa.string())]
)
"""digest: the shard's checksum (`samray.output.seals`), for `_SUCCESS`; null for a shard without one."""


class FailureCounts:
    """The failure counts of an output, and the file that stores them."""

    def __init__(self, output: str) -> None:
        self.uri = storage.join(output, FOLDER, "failures.parquet")
        self._kept: dict[int, list[Any]] = {}
        """Shard -> version, failures as JSON, digest."""
        self._saved_at = time.monotonic()
        self._is_saved = True

    @classmethod
    def load(cls, output: str) -> FailureCounts:
        """Load the last saved counts; empty if the file is missing or unreadable. Raises: StorageError."""
        counts = cls(output)
        try:
            data = storage.read_bytes(counts.uri)
            # A damaged count would be reported as true; the shards have the counts, too.
            if is_intact(data) is False:
                return counts
            table = read_parquet(data).select(_SCHEMA.names).cast(_SCHEMA)
        except (NotFoundError, pa.ArrowException, KeyError, OSError, ValueError):
            return counts
        columns = (table[name].to_pylist() for name in _SCHEMA.names)
        counts._kept = {shard: kept for shard, *kept in zip(*columns, strict=True)}
        return counts

    def get(self, shard: int, version: str | None) -> dict[str, int] | None:
        """Reason -> number of failed images in this version of a shard's file; None if not known."""
        kept = self._kept.get(shard)
        return None if kept is None or kept[0] != version else dict(parse_json(kept[1]))

    def digests(self, versions: Mapping[int, str | None]) -> dict[int, str | None]:
        """The known checksums of these versions of files (shard -> version)."""
        kept = {shard: self._kept.get(shard) for shard in versions}
        return {
            shard: counts[2] for shard, counts in kept.items() if counts is not None and counts[0] == versions[shard]
        }

    def set(self, shard: int, version: str | None, failures: Mapping[str, int], digest: str | None = None) -> None:
        """Record the counts of this version of a shard's file; does nothing if storage has no versions."""
        if version is not None:
            self._kept[shard] = [version, json.dumps(failures), digest]
            self._is_saved = False

    def save(self, every_s: float = 0.0) -> None:
        """Save the counts, unless nothing changed or the last save was less than every_s ago. Never raises
        StorageError."""
        if self._is_saved or time.monotonic() < self._saved_at + every_s:
            return
        shards = sorted(self._kept)
        columns = [[self._kept[shard][i] for shard in shards] for i in range(3)]
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, _SCHEMA, compression="zstd") as writer:
            leave_room(writer)
            writer.write_table(pa.table([shards, *columns], schema=_SCHEMA))
        try:
            # Never wait for this file as long as for a shard (storage.timeout_s).
            with storage.time_limit(SAVE_PATIENCE_S):
                storage.put(self.uri, seal(sink.getvalue()))
            self._is_saved = True
        except StorageError as error:  # without the file only a resume is slower
            logger.warning("%s", error)
        # Also after a failure, so that storage that is down is not tried again after every shard.
        self._saved_at = time.monotonic()


def failures_of_shards(
    output: str, done: Mapping[int, str | None], kept: FailureCounts | None = None, *, trust_success: bool = True
) -> dict[int, dict[str, int]]:
    """Reason -> number of failed images, for each of these finished shards. Raises StorageError.

    done: shard -> version of its file. Reads nothing if trust_success is set and `_SUCCESS` says that no image failed;
    else reads only the footers of shards whose counts are not stored.
    """
    if not done or (trust_success and _success_without_failures(output, len(done))):
        return {shard: {} for shard in done}
    kept = kept or FailureCounts.load(output)
    failures = {shard: kept.get(shard, version) for shard, version in done.items()}
    unknown = [shard for shard, counts in failures.items() if counts is None]
    # Local files take no time to wait for, and a pool takes longer than reading one.
    pool = contextlib.nullcontext() if storage.is_local(output) else ThreadPoolExecutor(NUM_THREADS)
    with pool as threads:
        in_order = map if threads is None else threads.map
        results = in_order(lambda shard: _read_failures(output, shard, done[shard]), unknown)
        for shard, (counts, digest) in zip(unknown, results, strict=True):
            # If a shard was replaced after the listing, this records its counts under the old version, which is
            # not looked up again.
            kept.set(shard, done[shard], counts, digest)
            failures[shard] = counts
    kept.save()
    return {shard: counts or {} for shard, counts in failures.items()}


def _success_without_failures(output: str, num_shards: int) -> bool:
    success = read_success(output)
    return success is not None and (success.num_failed, success.num_shards) == (0, num_shards)


def _read_failures(output: str, shard: int, version: str | None) -> tuple[dict[str, int], str | None]:
    """Reason -> number of failed images of a shard, and its checksum. Reads rows only if the footer has no counts."""
    stats, digest = _peek(output, shard, version)
    if "failures" in stats:
        return dict(stats["failures"]), digest
    with open_shard(output, shard) as file:
        stats = samray_metadata(file.schema_arrow).get("stats", {})
        if "failures" in stats:
            return dict(stats["failures"]), seal_of(file.metadata)
        errors = file.read(columns=["error"])["error"].drop_null().to_pylist()
        return dict(Counter(reason_of(error) for error in errors)), seal_of(file.metadata)


def _peek(output: str, shard: int, version: str | None) -> tuple[dict[str, Any], str | None]:
    """A shard's stats and checksum by one small read, without parsing the footer; no stats if that is not possible."""
    size = storage.size_of_version(version)
    if size is None:
        return {}, None
    tail = storage.read_bytes(shard_uri(output, shard), max(0, size - _TAIL_BYTES), _TAIL_BYTES)
    metadata, digest = footer_value(tail, b"samray"), footer_value(tail, CHECKSUM_KEY)
    try:
        stats = parse_json(metadata or b"{}").get("stats", {})
        return dict(stats), None if digest is None else digest.decode("ascii")
    except (ValueError, AttributeError, TypeError):
        return {}, None
