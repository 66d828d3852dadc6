"""The parts of an export: a job, and its pieces, each with its files and the mark that it is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar, cast

from samray import __version__, storage
from samray.exports.base import ExportOptions
from samray.exports.images import LabelledImage, Rows
from samray.output.file_names import FOLDER, stem_of
from samray.output.plan import Plan
from samray.output.where import Where


class LeftOut(NamedTuple):
    """Counts of what a format left out of a piece."""

    num_masks: int = 0
    """Masks below the thresholds of confident and stable; for saco those without a name,
    for geojson and geoparquet those of images without a CRS."""
    num_photos: int = 0
    """Images that could not be copied because they cannot be read any more."""


Files = Generator[tuple[str, bytes], None, LeftOut]
"""Yields names relative to DEST, with their content. Returns what was left out."""


def put_each(files: Files, put: Callable[[str, bytes], object]) -> LeftOut:
    """Call put for each file, in order. Returns what was left out."""
    while True:
        try:
            name, data = next(files)
        # A `for` loop would drop the value that the generator returns.
        except StopIteration as end:
            return cast(LeftOut, end.value)
        put(name, data)


Options = TypeVar("Options", bound=ExportOptions)


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of images: what one task exports, and what is redone if it was not finished."""

    number: int
    file: int
    """The number of the file that it belongs to, for files made of many pieces."""
    rows: tuple[Rows, ...]

    @property
    def num_images(self) -> int:
        """Number of images, including failed ones."""
        return sum(part.stop - part.start for part in self.rows)

    def fragment(self, kind: str) -> str:
        """The name of this piece's part of a file that is assembled later."""
        return f"{FOLDER}/pieces/{self.number:06d}.{kind}"

    @property
    def mark(self) -> str:
        return f"{FOLDER}/done/{self.number:06d}.json"


@dataclass(frozen=True, kw_only=True)
class Job(Generic[Options]):
    """One export. Small and picklable, because it is sent to the workers."""

    plan: Plan
    dest: str
    format: str
    """A name in `FORMATS`."""
    options: Options
    shards: tuple[int, ...] = ()
    """The shards to export."""
    fingerprint: str = ""
    """Changes if one of the shards is replaced."""
    stems: dict[int, str] = field(default_factory=dict)
    where: Where | None = None
    """The images and masks to export; None: all."""

    def stem(self, image: LabelledImage) -> str:
        """The name of the image's file in DEST, without extension."""
        return self.stems.get(image.image_id) or stem_of(image.file_name)


@dataclass(slots=True)
class Done:
    """A finished piece, as recorded in its mark."""

    piece: int
    num_images: int = 0
    num_masks: int = 0
    num_left_out: int = 0
    """Masks below the thresholds of confident and stable; for saco those without a name,
    for geojson and geoparquet those of images without a CRS."""
    num_failed: int = 0
    """Failed images, left out."""
    num_unreadable: int = 0
    """Images that could not be copied because they cannot be read any more."""
    files: list[str] = field(default_factory=list)
    num_images_not_selected: int = 0
    """Images that --where does not select."""
    num_masks_not_selected: int = 0
    """Masks of exported images that --where does not select."""


def cut(shards: Iterable[Rows], per_piece: int, per_file: int | None) -> Iterator[Piece]:
    """Cut the rows into pieces of per_piece images, in order; no piece crosses the end of a file of per_file images."""
    rows: list[Rows] = []
    number = num_before = in_piece = 0

    def piece() -> Piece:
        # num_before includes the piece; its last image says which file it belongs to.
        return Piece(number, (num_before - 1) // per_file if per_file else 0, tuple(rows))

    for shard in shards:
        start = shard.start
        while start < shard.stop:
            # Rows of a shard up to the end of the piece or of the file, whichever is nearer.
            room = per_piece - in_piece
            if per_file:
                room = min(room, per_file - num_before % per_file)
            stop = min(shard.stop, start + room)
            rows.append(Rows(shard.shard, start, stop, shard.num_rows))
            num_before, in_piece, start = num_before + stop - start, in_piece + stop - start, stop
            if in_piece == per_piece or (per_file and num_before % per_file == 0):
                yield piece()
                rows, in_piece, number = [], 0, number + 1
    if rows:
        yield piece()


def coco_file(
    job: Job[Any], pieces: list[Piece], description: str, categories: list[dict[str, Any]], images: str
) -> Iterator[bytes]:
    """A file in COCO's layout, streamed from the fragments `annotations` and images, the kind of those."""
    info = {"description": f"{description}, exported by samray", "version": __version__}
    yield b'{"info": ' + json.dumps(info).encode() + b',\n"licenses": [],\n'
    yield b'"categories": ' + json.dumps(categories).encode() + b',\n"images": [\n'
    yield from read_fragments(job, pieces, images, b",\n")
    yield b'\n],\n"annotations": [\n'
    yield from read_fragments(job, pieces, "annotations", b",\n")
    yield b"\n]}\n"


def read_fragments(job: Job[Any], pieces: list[Piece], kind: str, separator: bytes) -> Iterator[bytes]:
    """The pieces' fragments of this kind, with the separator between non-empty ones."""
    first = True
    for piece in pieces:
        data = storage.read_bytes(storage.join(job.dest, piece.fragment(kind)))
        if data:
            if not first:
                yield separator
            yield data
            first = False
