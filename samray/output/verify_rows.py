"""The checks of `verify` on the rows of a shard; each yields one sentence per problem."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import pyarrow as pa

from samray.output.schema import ANNOTATIONS_PER_IMAGE, CHANGES, PRESENCE, asked_of, is_transform
from samray.rle.runs import area, bbox_xywh, check_size, checked_runs

PREDICTED_IOU_RANGE: Final = (-0.4, 1.4)
"""SAM's IoU prediction is unbounded; a value further than this from [0, 1] cannot come from the model."""


_ASKED: Final = ("image", "annotations", "status", "corrections", "phrases", "presence")

_MAY_BE_NULL: Final = ("label", "label_score")


def check_planned(name: str, planned: pa.Table, table: pa.Table) -> Iterator[str]:
    """Check that the shard's images are those of the plan, each once, in order."""
    image = table["image"].combine_chunks()
    ids = image.field("image_id").to_pylist()
    wanted = planned["image_id"].to_pylist()
    if ids == wanted:
        columns = (("uri", table["uri"].to_pylist()), ("file_name", image.field("file_name").to_pylist()))
        for column, values in columns:
            for image_id, have, want in zip(ids, values, planned[column].to_pylist(), strict=True):
                if have != want:
                    yield f"{name}: image {image_id} has {column} {have!r}, expected {want!r} as planned"
        return
    # Compared as sets: one missing row would otherwise report all rows that follow.
    known = set(wanted)
    seen: set[int] = set()
    for image_id in ids:
        if image_id in seen:
            yield f"{name}: image {image_id} occurs more than once"
        elif image_id not in known:
            yield f"{name}: image {image_id} is not in the plan of this shard"
        seen.add(image_id)
    for image_id in wanted:
        if image_id not in seen:
            yield f"{name}: image {image_id} is missing"
    if seen == known and len(ids) == len(wanted):
        yield f"{name}: the images are not in the order of the plan"


def check_status(name: str, table: pa.Table) -> Iterator[str]:
    """Check that status, error, size and number of masks agree."""
    columns = ("image", "status", "error", "annotations")
    for image, status, error, masks in zip(*(table[column].to_pylist() for column in columns), strict=True):
        if image is None or any(value is None for value in image.values()):
            yield f"{name}: a row has an image without id, size or name: {image}"
            continue
        which = f"{name}: image {image['image_id']}"
        if status == "ok":
            if error is not None:
                yield f"{which} is ok, but has an error: {error}"
            if image["width"] < 1 or image["height"] < 1:
                yield f"{which} is ok, but has {image['width']}x{image['height']} pixels"
        elif status != "failed":
            yield f"{which} has the unknown status {status!r}"
        elif not error:
            yield f"{which} failed, but has no error"
        num_masks = None if masks is None else len(masks)
        if num_masks is None or (status == "failed" and num_masks):
            yield f"{which} has status {status!r} and {num_masks} masks"


def check_asked(name: str, table: pa.Table, categories: Sequence[str], num_common: int | None) -> Iterator[str]:
    """Check that a row's own phrases are categories, that each of its masks has a name that was asked of it, and that
    the scores in `presence`, if it has that column, are of all phrases asked.

    num_common: as in `num_common_of`. In a corrected output a person may have given any of the names.
    """
    has_presence = PRESENCE.name in table.column_names
    if num_common is None and not has_presence:
        return
    known, common = set(categories), set(categories[:num_common])
    rows = table.select([column for column in table.column_names if column in _ASKED]).to_pylist()
    for row in rows:
        which = f"{name}: image {(row['image'] or {}).get('image_id')}"
        user_phrases = row["phrases"] if num_common is not None else []
        if has_presence:
            # A person may have added names, which were asked of no image.
            asked = None if "corrections" in row else asked_of(user_phrases or (), categories, num_common)
            yield from (f"{which} {problem}" for problem in _check_presence(row, asked, known))
        if num_common is None:
            continue
        if user_phrases is None or not known.issuperset(user_phrases):
            yield f"{which} has the phrases {user_phrases}, expected a list of names that the run asks for"
            continue
        labels = {mask["label"] for mask in row["annotations"] or [] if mask is not None} - {None}
        if "corrections" not in row and (not_asked := labels - common - set(user_phrases)):
            yield f"{which} has a mask with the name {min(not_asked)!r}, which was not asked of this image"


