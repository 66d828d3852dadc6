"""An export as a job that can be stopped at any time and resumed.

The images are split into pieces. A task writes a piece's files, each all or nothing, and then a mark that names them. A
piece is done if its mark and files exist; everything else is done again. Formats with large files of many images write
fragments below DEST/_export, which are streamed into one file once all of its pieces are done.

DEST/_export/export.json records what is exported and how: a different export into the same DEST is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from samray import __version__, storage
from samray.errors import ConfigError, NotFoundError, StorageError
from samray.exports.base import ExportOptions, Format
from samray.exports.checks import check_rows
from samray.exports.formats import FORMATS, find_format
from samray.exports.images import Rows, read_rows
from samray.exports.pieces import Done, Files, Job, LeftOut, Piece, cut, put_each
from samray.output.append import stale_shards
from samray.output.file_names import ENDINGS, FOLDER, shared_stems
from samray.output.plan import Plan
from samray.output.schema import categories_of, schema_of
from samray.output.shards import FOLDER as SHARDS
from samray.output.shards import shard_number, shard_versions
from samray.output.where import Where
from samray.storage.strict_json import parse_json

MAX_LISTED: Final = 1_000_000
"""Exports of more images trust the marks: DEST is not listed to check that each file still exists, only the fragments
and assembled files."""

_PUT_THREADS: Final = 16

# --- before ---------------------------------------------------------------------------------------------------------


def open_job(
    plan: Plan, dest: str, name: str, options: ExportOptions, *, partial: bool, where: Where | None = None
) -> tuple[Job[Any], list[Piece]]:
    """Make the job and all of its pieces. Writes DEST/_export/export.json unless it exists.

    Raises: ConfigError if OUTPUT is not finished (without partial) or DEST has something else,
    StorageError.
    """
    dest = storage.normalize(dest)
    fmt = find_format(name)
    if where is not None:
        where.check(schema_of(plan.run))
    sizes = _shard_sizes(plan)
    # Sizes and versions of the shards: together they tell whether OUTPUT changes during the export.
    versions = shard_versions(plan.output)
    missing = plan.num_shards - len(sizes)
    if missing and not partial:
        raise ConfigError(
            f"{missing} of {plan.num_shards} shards of {storage.redact(plan.output)} are missing: finish the run, "
            "or export the finished shards with --partial"
        )
    stale = set() if partial else stale_shards(plan, sizes)
    if stale:
        raise ConfigError(
            f"{len(stale)} of {plan.num_shards} shards of {storage.redact(plan.output)} must be labelled again: "
            "finish the run, or export the finished shards with --partial"
        )
    if not sizes:
        raise ConfigError(f"{storage.redact(plan.output)} has no finished shards yet: there is nothing to export")
    shards = [Rows(shard, 0, (n := plan.num_images_of(shard)), n) for shard in sorted(sizes)]
    # Only the names that would collide, not a table of all images.
    stems = shared_stems(plan, fmt.stem_of, (*ENDINGS, *fmt.endings)) if fmt.names_files(options) else {}
    job = Job(
        plan=plan,
        dest=dest,
        format=name,
        options=options,
        shards=tuple(sorted(sizes)),
        fingerprint=_fingerprint({shard: versions.get(shard) for shard in sizes}),
        stems=stems,
        where=where,
    )
    # Refused before DEST is claimed.
    fmt.check(job)
    _claim(job, sizes)
    storage.remove_leftovers(dest)
    return job, list(cut(shards, *sizes_of(fmt, options)))


def sizes_of(fmt: Format, options: ExportOptions) -> tuple[int, int | None]:
    """Images per piece, and images per file that is assembled from pieces; None if one file holds all."""
    return fmt.sizes(options)


def _shard_sizes(plan: Plan) -> dict[int, int]:
    names = storage.list_names(storage.join(plan.output, SHARDS))
    numbers = ((shard_number(name), size) for name, size in names.items())
    return {number: size for number, size in numbers if number is not None and number < plan.num_shards}


def _fingerprint(versions: Mapping[int, str | None]) -> str:
    return hashlib.sha256(json.dumps(sorted(versions.items())).encode()).hexdigest()


def _claim(job: Job[Any], sizes: dict[int, int]) -> None:
    """Record in DEST what this export is, or check an existing record. sizes: bytes of the shards."""
    plan, dest = job.plan, job.dest
    shards = json.dumps(sorted(sizes.items())).encode()
    wanted = {
        "format": job.format,
        "options": job.options.chosen(),
        "categories": categories_of(plan.run["identity"]),
        "run": plan.run["identity"],
        "num_images": plan.num_images,
        "shards": hashlib.sha256(shards).hexdigest(),
        "versions": job.fingerprint,
    }
    if job.where is not None:
        wanted |= job.where.to_json()
    uri = storage.join(dest, FOLDER, "export.json")
    where = storage.redact(dest)
    recorded = _read_json(uri)
    if recorded is None:
        # One file is enough to know: DEST may be somebody's bucket with millions.
        if next(storage.list_files(dest), None) if storage.is_dir_like(dest) else storage.exists(dest):
            raise ConfigError(f"DEST {where} is not empty, and not a samray export: choose another DEST")
        storage.check_output(dest)
        full = {**wanted, "output": storage.redact(plan.output), "samray_version": __version__}
        storage.put_new(uri, json.dumps(full, indent=2, sort_keys=True).encode() + b"\n")
        # Read back, because another export may have created it a moment earlier.
        recorded = _read_json(uri) or {}
    if recorded.get("run") != wanted["run"]:
        raise ConfigError(f"DEST {where} has an export of another run: choose another DEST")
    for key in ("format", "options", "categories", "where", "quality"):
        # Options are compared as objects, too: an option that is new since then counts as its default.
        if recorded.get(key) != wanted.get(key) and not (
            key == "options" and _same_options(job.options, recorded.get(key))
        ):
            raise ConfigError(
                f"DEST {where} has a different export ({key}: {recorded.get(key)} there, {wanted.get(key)} now): "
                "choose another DEST"
            )
    counted = {key: recorded.get(key) for key in ("num_images", "shards", "versions")}
    counted["versions"] = counted["versions"] or job.fingerprint  # samray 0.1 did not write it
    if counted != {key: wanted[key] for key in counted}:
        raise ConfigError(
            f"{storage.redact(plan.output)} has changed since the export in {where} was begun: choose another DEST"
        )


def _same_options(options: ExportOptions, recorded: Any) -> bool:
    """Whether held, as JSON, are these options. An option that did not exist then counts as its default."""
    try:
        return type(options)(**recorded) == options
    except (TypeError, ConfigError):
        return False


def _read_json(uri: str) -> dict[str, Any] | None:
    try:
        content = parse_json(storage.read_bytes(uri))
    except NotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{storage.redact(uri)} is not valid: {error}; choose another DEST") from error
    return content if isinstance(content, dict) else {}


def find_done(job: Job[Any], pieces: list[Piece]) -> dict[int, Done]:
    """Piece -> the content of its mark, for each finished piece whose files still exist. Raises: StorageError."""
    marks = storage.list_names(storage.join(job.dest, FOLDER, "done"))
    marked = [piece for piece in pieces if piece.mark.rpartition("/")[2] in marks]
    if not marked:
        return {}
    with ThreadPoolExecutor(_PUT_THREADS) as pool:
        # Marks are small, and each takes a request: several at a time.
        contents = list(pool.map(lambda piece: _read_json(storage.join(job.dest, piece.mark)), marked))
    done = [(piece, Done(**mark)) for piece, mark in zip(marked, contents, strict=True) if mark is not None]
    pieces_folder = f"{FOLDER}/pieces/"
    believed = job.plan.num_images > MAX_LISTED
    if believed and not FORMATS[job.format].assembled(job, 0):
        return {piece.number: mark for piece, mark in done}
    if believed:  # formats with fragments have only a few files outside of folders
        existing = {pieces_folder + name for name in storage.list_names(storage.join(job.dest, FOLDER, "pieces"))}
        existing |= storage.list_names(job.dest).keys()
    else:
        start = len(storage.join(job.dest, ""))
        existing = {entry.uri[start:] for entry in storage.list_files(job.dest)}
    done_by_number = {}
    for piece, mark in done:
        # Once a file is assembled its fragments are deleted, so that they are then allowed to be missing.
        assembled = all(name in existing for name in FORMATS[job.format].assembled(job, piece.file))
        looked_for = (name for name in mark.files if not believed or name.startswith(pieces_folder))
        missing = (name for name in looked_for if name not in existing)
        if all(assembled and name.startswith(pieces_folder) for name in missing):
            done_by_number[piece.number] = mark
    return done_by_number


# --- a piece --------------------------------------------------------------------------------------------------------


def run_piece(job: Job[Any], piece: Piece) -> Done:
    """Write the piece's files and then its mark. Raises: ConfigError, StorageError."""
    # Files first, the mark last: a piece that dies in between is done again.
    rows = _SoundRows(job, piece)
    files, left_out = _put_all(job.dest, FORMATS[job.format].write(job, piece, rows))
    done = Done(
        piece.number,
        num_images=rows.num_images,
        num_masks=rows.num_masks - left_out.num_masks,
        num_left_out=left_out.num_masks,
        num_failed=rows.num_failed,
        num_unreadable=left_out.num_photos,
        files=files,
        num_images_not_selected=rows.num_images_not_selected,
        num_masks_not_selected=rows.num_masks_not_selected,
    )
    storage.put(storage.join(job.dest, piece.mark), json.dumps(asdict(done)).encode())
    return done


