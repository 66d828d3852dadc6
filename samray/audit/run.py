"""`samray.quality`: check the quality of an output."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.audit.compare import Comparison, compare
from samray.audit.job import AGAINST, OWN, Job, Piece, find_done, open_job, parquet_bytes, read_measured, run_piece
from samray.audit.page import write_page
from samray.audit.pixels import check_extra
from samray.audit.regions import find_regions
from samray.cluster.tasks import run_tasks, wants_ray
from samray.errors import ConfigError
from samray.output.compact import refuse_replaced
from samray.output.plan import load_plan
from samray.output.quality_columns import IMAGES_FOLDER, default_quality_folder
from samray.pipeline.preflight import check_fan_out
from samray.progress import ProgressView

MAX_REVIEW: Final = 1000
"""Images in DEST/review.parquet."""
MAX_DEPTH: Final = 100

GROUPS: Final = pa.schema(
    [("kind", pa.string()), ("group", pa.string()), ("metric", pa.string()), ("num_images", pa.int64())]
    + [(name, pa.float64()) for name in ("median", "median_of_others", "d", "psi", "p")]
    + [("drifts", pa.bool_())]
)


@dataclass(slots=True)
class QualityReport:
    """Result of `samray.quality`."""

    dest: str
    page: str
    counts: dict[str, int] = field(default_factory=dict)
    """Finding -> number of images, groups or regions; the columns of DEST/images."""
    num_pieces: int = 0
    num_pieces_skipped: int = 0
    """Pieces that an earlier call had measured."""
    wall_s: float = 0.0


def quality(
    output: str | Path,
    dest: str | Path | None = None,
    *,
    images: bool = False,
    against: str | Path | None = None,
    prefix_depth: int = 1,
    num_examples: int = 24,
    ray: bool | None = None,
    address: str | None = None,
    progress: bool = True,
) -> QualityReport:
    """Check a finished output, or finish a check that was begun in dest (default: OUTPUT/_samray/quality).

    images: also read the images: for exact and near duplicates, and dark, blank and blurred images. against: a second
    output, in which to look for the same images. prefix_depth: folders of a file name that make a group. num_examples:
    images on the page. ray: use Ray Data tasks (None: for large outputs, or if address names a cluster).
    Raises: ConfigError before anything is written, StorageError.
    """
    started = time.monotonic()
    plan = load_plan(str(output))
    dest_uri = default_quality_folder(plan.output) if dest is None else storage.normalize(str(dest))
    if not 1 <= prefix_depth <= MAX_DEPTH:
        raise ConfigError(f"prefix_depth={prefix_depth} must be from 1 to {MAX_DEPTH}")
    if images:
        check_extra()
    check_fan_out(dest_uri, ray, address)
    other = None if against is None else load_plan(str(against))
    job, pieces = open_job(plan, other, dest_uri, prefix_depth, images)
    done = find_done(job)
    todo = [piece for piece in pieces if piece.name not in done]
    _measure(job, pieces, todo, ray=ray, address=address, progress=progress)
    comparison, starts = _compare(job, [piece for piece in pieces if piece.source == OWN], pieces)
    for source, of_source in job.plans.items():
        refuse_replaced(of_source, job.fingerprints[source], dest_uri)
    review = _write(job, comparison, [piece for piece in pieces if piece.source == OWN], starts)
    page = write_page(plan, dest_uri, comparison, review, images=images, num_examples=num_examples)
    report = QualityReport(storage.redact(dest_uri), page, comparison.counts, len(pieces), len(pieces) - len(todo))
    # Last: it marks the check as complete.
    storage.put(storage.join(dest_uri, "quality.json"), json.dumps(comparison.counts, indent=2).encode() + b"\n")
    report.wall_s = time.monotonic() - started
    return report


def _measure(
    job: Job, pieces: Sequence[Piece], todo: list[Piece], *, ray: bool | None, address: str | None, progress: bool
) -> None:
    total, left = (sum(piece.num_images for piece in of_kind) for of_kind in (pieces, todo))
    view = ProgressView(total, total - left, enabled=progress)
    view.note = "measuring"
    with view:
        # As images that are labelled: an image's pixels take longer to read than to start Ray for a few hundred, and
        # rows alone take an eighth of what an export takes.
        work = left * 100 if job.images else left // 8
        on_ray = bool(todo) and wants_ray(ray, address, work)
        for piece in run_tasks(functools.partial(run_piece, job), todo, on_ray=on_ray, address=address):
            view.update(num_done=view.num_done + piece.num_images)
        view.update(note="comparing")


def _compare(job: Job, of_output: list[Piece], pieces: Sequence[Piece]) -> tuple[Comparison, list[int]]:
    """The comparison, and the index of each piece's first image, followed by the number of images."""
    tables = [read_measured(job, piece) for piece in of_output]
    starts = [0, *np.cumsum([table.num_rows for table in tables]).tolist()]
    measured = pa.concat_tables(tables).combine_chunks()
    others = [read_measured(job, piece) for piece in pieces if piece.source == AGAINST]
    with_masks = measured.filter(pc.greater(measured["num_masks"], 0))["prefix"].value_counts()
    num_of_prefix = {entry["values"]: entry["counts"] for entry in with_masks.to_pylist()}
    regions = find_regions(
        lambda: (
            (read_measured(job, piece, "-repeats"), start) for piece, start in zip(of_output, starts, strict=False)
        ),
        num_of_prefix,
    )
    return compare(measured, pa.concat_tables(others) if others else None, regions), starts


