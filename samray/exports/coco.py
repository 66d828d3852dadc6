"""COCO instances: one JSON file, or one per --images-per-file images.

The categories are the names that the run asked for, with ids from 1 on. Masks without a name have one more category,
"object", which is the only one of a run without names. An annotation's id is OUTPUT's plus 1, because COCOeval reads id
0 as no match. Masks are the stored compressed run lengths, or polygons that cover exactly the same pixels: one per
component, with holes connected to it by bridges of zero width. Scores, points and crop boxes keep their own names,
which COCO's readers ignore. Images without masks are in the list of images: negatives.

--with-images copies the images to images/, and file_name is then the name of the copy. --layout cvat puts the files
where datumaro, the library of CVAT, looks for them: annotations/instances_default.json, and images/default/.

With --confident or --stable the file is for an annotator, who corrects the masks and adds missing ones. It then has
only masks above these thresholds, and `review` lists what is left to do. CVAT loads the file as "COCO 1.0" with
datumaro, which needs an integer iscrowd and a category_id other than 0, accepts compressed and plain run lengths, finds
images by file_name, and assigns new ids. All exports meet this. CVAT keeps only attributes that the label declares, so
OUTPUT's id is stored in one, `samray_id` (see `samray import --corrects`).
Source: cvat/apps/dataset_manager/formats/coco.py and bindings.py (`import_dm_annotations`), datumaro's coco base.

A piece makes two fragments, images and annotations, because a COCO file has all images before all annotations;
`chunks` streams them into one file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import Field, model_validator

from samray.errors import ConfigError
from samray.exports import review
from samray.exports.base import IMAGES_PER_PIECE, ExportOptions, Format
from samray.exports.images import LabelledImage, images_of
from samray.exports.photos import photos_of
from samray.exports.pieces import LeftOut, coco_file, read_fragments
from samray.output.classes import UNNAMED, Classes, classes_of
from samray.rle.polygons import Ring, join, outlines, simplified
from samray.rle.runs import runs_of_image

if TYPE_CHECKING:
    import pyarrow as pa

    from samray.exports.pieces import Files, Job, Piece


class CocoOptions(ExportOptions):
    polygons: bool = False
    """Exact polygons instead of RLE."""
    simplify: float | None = Field(None, gt=0)
    """Simplify polygons by up to this many pixels; smaller files, but not exact."""
    images_per_file: int | None = Field(None, gt=0)
    """Images per JSON file; default is one file for all."""
    confident: float | None = Field(None, ge=0, le=1)
    """Export only masks with at least this predicted IoU, for manual correction."""
    stable: float | None = Field(None, ge=0, le=1)
    """Export only masks with at least this stability score, for manual correction."""
    with_images: bool = False
    """Also copy the images."""
    layout: Literal["cvat"] | None = None
    """cvat: name the files as CVAT and its library datumaro expect them."""

    @model_validator(mode="after")
    def _cvat_has_one_file(self) -> CocoOptions:
        if self.layout == "cvat" and self.images_per_file:
            raise ValueError("--layout cvat is one JSON file for all images: leave out --images-per-file")
        return self

    @model_validator(mode="after")
    def _polygons_are_simplified(self) -> CocoOptions:
        if self.simplify is not None and not self.polygons:
            raise ValueError("--simplify needs --polygons: run lengths are exact")
        return self

    @property
    def images_folder(self) -> str:
        """Where copies of the images are; `file_name` is relative to it."""
        return "images/default" if self.layout == "cvat" else "images"

    @property
    def for_review(self) -> bool:
        """Whether the file is for an annotator, who corrects the masks and adds missing ones."""
        return self.confident is not None or self.stable is not None


def check(job: Job[CocoOptions]) -> None:
    """Raises: ConfigError if a file for an annotator would lack masks that `samray import --corrects` misses."""
    if job.options.for_review and job.where is not None and job.where.selects_masks:
        raise ConfigError(
            "--confident and --stable make a file for an annotator, and samray import --corrects would take the masks "
            "that --where drops for masks that the annotator removed: use columns of the image alone, or first "
            "samray compact --where, then export and correct its DEST"
        )


def write(job: Job[CocoOptions], piece: Piece, tables: Iterable[pa.Table]) -> Files:
    """Write the piece's images and annotations, as the contents of two JSON lists."""
    images: list[str] = []
    annotations: list[str] = []
    left_to_do: list[str] = []
    num_left_out = num_unreadable = 0
    options, classes = job.options, classes_of(job.plan)
    has_unnamed = False
    for table in tables:
        for image, photo in photos_of(job, piece, images_of(table), copy=options.with_images):
            if options.for_review:
                sure = review.only_sure(image, options.confident, options.stable)
                num_unsure = len(image.ids) - len(sure.ids)
                left_to_do.append(review.line(sure, num_unsure))
                num_left_out += num_unsure
                # The annotations and the review list then speak of the same masks.
                image = sure
            num_unreadable += options.with_images and photo is None
            file_name = image.file_name
            if photo is not None:
                file_name = f"{job.stem(image)}{photo.extension}"
                yield f"{options.images_folder}/{file_name}", photo.data
            images.append(json.dumps({**_image(image), "file_name": file_name}))
            annotations += map(json.dumps, _annotations(image, options, classes))
            has_unnamed = has_unnamed or None in image.labels
    yield piece.fragment("images"), ",\n".join(images).encode()
    yield piece.fragment("annotations"), ",\n".join(annotations).encode()
    if classes.names:
        yield piece.fragment("unnamed"), b"1" if has_unnamed else b""
    if options.for_review:
        yield piece.fragment("review"), "\n".join(left_to_do).encode()
    return LeftOut(num_masks=num_left_out, num_photos=num_unreadable)


