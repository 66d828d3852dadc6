"""`samray demo`: label scenes with known masks with the real pipeline, and report quality and speed."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask
from rich.console import Console
from rich.markup import escape

from samray.config import Config
from samray.errors import ConfigError
from samray.output.shards import done_shards, read_shard
from samray.scenes.scene import Scene, make_scene
from samray.text import two_columns

SIZES_HW = ((480, 640), (640, 480), (512, 512), (384, 768))
"""The scenes cycle through these sizes: different aspect ratios, as in photographs."""


@dataclass(frozen=True, slots=True)
class ProposalQuality:
    """How well the generated masks cover the known ones."""

    num_objects: int
    num_masks: int
    """All generated masks, whether they cover a known object or not."""
    mean_best_iou: float
    """Mean over known objects of the IoU with the best matching mask; 0 for objects that no mask touches."""
    average_recall: float
    """AR@1000, as in `samray evaluate proposals`."""


def run_demo(directory: Path, config: Config, num_scenes: int = 12, *, show: bool = False) -> int:
    """Make scenes, label, compare, report; returns the exit code. A second call on the same directory labels nothing
    again.

    show: open the report in the browser, if there is a display.
    """
    from samray.evaluate.scenes import evaluate_clicks
    from samray.pipeline.report import print_report
    from samray.pipeline.run import label
    from samray.report.output import open_page, write_report
    from samray.report.page import Figure
    from samray.sam.checkpoints import load_model

    model = load_model(config.model.name, config.model.checkpoint, config.model.device, config.model.dtype)
    console = Console(stderr=True)
    images, labels = directory / "images", directory / "labels"
    scenes = make_scenes(num_scenes)
    write_scenes(directory, scenes)
    console.print(f"{num_scenes} sample scenes are in {images}", highlight=False, markup=False, soft_wrap=True)
    report = label(str(images), str(labels), config)
    if report.exit_code:
        print_report(report)
        return report.exit_code
    found = compare(directory, str(labels))
    clicks = evaluate_clicks(model, scenes)
    agreement = [
        Figure(f"{found.mean_best_iou:.2f}", "mean IoU", f"of the best matching mask, {found.num_objects} objects"),
        Figure(f"{found.average_recall:.2f}", "average recall", "over IoU from 0.50 to 0.95"),
        Figure(f"{clicks['miou']:.2f}", "mean IoU of one click", f"on {clicks['num_regions']} whole objects"),
    ]
    page = write_report(str(labels), agreement=agreement)

    table = two_columns()
    table.add_row("scenes", f"{num_scenes}, with shapes and textures that the model was not trained on")
    table.add_row("masks", f"{found.num_masks}, {found.num_masks / num_scenes:.1f} per scene")
    covered = f"mean IoU {found.mean_best_iou:.2f} of the best matching mask, average recall {found.average_recall:.2f}"
    table.add_row("known objects", f"{found.num_objects}: {covered}")
    table.add_row("one click", f"mean IoU {clicks['miou']:.2f} on {clicks['num_regions']} whole objects")
    if report.num_labelled:
        each = f"{report.device_seconds / report.num_labelled:.2f} s per image in the model"
        table.add_row("speed", f"{each}; {report.wall_s:.0f} s in total, including the start of Ray")
    else:
        table.add_row("speed", "nothing to label: an earlier demo did it")
    table.add_row("labels", escape(str(labels)))
    table.add_row("report", escape(page))
    Console(highlight=False).print(table, soft_wrap=True)
    if show and not open_page(page):
        console.print("cannot open the report: this machine has no display", highlight=False)
    return 0


def make_scenes(number: int) -> list[Scene]:
    """The demo's scenes: always the same, from the split that training never uses."""
    return [make_scene(10_000 + i, SIZES_HW[i % len(SIZES_HW)], split="heldout") for i in range(number)]


def write_scenes(directory: Path, scenes: Sequence[Scene]) -> None:
    """Write directory/images/scene-*.jpg, and the known masks as COCO RLE to directory/known_masks.json.

    Raises ConfigError if the directory has the scenes of another demo, whose labels would not match these.
    """
    known = {f"scene-{i:03d}.jpg": [_encode(mask) for mask in scene.masks] for i, scene in enumerate(scenes)}
    text = json.dumps(known)
    truth = directory / "known_masks.json"
    if truth.exists():
        if truth.read_text() != text:
            raise ConfigError(f"{directory} has the scenes of a different demo; choose another directory or delete it")
        return
    if (directory / "images").exists():
        raise ConfigError(f"{directory / 'images'} exists and is not from a finished demo; choose another directory")
    (directory / "images").mkdir(parents=True)
    for name, scene in zip(known, scenes, strict=True):
        data = io.BytesIO()
        Image.fromarray(scene.image).save(data, "JPEG", quality=92)
        (directory / "images" / name).write_bytes(data.getvalue())
    truth.write_text(text)  # last: marks that all scenes are written


def compare(directory: Path, labels: str) -> ProposalQuality:
    """Compare the masks in `labels` with the known ones of the scenes in directory."""
    from samray.evaluate.proposals import Marked, average_recall, best_ious

    known = json.loads((directory / "known_masks.json").read_text())
    marked: list[Marked] = []
    best: list[float] = []
    for shard in sorted(done_shards(labels)):
        for row in read_shard(labels, shard).select(["image", "annotations"]).to_pylist():
            truth = known.get(row["image"]["file_name"].rpartition("/")[2], [])
            found = [annotation["segmentation"] for annotation in row["annotations"]]
            marked.append(Marked(truth, found, [annotation["predicted_iou"] for annotation in row["annotations"]]))
            best += best_ious(truth, found).tolist()
    num_masks = sum(len(one.masks) for one in marked)
    if not best:
        return ProposalQuality(0, num_masks, 0.0, 0.0)
    return ProposalQuality(len(best), num_masks, float(np.mean(best)), average_recall(marked)["ar_1000"])


def _encode(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
