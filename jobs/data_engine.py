"""The data engine on a small synthetic world that no model has seen: label, correct, train, label again.

    python jobs/data_engine.py world/ [--images 50] [--steps 600]

The world consists of stripes: blobs that differ from their surroundings only by the direction of their stripes. Its
images are labelled by a model. A simulated annotator corrects the export (accepts a mask that fits a blob, redraws one
that half fits, removes the rest, draws missing ones). The model's mask decoder is trained on the result, and held-out
images of the same world are labelled before and after. Prints the results as a table and, with --json, as JSON. Every
step is a samray command, and resumes if interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

# A script's own folder is on sys.path, but not the folder above it, where a checkout has samray.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import samray
from samray.config import load_config
from samray.evaluate.points import evaluate_points
from samray.evaluate.proposals import best_ious
from samray.evaluate.regions import RegionImage
from samray.output.shards import done_shards, read_shard
from samray.rle.records import Rle
from samray.train.run import train
from samray.train.settings import load_train_settings

Bool = npt.NDArray[np.bool_]
SIDE = 256
ACCEPTED, REDRAWN = 0.75, 0.4  # minimum IoU with a blob to accept a mask, or to redraw it


def paint(seed: int, side: int = SIDE) -> tuple[npt.NDArray[np.uint8], Bool]:
    """An image (side, side, 3) of stripes, and its blobs (N, side, side), disjoint."""
    rng = np.random.default_rng([seed, 77])
    ys, xs = np.mgrid[:side, :side]
    dark, light = rng.uniform(20, 110, 3), rng.uniform(140, 240, 3)
    period, angle = rng.uniform(6, 12), rng.uniform(0, np.pi)
    phase = _stripes(xs, ys, angle, period)
    masks: list[Bool] = []
    taken = np.zeros((side, side), bool)
    for _ in range(int(rng.integers(5, 12))):
        noise = ndimage.gaussian_filter(rng.standard_normal((side, side)), side / 16)
        radius, cx, cy = rng.uniform(0.1, 0.22) * side, *rng.uniform(0.15 * side, 0.85 * side, 2)
        blob = np.hypot(xs - cx, ys - cy) < radius * (1 + 0.25 * noise / noise.std())
        if (blob & taken).any():
            continue
        pieces, _ = ndimage.label(blob)
        areas = np.bincount(pieces.ravel())[1:]
        if len(areas) == 0 or areas.max() < 600:
            continue
        blob = pieces == 1 + int(areas.argmax())
        taken |= ndimage.binary_dilation(blob, iterations=6)
        turned = _stripes(xs, ys, angle + rng.uniform(0.3, 0.7) * np.pi, period)
        phase = np.where(blob, turned, phase)
        masks.append(blob)
    picture = dark + (light - dark) * phase[..., None] + rng.normal(0, 6, (side, side, 3))
    return picture.clip(0, 255).astype(np.uint8), np.stack(masks)


def _stripes(xs: npt.NDArray[Any], ys: npt.NDArray[Any], angle: float, period: float) -> npt.NDArray[np.float64]:
    wave = np.sin(2 * np.pi * (xs * np.cos(angle) + ys * np.sin(angle)) / period)
    return np.asarray(0.5 + 0.5 * wave.clip(-0.6, 0.6) / 0.6)


def make_world(folder: Path, seeds: Sequence[int]) -> dict[str, list[Rle]]:
    """Write folder/<seed>.png; returns the blobs of each file's name."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {}
    for seed in seeds:
        image, masks = paint(seed)
        if not (folder / f"{seed:05d}.png").exists():
            Image.fromarray(image).save(folder / f"{seed:05d}.png")
        known[f"{seed:05d}.png"] = [encode(mask) for mask in masks]
    return known


def encode(mask: Bool) -> Rle:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def correct(exported: Path, corrected: Path, known: dict[str, list[Rle]]) -> Counter[str]:
    """Simulate a patient annotator on an export: each blob gets one mask. Returns counts of what was done."""
    coco = json.loads(exported.read_text())
    done: Counter[str] = Counter()
    masks: list[dict[str, Any]] = []
    for image in coco["images"]:
        blobs = known[Path(image["file_name"]).name]
        own = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        iou = coco_mask.iou([a["segmentation"] for a in own], blobs, [0] * len(blobs)) if own and blobs else None
        for i, blob in enumerate(blobs):
            best = int(iou[:, i].argmax()) if iou is not None else -1
            fits = float(iou[best, i]) if iou is not None else 0.0
            what = "accepted" if fits >= ACCEPTED else "redrawn" if fits >= REDRAWN else "drawn"
            done[what] += 1
            new = {"id": 10**9 + len(masks), "image_id": image["id"], "category_id": 1, "iscrowd": 0}
            masks.append(own[best] if what == "accepted" else {**new, "segmentation": blob})
        done["masks shown"] += len(own)
    corrected.write_text(json.dumps({**coco, "annotations": masks}))
    return done