def _check_presence(row: Mapping[str, Any], asked: Sequence[str] | None, known: set[str]) -> Iterator[str]:
    """Yield a sentence for each thing wrong with the column `presence`. asked: None if any of known may be there."""
    items = row["presence"]
    if items is None or None in items or any(None in item.values() for item in items):
        yield f"has an empty field in its presence: {items}"
        return
    phrases = [item["phrase"] for item in items]
    wanted = [] if row["status"] == "failed" else asked
    if wanted is None and (len(set(phrases)) < len(phrases) or not known.issuperset(phrases)):
        yield f"has the presence of {phrases}, expected names that the run asks for, each once"
    elif wanted is not None and phrases != wanted:
        yield f"has the presence of {phrases}, expected {wanted}"
    for item in items:
        if not 0 <= item["score"] <= 1:
            yield f"has a score out of range: presence of {item['phrase']!r} {item['score']}, expected 0 to 1"


def check_image(
    name: str, row: dict[str, Any], bbox_convention: str, deep: bool, *, has_gaps: bool = False
) -> Iterator[str]:
    """Check the annotations of a row (from `pa.Table.to_pylist`); deep: also every mask, area and box.

    has_gaps: only some masks of a run were kept, with their ids.
    """
    image = row["image"]
    if image is None or any(value is None for value in image.values()):
        return  # reported by check_status
    corrected = "corrections" in row
    if corrected or has_gaps:
        yield from _check_ids(f"{name}: image {image['image_id']}", row)
    # Of a selection the removed masks may have been corrected, too.
    if corrected and not has_gaps:
        yield from _check_corrections(f"{name}: image {image['image_id']}", row)
    elif "tiles" in row and not has_gaps:
        yield from _check_tiles(f"{name}: image {image['image_id']}", row)
    transform = (row.get("geo") or {}).get("transform")
    if transform is not None and not is_transform(transform):
        yield f"{name}: image {image['image_id']} has the transform {transform} in geo, expected six numbers"
    for i, mask in enumerate(row["annotations"] or []):
        which = f"{name}: image {image['image_id']}, annotation {i}"
        if mask is None or any(_holds_null(value) for key, value in mask.items() if key not in _MAY_BE_NULL):
            yield f"{which} has an empty field"
            continue
        if not (corrected or has_gaps) and mask["id"] != image["image_id"] * ANNOTATIONS_PER_IMAGE + i:
            yield f"{which} has the id {mask['id']}, not image_id * {ANNOTATIONS_PER_IMAGE} + index"
        hw = [image["height"], image["width"]]
        if mask["segmentation"]["size"] != hw:
            yield f"{which} has a mask of size {mask['segmentation']['size']}, not {hw} like the image (height, width)"
            continue
        yield from (f"{which} {problem}" for problem in check_numbers(mask, hw))
        yield from (f"{which} {problem}" for problem in check_label(mask))
        if deep:
            problem = check_mask(mask, bbox_convention)
            if problem:
                yield f"{which} {problem}"


def check_label(mask: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each impossible value of a mask's name; of a run without names nothing."""
    label, score = mask.get("label"), mask.get("label_score")
    if label == "":
        yield "has an empty name"
    if (label is None) != (score is None):
        yield f"has the name {label!r} with the score {score}; expected both or none"
    elif score is not None and not math.isfinite(score):
        yield f"has a score that is not a number: label_score {score}"


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict):
        value = value.values()
    return any(map(_holds_null, value)) if isinstance(value, list | type({}.values())) else value is None


