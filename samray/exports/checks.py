"""Check rows before export: an OUTPUT may be damaged, or come from an untrusted source.

Other tools trust their input: pycocotools writes outside its memory if run lengths do not fit the size. Only rows that
samray itself would decode are exported.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from samray.errors import StorageError
from samray.rle.runs import all_sound, check_size, checked_runs, slices_of

_MAY_BE_NULL: Final = ("label", "label_score")
"""Null in a mask that is not one of the names asked for."""

_NUMBERS: Final = ("predicted_iou", "stability_score", "bbox", "crop_box", "point_coords", "label_score")


def check_rows(table: pa.Table) -> None:
    """table: of `SCHEMA`, without failed images. Raises: StorageError that names the first bad image."""
    images = table["image"].combine_chunks()
    annotations = table["annotations"].combine_chunks()
    sizes = []
    for image, uri in zip(images.to_pylist(), table["uri"].to_pylist(), strict=True):
        # No field of an image may be null: formats write all of them.
        if image is None or None in image.values() or uri is None:
            raise _fault(image, "an empty field")
        try:
            sizes.append(check_size([image["height"], image["width"]]))
        except ValueError as error:
            raise _fault(image, str(error)) from error
    if annotations.null_count:
        raise _fault(images[pc.index(annotations.is_null(), True).as_py()].as_py(), "no list of masks")
    masks = annotations.flatten()
    image_of = pc.list_parent_indices(annotations).to_numpy()
    for unsound, what in (
        (_holds_null(masks, _MAY_BE_NULL), "an empty field"),
        (_not_of_length(masks.field("bbox"), 4) | _not_of_length(masks.field("crop_box"), 4), "a box of other than 4"),
        (_not_of_length(masks.field("segmentation").field("size"), 2), "a mask's size of other than 2 numbers"),
        (_unsound_points(masks.field("point_coords")), "a point of other than 2 numbers"),
        *(
            (_not_finite(masks.field(name)), f"a {name} that is not a finite number")
            for name in _NUMBERS
            if masks.type.get_field_index(name) >= 0
        ),
    ):
        if unsound.any():
            raise _fault(images[int(image_of[unsound.argmax()])].as_py(), what)
    # Sizes are compared as well: run lengths are then checked against the image's.
    sides = masks.field("segmentation").field("size").flatten().to_numpy(zero_copy_only=False).reshape(-1, 2)
    counts = masks.field("segmentation").field("counts")
    true_sides = np.array(sizes, np.int64).reshape(-1, 2)[image_of]
    # All at once first, in a tenth of the time; one by one only to find the mask at fault.
    if np.array_equal(sides, true_sides) and all_sound(counts, true_sides.prod(axis=1)):
        return
    for index, rows in enumerate(slices_of(image_of, len(images))):
        for number, (size, text) in enumerate(zip(sides[rows].tolist(), counts[rows], strict=True)):
            try:
                if tuple(size) != sizes[index]:
                    raise ValueError(f"a mask of size {size}, not {list(sizes[index])} like the image (height, width)")
                checked_runs(text.as_py(), sizes[index])
            except ValueError as error:
                raise _fault(images[index].as_py(), f"{error} (annotation {number})") from error


def _fault(image: dict[str, object] | None, what: str) -> StorageError:
    name = "an image" if image is None else f"image {image['image_id']}"
    return StorageError(f"{name} has {what}: it cannot be exported; `samray verify --deep` finds all such problems")


def _holds_null(values: pa.Array, but: Collection[str] = ()) -> np.ndarray:
    """(N,) bool: whether each struct is null, or has a field that is, except for those in but."""
    # A null struct may still have values in its fields, so both are looked at.
    is_null = np.asarray(values.is_null().to_numpy(zero_copy_only=False), bool)
    if pa.types.is_struct(values.type):
        for number in range(values.type.num_fields):
            if values.type.field(number).name not in but:
                is_null = is_null | _holds_null(values.field(number))
    return is_null


def _not_of_length(lists: pa.Array, length: int) -> np.ndarray:
    """(N,) bool: whether each list has another length or a null element."""
    lengths = pc.fill_null(pc.list_value_length(lists), -1).to_numpy(zero_copy_only=False)
    unsound = np.asarray(lengths != length, bool)
    values = pc.is_null(lists.flatten()).to_numpy(zero_copy_only=False)
    if values.any():
        unsound[pc.list_parent_indices(lists).to_numpy()[values]] = True
    return unsound


def _unsound_points(lists: pa.Array) -> np.ndarray:
    """(N,) bool: whether each list of points has a point that is not two numbers."""
    unsound = np.zeros(len(lists), bool)
    unsound[pc.list_parent_indices(lists).to_numpy()[_not_of_length(lists.flatten(), 2)]] = True
    return unsound


def _not_finite(values: pa.Array) -> np.ndarray:
    """(N,) bool: whether a number, or one in a list, is NaN or infinite, which JSON cannot hold."""
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        return np.asarray(~np.isfinite(pc.fill_null(values, 0.0).to_numpy(zero_copy_only=False)), bool)
    is_bad = np.zeros(len(values), bool)
    is_bad[pc.list_parent_indices(values).to_numpy()[_not_finite(values.flatten())]] = True
    return is_bad
