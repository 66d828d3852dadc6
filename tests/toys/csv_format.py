"""A toy format: one CSV with a line per mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from pydantic import Field

from samray.exports.base import ExportOptions, Format
from samray.exports.images import images_of
from samray.exports.pieces import Files, Job, LeftOut, Piece, read_fragments

if TYPE_CHECKING:
    import pyarrow as pa


class CsvOptions(ExportOptions):
    digits: int | None = Field(None, ge=0, le=6)
    """Digits of the predicted IoU; 3 if not given."""
    decimal_comma: bool = False
    """Write 0,9 instead of 0.9."""


def write(job: Job[CsvOptions], piece: Piece, tables: Iterable[pa.Table]) -> Files:
    lines = []
    for table in tables:
        for image in images_of(table):
            for iou in image.predicted_iou:
                number = f"{iou:.{3 if job.options.digits is None else job.options.digits}f}"
                lines.append(f"{image.file_name};{number.replace('.', ',') if job.options.decimal_comma else number}\n")
    yield piece.fragment("csv"), "".join(lines).encode()
    return LeftOut()


def assembled(job: Job[CsvOptions], file: int) -> list[str]:
    return ["masks.csv"]


def chunks(job: Job[CsvOptions], name: str, pieces: list[Piece]) -> Iterator[bytes]:
    yield from read_fragments(job, pieces, "csv", b"")


FORMAT: Final = Format(
    help="CSV with one line per mask", options=CsvOptions, write=write, assembled=assembled, chunks=chunks
)
