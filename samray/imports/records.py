"""Convert annotations of SA-1B and COCO, which may be incomplete, to rows of an output.

Area and box are measured again from the mask, because sources round them, cut them or take them from polygons. An
annotation's id becomes image_id * 65536 + index, as everywhere in samray. Missing values are filled in: a predicted IoU
(or COCO's `score`) and stability of 1, no point, the whole image as crop box. If the source has categories, a mask has
the name of its own; the score of a name is `label_score`, else `score`, else 1.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Final, TypedDict

import numpy as np
from pycocotools import mask as coco_mask

from samray.errors import ImageError
from samray.output.schema import ANNOTATIONS_PER_IMAGE, ImageRecord
from samray.output.verify_rows import check_numbers
from samray.rle.records import MaskRecord
from samray.rle.runs import MAX_CHARS, Runs, area, bbox_xywh, check_size, checked_runs, spans

_MAX_OUTLINE: Final = 2**22
"""Maximum outline of an annotation's polygons and maximum coordinate, in pixels."""

MAX_IMAGE_CHARS: Final = 2**25
"""Maximum characters of run lengths per image: a polygon with three corners can make megabytes of them."""


def record_of(
    planned: Mapping[str, Any],
    image: Mapping[str, Any],
    annotations: Sequence[Any],
    bbox_convention: str,
    categories: Collection[str] | None = None,
) -> tuple[ImageRecord, int]:
    """A row of an output, and the number of annotations dropped because they have no pixels.

    planned: the image's row in the manifest. image: width and height. categories: the names of the output; None for an
    output without. An annotation that cannot be parsed makes the image a failed row, with a reason that names the
    annotation.
    """
    known = {name: planned[name] for name in ("image_id", "file_name", "uri")}
    try:
        height, width = image_hw(image)
        kept: list[MaskRecord] = []
        num_chars = 0
        for i, raw in enumerate(annotations):
            mask = _annotation(i, raw, (height, width), bbox_convention, categories)
            if mask is not None:
                kept.append(mask)
                num_chars += len(mask["segmentation"]["counts"])
            if len(kept) > ANNOTATIONS_PER_IMAGE:
                raise ImageError("unsupported", f"{len(annotations)} annotations are more than {ANNOTATIONS_PER_IMAGE}")
            if num_chars > MAX_IMAGE_CHARS:
                raise ImageError("too_large", f"its masks have more than {MAX_IMAGE_CHARS} characters of run lengths")
    except ImageError as error:
        return failed(planned, error), 0
    return ImageRecord(**known, width=width, height=height, annotations=kept), len(annotations) - len(kept)


def failed(planned: Mapping[str, Any], error: ImageError) -> ImageRecord:
    """The row of an image whose annotations are not available."""
    known = {name: planned[name] for name in ("image_id", "file_name", "uri")}
    return ImageRecord(**known, width=0, height=0, error=str(error))


