"""`samray.export`: write an output in the format of another tool."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samray import storage
from samray.cluster.tasks import run_tasks, wants_ray
from samray.exports.formats import options_of
from samray.exports.job import assemble, find_done, mark_finished, open_job, run_piece
from samray.exports.pieces import Done
from samray.output.plan import load_plan
from samray.output.where import make_where
from samray.pipeline.preflight import check_fan_out
from samray.progress import ProgressView


@dataclass
class ExportReport:
    """Result of `samray.export`."""

    dest: str
    format: str
    num_images: int = 0
    """Images in DEST, without failed ones."""
    num_masks: int = 0
    num_left_out: int = 0
    """Masks of those images below the thresholds of confident and stable; for saco those without a name, for geojson
    and geoparquet those of images without a CRS."""
    num_failed: int = 0
    """Failed images of OUTPUT, left out."""
    num_unreadable: int = 0
    """Images that could not be copied because they cannot be read any more."""
    num_images_not_selected: int = 0
    """Images that `where` does not select."""
    num_masks_not_selected: int = 0
    """Masks of exported images that `where` does not select."""
    num_pieces: int = 0
    num_pieces_skipped: int = 0
    """Pieces that an earlier call had finished."""
    files: list[str] = field(default_factory=list)
    """Names, relative to DEST, of the files with many images; those of single images are too many to list."""
    wall_s: float = 0.0

    def add(self, done: Done) -> None:
        """Add the counts of a finished piece."""
        self.num_images += done.num_images
        self.num_masks += done.num_masks
        self.num_left_out += done.num_left_out
        self.num_failed += done.num_failed
        self.num_unreadable += done.num_unreadable
        self.num_images_not_selected += done.num_images_not_selected
        self.num_masks_not_selected += done.num_masks_not_selected


def export(
    output: str | Path,
    dest: str | Path,
    *,
    format: str,
    where: str | None = None,
    quality: str | None = None,
    partial: bool = False,
    ray: bool | None = None,
    address: str | None = None,
    progress: bool = True,
    **options: Any,
) -> ExportReport:
    """Export output to dest, or finish an export that was begun there.

    format, options: as listed by `samray export --help`, with underscores: with_images=True for --with-images.
    where: SQL expression that selects images and masks, as for --where. quality: where the output's
    `samray.quality` is, for its columns, if not at the default place.
    partial: export the finished shards of an unfinished output. ray: use Ray Data tasks (None: for large outputs, or if
    address names a cluster). Raises: ConfigError before anything is written, StorageError if storage cannot be reached.
    """
    started = time.monotonic()
    checked = options_of(format, options)
    # Before OUTPUT is read and DEST claimed: a cluster that does not respond must leave nothing behind.
    check_fan_out(str(dest), ray, address)
    plan = load_plan(str(output))
    selection = make_where(where, plan.output, quality)
    job, pieces = open_job(plan, str(dest), format, checked, partial=partial, where=selection)
    done_pieces = find_done(job, pieces)
    report = ExportReport(storage.redact(job.dest), format, num_pieces=len(pieces), num_pieces_skipped=len(done_pieces))
    for mark in done_pieces.values():
        report.add(mark)
    # Counts of finished pieces come from their marks, so that the report covers the whole export.
    todo = [piece for piece in pieces if piece.number not in done_pieces]
    images_of = {piece.number: piece.num_images for piece in pieces}
    num_done = sum(images_of[number] for number in done_pieces)
    total = sum(images_of.values())
    view = ProgressView(total, num_done, enabled=progress)
    view.note = "exporting"
    with view:
        # By the images that are left: a resume with little to do starts no Ray.
        on_ray = bool(todo) and wants_ray(ray, address, total - num_done)
        for done in run_tasks(functools.partial(run_piece, job), todo, on_ray=on_ray, address=address):
            report.add(done)
            num_done += images_of[done.piece]
            view.update(num_done=num_done, num_failed=report.num_failed)
        view.update(note="assembling files")
        # In this process: each assembled file is one stream, whatever the number of workers.
        report.files = assemble(job, pieces)
    mark_finished(job, num_images=report.num_images, num_masks=report.num_masks, num_failed=report.num_failed)
    report.wall_s = time.monotonic() - started
    return report