def check_numbers(mask: Mapping[str, Any], hw: Sequence[int]) -> Iterator[str]:
    """Yield a sentence for each score, box or point that is not a possible value. hw: height and width of the image."""
    scores = {"predicted_iou": PREDICTED_IOU_RANGE, "stability_score": (0.0, 1.0)}
    for column, (low, high) in scores.items():
        if not math.isfinite(mask[column]):
            yield f"has a score that is not a number: {column} {mask[column]}"
        elif not low <= mask[column] <= high:
            yield f"has a score out of range: {column} {mask[column]}, expected {low:g} to {high:g}"
    # Both are x, y, width, height in pixels of the whole image.
    for column in ("bbox", "crop_box"):
        box = mask[column]
        if len(box) != 4 or not all(map(math.isfinite, box)):
            yield f"has a box that is not four finite numbers: {column} {box}"
        elif min(box) < 0 or box[0] + box[2] > hw[1] or box[1] + box[3] > hw[0]:
            yield f"has a box outside the image: {column} {box}"
    if any(len(point) != 2 or not all(map(math.isfinite, point)) for point in mask["point_coords"]):
        yield f"has points that are not pairs of finite numbers: {mask['point_coords']}"


def _ids_of(row: dict[str, Any]) -> list[int]:
    return [mask["id"] for mask in row["annotations"] or [] if mask is not None and mask["id"] is not None]


def _check_ids(which: str, row: dict[str, Any]) -> Iterator[str]:
    """Masks keep their ids if others are removed, which leaves gaps in the ids."""
    ids = _ids_of(row)
    first = row["image"]["image_id"] * ANNOTATIONS_PER_IMAGE
    if any(not first <= id < first + ANNOTATIONS_PER_IMAGE for id in ids) or any(b <= a for a, b in pairwise(ids)):
        yield f"{which} has annotations whose ids do not increase from image_id * {ANNOTATIONS_PER_IMAGE}"


def _check_corrections(which: str, row: dict[str, Any]) -> Iterator[str]:
    ids = _ids_of(row)
    for entry in row["corrections"] or []:
        # Added and changed masks must be among the annotations, removed and left-out ones must not.
        id, change = entry["id"], entry["change"]
        if change not in CHANGES or (id in ids) != (change in ("added", "changed")):
            yield f"{which} records that annotation {id} was {change}, but it is {'' if id in ids else 'not '}there"


def _check_tiles(which: str, row: dict[str, Any]) -> Iterator[str]:
    """The tiles of an image that was labelled in tiles: those of each mask, inside of the image."""
    tiles, image = row["tiles"], row["image"]
    if tiles is None or None in tiles or _holds_null(tiles):
        yield f"{which} has an empty field in its tiles"
    elif tiles and [tile["id"] for tile in tiles] != _ids_of(row):
        yield f"{which} has tiles of other masks than it has"
    else:
        for box in (box for tile in tiles for box in tile["boxes"]):
            if len(box) != 4:
                yield f"{which} has a tile that is not four numbers: {box}"
                continue
            x, y, w, h = box
            if min(x, y, w - 1, h - 1) < 0 or x + w > image["width"] or y + h > image["height"]:
                yield f"{which} has a tile outside the image: {box}"


def check_mask(mask: dict[str, Any], bbox_convention: str) -> str | None:
    """The problem of one annotation's mask, area or box; None if it has none."""
    try:
        # Refuses run lengths that do not fit the size before any pixel is made.
        hw = check_size(mask["segmentation"]["size"])
        runs = checked_runs(mask["segmentation"]["counts"], hw)
    except ValueError as error:
        return f"has {error}"
    num_pixels = area(runs)
    if num_pixels != mask["area"]:
        return f"has the area {mask['area']}, but {num_pixels} pixels"
    if num_pixels == 0:
        return "is empty"
    x, y, w, h = bbox_xywh(runs, hw)
    # segment-anything's boxes are one pixel shorter than COCO's.
    box = [x, y, w, h] if bbox_convention == "coco" else [x, y, w - 1, h - 1]
    if mask["bbox"] != box:
        return f"has the box {mask['bbox']}, but its pixels span {box}"
    return None