def _image(image: LabelledImage) -> dict[str, Any]:
    return {"id": image.image_id, "width": image.width, "height": image.height}


def _annotations(image: LabelledImage, options: CocoOptions, classes: Classes) -> Iterator[dict[str, Any]]:
    size = [image.height, image.width]
    class_of = classes.indices(image.labels, len(image.ids))
    segmentations: list[Any] = [{"size": size, "counts": counts} for counts in image.counts]
    if options.polygons:
        hw = image.height, image.width
        masks = outlines(runs_of_image(image.image_id, image.counts, hw), hw)
        # One polygon per component, as COCO means a list of several.
        segmentations = [
            [join(_simplified(component, options.simplify)).ravel().tolist() for component in components]
            for components in masks
        ]
    for index, segmentation in enumerate(segmentations):
        samray_id = {"attributes": {review.ID_ATTRIBUTE: image.ids[index]}} if options.for_review else {}
        label_score = {"label_score": image.label_scores[index]} if image.labels else {}
        yield {
            "id": image.ids[index] + 1,
            "image_id": image.image_id,
            "category_id": class_of[index] + 1,
            "iscrowd": 0,
            "bbox": image.bbox[index],
            "area": image.area[index],
            "segmentation": segmentation,
            "predicted_iou": image.predicted_iou[index],
            "stability_score": image.stability_score[index],
            "point_coords": image.point_coords[index],
            "crop_box": image.crop_box[index],
            **label_score,
            **samray_id,
        }


def _simplified(rings: list[Ring], tolerance: float | None) -> list[Ring]:
    return rings if tolerance is None else [simplified(ring, tolerance) for ring in rings]


def assembled(job: Job[CocoOptions], file: int) -> list[str]:
    """The COCO file that a piece belongs to, and the list of images left to review in it."""
    number = f"-{file:06d}" if job.options.images_per_file else ""
    names = ["annotations/instances_default.json" if job.options.layout == "cvat" else f"instances{number}.json"]
    if job.options.for_review:
        names.append(f"review{number}.csv")
    return names


def chunks(job: Job[CocoOptions], name: str, pieces: list[Piece]) -> Iterator[bytes]:
    """A COCO file, streamed from its pieces' fragments; or the review list, which is sorted."""
    if name.startswith("review"):
        yield from review.chunks(read_fragments(job, pieces, "review", b"\n"))
        return
    classes = classes_of(job.plan)
    what = "Masks with names" if classes.names else "Masks without classes"
    yield from coco_file(job, pieces, what, _categories(job, classes, pieces), "images")


def _categories(job: Job[CocoOptions], classes: Classes, pieces: list[Piece]) -> list[dict[str, Any]]:
    with_unnamed = bool(classes.names) and any(read_fragments(job, pieces, "unnamed", b""))
    names = classes.all(with_unnamed=with_unnamed)
    # The supercategory marks the class of masks without a name (`classes.means_unnamed`).
    return [
        {"id": index + 1, "name": name, "supercategory": UNNAMED if name == classes.unnamed else ""}
        for index, name in enumerate(names)
    ]


FORMAT: Final = Format(
    help="instances JSON for pycocotools",
    options=CocoOptions,
    sizes=lambda options: (IMAGES_PER_PIECE, options.images_per_file),
    write=write,
    names_files=lambda options: options.with_images,
    assembled=assembled,
    chunks=chunks,
    check=check,
)
