"""The records of masks as in SA-1B: returned by generators, and stored in the column `annotations`."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class Rle(TypedDict):
    """A mask as COCO's compressed run lengths."""

    size: list[int]
    """[H, W] of the whole image."""
    counts: str
    """Alternating runs of 0 and 1, column by column, starting with 0 (`samray.rle.runs.run_lengths`)."""


class MaskRecord(TypedDict):
    """One mask of an image. Boxes and points are in pixels of the upright image."""

    segmentation: Rle
    bbox: list[float]
    """[x, y, width, height]; with `masks.bbox_convention=sam` width and height are one pixel smaller."""
    area: int
    """Pixels."""
    predicted_iou: float
    """The model's estimate, about 0 to 1."""
    stability_score: float
    """0 to 1."""
    point_coords: list[list[float]]
    """[[x, y], ...] of the foreground clicks; empty for a mask from a box alone or from an import."""
    crop_box: list[float]
    """[x, y, width, height] of the mask's crop; the whole image without crops."""
    label: NotRequired[str | None]
    """Only in runs that name (`labels.by`): the mask's name; None if it is not one of the names asked for."""
    label_score: NotRequired[float | None]
    """How well the name fits, on the scale of the way that found it; None without a name."""
    id: NotRequired[int]
    """image_id * 65536 + index. Generators leave it out, because they do not know the image's id."""
