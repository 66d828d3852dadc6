"""Sample a large output in seconds: the footers of its shards, and a random sample of row groups.

Footers have the number of images, masks and failures of a shard, and how long it took. Everything else is estimated
from row groups: a random one from each of several equal strata, which gives every image the same probability. The
sample is deterministic for an output.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from samray.errors import ImageError
from samray.output.schema import reason_of, samray_metadata
from samray.output.shards import open_shard
from samray.storage.footers import Bounds, statistics

MAX_FOOTERS: Final = 4096
"""Maximum number of footers read. With more shards they are a sample, and counts become estimates."""

SAMPLE_IMAGES: Final = 4096
MAX_GROUPS: Final = 512
"""Maximum number of row groups in a sample."""

_EXAMPLE_GROUPS: Final = 64
_FOOTER_THREADS: Final = 32
_READ_THREADS: Final = 16
_ROWS_AT_ONCE: Final = 16
_SEED: Final = 0

NUMBERS: Final = (
    "image",
    "status",
    "annotations.list.element.area",
    "annotations.list.element.predicted_iou",
    "annotations.list.element.stability_score",
    "annotations.list.element.point_coords",
)
"""The columns with everything about masks except their pixels."""

T = TypeVar("T")
Draw = tuple[int, int]
"""A shard and the index of a row group in it."""


@dataclass(frozen=True, slots=True)
class Footer:
    """The content of a shard's footer."""

    shard: int
    group_rows: tuple[int, ...]
    """Number of images in each row group."""
    group_fails: tuple[bool, ...]
    """Whether a row group may have failed images."""
    num_masks: int
    failures: Mapping[str, int]
    """Reason -> number of failed images."""
    stats: Mapping[str, Any]
    """How the shard was made, as in `samray.pipeline.report.ShardSummary`; empty if it was not recorded."""
    labels: Mapping[str | None, int] = field(default_factory=dict)
    """Name -> number of masks, None for those without; empty if not asked for, or in an output without names."""

    @property
    def num_images(self) -> int:
        return sum(self.group_rows)

    @property
    def num_failed(self) -> int:
        return sum(self.failures.values())


def read_footers(output: str, shards: Iterable[int], *, labels: bool = False) -> list[Footer]:
    """Read the footers of these finished shards, or of a sample of MAX_FOOTERS. Raises: StorageError.

    labels: also count the masks of each name, from the column of names, which takes one more request per shard.
    """
    chosen = spread(sorted(shards), MAX_FOOTERS)
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        return list(pool.map(lambda shard: _footer(output, shard, labels), chosen))


def _footer(output: str, shard: int, labels: bool) -> Footer:
    with open_shard(output, shard) as file:
        return _footer_of(shard, file, labels)


def _footer_of(shard: int, file: pq.ParquetFile, labels: bool) -> Footer:
    metadata = file.metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    stats = samray_metadata(file.schema_arrow).get("stats", {})
    # The footer's counts are believed only if they fit the number of rows.
    if stats.get("num_images") == metadata.num_rows:
        num_masks, failures = stats["num_masks"], stats["failures"]
    else:  # for example imported
        num_masks, failures = _count_rows(file)
    return Footer(
        shard,
        tuple(group.num_rows for group in groups),
        tuple(_may_have_failed(status) for status in statistics(metadata, "status")),
        num_masks,
        failures,
        stats,
        _count_labels(file) if labels else {},
    )


def _may_have_failed(status: Bounds | None) -> bool:
    """Whether a row group may have failed images. status: statistics of its column of that name, if it has any."""
    return status is None or status.min != "ok"


def count_labels(masks: pa.StructArray) -> Counter[str | None]:
    """Number of masks by name, None for those without a name. masks: with a field `label`."""
    return Counter({pair["values"]: pair["counts"] for pair in masks.field("label").value_counts().to_pylist()})


def _count_labels(file: pq.ParquetFile) -> Counter[str | None]:
    """`count_labels` of a shard; empty for a shard without names."""
    counts: Counter[str | None] = Counter()
    annotation = file.schema_arrow.field("annotations").type.value_type
    if annotation.get_field_index("label") >= 0:
        for batch in file.iter_batches(SAMPLE_IMAGES, columns=["annotations.list.element.label"]):
            counts.update(count_labels(batch["annotations"].flatten()))
    return counts


def _count_rows(file: pq.ParquetFile) -> tuple[int, Counter[str]]:
    """Number of masks, and of failed images by reason, from two small columns."""
    num_masks, failures = 0, Counter[str]()
    # The ids alone tell the number of masks.
    for batch in file.iter_batches(SAMPLE_IMAGES, columns=["annotations.list.element.id", "error"]):
        num_masks += len(batch["annotations"].flatten())
        failures.update(reason_of(error) for error in batch["error"].drop_null().to_pylist())
    return num_masks, failures


