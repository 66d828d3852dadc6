"""What an export leaves for a person to do: which masks are sure enough to be shown, and where most is missing.

review.csv has a line an image: image_id, file_name, kept (masks in the export), left_out (masks that were not sure
enough) and uncovered, the share of the picture under no kept mask, from 0 to 1. It is sorted by that, the largest
first, and then by left_out: the image that needs a person most is at the top. A name that a spreadsheet would take for
a formula has an apostrophe before it.
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
"""The name under which a mask's id goes to a person's tool, and comes back where the tool keeps it."""

_FORMULA: Final = re.compile(r"[\s\x00-\x1f\ufeff\u200b'\"]*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
"""Equals, plus, minus and at, also full-width ones, after what programs leave out on reading."""

COLUMNS: Final = ("image_id", "file_name", "kept", "left_out", "uncovered")


def is_sure(predicted_iou: float, stability_score: float, confident: float | None, stable: float | None) -> bool:
    """Whether a mask is shown to a person: both scores are at least what is asked, where anything is."""
    # Without a bound all pass: a predicted IoU may be below 0, as that of a mask a person asked for.
    return (confident is None or predicted_iou >= confident) and (stable is None or stability_score >= stable)


def only_sure(image: LabelledImage, confident: float | None, stable: float | None) -> LabelledImage:
    """The image with the masks that are shown."""
    scores = zip(image.predicted_iou, image.stability_score, strict=True)
    sure = [i for i, (iou, stability) in enumerate(scores) if is_sure(iou, stability, confident, stable)]
    return image.of_masks(sure)


def line(image: LabelledImage, num_left_out: int) -> str:
    """The image's line of the list, as JSON. image: with the masks that are shown."""
    covered = union_area(runs_of_image(image.image_id, image.counts, (image.height, image.width)))
    uncovered = 1 - covered / (image.width * image.height)
    return json.dumps([image.image_id, image.file_name, len(image.ids), num_left_out, uncovered])


def chunks(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The list, sorted. lines: of `line`, some at a time, and line breaks between."""
    rows = [json.loads(text) for some in lines for text in some.splitlines() if text]
    rows.sort(key=lambda row: (-row[4], -row[3], row[0]))
    for start in range(0, max(len(rows), 1), 1000):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if start == 0:
            writer.writerow(COLUMNS)
        quoting_writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for row in rows[start : start + 1000]:
            cells = [row[0], plain_cell(row[1]), *row[2:4], f"{row[4]:.4f}"]
            # Python 3.11 quotes no carriage return, and readers would end the line there.
            (quoting_writer if "\r" in row[1] else writer).writerow(cells)
        yield text.getvalue().encode()


def plain_cell(text: str) -> str:
    """The text so that no spreadsheet takes it for a formula: with an apostrophe before what one might begin with."""
    return f"'{text}" if _FORMULA.match(text) else text
