"""Compare the corrected masks of an image with the original ones: unchanged, changed, added, removed.

Tools assign new ids, so a mask is matched by the attribute `samray_id`, if the tool kept it, else by its pixels: the
pair of masks with the largest IoU is the same mask, then the next pair, down to an IoU of `MATCH_IOU`. A mask with
exactly the same pixels and the same name is unchanged and keeps its scores and everything else. The name that the
person gave wins.

The id of a mask is never reused in an image: new masks get ids after all that the image ever had, which are those of
its masks and of its `corrections`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from samray.errors import ImageError, StorageError
from samray.exports.review import ID_ATTRIBUTE, is_sure
from samray.imports.records import counts_of, image_hw, measure
from samray.output.schema import ANNOTATIONS_PER_IMAGE, ImageRecord
from samray.rle.records import MaskRecord
from samray.rle.runs import runs_of_image

Name = dict[str, Any]
"""`label` and `label_score` of a corrected mask; empty if the corrected file says nothing about its name."""

MATCH_IOU: Final = 0.5
"""Minimum IoU to match a corrected mask with an original one."""


def unchanged_record(row: Mapping[str, Any]) -> ImageRecord:
    """The record of a row of an output. row: from `pa.Table.to_pylist`."""
    return ImageRecord(
        **row["image"],
        uri=row["uri"],
        annotations=row["annotations"],
        error=row["error"],
        corrections=row.get("corrections"),
        phrases=row.get("phrases"),
        presence=row.get("presence"),
        geo=row.get("geo"),
        tiles=row.get("tiles"),
    )


def corrected_record(
    row: Mapping[str, Any],
    image: Mapping[str, Any],
    annotations: Sequence[Any],
    *,
    confident: float | None,
    stable: float | None,
    keep_rest: bool,
    bbox_convention: str,
    categories: Collection[str] | None = None,
) -> tuple[ImageRecord, Counter[str]]:
    """The corrected row of an image, and the number of masks unchanged, changed, added, removed, left_out.

    row: of the output, not failed. image: width, height and annotations from the corrected file. confident, stable: as
    for the export; masks below were not exported. They are left out or, with keep_rest, kept unchanged. `dropped`
    counts annotations without pixels, such as plain boxes. An annotation that cannot be parsed makes the image a failed
    row with a reason. categories: the names of the corrected output; None if it has none. Raises: StorageError if the
    output's masks are damaged.
    """
    known = row["image"]
    hw = known["height"], known["width"]
    try:
        if image_hw(image) != hw:
            raise ImageError(
                "unreadable",
                f"the corrected image is {image['width']}x{image['height']}, the labelled one {hw[1]}x{hw[0]}",
            )
        drawn = [(_drawn(i, raw, hw), _name(raw, categories)) for i, raw in enumerate(annotations)]
        # Without those that have no pixel, such as plain boxes.
        returned = [mask for mask, _ in drawn if mask is not None]
        names = [name for mask, name in drawn if mask is not None]
        shown, rest = _parted(row, hw, confident, stable)
        edit = _Edit(row, hw, bbox_convention)
        edit.numbers["dropped"] = len(drawn) - len(returned)
        edit.set_aside(rest, keep=keep_rest)
        edit.apply(shown, returned, names)
    except ImageError as error:
        failed = {"image_id": known["image_id"], "file_name": known["file_name"], "uri": row["uri"]}
        return ImageRecord(**failed, width=0, height=0, error=str(error), phrases=row.get("phrases")), Counter()
    record = ImageRecord(
        **known,
        uri=row["uri"],
        annotations=[edit.kept[id] for id in sorted(edit.kept)],
        corrections=[{"id": id, "change": edit.marks[id]} for id in sorted(edit.marks)],
        phrases=row.get("phrases"),
        presence=row.get("presence"),
        geo=row.get("geo"),
        tiles=row.get("tiles"),
    )
    return record, edit.numbers


def _parted(
    row: Mapping[str, Any], hw: tuple[int, int], confident: float | None, stable: float | None
) -> tuple[list[MaskRecord], list[MaskRecord]]:
    """The masks that the export showed to the person, and the rest. Raises: StorageError if one is damaged."""
    shown: list[MaskRecord] = []
    rest: list[MaskRecord] = []
    for mask in row["annotations"]:
        (shown if is_sure(mask["predicted_iou"], mask["stability_score"], confident, stable) else rest).append(mask)
    image_id = row["image"]["image_id"]
    if any(mask["segmentation"]["size"] != list(hw) for mask in row["annotations"]):
        raise StorageError(
            f"image {image_id} has a mask of another size than the image, {hw[1]}x{hw[0]}; "
            "`samray verify --deep` finds all such problems"
        )
    # pycocotools, which is about to compare them, reads and writes outside of its memory for unsound run lengths.
    runs_of_image(image_id, [mask["segmentation"]["counts"] for mask in shown], hw)
    return shown, rest


class _Edit:
    """The masks of one image while a person's changes are applied to them."""

    def __init__(self, row: Mapping[str, Any], hw: tuple[int, int], bbox_convention: str) -> None:
        self.hw, self.bbox_convention = hw, bbox_convention
        self.kept: dict[int, MaskRecord] = {}
        """Id -> mask of the corrected image."""
        self.marks: dict[int, str] = {entry["id"]: entry["change"] for entry in row.get("corrections") or []}
        """Id -> what was changed, earlier corrections included."""
        self.numbers: Counter[str] = Counter()
        first_id = row["image"]["image_id"] * ANNOTATIONS_PER_IMAGE
        ids = [mask["id"] for mask in row["annotations"]]
        # After all ids that the image ever had, those of removed masks included.
        self._next_id = max([*ids, *self.marks], default=first_id - 1) + 1
        self._end_id = first_id + ANNOTATIONS_PER_IMAGE

    def set_aside(self, masks: Sequence[MaskRecord], *, keep: bool) -> None:
        """Masks that the person did not see: kept as is, or left out and marked so."""
        if keep:
            self.kept |= {mask["id"]: mask for mask in masks}
        else:
            self.marks |= {mask["id"]: "left_out" for mask in masks}
            self.numbers["left_out"] = len(masks)

    def apply(
        self, shown: Sequence[MaskRecord], returned: Sequence[tuple[str, int | None]], names: Sequence[Name]
    ) -> None:
        """Compare what the person saw with what came back. returned: as for `match_masks`; names: of each. Raises:
        ImageError."""
        same_as = match_masks(shown, returned, self.hw)
        for index, mask in enumerate(shown):
            if index in same_as:
                self._keep_or_change(mask, returned[same_as[index]][0], names[same_as[index]])
            else:
                self.numbers["removed"] += 1
                self.marks[mask["id"]] = "removed"
        matched = set(same_as.values())
        for index, (counts, _) in enumerate(returned):
            if index not in matched:
                self._add(counts, names[index])
        # `_end_id` is the first id of the next image.
        if self._next_id > self._end_id:
            raise ImageError("unsupported", f"no mask id is left: an image has at most {ANNOTATIONS_PER_IMAGE}")

    def _keep_or_change(self, mask: MaskRecord, counts: str, name: Name) -> None:
        same_name = not name or name["label"] == mask.get("label")
        same_pixels = _same_pixels(counts, mask["segmentation"]["counts"], self.hw)
        if same_pixels and same_name:
            self.numbers["unchanged"] += 1
            self.kept[mask["id"]] = mask  # scores and all
            return
        self.numbers["changed"] += 1
        changed = mask
        if not same_pixels:
            drawn = _manual_record(counts, self.hw, self.bbox_convention, mask["point_coords"], mask["crop_box"])
            changed = {**changed, **drawn}
        if not same_name:
            changed = cast(MaskRecord, {**changed, **name})
        self.kept[mask["id"]] = changed
        if self.marks.get(mask["id"]) != "added":  # a mask added manually stays so
            self.marks[mask["id"]] = "changed"

    def _add(self, counts: str, name: Name) -> None:
        self.numbers["added"] += 1
        # A drawn mask has no point, and the whole image as its crop.
        crop_box = [0.0, 0.0, float(self.hw[1]), float(self.hw[0])]
        drawn = _manual_record(counts, self.hw, self.bbox_convention, [], crop_box)
        self.kept[self._next_id] = cast(MaskRecord, {"id": self._next_id, **drawn, **name})
        self.marks[self._next_id] = "added"
        self._next_id += 1


