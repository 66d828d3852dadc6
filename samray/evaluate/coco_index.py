"""Masks as pycocotools' COCOeval takes them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from pycocotools.coco import COCO

from samray.evaluate.regions import areas
from samray.rle.records import Rle


def coco_index(
    images: Sequence[tuple[list[Rle], Sequence[str | None], Sequence[float] | None]],
    sizes: Sequence[list[int]],
    names: Sequence[str],
) -> COCO:
    """Masks with names and scores as a COCO index. Ids start at 1, because COCOeval reads id 0 as "no match"."""
    # Masks without a name have an id that is not a category, so that they count only in the class-agnostic figures.
    id_of: dict[str | None, int] = {name: number for number, name in enumerate((*names, None), 1)}
    annotations: list[dict[str, Any]] = []
    for image_id, (rles, mask_names, scores) in enumerate(images, 1):
        for index, (rle, area) in enumerate(zip(rles, areas(rles), strict=True)):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": id_of[mask_names[index]],
                "iscrowd": 0,
            }
            score = {} if scores is None else {"score": scores[index]}
            annotations.append({**annotation, **score, "segmentation": rle, "area": area})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "height": height, "width": width} for i, (height, width) in enumerate(sizes, 1)],
        "annotations": annotations,
        "categories": [{"id": id_of[name], "name": name} for name in names],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
