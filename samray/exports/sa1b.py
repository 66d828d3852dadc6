"""SA-1B: one JSON file per image, with the names, types and order of the fields in the published data set.

`a/b.jpg` becomes `a/b.json`, with --with-images next to a copy of the image, as in SA-1B; --tar packs whole pieces into
`sa_000000.tar` and so on. Boxes are those of OUTPUT: with `masks.bbox_convention=sam` they are one pixel smaller, as in
SA-1B.

In a run that names, annotations also have `label` and `label_score`, and the file the list of names, `categories`.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from pydantic import Field, model_validator

from samray.exports.base import IMAGES_PER_PIECE, ExportOptions, Format
from samray.exports.images import LabelledImage, images_of
from samray.exports.photos import photos_of
from samray.exports.pieces import LeftOut, put_each
from samray.output.schema import categories_of

if TYPE_CHECKING:
    import pyarrow as pa

    from samray.exports.pieces import Files, Job, Piece


class Sa1bOptions(ExportOptions):
    tar: bool = False
    """Pack into sa_000000.tar, ..., like the published data set."""
    with_images: bool = False
    """Also copy the images."""
    images_per_file: int | None = Field(None, gt=0)
    """Images per tar; needs --tar."""

    @model_validator(mode="after")
    def _files_of_many_images_are_tars(self) -> Sa1bOptions:
        if self.images_per_file and not self.tar:
            raise ValueError("--images-per-file needs --tar: without it each image has a JSON file of its own")
        return self


def write(job: Job[Sa1bOptions], piece: Piece, tables: Iterable[pa.Table]) -> Files:
    """Write the piece's JSON files and images, or one tar of them."""
    files = _members(job, piece, tables)
    if not job.options.tar:
        return (yield from files)
    # A piece is one tar, so its images per file bound the memory.
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        left_out = put_each(files, lambda name, data: archive.addfile(_tar_header(name, data), io.BytesIO(data)))
    yield f"sa_{piece.number:06d}.tar", buffer.getvalue()
    return left_out


def _tar_header(name: str, data: bytes) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)  # without times and owners, the same images give the same bytes
    header.size = len(data)
    return header


def _members(job: Job[Sa1bOptions], piece: Piece, tables: Iterable[pa.Table]) -> Files:
    num_unreadable = 0
    categories = categories_of(job.plan.run["identity"])
    of_run = {} if categories is None else {"categories": categories}
    for table in tables:
        for image, photo in photos_of(job, piece, images_of(table), copy=job.options.with_images):
            stem = job.stem(image)
            if photo is not None:
                yield stem + photo.extension, photo.data
            num_unreadable += job.options.with_images and photo is None
            yield f"{stem}.json", json.dumps({**record_of(image), **of_run}).encode()
    return LeftOut(num_photos=num_unreadable)


def record_of(image: LabelledImage) -> dict[str, Any]:
    """The content of the image's JSON file."""
    size = [image.height, image.width]
    named = zip(image.labels, image.label_scores, strict=True)
    # One dict for each mask, empty ones in a run without names.
    names = [{"label": label, "label_score": score} for label, score in named] or [{}] * len(image.ids)
    return {
        "image": {
            "image_id": image.image_id,
            "width": image.width,
            "height": image.height,
            "file_name": image.file_name,
        },
        "annotations": [
            {
                "bbox": bbox,
                "area": area,
                "segmentation": {"size": size, "counts": counts},
                "predicted_iou": predicted_iou,
                "point_coords": point_coords,
                "crop_box": crop_box,
                "id": id,
                "stability_score": stability_score,
                **name,
            }
            for id, counts, bbox, area, predicted_iou, stability_score, point_coords, crop_box, name in zip(
                image.ids,
                image.counts,
                image.bbox,
                image.area,
                image.predicted_iou,
                image.stability_score,
                image.point_coords,
                image.crop_box,
                names,
                strict=True,
            )
        ],
    }


FORMAT: Final = Format(
    help="one JSON file per image",
    options=Sa1bOptions,
    sizes=lambda options: (options.images_per_file or IMAGES_PER_PIECE, None),
    write=write,
    names_files=lambda options: True,
)