def match_masks(
    shown: Sequence[MaskRecord], returned: Sequence[tuple[str, int | None]], hw: tuple[int, int]
) -> dict[int, int]:
    """Index in shown -> index in returned of the same mask; one to one.

    returned: run lengths, and the id that came back, if any. If several have the same id, as after copy and paste, the
    one that overlaps most keeps it; the others are matched as if they had none.
    """
    if not shown or not returned:
        return {}
    ious = _ious([mask["segmentation"]["counts"] for mask in shown], [counts for counts, _ in returned], hw)
    matches: dict[int, int] = {}
    # First by the ids that came back, then by the pixels.
    for index, mask in enumerate(shown):
        claims = [i for i, (_, id) in enumerate(returned) if id == mask["id"]]
        if claims:
            matches[index] = max(claims, key=lambda i: ious[index, i])
    taken = set(matches.values())
    # Greedily, from the largest IoU on.
    for flat in np.argsort(-ious, axis=None, kind="stable").tolist():
        index, other = divmod(flat, len(returned))
        if ious[index, other] < MATCH_IOU:
            break
        if index not in matches and other not in taken:
            matches[index] = other
            taken.add(other)
    return matches


def _ious(ours: list[str], theirs: list[str], hw: tuple[int, int]) -> npt.NDArray[np.float64]:
    """(len(ours), len(theirs)) IoUs of valid run-length strings."""
    rles = [[{"size": list(hw), "counts": counts} for counts in masks] for masks in (ours, theirs)]
    # 0: the usual IoU, not the one for crowds.
    return np.asarray(coco_mask.iou(rles[0], rles[1], [0] * len(theirs)))


