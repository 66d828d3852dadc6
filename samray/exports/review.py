"""Exports for manual review: which masks are good enough to show, and which images need the most work.

review.csv has one line per image: image_id, file_name, kept (masks in the export), left_out (masks below the
thresholds) and uncovered, the fraction of the image under no kept mask. It is sorted by uncovered, then left_out, both
descending: the image that needs the most work comes first. A name that a spreadsheet would read as a formula gets an
apostrophe in front.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Final

from samray.exports.images import LabelledImage
from samray.rle.runs import runs_of_image, union_area

ID_ATTRIBUTE: Final = "samray_id"
"""The attribute that carries a mask's id into an annotation tool, and back if the tool keeps it."""

_FORMULA: Final = re.compile(r"[\s\x00-\x1f\ufeff\u200b'\"]*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
"""Equals, plus, minus and at, also full-width, after leading characters that programs ignore."""

COLUMNS: Final = ("image_id", "file_name", "kept", "left_out", "uncovered")


def is_sure(predicted_iou: float, stability_score: float, confident: float | None, stable: float | None) -> bool:
    """Whether a mask is shown to the annotator: its scores reach the thresholds that are set."""
    # Without a threshold every mask passes: the predicted IoU of a prompted mask may be below 0.
    return (confident is None or predicted_iou >= confident) and (stable is None or stability_score >= stable)


def only_sure(image: LabelledImage, confident: float | None, stable: float | None) -> LabelledImage:
    """The image with only the masks that are shown."""
    scores = zip(image.predicted_iou, image.stability_score, strict=True)
    sure = [i for i, (iou, stability) in enumerate(scores) if is_sure(iou, stability, confident, stable)]
    return image.of_masks(sure)


def line(image: LabelledImage, num_left_out: int) -> str:
    """The image's line of the list, as JSON. image: with the masks that are shown."""
    covered = union_area(runs_of_image(image.image_id, image.counts, (image.height, image.width)))
    uncovered = 1 - covered / (image.width * image.height)
    return json.dumps([image.image_id, image.file_name, len(image.ids), num_left_out, uncovered])


def chunks(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The sorted list. lines: output of `line`, in parts, separated by line breaks."""
    # All in memory: sorting needs them, and a line is short.
    rows = [json.loads(text) for line in lines for text in line.splitlines() if text]
    # By id last, so that the same export gives the same file.
    rows.sort(key=lambda row: (-row[4], -row[3], row[0]))
    for start in range(0, max(len(rows), 1), 1000):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if start == 0:
            writer.writerow(COLUMNS)
        quoting_writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for row in rows[start : start + 1000]:
            cells = [row[0], plain_cell(row[1]), *row[2:4], f"{row[4]:.4f}"]
            # Python 3.11 does not quote a carriage return, and readers would end the line there.
            (quoting_writer if "\r" in row[1] else writer).writerow(cells)
        yield text.getvalue().encode()


def plain_cell(text: str) -> str:
    """Add an apostrophe to text that a spreadsheet would read as a formula."""
    return f"'{text}" if _FORMULA.match(text) else text