class _SoundRows:
    """The selected rows of a piece's images that did not fail. Counts them while they are read, so that none is
    kept."""

    def __init__(self, job: Job[Any], piece: Piece) -> None:
        self._output, self._rows, self._where = job.plan.output, piece.rows, job.where
        self.num_images = self.num_failed = self.num_masks = 0
        self.num_images_not_selected = self.num_masks_not_selected = 0

    def __iter__(self) -> Iterator[pa.Table]:
        for table in read_rows(self._output, self._rows):
            ok = table.filter(pc.equal(table["status"], "ok"))
            self.num_failed += table.num_rows - ok.num_rows
            if ok.num_rows:
                check_rows(ok)
                ok = ok if self._where is None else self._selected(ok, self._where)
            self.num_images += ok.num_rows
            self.num_masks += _num_masks(ok)
            if ok.num_rows:
                yield ok

    def _selected(self, rows: pa.Table, where: Where) -> pa.Table:
        images, masks = where.flags(rows)
        selected = where.take(rows, images, masks)
        of_images = rows.filter(pa.array(images))
        self.num_images_not_selected += rows.num_rows - selected.num_rows
        self.num_masks_not_selected += _num_masks(of_images) - _num_masks(selected)
        return selected


def _num_masks(rows: pa.Table) -> int:
    return pc.sum(pc.list_value_length(rows["annotations"])).as_py() or 0


