"""YOLO segmentation: labels/NAME.txt, one line per mask, `0 x1 y1 x2 y2 ...`, as fractions of the image's width and
height.

The first number is the class, an index into the names of data.yaml. These are the names that the run asked for, then
"object" if there are masks without a name; without names all masks are of class 0, "object".

A mask is one polygon along the edges of its pixels. Holes and further components are connected to it by bridges of zero
width, which makes filling exact, pixel by pixel. train.txt lists the images as images/NAME: copied there by
--with-images, else for the user to link there. An image without masks has an empty file: it is background. YOLO's tools
find the labels of an image by replacing the last `/images/` of its path with `/labels/`: no folder below may have that
name.

--layout cvat has labels/train/NAME.txt and images/train/NAME, as CVAT's "Ultralytics YOLO Segmentation" does. Its
data.yaml names no images for validation: CVAT would import them twice.
Source: datumaro of CVAT, plugins/yolo_format/extractor.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Literal

import pyarrow.compute as pc
import yaml
from pydantic import Field

from samray.errors import ConfigError
from samray.exports.base import ExportOptions, Format
from samray.exports.images import LabelledImage, images_of
from samray.exports.photos import photos_of
from samray.exports.pieces import LeftOut, read_fragments
from samray.output import file_names as names
from samray.output.classes import classes_of
from samray.output.file_names import extension_of
from samray.rle.polygons import join, outlines, simplified
from samray.rle.runs import runs_of_image

if TYPE_CHECKING:
    import pyarrow as pa

    from samray.exports.pieces import Files, Job, Piece


class YoloOptions(ExportOptions):
    with_images: bool = False
    """Also copy the images."""
    simplify: float | None = Field(None, gt=0)
    """Simplify polygons by up to this many pixels; smaller files, but not exact."""
    layout: Literal["cvat"] | None = None
    """cvat: name the files as CVAT and its library datumaro expect them."""

    @property
    def subset(self) -> str:
        """The folder in images/ and labels/, with a slash."""
        return "train/" if self.layout == "cvat" else ""


_LINE_ENDS: Final = r"\r\n\x0b\x0c\x1c\x1d\x1e\x{85}\x{2028}\x{2029}"
_IN_THE_WAY: Final = rf"(^|/)images/|[{_LINE_ENDS}]|\./|\s$"
"""Names that YOLO's tools would misread: they split lists like Python's `splitlines`, strip the whole text, and replace
each `./`. In the syntax of RE2, which Arrow uses."""


def stem_of(file_name: str) -> str:
    """As `names.stem_of`, without what YOLO's tools would misread: a folder `images`, line breaks, `./`."""
    # The added dot keeps splitlines from dropping a line break at the end of the name.
    one_line = "_".join(f"{file_name}.".splitlines()).removesuffix(".")
    *folders, name = names.stem_of(one_line).split("/")
    folders = [f"{folder[:-1]}_" if folder.endswith(".") else folder for folder in folders]
    return "/".join([*("images_" if folder == "images" else folder for folder in folders), name])


def check(job: Job[YoloOptions]) -> None:
    """Raises: ConfigError if YOLO would find no or wrong labels for an image, and it is not copied under another
    name."""
    if not job.options.with_images and (number := _num_in_the_way(job)):
        raise ConfigError(
            f"{number} images are in a folder `images` or one whose name ends with a dot, or have a line break or a "
            "space at the end of their name, and YOLO would look for their labels elsewhere: --with-images copies the "
            "images under safe names"
        )
    if job.stems and not job.options.with_images:
        raise ConfigError(
            f"{len(job.stems)} images have names that differ only in extension or case, and YOLO finds labels by "
            "the name without the extension: --with-images copies the images under unique names"
        )


def _num_in_the_way(job: Job[YoloOptions]) -> int:
    file_names = job.plan.read_images(["file_name"])["file_name"]
    return int(pc.sum(pc.match_substring_regex(file_names, _IN_THE_WAY)).as_py() or 0)


