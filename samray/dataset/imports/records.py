"""Annotations of SA-1B and COCO, whatever they leave open, as rows of an output.

The mask is what counts: area and box are measured on it again, for sources round them, cut them or take them from
polygons. An annotation's id becomes image_id * 65536 + index, as everywhere in samray. What a source does not know is
filled in: a predicted IoU (else COCO's `score`) and stability of 1, no point, the whole image as crop box. Categories
have no place in the SA-1B layout and are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pycocotools import mask as coco_mask

from samray.dataset.runs import run_lengths
from samray.dataset.schema import ANNOTATIONS_PER_IMAGE, ImageRecord
from samray.errors import ImageError


def record_of(
    planned: Mapping[str, Any], image: Mapping[str, Any], annotations: Sequence[Any], bbox_convention: str
) -> tuple[ImageRecord, int]:
    """A row of an output, and how many annotations were dropped because they hold no pixel.

    planned: the image's row of the manifest. image: width and height. An annotation that cannot be understood makes
    the image a failed one, with a reason that names it.
    """
    known = {name: planned[name] for name in ("image_id", "file_name", "uri")}
    try:
        height, width = image_hw(image)
        found = [_annotation(i, raw, (height, width), bbox_convention) for i, raw in enumerate(annotations)]
        kept = [mask for mask in found if mask is not None]
        if len(kept) > ANNOTATIONS_PER_IMAGE:
            raise ImageError("unsupported", f"{len(kept)} annotations are more than {ANNOTATIONS_PER_IMAGE}")
    except ImageError as error:
        return failed(planned, error), 0
    return ImageRecord(**known, width=width, height=height, annotations=kept), len(found) - len(kept)


def failed(planned: Mapping[str, Any], error: ImageError) -> ImageRecord:
    """The row of an image whose annotations cannot be had."""
    known = {name: planned[name] for name in ("image_id", "file_name", "uri")}
    return ImageRecord(**known, width=0, height=0, error=str(error))


def image_hw(image: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in pixels. Raises: ImageError where they are no sizes of an image."""
    sides = image.get("height"), image.get("width")
    if not all(isinstance(side, int) and 0 < side < 2**31 for side in sides):
        raise ImageError("unreadable", f"the image has the impossible height and width {sides}")
    return sides  # type: ignore[return-value]


def _annotation(place: int, raw: Any, hw: tuple[int, int], bbox_convention: str) -> dict[str, Any] | None:
    """As `MaskGenerator` would make it, without id; None where there is no pixel. Raises: ImageError."""
    try:
        counts = counts_of(raw.get("segmentation"), hw)
        if counts is None:
            return None
        area, bbox = measure(counts, hw, bbox_convention)
        if area == 0:
            return None
        score = raw.get("predicted_iou", raw.get("score"))
        points = raw.get("point_coords") or []
        return {
            "segmentation": {"size": list(hw), "counts": counts},
            "bbox": bbox,
            "area": area,
            "predicted_iou": _score(score),
            "stability_score": _score(raw.get("stability_score")),
            "point_coords": [[_finite(x), _finite(y)] for x, y in points],
            "crop_box": _four(raw.get("crop_box")) or [0.0, 0.0, float(hw[1]), float(hw[0])],
        }
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ImageError("unreadable", f"annotation {place} cannot be understood: {error}") from error


def _score(value: Any) -> float:
    return float(value) if value is not None and math.isfinite(value) else 1.0


def _four(value: Any) -> list[float] | None:
    if value is None:
        return None
    if len(value) != 4:
        raise ValueError(f"a box of {len(value)} numbers")
    return [_finite(number) for number in value]


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):  # Python reads NaN and Infinity, which are no JSON
        raise ValueError(f"the coordinate {number}")
    return number


def counts_of(segmentation: Any, hw: tuple[int, int]) -> str | None:
    """COCO's compressed run lengths, of whatever form; None where there is no mask. Raises: ValueError and the like."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        return _counts_of_polygons(segmentation, hw)
    size, counts = segmentation["size"], segmentation["counts"]
    if list(size) != list(hw):
        raise ValueError(f"a mask of size {size}, in an image {list(hw)} high and wide")
    if isinstance(counts, list):
        if not all(isinstance(run, int) and run >= 0 for run in counts) or sum(counts) != hw[0] * hw[1]:
            raise ValueError(f"run lengths that do not sum to {hw[0]} * {hw[1]}")
        return str(coco_mask.frPyObjects({"size": list(hw), "counts": counts}, *hw)["counts"].decode("ascii"))
    # Looked at before pycocotools sees it, which may write past its memory for run lengths that do not fit.
    runs = run_lengths(counts)
    if runs is None or runs.min() < 0 or runs.sum() != hw[0] * hw[1]:
        raise ValueError("a run-length string that is no mask of this size")
    return str(counts)


def _counts_of_polygons(polygons: list[Any], hw: tuple[int, int]) -> str | None:
    usable = []
    for polygon in polygons:
        numbers = [float(number) for number in polygon]
        if len(numbers) % 2 or not all(math.isfinite(number) and abs(number) < 2**26 for number in numbers):
            raise ValueError("a polygon that is no list of x, y")
        if len(numbers) >= 6:  # COCO has a few of one or two points, which hold nothing
            usable.append(numbers)
    if not usable:
        return None
    return str(coco_mask.merge(coco_mask.frPyObjects(usable, *hw))["counts"].decode("ascii"))


def measure(counts: str, hw: tuple[int, int], bbox_convention: str) -> tuple[int, list[float]]:
    """Area and box of a sound run-length string. bbox_convention: coco, or sam, whose boxes are one pixel short."""
    rle = {"size": list(hw), "counts": counts.encode("ascii")}
    x, y, w, h = (float(value) for value in coco_mask.toBbox(rle))
    return int(coco_mask.area(rle)), [x, y, w, h] if bbox_convention == "coco" else [x, y, w - 1, h - 1]


def bbox_convention_of(samples: Iterable[tuple[Any, tuple[int, int]]]) -> str | None:
    """coco or sam, by what most boxes agree with; None where none says. Never raises.

    samples: annotations, each with its image's height and width.
    """
    votes = {"coco": 0, "sam": 0}
    for raw, hw in samples:
        try:
            counts = counts_of(raw["segmentation"], hw)
            box = _four(raw["bbox"])
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError):
            continue
        for convention in votes:
            if counts is not None:
                votes[convention] += box == measure(counts, hw, convention)[1]
    if votes["coco"] == votes["sam"]:
        return None
    return max(votes, key=lambda convention: votes[convention])