def _put_all(dest: str, files: Files) -> tuple[list[str], LeftOut]:
    """Write the files, several at a time: each waits for the disk or the network. Returns their names."""
    names: list[str] = []
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(_PUT_THREADS) as pool:

        def put(name: str, data: bytes) -> None:
            names.append(name)
            waiting.append(pool.submit(storage.put, storage.join(dest, name), data))
            if len(waiting) > _PUT_THREADS:  # no more than these are in memory
                waiting.popleft().result()

        # A generator's files are made one by one while earlier ones are being written.
        left_out = put_each(files, put)
        for future in waiting:
            future.result()
    return names, left_out


# --- after ----------------------------------------------------------------------------------------------------------


def assemble(job: Job[Any], pieces: list[Piece]) -> list[str]:
    """Assemble the files that consist of fragments, then delete the fragments. Returns the files' names.

    All pieces must be done. Raises: StorageError.
    """
    by_file: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_file.setdefault(piece.file, []).append(piece)
    names: list[str] = []
    fragments = storage.list_names(storage.join(job.dest, FOLDER, "pieces"))
    for file, file_pieces in sorted(by_file.items()):
        for name in FORMATS[job.format].assembled(job, file):
            names.append(name)
            # A file appears whole or not at all, so one that exists is finished.
            if not storage.exists(storage.join(job.dest, name)):
                storage.put_chunks(storage.join(job.dest, name), FORMATS[job.format].chunks(job, name, file_pieces))
    with ThreadPoolExecutor(_PUT_THREADS) as pool:
        list(pool.map(lambda name: storage.delete(storage.join(job.dest, FOLDER, "pieces", name)), fragments))
    return names


def mark_finished(job: Job[Any], **counts: int) -> None:
    """Write DEST/_export/_SUCCESS. Raises: StorageError, also if a shard was replaced since."""
    # Looked up again at the end: rows may have been read before and after a shard was replaced.
    versions = shard_versions(job.plan.output)
    if _fingerprint({shard: versions.get(shard) for shard in job.shards}) != job.fingerprint:
        raise StorageError(
            f"shards of {storage.redact(job.plan.output)} were replaced during the export, so "
            f"{storage.redact(job.dest)} may mix old rows with new ones and is not marked as finished; delete it and "
            "export again"
        )
    data = json.dumps(counts, sort_keys=True).encode()
    storage.put(storage.join(job.dest, FOLDER, "_SUCCESS"), data + b"\n")
