"""An image of the report with its masks: the photo as a small JPEG, each mask as run lengths on the same small grid.

The page paints the masks itself, to show, hide and find single ones. They are scaled to the photo's size as run
lengths: a report of 24 images with hundreds of masks decodes none of them to pixels.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask

from samray.errors import StorageError
from samray.rle.runs import Runs, batches, column_intervals, runs_of_image, slices_of

MAX_MASKS = 600
"""Maximum number of masks shown per image, largest first."""


@dataclass
class Overlay:
    """One image of the gallery."""

    file_name: str
    uri: str
    original_hw: tuple[int, int]
    height: int
    """Size in pixels of the photo and of the masks' grid."""
    width: int
    num_masks: int
    """Number of masks of the image; fewer may be shown."""
    masks: list[dict[str, Any]] = field(default_factory=list)
    """Largest first: id (a string, because it may exceed JavaScript's integers), area, iou, stability, point,
    counts; of a run that names also label and label_score."""
    photo: str | None = None
    """A data: URI; None if the image cannot be read any more."""
    problem: str = ""

    @property
    def num_bytes(self) -> int:
        """Approximate size in the page."""
        return len(self.photo or "") + sum(len(mask["counts"]) + 150 for mask in self.masks)


def make_overlay(row: Mapping[str, Any], side: int) -> Overlay:
    """Make an overlay from a row of an output, without its photo. side: longest side in pixels; never enlarges.

    If a mask cannot be decoded, none is shown and `problem` says why.
    """
    image, annotations = row["image"], row["annotations"] or []
    original_hw = (image["height"], image["width"])
    height, width = small_hw((max(1, original_hw[0] or 0), max(1, original_hw[1] or 0)), side)
    overlay = Overlay(image["file_name"], row["uri"], original_hw, height, width, len(annotations))
    # The output may be damaged: fields that the page needs can be null.
    if any(not mask or mask["area"] is None or mask["segmentation"] is None for mask in annotations):
        overlay.problem = f"image {image['image_id']} has a mask without area or pixels; `samray verify` shows which"
        return overlay
    # Largest first, which is also the order of painting: small masks stay on top.
    shown = sorted(annotations, key=lambda a: -int(a["area"]))[:MAX_MASKS]
    strings = [annotation["segmentation"]["counts"] for annotation in shown]
    try:
        runs = runs_of_image(image["image_id"], strings, original_hw)
    except StorageError as error:
        overlay.problem = str(error)
        return overlay
    for annotation, counts in zip(shown, scaled_counts(runs, original_hw, (height, width)), strict=True):
        overlay.masks.append(
            {
                "id": str(annotation["id"]),
                "area": annotation["area"],
                "iou": _finite(annotation["predicted_iou"]),
                "stability": _finite(annotation["stability_score"]),
                "point": (annotation["point_coords"] or [None])[0],
                "counts": counts,
                **_name(annotation),
            }
        )
    return overlay


def _name(annotation: Mapping[str, Any]) -> dict[str, Any]:
    if "label" not in annotation:
        return {}
    return {"label": annotation["label"], "label_score": _finite(annotation["label_score"])}


def _finite(value: float | None) -> float | None:
    """None for values that JSON does not have; imported masks may have no scores."""
    return round(value, 5) if value is not None and math.isfinite(value) else None


def small_hw(original_hw: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width with the longest side at most `side`, each at least 1."""
    scale = min(1.0, side / max(original_hw))
    return max(1, round(original_hw[0] * scale)), max(1, round(original_hw[1] * scale))


def scaled_counts(masks: list[Runs], original_hw: tuple[int, int], target_hw: tuple[int, int]) -> list[str]:
    """Masks on a coarser grid as COCO's compressed run lengths; each pixel takes the original at its centre.

    masks: run lengths in the frame original_hw, with no side smaller than in target_hw. A mask that falls between the
    centres keeps one pixel, to stay visible.
    """
    return [
        counts for batch in batches(masks, original_hw[0]) for counts in _scaled_counts(batch, original_hw, target_hw)
    ]


def _scaled_counts(masks: list[Runs], original_hw: tuple[int, int], target_hw: tuple[int, int]) -> list[str]:
    """`scaled_counts`, all at once."""
    height, width = target_hw
    intervals = column_intervals(masks, original_hw[0])
    row_of, column_of = (_nearest(small, large) for small, large in zip(target_hw, original_hw, strict=True))
    # The first sampled column at or after each interval's; it is kept only if it is exactly that one.
    column = np.searchsorted(column_of, intervals.column).clip(max=width - 1)
    # Sampled rows from top on, and those before bottom.
    top, bottom = np.searchsorted(row_of, intervals.top), np.searchsorted(row_of, intervals.bottom)
    kept = (column_of[column] == intervals.column) & (bottom > top)
    start, end = (column * height + top)[kept], (column * height + bottom)[kept]
    of_mask = slices_of(intervals.mask[kept], len(masks))
    of_mask_before = slices_of(intervals.mask, len(masks))
    scaled = []
    for now, before in zip(of_mask, of_mask_before, strict=True):
        starts, ends = start[now], end[now]
        if now.start == now.stop and before.start < before.stop:  # between the centres: one pixel represents the mask
            first = before.start
            starts = column[first][None] * height + top[first].clip(max=height - 1)
            ends = starts + 1
        scaled.append(_compressed(starts, ends, height, width))
    return scaled


def _nearest(small: int, large: int) -> npt.NDArray[np.int64]:
    """For each of `small` pixels, the one of `large` that its centre falls into."""
    return np.asarray((np.arange(small) + 0.5) * large / small, np.int64)


def _compressed(starts: Runs, ends: Runs, height: int, width: int) -> str:
    changes: Runs = np.zeros(0, np.int64)
    if len(starts):
        apart = starts[1:] > ends[:-1]  # runs that continue in the next column are one
        changes = np.stack([starts[np.append(True, apart)], ends[np.append(apart, True)]], 1).ravel()
    counts = np.diff(changes, prepend=0, append=height * width).tolist()
    if counts[-1] == 0 and len(counts) > 1:  # if the last pixel is 1, its run is the last one
        counts.pop()
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return str(rle["counts"].decode("ascii"))


def jpeg_uri(image: npt.NDArray[np.uint8], hw: tuple[int, int]) -> str:
    """image: (H, W, 3) RGB. Resizes it to hw and returns a data: URI."""
    # reducing_gap: a large photo is first shrunk by a whole number, which is fast.
    small = Image.fromarray(image).resize((hw[1], hw[0]), Image.Resampling.LANCZOS, reducing_gap=3.0)
    data = io.BytesIO()
    small.save(data, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
