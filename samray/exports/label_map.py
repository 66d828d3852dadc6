"""Label maps: NAME.png with 16 bits, 0 for background, else the number of a mask; and NAME.json, which describes the
masks.

Label k is the k-th mask of the image. Masks may overlap, labels cannot: the smaller mask is shown or, with --on-top
predicted_iou, the better one; if equal, the earlier one.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from samray.errors import ConfigError
from samray.exports.base import ExportOptions, Format
from samray.exports.images import LabelledImage, images_of
from samray.exports.pieces import LeftOut
from samray.rle.runs import runs_of_image, spans

if TYPE_CHECKING:
    import pyarrow as pa

    from samray.exports.pieces import Files, Job, Piece

MAX_LABEL: Final = 65535
MAX_PIXELS: Final = 2**28
"""Maximum pixels of a label map, which is painted in memory with 4 bytes per pixel."""


class LabelMapOptions(ExportOptions):
    on_top: Literal["area", "predicted_iou"] = "area"
    """If masks overlap, show the smaller one (area) or the better one (predicted_iou)."""


def write(job: Job[LabelMapOptions], piece: Piece, tables: Iterable[pa.Table]) -> Files:
    """Write the piece's PNG and JSON files. Raises: ConfigError if an image has more masks than there are labels."""
    for table in tables:
        for image in images_of(table):
            labels = label_map(image, job.options.on_top)
            buffer = io.BytesIO()
            Image.fromarray(labels).save(buffer, format="PNG")
            # Pixels that each label has after overlaps: 0 for a mask that is hidden by others.
            visible = np.bincount(labels.ravel(), minlength=len(image.ids) + 1).tolist()
            masks = [{"label": i + 1, "id": id, "visible_area": visible[i + 1]} for i, id in enumerate(image.ids)]
            about = {"image_id": image.image_id, "file_name": image.file_name, "masks": masks}
            stem = job.stem(image)
            yield f"{stem}.png", buffer.getvalue()
            yield f"{stem}.json", json.dumps(about).encode()
    return LeftOut()


def label_map(image: LabelledImage, on_top: str) -> npt.NDArray[np.uint16]:
    """(H, W) uint16 labels, 0 for background. on_top: area or predicted_iou."""
    if len(image.ids) > MAX_LABEL:
        raise ConfigError(
            f"image {image.image_id} has {len(image.ids)} masks, and a label map of 16 bits allows {MAX_LABEL}: "
            "label with masks.max_masks, or export to another format"
        )
    runs = runs_of_image(image.image_id, image.counts, (image.height, image.width))
    if image.width * image.height > MAX_PIXELS:
        raise ConfigError(
            f"image {image.image_id} is {image.width}x{image.height}, but a label map has at most {MAX_PIXELS} pixels: "
            "export to another format"
        )
    rank = image.area if on_top == "area" else [-score for score in image.predicted_iou]
    pixels = np.zeros(image.width * image.height, dtype=np.uint16)
    for index in sorted(range(len(runs)), key=lambda i: (-rank[i], -i)):  # the last one painted is on top
        label = index + 1
        for start, end in zip(*(side.tolist() for side in spans(runs[index])), strict=True):
            pixels[start:end] = label
    # Run lengths go down the columns: painted as (W, H), then transposed.
    return np.ascontiguousarray(pixels.reshape(image.width, image.height).T)


FORMAT: Final = Format(help="16-bit PNGs and JSON", options=LabelMapOptions, write=write, names_files=True)