def _write(job: Job, comparison: Comparison, of_output: list[Piece], starts: list[int]) -> pa.Table:
    """Write the tables; returns the list for review, with the shard and row of each image."""
    for piece, (start, stop) in zip(of_output, pairwise(starts), strict=True):
        name = storage.join(job.dest, IMAGES_FOLDER, f"part-{piece.number:06d}.parquet")
        storage.put(name, parquet_bytes(comparison.images.slice(start, stop - start)))
    tests = pa.Table.from_pylist([asdict(test) for test in comparison.tests], schema=GROUPS)
    storage.put(storage.join(job.dest, "groups.parquet"), parquet_bytes(tests))
    storage.put(storage.join(job.dest, "regions.parquet"), parquet_bytes(comparison.regions.table))
    review = review_of(job, comparison)
    storage.put(storage.join(job.dest, "review.parquet"), parquet_bytes(review.drop_columns(["shard", "row"])))
    return review


def review_of(job: Job, comparison: Comparison) -> pa.Table:
    """The worst images first, with their URIs: an INPUT of `samray label`."""
    plan = job.plans[OWN]
    first_of_shard = np.array(plan.starts())
    # Of images of equal rank there are none, so the order is that of the ranks.
    at = np.argsort(comparison.images["rank"].to_numpy(), kind="stable")[:MAX_REVIEW]
    at = at[(comparison.images["outlier"].to_numpy() > 0)[at] | _reasons_any(comparison, at)]
    shards = np.searchsorted(first_of_shard, at, side="right") - 1
    rows = at - first_of_shard[shards]
    rows_of_shard: dict[int, Any] = {}
    # By shard: the plan keeps the part of the manifest that it read last.
    for shard in sorted(set(shards.tolist())):
        rows_of_shard[shard] = plan.read_shard(shard).select(["uri", "file_name"]).to_pylist()
    located = [rows_of_shard[shard][row] for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]
    table = comparison.images.take(pa.array(at))
    extra = {
        "uri": pa.array([location["uri"] for location in located], pa.string()),
        "file_name": pa.array([location["file_name"] for location in located], pa.string()),
        "shard": pa.array(shards, pa.int32()),
        "row": pa.array(rows, pa.int32()),
    }
    for name, column in reversed(extra.items()):
        table = table.add_column(0, name, column)
    return table


def _reasons_any(comparison: Comparison, at: Any) -> Any:
    table = comparison.images
    flags = [n for n in ("few_masks", "many_masks", "is_dark", "is_blank", "is_blurred") if n in table.column_names]
    return np.any([table[name].to_numpy()[at] for name in flags], axis=0)