def image_hw(image: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in pixels. Whole numbers may be floats, as pandas writes them.

    Raises: ImageError if they are not a valid image size, or are too large.
    """
    sides = [integer_of(image.get(name)) for name in ("height", "width")]
    if None in sides:
        hw = (image.get("height"), image.get("width"))
        raise ImageError("unreadable", f"the image has the impossible height and width {reprlib.repr(hw)}")
    try:
        return check_size(sides)
    except ValueError as error:
        raise ImageError("unreadable", f"the image has {error}") from error


def integer_of(value: Any) -> int | None:
    """The integer value of an int or of a whole float; None for everything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _annotation(
    index: int, raw: Any, hw: tuple[int, int], bbox_convention: str, categories: Collection[str] | None
) -> MaskRecord | None:
    """As from `MaskGenerator`, without id; None if there is no pixel. Raises: ImageError."""
    try:
        counts = counts_of(raw.get("segmentation"), hw)
        if counts is None:
            return None
        num_pixels, bbox = measure(counts, hw, bbox_convention)
        if num_pixels == 0:
            return None
        score = raw.get("predicted_iou", raw.get("score"))
        points = raw.get("point_coords") or []
        mask: MaskRecord = {
            "segmentation": {"size": list(hw), "counts": counts},
            "bbox": bbox,
            "area": num_pixels,
            "predicted_iou": _score(score),
            "stability_score": _score(raw.get("stability_score")),
            "point_coords": [[_finite(x), _finite(y)] for x, y in points],
            "crop_box": _four(raw.get("crop_box")) or [0.0, 0.0, float(hw[1]), float(hw[0])],
        }
        # Refused now, because verify would report such values later.
        for problem in check_numbers(mask, hw):
            raise ValueError(f"it {problem}")
        return mask if categories is None else {**mask, **_name(raw, categories)}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ImageError("unreadable", f"annotation {index} is not valid: {str(error)[:300]}") from error


class _Name(TypedDict):
    label: str | None
    label_score: float | None


def _name(raw: Mapping[str, Any], categories: Collection[str]) -> _Name:
    """The name of an annotation and its score. Raises: ValueError if it is not one of the categories."""
    label = raw.get("label")
    if label is None:
        return {"label": None, "label_score": None}
    if label not in categories:
        raise ValueError(f"it has the name {reprlib.repr(label)}, which is not one of the categories")
    return {"label": label, "label_score": _score(raw.get("label_score", raw.get("score")))}


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
    if not math.isfinite(number):  # Python also parses NaN and Infinity, which are not JSON
        raise ValueError(f"the coordinate {number}")
    return number


def counts_of(segmentation: Any, hw: tuple[int, int]) -> str | None:
    """COCO's compressed run lengths from any form of segmentation; None if there is no mask.

    hw: from `image_hw`. Raises: ValueError and the like.
    """
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        return _counts_of_polygons(segmentation, hw)
    size, counts = segmentation["size"], segmentation["counts"]
    if not isinstance(size, list) or [integer_of(side) for side in size] != list(hw):
        raise ValueError(f"a mask of size {reprlib.repr(size)}, not {list(hw)} like the image (height, width)")
    if isinstance(counts, list):
        return _compressed(_plain_runs(counts, hw), hw)
    runs = checked_runs(counts, hw)
    # An empty run between two others is legal, but makes pycocotools' IoU stop too early.
    return _compressed(runs, hw) if np.any(runs[1:] == 0) else str(counts)


def _plain_runs(counts: list[Any], hw: tuple[int, int]) -> Runs:
    """Validate uncompressed run lengths; whole numbers may be floats. Raises: ValueError."""
    # By its length, before millions of values are converted.
    if len(counts) > MAX_CHARS:
        raise ValueError(f"{len(counts)} run lengths; at most {MAX_CHARS} are supported")
    runs = [integer_of(run) for run in counts]
    # Python's sum does not overflow.
    if any(run is None or run < 0 for run in runs) or sum(runs) != hw[0] * hw[1]:  # type: ignore[arg-type]
        raise ValueError(f"run lengths that do not sum to {hw[0]} * {hw[1]}")
    return np.array(runs, dtype=np.int64)


def _compressed(runs: Runs, hw: tuple[int, int]) -> str:
    """Encode the runs as COCO's string, without empty runs except for the first."""
    start, end = spans(runs)
    # From the spans of ones back to alternating runs, of which only the first may be empty.
    counts = np.diff(np.stack([start, end], axis=1).ravel(), prepend=0, append=hw[0] * hw[1])
    if counts[-1] == 0 and len(counts) > 1:  # if the last pixel is 1, its run is the last one
        counts = counts[:-1]
    return str(coco_mask.frPyObjects({"size": list(hw), "counts": counts}, *hw)["counts"].decode("ascii"))


def _counts_of_polygons(polygons: list[Any], hw: tuple[int, int]) -> str | None:
    if all(isinstance(number, int | float) for number in polygons):  # one polygon, not in a list
        polygons = [polygons]
    elif len(polygons) > 2 and all(_is_point(point) for point in polygons):  # one polygon of [x, y] pairs
        polygons = [list(chain.from_iterable(polygons))]
    usable = []
    outline = 0.0
    for polygon in polygons:
        if polygon and all(_is_point(point) for point in polygon):
            polygon = list(chain.from_iterable(polygon))
        xy = np.array([float(number) for number in polygon], dtype=np.float64)
        if len(xy) % 2 or not np.isfinite(xy).all():
            raise ValueError("a polygon that is not a list of x, y")
        if len(xy) < 6:  # COCO has a few polygons with one or two points, which are empty
            continue
        # pycocotools walks along the outline in fifths of a pixel and stores each step, even far outside the image.
        corners = xy.reshape(-1, 2)
        length = np.abs(np.diff(corners, axis=0, append=corners[:1])).max(axis=1).sum()
        outline += float(length)
        # Written so that infinity and NaN are refused, too.
        if not outline <= _MAX_OUTLINE or np.abs(xy).max() > _MAX_OUTLINE:
            raise ValueError(
                f"polygons with an outline or a coordinate of {outline:.3g} pixels; at most {_MAX_OUTLINE} "
                "are supported"
            )
        usable.append(xy.tolist())
    if not usable:
        return None
    # The polygons are parts of one mask.
    return str(coco_mask.merge(coco_mask.frPyObjects(usable, *hw))["counts"].decode("ascii"))


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and not any(isinstance(number, list) for number in value)


def measure(counts: str, hw: tuple[int, int], bbox_convention: str) -> tuple[int, list[float]]:
    """Area and box of a valid run-length string. bbox_convention: coco, or sam, whose boxes are one pixel smaller."""
    runs = checked_runs(counts, hw)
    x, y, w, h = bbox_xywh(runs, hw)
    return area(runs), [x, y, w, h] if bbox_convention == "coco" else [x, y, w - 1, h - 1]


def bbox_convention_of(samples: Iterable[tuple[Any, tuple[int, int]]]) -> str | None:
    """The convention, coco or sam, that most boxes follow; None if they do not tell. Never raises.

    samples: annotations, each with its image's height and width.
    """
    votes = {"coco": 0, "sam": 0}
    for raw, hw in samples:
        try:
            counts = counts_of(raw["segmentation"], hw)
            box = _four(raw["bbox"])
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError):
            continue
        # A sample votes for the convention in which its box fits its mask.
        for convention in votes:
            if counts is not None:
                votes[convention] += box == measure(counts, hw, convention)[1]
    if votes["coco"] == votes["sam"]:
        return None
    return max(votes, key=lambda convention: votes[convention])
