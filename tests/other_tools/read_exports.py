"""What other tools read of an export. Runs in their environment, which has no samray.

python read_exports.py READER OUT ARGUMENTS...

OUT becomes JSON: {"images": {name: {"size": [width, height], "masks": [{"name", "bbox", "counts"}]}}}. bbox: x, y,
width, height in pixels as the tool gives it, or null. counts: COCO's compressed run lengths of the whole image.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def encoded(mask: Any) -> str:
    """mask: (H, W), zero outside."""
    return coco_mask.encode(np.asfortranarray(np.asarray(mask) > 0, dtype=np.uint8))["counts"].decode()


def joined(polygons: list[list[float]], height: int, width: int) -> str:
    """Run lengths of the union of polygons [x, y, x, y, ...] in pixels, filled by pycocotools."""
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))["counts"].decode()


def datumaro(folder: str, format: str) -> dict[str, Any]:
    """By datumaro's own import; parts of one annotation share its group."""
    from datumaro import Dataset

    data = Dataset.import_from(folder, format)
    names = data.categories()
    images = {}
    for item in data:
        height, width = item.media.data.shape[:2]  # decodes the image
        groups: dict[int, dict[str, list[Any]]] = {}
        for one in item.annotations:
            groups.setdefault(one.group, {}).setdefault(one.type.name, []).append(one)
        masks = []
        for parts in groups.values():
            shapes = parts.get("mask") or parts["polygon"]
            if shapes[0].type.name == "polygon":
                counts = joined([shape.points for shape in shapes], height, width)
            else:
                counts = encoded(shapes[0].image)
            label = shapes[0].label
            name = None if label is None else names[next(iter(names))].items[label].name
            boxes = parts.get("bbox")
            bbox = boxes[0].get_bbox() if boxes else shapes[0].get_bbox() if len(shapes) == 1 else None
            masks.append({"name": name, "bbox": None if bbox is None else [float(x) for x in bbox], "counts": counts})
        images[f"{item.id}{Path(item.media.path).suffix}"] = {"size": [width, height], "masks": masks}
    return images


def fiftyone_coco(images: str, labels: str) -> dict[str, Any]:
    """By the importer behind `fiftyone.types.COCODetectionDataset`, without FiftyOne's database."""
    import fiftyone.utils.coco as coco

    return _fiftyone(coco.COCODetectionDatasetImporter(
        data_path=images, labels_path=labels, label_types=["segmentations"], include_id=False
    ), images)  # fmt: skip


def fiftyone_yolo(folder: str, subset: str) -> dict[str, Any]:
    """By the importer behind `fiftyone.types.YOLOv5Dataset`, without FiftyOne's database."""
    import fiftyone.utils.yolo as yolo

    return _fiftyone(yolo.YOLOv5DatasetImporter(
        yaml_path=f"{folder}/data.yaml", split="train", label_type="polylines", include_all_data=True
    ), f"{folder}/images{subset}")  # fmt: skip


def _fiftyone(importer: Any, images: str) -> dict[str, Any]:
    read = {}
    with importer:
        for path, metadata, label in importer:
            pixels = _pixels(path)
            height, width = pixels.shape[:2]
            assert metadata is None or (metadata.width, metadata.height) == (width, height)
            label = label.get("segmentations") if isinstance(label, dict) else label
            read[Path(path).relative_to(Path(images).resolve()).as_posix()] = {
                "size": [width, height],
                "masks": [_fiftyone_mask(one, height, width) for one in _labels_of(label)],
            }
    return read


def _labels_of(label: Any) -> list[Any]:
    return [] if label is None else list(getattr(label, "detections", None) or getattr(label, "polylines", []))


def _fiftyone_mask(one: Any, height: int, width: int) -> dict[str, Any]:
    """A detection, whose mask is the part within its box, or a polyline; coordinates are fractions of the image."""
    if hasattr(one, "bounding_box"):
        x, y, w, h = np.array(one.bounding_box) * (width, height, width, height)
        whole = np.zeros((height, width), bool)
        left, top = round(x), round(y)
        whole[top : top + one.mask.shape[0], left : left + one.mask.shape[1]] = one.mask
        return {"name": one.label, "bbox": [x, y, w, h], "counts": encoded(whole)}
    polygons = [(np.array(part) * (width, height)).ravel().round(3).tolist() for part in one.points]
    return {"name": one.label, "bbox": None, "counts": joined(polygons, height, width)}


def fiftyone_label_maps(images: str, maps: str) -> dict[str, Any]:
    """FiftyOne's `Segmentation` of each PNG: the pixels of each value, named by it."""
    from fiftyone import Segmentation

    read = {}
    for path in sorted(Path(images).iterdir()):
        height, width = _pixels(str(path)).shape[:2]
        label = Segmentation(mask_path=str(Path(maps) / f"{path.stem}.png"))
        label.import_mask()
        read[path.name] = {
            "size": [width, height],
            "masks": [
                {"name": str(value), "bbox": None, "counts": encoded(label.mask == value)}
                for value in np.unique(label.mask)
                if value > 0
            ],
        }
    return read


def fiftyone_database(images: str, labels: str) -> dict[str, Any]:
    """The whole of FiftyOne, with the MongoDB that FIFTYONE_DATABASE_URI names."""
    import fiftyone

    data = fiftyone.Dataset.from_dir(
        dataset_type=fiftyone.types.COCODetectionDataset,
        data_path=images,
        labels_path=labels,
        label_types=["segmentations"],
        label_field="masks",
    )
    read = {}
    for sample in data:
        height, width = _pixels(sample.filepath).shape[:2]
        read[Path(sample.filepath).relative_to(Path(images).resolve()).as_posix()] = {
            "size": [width, height],
            "masks": [_fiftyone_mask(one, height, width) for one in _labels_of(sample["masks"])],
        }
    return read


def _pixels(path: str) -> np.ndarray:
    import cv2

    pixels = cv2.imread(path)
    assert pixels is not None, path
    return pixels


READERS = (datumaro, fiftyone_coco, fiftyone_yolo, fiftyone_label_maps, fiftyone_database)

if __name__ == "__main__":
    name, out, *arguments = sys.argv[1:]
    (reader,) = (reader for reader in READERS if reader.__name__ == name)
    Path(out).write_text(json.dumps({"images": reader(*arguments)}))