def spread(items: Sequence[T], number: int) -> list[T]:
    """At most `number` of the items, in order: a random one from each of `number` equal parts."""
    if len(items) <= number:
        return list(items)
    draw = random.Random(_SEED)
    # Edges of `number` parts whose sizes differ by at most one.
    edges = [i * len(items) // max(number, 1) for i in range(number + 1)]
    return [items[draw.randrange(low, high)] for low, high in pairwise(edges)]


def draw_groups(footers: Sequence[Footer], num_images: int = SAMPLE_IMAGES) -> list[Draw]:
    """A random sample of row groups with about this many images; all of them if there are no more images."""
    groups = [(f.shard, i) for f in footers for i, rows in enumerate(f.group_rows) if rows]
    total = sum(footer.num_images for footer in footers)
    if total <= num_images and len(groups) <= MAX_GROUPS:
        return groups
    return spread(groups, min(MAX_GROUPS, max(1, num_images * len(groups) // max(total, 1))))


def read_groups(output: str, groups: Iterable[Draw], columns: Sequence[str]) -> Iterator[tuple[Draw, pa.Table]]:
    """Read columns of row groups; only the first rows of very large ones. Raises: StorageError."""

    def read(file: pq.ParquetFile, draw: Draw) -> pa.Table:
        # Only the first batch: a row group of another writer may have millions of rows.
        batches = file.iter_batches(SAMPLE_IMAGES, row_groups=[draw[1]], columns=list(columns))
        return pa.Table.from_batches([next(batches)])

    return _by_shard(output, groups, read)


def read_rows(output: str, rows: Mapping[Draw, Sequence[int]]) -> Iterator[tuple[Draw, list[dict[str, Any]]]]:
    """Read whole rows, by their indices in row groups, in order, without holding a whole row group. Raises:
    StorageError."""

    def read(file: pq.ParquetFile, draw: Draw) -> list[dict[str, Any]]:
        images: list[dict[str, Any]] = []
        first = 0
        # Whole rows with masks are large, so only few are held at once.
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[draw[1]]):
            in_batch = [row - first for row in sorted(rows[draw]) if first <= row < first + len(batch)]
            images += batch.take(pa.array(in_batch, pa.int64())).to_pylist()
            first += len(batch)
            if len(images) == len(rows[draw]):
                break
        return images

    return _by_shard(output, rows, read)


def examples_by_reason(output: str, footers: Sequence[Footer], number: int) -> dict[str, list[tuple[str, str]]]:
    """Reason -> up to `number` pairs (uri, message), from at most _EXAMPLE_GROUPS row groups.

    Raises: StorageError.
    """
    examples: dict[str, list[tuple[str, str]]] = defaultdict(list)
    by_reason: dict[str, list[Footer]] = defaultdict(list)
    for footer in footers:
        for reason in footer.failures:
            by_reason[reason].append(footer)
    # Sample shards per reason: a sample over all failures would miss rare reasons.
    share = max(1, _EXAMPLE_GROUPS // max(len(by_reason), 1))
    groups = {
        draw for of_reason in by_reason.values() for draw in spread(_failing_groups(spread(of_reason, share)), share)
    }

    def read(file: pq.ParquetFile, draw: Draw) -> list[tuple[str, str]]:
        table = file.read_row_group(draw[1], columns=["error", "uri"])
        return list(zip(table["error"].to_pylist(), table["uri"].to_pylist(), strict=True))

    for _, rows in _by_shard(output, sorted(groups), read):
        for error, uri in rows:
            if error is not None and len(examples[reason_of(error)]) < number:
                examples[reason_of(error)].append((uri, ImageError.parse(error).message))
    return examples


def _failing_groups(footers: Sequence[Footer]) -> list[Draw]:
    return [(footer.shard, i) for footer in footers for i, fails in enumerate(footer.group_fails) if fails]


def _by_shard(
    output: str, draws: Iterable[Draw], read: Callable[[pq.ParquetFile, Draw], T]
) -> Iterator[tuple[Draw, T]]:
    """Call `read` on each row group, shard by shard, to open each file once."""
    groups: dict[int, list[Draw]] = defaultdict(list)
    for draw in draws:
        groups[draw[0]].append(draw)

    def body(shard: int) -> list[tuple[Draw, T]]:
        with open_shard(output, shard) as file:
            return [(draw, read(file, draw)) for draw in groups[shard]]

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for of_shard in pool.map(body, groups):
            yield from of_shard