def quality(labels: Path, known: dict[str, list[Rle]]) -> dict[str, float]:
    """mean_best_iou of the blobs with their best matching masks, and num_masks per image, for an output."""
    best: list[float] = []
    num_masks = num_images = 0
    for shard in sorted(done_shards(str(labels))):
        for row in read_shard(str(labels), shard).select(["image", "annotations"]).to_pylist():
            found = [annotation["segmentation"] for annotation in row["annotations"]]
            best += best_ious(known[Path(row["image"]["file_name"]).name], found).tolist()
            num_masks, num_images = num_masks + len(found), num_images + 1
    return {"mean_best_iou": float(np.mean(best)), "num_masks": num_masks / num_images}


def clicks(checkpoint: str | None, folder: Path, known: dict[str, list[Rle]]) -> dict[str, Any]:
    """miou and miou_oracle of one click on each blob."""
    images = (
        RegionImage(name=name, pixels=np.asarray(Image.open(folder / name).convert("RGB")), annotators=[blobs])
        for name, blobs in known.items()
    )
    return evaluate_points(samray.load_model("tiny", checkpoint=checkpoint), images, min_area=1)


def run(folder: Path, num_images: int, num_heldout: int, steps: int, *, progress: bool = True) -> dict[str, Any]:
    """Run the loop once. Returns the results on held-out images before and after, and the annotator's work."""
    known = make_world(folder / "images", range(num_images))
    heldout = make_world(folder / "heldout", range(100_000, 100_000 + num_heldout))
    preset = load_config("tiny", None, ["output.images_per_shard=8"])
    samray.label(folder / "images", folder / "round1", preset, progress=progress)
    samray.label(folder / "heldout", folder / "before", preset, progress=progress)
    samray.export(folder / "round1", folder / "review", format="coco", confident=0.5, progress=progress)
    person = correct(folder / "review" / "instances.json", folder / "corrected.json", known)
    samray.import_(
        folder / "corrected.json",
        folder / "round1-corrected",
        corrects=folder / "round1",
        confident=0.5,
        progress=progress,
    )
    settings = load_train_settings(
        None,
        [
            "train.trainable=decoder", f"train.steps={steps}", "train.learning_rate=5e-4", "train.interaction_steps=1",
            "train.box_fraction=0", "data.prompts_per_image=8", "train.validate_every=100000",
            # Held-out images are separate files: a split of these would depend on the folder's name.
            "data.validation_fraction=0",
        ],
    )  # fmt: skip
    started = time.monotonic()
    report = train(folder / "round1-corrected", folder / "weights", settings, progress=progress)
    seconds = time.monotonic() - started
    weights = str(folder / "weights" / "weights.safetensors")
    trained = load_config("tiny", None, ["output.images_per_shard=8", f"model.checkpoint={weights}"])
    samray.label(folder / "heldout", folder / "after", trained, progress=progress)
    return {
        "person": dict(person),
        "train_seconds": seconds,
        "train_minutes_all_runs": report.minutes,
        "before": {**clicks(None, folder / "heldout", heldout), **quality(folder / "before", heldout)},
        "after": {**clicks(weights, folder / "heldout", heldout), **quality(folder / "after", heldout)},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=50, help="images to label and train on (default: %(default)s)")
    parser.add_argument("--heldout", type=int, default=30, help="held-out images to measure on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.heldout < 1:
        parser.error("--heldout must be at least 1")
    figures = run(args.folder, args.images, args.heldout, args.steps)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2))
    print("the annotator: " + ", ".join(f"{number} {what}" for what, number in figures["person"].items()))
    print(f"training: {figures['train_seconds']:.0f} s including the start of Ray")
    print(f"{'held out':10}{'one click':>12}{'best of 3':>12}{'labelled':>12}{'masks per image':>16}")
    for name in ("before", "after"):
        f = figures[name]
        shown = f"{f['miou']:12.3f}{f['miou_oracle']:12.3f}{f['mean_best_iou']:12.3f}{f['num_masks']:16.1f}"
        print(f"{name:10}{shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
