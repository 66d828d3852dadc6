"""Unpack Parquet of photographs with regions into images and SA-1B JSON for training.

    python jobs/unpack_regions.py pictures/ FILE.parquet [FILE.parquet ...]
    samray import pictures/ labels/

The files have BSDS500's layout (which `samray evaluate` also reads): one row per image with `image_id`, `jpeg`,
`width`, `height` and `annotators`, whose `regions` are COCO's compressed run lengths. An image becomes
pictures/sa_<image_id>.jpg, with unchanged bytes, and its regions sa_<image_id>.json. The regions of all annotators are
kept; their predicted_iou and stability_score are 1, because people drew them. Existing files are not written again.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

# A script's own folder is on sys.path, but not the folder above it, where a checkout has samray.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from samray.evaluate.points import centre
from samray.storage.tables import open_parquet

COLUMNS = ("image_id", "width", "height", "jpeg", "annotators")
ROWS_AT_ONCE = 8


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    counts = [unpack(row, args.output) for file in args.files for row in _rows(file)]
    print(f"{len(counts)} pictures, {sum(counts)} masks in {args.output}", file=sys.stderr)
    return 0


def unpack(row: dict[str, Any], output: Path) -> int:
    """Write an image and its regions. Returns the number of regions."""
    number, width, height = (int(row[name]) for name in ("image_id", "width", "height"))
    stem = output / f"sa_{number}"
    regions = [region for annotator in row["annotators"] for region in annotator["regions"]]
    if stem.with_suffix(".json").exists():
        return len(regions)
    stem.with_suffix(".jpg").write_bytes(row["jpeg"])
    image = {"image_id": number, "width": width, "height": height, "file_name": f"{stem.name}.jpg"}
    annotations = [_annotation(region, number * 65536 + i, width, height) for i, region in enumerate(regions)]
    temporary = stem.with_suffix(".tmp")
    temporary.write_text(json.dumps({"image": image, "annotations": annotations}))
    os.replace(temporary, stem.with_suffix(".json"))
    return len(regions)


def _annotation(counts: str, number: int, width: int, height: int) -> dict[str, Any]:
    rle = {"size": [height, width], "counts": counts}
    x, y = centre(coco_mask.decode(rle).view(bool))
    return {
        "id": number,
        "segmentation": rle,
        "bbox": [float(side) for side in coco_mask.toBbox(rle)],
        "area": int(coco_mask.area(rle)),
        "predicted_iou": 1.0,
        "stability_score": 1.0,
        "point_coords": [[float(x), float(y)]],
        "crop_box": [0.0, 0.0, float(width), float(height)],
    }


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as stream:
        for batch in open_parquet(stream).iter_batches(ROWS_AT_ONCE, columns=list(COLUMNS)):
            yield from batch.to_pylist()


if __name__ == "__main__":
    sys.exit(main())
