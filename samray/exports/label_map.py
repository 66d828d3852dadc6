"""Label maps: NAME.png with 16 bits, 0 for background, else the number of a mask; and NAME.json, which describes the
masks.

With --classes label k is the k-th name that the run asked for, one more if a mask has no name, and the JSON lists the
classes.

Without, label k is the k-th mask of the image. Masks may overlap, labels cannot: the smaller mask is shown or, with
--on-top predicted_iou, the better one; if equal, the earlier one.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from samray.errors import ConfigError
from samray.exports.base import ExportOptions, Format
from samray.exports.images import LabelledImage, images_of
from samray.exports.pieces import LeftOut
from samray.output.classes import Classes, classes_of
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
    classes: bool = False
    """Pixels are the number of a name instead of the number of a mask; needs an output with names."""


def check(job: Job[LabelMapOptions]) -> None:
    """Raises: ConfigError if classes are asked of an output without names."""
    classes = classes_of(job.plan)
    if job.options.classes and not classes.names:
        raise ConfigError(f"{classes.where} has no names: leave out --classes, or label with labels.by")
    if job.options.classes and len(classes.names) >= MAX_LABEL:
        raise ConfigError(
            f"{classes.where} has {len(classes.names)} names, and a label map of 16 bits allows {MAX_LABEL}: "
            "leave out --classes"
        )


def write(job: Job[LabelMapOptions], piece: Piece, tables: Iterable[pa.Table]) -> Files:
    """Write the piece's PNG and JSON files. Raises: ConfigError if an image has more masks than there are labels."""
    classes = classes_of(job.plan)
    for table in tables:
        for image in images_of(table):
            class_of = classes.indices(image.labels, len(image.ids)) if job.options.classes else None
            pixels = label_map(image, job.options.on_top, class_of)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="PNG")
            about = {
                "image_id": image.image_id,
                "file_name": image.file_name,
                **_legend(image, classes, pixels, class_of),
            }
            stem = job.stem(image)
            yield f"{stem}.png", buffer.getvalue()
            yield f"{stem}.json", json.dumps(about).encode()
    return LeftOut()


def _legend(
    image: LabelledImage, classes: Classes, pixels: npt.NDArray[np.uint16], class_of: Sequence[int] | None
) -> dict[str, Any]:
    """Meaning of the labels: `classes` or `masks`."""
    # Pixels that each label has after overlaps: 0 for a mask that is hidden by others.
    visible = np.bincount(pixels.ravel(), minlength=max(len(image.ids), len(classes.names) + 1) + 1).tolist()
    if class_of is not None:
        names = classes.all(with_unnamed=len(classes.names) in class_of)
        return {"classes": [{"label": i + 1, "name": n, "visible_area": visible[i + 1]} for i, n in enumerate(names)]}
    masks = [{"label": i + 1, "id": id, "visible_area": visible[i + 1]} for i, id in enumerate(image.ids)]
    if image.labels:
        masks = [{**mask, "name": name} for mask, name in zip(masks, image.labels, strict=True)]
    return {"masks": masks}


def label_map(image: LabelledImage, on_top: str, class_of: Sequence[int] | None = None) -> npt.NDArray[np.uint16]:
    """(H, W) uint16 labels, 0 for background. on_top: area or predicted_iou. class_of: the class of each mask, to paint
    classes; None paints masks."""
    if len(image.ids) > MAX_LABEL and class_of is None:
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
        label = 1 + (index if class_of is None else class_of[index])
        for start, end in zip(*(side.tolist() for side in spans(runs[index])), strict=True):
            pixels[start:end] = label
    # Run lengths go down the columns: painted as (W, H), then transposed.
    return np.ascontiguousarray(pixels.reshape(image.width, image.height).T)


FORMAT: Final = Format(
    help="16-bit PNGs and JSON", options=LabelMapOptions, write=write, names_files=lambda options: True, check=check
)