def write(job: Job[YoloOptions], piece: Piece, tables: Iterable[pa.Table]) -> Files:
    """Write the piece's label files and images, and its lines of train.txt."""
    lines = []
    num_unreadable = 0
    subset = job.options.subset
    # CVAT's own lists have no `./`.
    start = f"{'' if subset else './'}images/{subset}"
    classes, has_unnamed = classes_of(job.plan), False
    for table in tables:
        for image, photo in photos_of(job, piece, images_of(table), copy=job.options.with_images):
            stem = job.stems.get(image.image_id) or stem_of(image.file_name)
            if photo is not None:
                yield f"images/{subset}{stem}{photo.extension}", photo.data
            if job.options.with_images and photo is None:
                num_unreadable += 1  # and not in train.txt, which lists images that are there
            else:
                lines.append(f"{start}{stem}{photo.extension if photo else extension_of(image.file_name)}\n")
            has_unnamed = has_unnamed or None in image.labels
            class_of = classes.indices(image.labels, len(image.ids))
            yield f"labels/{subset}{stem}.txt", label_text(image, job.options.simplify, class_of).encode()
    yield piece.fragment("train"), "".join(lines).encode()
    if classes.names:
        yield piece.fragment("unnamed"), b"1" if has_unnamed else b""
    return LeftOut(num_photos=num_unreadable)


def label_text(image: LabelledImage, tolerance: float | None, class_of: Sequence[int]) -> str:
    """One line per mask that has a pixel. tolerance: of `simplified`, in pixels; None for exact polygons. class_of: of
    each mask."""
    hw = image.height, image.width
    masks = runs_of_image(image.image_id, image.counts, hw)
    # Six digits are exact to 0.05 pixels for images up to 100,000 wide. Each coordinate is formatted once.
    xs = [f" {x / image.width:.6g}" for x in range(image.width + 1)]
    ys = [f" {y / image.height:.6g}" for y in range(image.height + 1)]
    lines = []
    for index, components in zip(class_of, outlines(masks, hw), strict=True):
        if tolerance is not None:
            components = [[simplified(ring, tolerance) for ring in rings] for rings in components]
        # A mask without pixels gives no line, and an image without masks an empty file: background.
        if components:
            polygon = join([join(rings) for rings in components])
            lines.append(str(index) + "".join([xs[x] + ys[y] for x, y in polygon.tolist()]) + "\n")
    return "".join(lines)


def assembled(job: Job[YoloOptions], file: int) -> list[str]:
    """The files assembled from all pieces."""
    return ["train.txt", "data.yaml"]


def chunks(job: Job[YoloOptions], name: str, pieces: list[Piece]) -> Iterator[bytes]:
    """The list of images, and the YAML file for YOLO's tools."""
    if name == "train.txt":
        yield from read_fragments(job, pieces, "train", b"")
    else:
        if job.options.layout == "cvat":
            yield b"# Exported by samray for CVAT. To train with YOLO's tools, add: val: train.txt\ntrain: train.txt\n"
        else:
            yield b"# Exported by samray. val is the same list: split train.txt to hold images back.\n"
            yield b"train: train.txt\nval: train.txt\n"
        classes = classes_of(job.plan)
        with_unnamed = bool(classes.names) and any(read_fragments(job, pieces, "unnamed", b""))
        named = dict(enumerate(classes.all(with_unnamed=with_unnamed)))
        # By PyYAML, which quotes a name that would be a number, a boolean or a comment.
        yield yaml.safe_dump({"names": named}, allow_unicode=True, sort_keys=False).encode()


FORMAT: Final = Format(
    help="segmentation text files",
    options=YoloOptions,
    write=write,
    names_files=lambda options: True,
    stem_of=stem_of,
    assembled=assembled,
    chunks=chunks,
    check=check,
)