def _same_pixels(ours: str, theirs: str, hw: tuple[int, int]) -> bool:
    # One mask can have two encodings: runs without pixels, or a last run that others leave out.
    return ours == theirs or bool(_ious([ours], [theirs], hw)[0, 0] == 1.0)


def _manual_record(
    counts: str, hw: tuple[int, int], bbox_convention: str, point_coords: list[list[float]], crop_box: list[float]
) -> MaskRecord:
    """The record of a manually drawn mask. Its scores are 1, to pass any score filter."""
    area, bbox = measure(counts, hw, bbox_convention)
    return {
        "segmentation": {"size": list(hw), "counts": counts},
        "bbox": bbox,
        "area": area,
        "predicted_iou": 1.0,
        "stability_score": 1.0,
        "point_coords": point_coords,
        "crop_box": crop_box,
    }


def _drawn(index: int, raw: Any, hw: tuple[int, int]) -> tuple[str, int | None] | None:
    """An annotation's run lengths, and the samray id that came back with it; None if it has no pixel.

    Raises: ImageError.
    """
    try:
        counts = counts_of(raw.get("segmentation"), hw)
        if counts is None or measure(counts, hw, "coco")[0] == 0:
            return None
        return counts, id_of(raw.get("attributes"))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ImageError("unreadable", f"annotation {index} is not valid: {str(error)[:300]}") from error


def _name(raw: Mapping[str, Any], categories: Collection[str] | None) -> Name:
    """The name in an annotation. raw: with a `label` from `coco.sorted_annotations`."""
    if categories is None or "label" not in raw:
        return {}
    # A name that the output does not have is the export's "object".
    named = raw["label"] in categories
    return {"label": raw["label"], "label_score": 1.0} if named else {"label": None, "label_score": None}


def id_of(attributes: Any) -> int | None:
    """The id in an annotation's attributes, which tools return as text, as a float, or empty."""
    value = attributes.get(ID_ATTRIBUTE) if isinstance(attributes, Mapping) else None
    if value is None or isinstance(value, bool):
        return None
    try:
        if isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal()):
            return int(value)  # not via float, which is exact only up to 2^53
        return None if float(value) % 1 else int(float(value))
    except (ValueError, TypeError, OverflowError):
        return None
