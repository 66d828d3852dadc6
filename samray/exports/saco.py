"""SA-Co pairs: one JSON file with an entry per image and phrase, with masks or without, as SAM 3's data sets have it.

A run that names asks `labels.phrases` of every image, and the texts of a prompt file of one image each. An image of
which 10 phrases were asked gives 10 pairs. A pair without annotations is a negative, "not in this image". Masks without
a name belong to no pair and are left out.

The file is COCO's with these differences: `images` are pairs, whose phrase is `text_input`; the ids of annotations
point to pairs; `bbox` ([x, y, width, height]) and `area` are fractions of the image's; the only category is "object".
`is_instance_exhaustive` and `is_pixel_exhaustive` are 1, or SAM 3's evaluation would skip the pair: they say that each
phrase was asked, not that a person has checked the answer. `source` is "samray". `presence_score`, if OUTPUT has one,
says how likely the image shows what the phrase names.
Source: facebookresearch/sam3, scripts/eval/gold/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from samray.errors import ConfigError
from samray.exports.base import ExportOptions, Format
from samray.exports.images import LabelledImage, images_of
from samray.exports.photos import photos_of
from samray.exports.pieces import LeftOut, coco_file
from samray.output.classes import UNNAMED, Classes, classes_of
from samray.output.where import drops_masks

if TYPE_CHECKING:
    import pyarrow as pa

    from samray.exports.pieces import Files, Job, Piece

IMAGES_PER_PIECE: Final = 32
"""Fewer than in COCO files: a piece is in memory as text, and each image is in it once per phrase."""


class SacoOptions(ExportOptions):
    with_images: bool = False
    """Also copy the images."""


def check(job: Job[SacoOptions]) -> None:
    """Raises: ConfigError if OUTPUT has no names, and so no phrases, or if a selection has dropped masks."""
    classes = classes_of(job.plan)
    if not classes.names:
        raise ConfigError(
            f"{classes.where} has no names, so there are no phrases to pair images with: label with labels.by"
        )
    if drops_masks(job.where, job.plan.run):
        raise ConfigError(
            "a pair without masks says that the image does not show its phrase, so --format saco takes no --where that "
            "drops masks, neither now nor in samray compact: use columns of the image alone"
        )


def write(job: Job[SacoOptions], piece: Piece, tables: Iterable[pa.Table]) -> Files:
    """Write the piece's images, and its pairs and annotations as the contents of two JSON lists."""
    pairs: list[str] = []
    annotations: list[str] = []
    num_unnamed = num_unreadable = 0
    classes = classes_of(job.plan)
    for table in tables:
        for image, photo in photos_of(job, piece, images_of(table), copy=job.options.with_images):
            num_unreadable += job.options.with_images and photo is None
            file_name = image.file_name
            if photo is not None:
                file_name = f"{job.stem(image)}{photo.extension}"
                yield f"images/{file_name}", photo.data
            pairs += map(json.dumps, _pairs(image, file_name, classes))
            annotations += map(json.dumps, _annotations(image, classes))
            num_unnamed += image.labels.count(None)
    yield piece.fragment("pairs"), ",\n".join(pairs).encode()
    yield piece.fragment("annotations"), ",\n".join(annotations).encode()
    return LeftOut(num_masks=num_unnamed, num_photos=num_unreadable)


def _pair_id(image: LabelledImage, index: int, classes: Classes) -> int:
    return image.image_id * len(classes.names) + index


def _pairs(image: LabelledImage, file_name: str, classes: Classes) -> Iterator[dict[str, Any]]:
    # Names of masks too: a person who corrects masks may give others than were asked.
    asked = {*classes.common, *image.phrases, *image.labels}
    for index, name in enumerate(classes.names):
        if name not in asked:
            continue
        yield {
            "id": _pair_id(image, index, classes),
            "file_name": file_name,
            "text_input": name,
            "width": image.width,
            "height": image.height,
            "queried_category": str(index),
            "is_instance_exhaustive": 1,
            "is_pixel_exhaustive": 1,
            **({"presence_score": image.presence[name]} if name in image.presence else {}),
        }


def _annotations(image: LabelledImage, classes: Classes) -> Iterator[dict[str, Any]]:
    width, height = image.width, image.height
    for i, index in enumerate(classes.indices(image.labels, len(image.ids))):
        if index == len(classes.names):
            continue  # without a name
        x, y, w, h = image.bbox[i]
        yield {
            "id": image.ids[i] + 1,  # COCOeval reads id 0 as no match
            "image_id": _pair_id(image, index, classes),
            "category_id": 1,
            "iscrowd": 0,
            "source": "samray",
            "bbox": [x / width, y / height, w / width, h / height],
            "area": image.area[i] / (width * height),
            "segmentation": {"size": [height, width], "counts": image.counts[i]},
            "label_score": image.label_scores[i],
            "predicted_iou": image.predicted_iou[i],
        }


def assembled(job: Job[SacoOptions], file: int) -> list[str]:
    """The only file of many images."""
    return ["saco.json"]


def chunks(job: Job[SacoOptions], name: str, pieces: list[Piece]) -> Iterator[bytes]:
    """The file, streamed from its pieces' fragments."""
    categories = [{"id": 1, "name": UNNAMED, "supercategory": UNNAMED}]
    yield from coco_file(job, pieces, "Pairs of an image and a phrase", categories, "pairs")


FORMAT: Final = Format(
    help="pairs of image and phrase, negatives too",
    options=SacoOptions,
    sizes=lambda options: (IMAGES_PER_PIECE, None),
    write=write,
    names_files=lambda options: options.with_images,
    assembled=assembled,
    chunks=chunks,
    check=check,
)
