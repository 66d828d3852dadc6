"""A quality check as a job that can be stopped at any time and resumed.

The shards are split into pieces. A task measures a piece and writes two files below DEST/_quality/measured: first the
masks that repeat, then the numbers per image. The second is the mark that the piece is done; everything else is done
again. What compares images is computed from these files at the end, in seconds, and written again by each call.

DEST/_quality/quality.json records what is checked and how: a different check into the same DEST is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from samray import __version__, storage
from samray.audit.measure import measure_shards
from samray.errors import ConfigError, NotFoundError, StorageError
from samray.output.compact import fingerprint_finished
from samray.output.plan import Plan
from samray.storage.strict_json import parse_json
from samray.storage.tables import read_parquet

FOLDER: Final = "_quality"
OWN, AGAINST = "own", "against"
IMAGES_PER_PIECE: Final = 4096
IMAGES_PER_PIECE_READ: Final = 256
"""The same if the images are read, which takes a thousand times as long."""
_NAME: Final = re.compile(r"(own|against)-(\d{6})\.parquet")


@dataclass(frozen=True, slots=True)
class Piece:
    """Shards of an output: what one task measures."""

    source: str
    """OWN or AGAINST."""
    number: int
    shards: tuple[int, ...]
    num_images: int

    @property
    def name(self) -> str:
        return f"{self.source}-{self.number:06d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One check. Small and picklable, because it is sent to the workers."""

    plans: dict[str, Plan]
    """OWN: of OUTPUT; AGAINST: of a second output, if there is one."""
    dest: str
    depth: int
    """Folders of a file name that make its prefix."""
    images: bool
    """Whether the images are read."""
    fingerprints: dict[str, str]

    def measured(self, piece: Piece, kind: str = "") -> str:
        return storage.join(self.dest, FOLDER, "measured", f"{piece.name}{kind}.parquet")


def open_job(plan: Plan, against: Plan | None, dest: str, depth: int, images: bool) -> tuple[Job, list[Piece]]:
    """Make the job and all of its pieces. Writes DEST/_quality/quality.json unless it exists.

    Raises: ConfigError if an output is not finished or DEST has something else, StorageError.
    """
    plans = {OWN: plan} if against is None else {OWN: plan, AGAINST: against}
    fingerprints = {source: fingerprint_finished(of_source)[0] for source, of_source in plans.items()}
    job = Job(plans=plans, dest=dest, depth=depth, images=images, fingerprints=fingerprints)
    _claim(job)
    storage.remove_leftovers(storage.join(dest, FOLDER, "measured"))
    most = IMAGES_PER_PIECE_READ if images else IMAGES_PER_PIECE
    return job, [piece for source, of_source in plans.items() for piece in _cut(source, of_source, most)]


def _cut(source: str, plan: Plan, most: int) -> Iterator[Piece]:
    """Pieces of at most this many images, or of one shard."""
    shards: list[int] = []
    number = in_piece = 0
    for shard in range(plan.num_shards):
        size = plan.num_images_of(shard)
        if shards and in_piece + size > most:
            yield Piece(source, number, tuple(shards), in_piece)
            shards, in_piece, number = [], 0, number + 1
        shards.append(shard)
        in_piece += size
    if shards:
        yield Piece(source, number, tuple(shards), in_piece)


def _claim(job: Job) -> None:
    uri, where = storage.join(job.dest, FOLDER, "quality.json"), storage.redact(job.dest)
    wanted: dict[str, Any] = {
        "output": storage.redact(job.plans[OWN].output),
        "against": storage.redact(job.plans[AGAINST].output) if AGAINST in job.plans else None,
        "prefix_depth": job.depth,
        "images": job.images,
    }
    recorded = _read_json(uri)
    if recorded is None:
        # One file is enough to know: DEST may be somebody's bucket with millions.
        if next(storage.list_files(job.dest), None) if storage.is_dir_like(job.dest) else storage.exists(job.dest):
            raise ConfigError(f"DEST {where} is not empty, and not a samray quality check: choose another DEST")
        storage.check_output(job.dest)
        full = {**wanted, "shards": job.fingerprints, "samray_version": __version__}
        storage.put_new(uri, json.dumps(full, indent=2, sort_keys=True).encode() + b"\n")
        # Read back, because another check may have created it a moment earlier.
        recorded = _read_json(uri) or {}
    for key, value in wanted.items():
        if recorded.get(key) != value:
            raise ConfigError(
                f"DEST {where} has a different check ({key}: {recorded.get(key)} there, {value} now): choose another "
                "DEST, or delete that one"
            )
    if recorded.get("shards") != job.fingerprints:
        raise ConfigError(
            f"the labels have changed since the check in {where} was begun: choose another DEST, or delete that one"
        )


def _read_json(uri: str) -> dict[str, Any] | None:
    try:
        content = parse_json(storage.read_bytes(uri))
    except NotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{storage.redact(uri)} is not valid: {error}; choose another DEST") from error
    return content if isinstance(content, dict) else {}


def find_done(job: Job) -> set[str]:
    """The names of the measured pieces: one LIST. Raises: StorageError."""
    names = storage.list_names(storage.join(job.dest, FOLDER, "measured"))
    return {name.removesuffix(".parquet") for name in names if _NAME.fullmatch(name)}


def run_piece(job: Job, piece: Piece) -> Piece:
    """Measure a piece, and write it. Raises: StorageError."""
    plan = job.plans[piece.source]
    measured = measure_shards(plan.output, list(piece.shards), job.depth)
    images = measured.images
    if images.num_rows != piece.num_images:
        # Images are found again by their index in the plan.
        raise StorageError(
            f"shards {piece.shards[0]} to {piece.shards[-1]} of {storage.redact(plan.output)} have {images.num_rows} "
            f"rows, expected {piece.num_images} as planned; `samray verify` shows details"
        )
    if job.images:
        from samray.audit.pixels import measure_pixels

        images = measure_pixels(plan, piece.shards, images)
    storage.put(job.measured(piece, "-repeats"), parquet_bytes(measured.repeats))
    # Last, because its existence is the mark.
    storage.put(job.measured(piece), parquet_bytes(images))
    return piece


def read_measured(job: Job, piece: Piece, kind: str = "") -> pa.Table:
    """The table that `run_piece` wrote. Raises: StorageError."""
    return read_parquet(storage.read_bytes(job.measured(piece, kind)))


def parquet_bytes(table: pa.Table) -> bytes:
    """Encode a table as Parquet; the same rows give the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.combine_chunks(), sink, compression="zstd")
    return bytes(sink.getvalue())
