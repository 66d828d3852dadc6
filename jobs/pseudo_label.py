"""Label photographs with a classical hierarchical segmentation: the first teacher of the embedded model.

    python jobs/pseudo_label.py pictures/ FOLDER [FOLDER ...]
    samray import pictures/ labels/

Every photograph in the folders is resized to 480 pixels and written to pictures/ as sa_<n>.jpg, with its regions at
eight scales in sa_<n>.json, in the SA-1B layout; a large photograph gives a second image, about a quarter of it.
Screenshots, drawings, logos, transparent images and other sizes of the same photograph are left out. Numbers come from
the content: existing files are not redone, and more folders can be added at any time.

A mask's stability_score is the cost increase of the next merge, and its predicted_iou is its compactness: among regions
of similar size, people mark the compact and long-lived ones (train with
data.weigh_by_score=true).
"""

import argparse
import hashlib
import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

# A script's own folder is on sys.path, but not the folder above it, where a checkout has samray.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from samray.rle.encode import boxes_xyxy, compress, encode_array
from samray.train.regions import SIDE, region_tree

COSTS = tuple(np.geomspace(12, 400, 8).tolist())
"""Costs at which the tree is cut: from a few hundred pieces to the two or three largest parts of an image."""
MIN_AREA, MAX_AREA = 0.002, 0.75  # fractions of the image
MIN_SIDE = 240
NUMBER_BITS = 37
"""Range of image numbers: a mask's id, which is 65536 times as large, must be below 2**53 to be exact in JSON floats.
With 10,000 images, two have the same number in one of 1,400 cases; then the second is left out."""
_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(args.folders)
    with ProcessPoolExecutor(args.workers) as pool:
        counts = list(pool.map(label, pictures, pictures.values(), [args.output] * len(pictures)))
    kept = [count for count in counts if count]
    print(
        f"{len(kept)} of {len(pictures)} pictures are photographs; {sum(kept)} masks in {args.output}", file=sys.stderr
    )
    return 0


def label(number: int, path: Path, output: Path) -> int:
    """Write the image under its number, a tile of it (if it is large) under the next, and their masks.

    Returns the number of masks; 0 if the image was left out.
    """
    views = _views(path)
    return sum(_write(output / f"sa_{number + i}", number + i, view) for i, view in enumerate(views))


def number_of(picture: bytes) -> int:
    """The number of an image's content: even, because a tile of it has the next one."""
    digest = hashlib.sha256(picture).digest()
    return int.from_bytes(digest[:8]) >> (64 - NUMBER_BITS) & ~1


def _pictures(folders: list[Path]) -> dict[int, Path]:
    """Number -> path. Every file once, whatever its names; of a wallpaper in many sizes (NAME/contents/images/WxH.jpg)
    only the largest.
    """
    files = [p for f in folders for p in sorted(f.rglob("*")) if p.suffix.lower() in _SUFFIXES and p.is_file()]
    files = [path for path in files if not path.is_symlink()]
    largest: dict[str, Path] = {}
    for path in files:
        name = str(path.parents[1]) if path.parent.name.startswith("images") else str(path)
        if name not in largest or path.stat().st_size > largest[name].stat().st_size:
            largest[name] = path
    pictures: dict[int, Path] = {}
    for path in largest.values():
        pictures.setdefault(number_of(path.read_bytes()), path)
    return pictures


def _views(path: Path) -> list[Image.Image]:
    try:
        with Image.open(path) as image:
            if min(image.size) < MIN_SIDE or image.mode not in ("RGB", "CMYK") or "transparency" in image.info:
                return []
            if max(image.size) > 2.2 * min(image.size):
                return []
            image.draft("RGB", (1000, 1000))
            picture = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return []
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    if not is_photograph(np.asarray(small)):
        return []
    if max(picture.size) < 2 * SIDE:
        return [small]
    rng = np.random.default_rng(int(hashlib.sha256(path.name.encode()).hexdigest()[:12], 16))
    w, h = (round(side * rng.uniform(0.45, 0.6)) for side in picture.size)
    x, y = int(rng.integers(picture.width - w)), int(rng.integers(picture.height - h))
    tile = picture.crop((x, y, x + w, y + h))
    tile.thumbnail((SIDE, SIDE))
    return [small, tile]


def is_photograph(image: npt.NDArray[np.uint8]) -> bool:
    """Whether an (H, W, 3) image looks like a photograph: many colours, none dominant, and not all grey."""
    coarse = (image >> 3).astype(np.int32)
    codes = (coarse[..., 0] << 10) | (coarse[..., 1] << 5) | coarse[..., 2]
    counts = np.bincount(codes.ravel())
    flat = (np.abs(np.diff(image.astype(np.int16), axis=1)).sum(2) == 0).mean()
    saturation = (image.max(2).astype(np.int16) - image.min(2)).mean()
    return bool(counts.max() < 0.2 * codes.size and (counts > 0).sum() > 500 and flat < 0.35 and saturation > 6)


def compactness(mask: npt.NDArray[np.bool_]) -> float:
    """4 pi area / outline^2 of a mask (H, W), outline along pixel edges: pi / 4 for a square, near 0 for a thin
    line."""
    outline = int((mask[1:] != mask[:-1]).sum()) + int((mask[:, 1:] != mask[:, :-1]).sum())
    return 4 * math.pi * int(mask.sum()) / max(outline, 1) ** 2


def _write(stem: Path, number: int, picture: Image.Image) -> int:
    if stem.with_suffix(".json").exists():
        return len(json.loads(stem.with_suffix(".json").read_text())["annotations"])
    picture.save(stem.with_suffix(".jpg"), quality=92)
    image = np.asarray(picture)
    tree = region_tree(image)
    height, width = image.shape[:2]
    nodes = sorted({int(node) for cost in COSTS for node in tree.cut(cost)})
    low, high = MIN_AREA * height * width, MAX_AREA * height * width
    annotations: list[dict[str, Any]] = []
    for node in nodes:
        if not low <= tree.area[node] <= high:
            continue
        mask = tree.mask(node)
        counts = encode_array(mask)
        x0, y0, x1, y1 = (int(v) for v in boxes_xyxy([counts], (height, width))[0])
        born, gone = float(tree.cost[node]), float(tree.cost[tree.parent[node]])
        ys, xs = np.nonzero(mask)
        annotations.append(
            {
                "id": number * 65536 + len(annotations),
                "segmentation": compress(counts, (height, width)),
                "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
                "area": int(tree.area[node]),
                "predicted_iou": round(min(1.0, 0.1 + compactness(mask)), 4),
                "stability_score": round(1 - born / gone, 4),
                "point_coords": [[float(xs[len(xs) // 2]), float(ys[len(ys) // 2])]],
                "crop_box": [0.0, 0.0, float(width), float(height)],
            }
        )
    record = {"image_id": number, "width": width, "height": height, "file_name": f"{stem.name}.jpg"}
    temporary = stem.with_suffix(".tmp")
    temporary.write_text(json.dumps({"image": record, "annotations": annotations}))
    os.replace(temporary, stem.with_suffix(".json"))
    return len(annotations)


if __name__ == "__main__":
    sys.exit(main())
