"""`samray demo --train`: the data engine on a small world that no model has seen: label, correct, train, label again.

The world consists of stripes (`samray.scenes.stripes`). Its images are labelled by a model. A simulated annotator
corrects the export: accepts a mask that fits a blob, redraws one that half fits, removes the rest, draws missing ones.
The model's mask decoder is trained on the result, and held-out images of the same world are labelled before and after.
Every step is what a samray command does, and resumes if interrupted. `jobs/data_engine.py` does the same at any size.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask
from rich.console import Console
from rich.table import Table

import samray
from samray.cluster.session import running_ray
from samray.config import Config
from samray.errors import ConfigError, SamrayError
from samray.evaluate.points import evaluate_points
from samray.evaluate.proposals import best_ious
from samray.evaluate.regions import RegionImage
from samray.output.shards import done_shards, read_shard
from samray.pipeline.report import print_report
from samray.report import pictures
from samray.rle.records import Rle
from samray.sam.checkpoints import load_configured
from samray.scenes.stripes import striped_scene
from samray.train.progress import print_train_report
from samray.train.run import train
from samray.train.settings import load_train_settings

Bool = npt.NDArray[np.bool_]

ACCEPTED, REDRAWN = 0.75, 0.4
"""Minimum IoU with a blob to accept a mask, or to redraw it."""

FIRST_HELDOUT: Final = 100_000
"""Seed of the first held-out image; those of the images to train on begin at 0."""

DEFAULTS: Final = ("masks.points_per_side=12", "output.images_per_shard=3")
"""Settings of the labelling, which the user's come after: small images need few points."""

_CONFIDENT = 0.5
_PICTURE_HEIGHT, _PICTURE_IMAGES = 230, 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounds:
    """The size of the world and of the training."""

    num_images: int = 12
    num_heldout: int = 6
    steps: int = 40
    training: tuple[str, ...] = (
        "train.batch_size=3", "train.learning_rate=1e-3", "train.warmup_steps=5", "train.ema_decay=0.9",
    )  # fmt: skip
    """Further settings of `samray train`; those of a short training are chosen to learn much in few steps."""


@dataclass(slots=True)
class RoundsReport:
    """Results on the held-out images before and after the training."""

    before: dict[str, Any]
    """miou and miou_oracle of one click on each blob, mean_best_iou of the labels, num_masks per image."""
    after: dict[str, Any]
    person: Counter[str] = field(default_factory=Counter)
    """Action of the annotator -> number of masks."""
    train_seconds: float = 0.0
    train_minutes_all_runs: float = 0.0


class Stopped(SamrayError):
    """A step ended early, after it has said why; the same call resumes."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("stopped")
        self.exit_code = exit_code


def train_demo(directory: Path, config: Config, rounds: Rounds, *, progress: bool = True) -> int:
    """Run the loop in directory, and print figures and a picture of before and after; returns the exit code."""
    started = time.monotonic()
    try:
        say = Console(stderr=True, highlight=False).print
        report = run_rounds(directory, config, rounds, progress=progress, say=say)
    except Stopped as stopped:
        return stopped.exit_code
    picture = directory / "before-and-after.jpg"
    picture.write_bytes(draw_before_and_after(directory, rounds))
    console = Console(highlight=False)
    work = ", ".join(f"{number} {what}" for what, number in report.person.items() if what != "masks shown")
    console.print(f"the simulated annotator: {work}, of {report.person['masks shown']} masks shown", soft_wrap=True)
    console.print(figures_table(report, f"after {rounds.steps} steps"))
    console.print(f"picture  {picture}", soft_wrap=True, markup=False)
    console.print(f"weights  {directory / 'weights' / 'weights.safetensors'}", soft_wrap=True, markup=False)
    console.print(f"{time.monotonic() - started:.0f} s in total; {report.train_seconds:.0f} s in training")
    return 0


def figures_table(report: RoundsReport, after: str = "after") -> Table:
    """The figures on the held-out images."""
    table = Table(box=None, pad_edge=False)
    table.add_column("held-out images")
    for title in ("one click", "best of three", "best label", "masks per image"):
        table.add_column(title, justify="right")
    for name, figures in (("before", report.before), (after, report.after)):
        ious = [f"{figures[key]:.3f}" for key in ("miou", "miou_oracle", "mean_best_iou")]
        table.add_row(name, *ious, f"{figures['num_masks']:.1f}")
    return table


# --- the loop ------------------------------------------------------------------------------------------------------


def run_rounds(
    folder: Path, config: Config, rounds: Rounds, *, progress: bool = True, say: Any = lambda words: None
) -> RoundsReport:
    """Run the loop once, in one Ray. say: called with a line before each step.

    Raises: ConfigError, what the steps raise; Stopped if a signal ended one.
    """
    if config.model.adapter is not None:
        raise ConfigError(
            "model.adapter does not go with --train, which trains the weights of model.checkpoint: leave it out, or"
            " train an adapter with samray train train.trainable=lora"
        )
    known = make_world(folder / "images", range(rounds.num_images))
    heldout = make_world(folder / "heldout", range(FIRST_HELDOUT, FIRST_HELDOUT + rounds.num_heldout))
    weights = str(folder / "weights" / "weights.safetensors")
    trained = config.model_copy(update={"model": config.model.model_copy(update={"checkpoint": weights})})
    with running_ray(config.cluster, one_dataset=False):
        say(f"1. label {len(known)} images, and {len(heldout)} held-out ones")
        _label(folder / "images", folder / "round1", config, progress)
        _label(folder / "heldout", folder / "before", config, progress)
        say("2. correct the masks that the model is sure of, and draw the missing ones")
        person = _correct_round(folder, known)
        say(f"3. train the mask decoder on them for {rounds.steps} steps")
        started = time.monotonic()
        report = train(folder / "round1-corrected", folder / "weights", _settings(config, rounds), progress=progress)
        if report.exit_code:
            print_train_report(report)
            raise Stopped(report.exit_code)
        seconds = time.monotonic() - started
        say("4. label the held-out images again")
        _label(folder / "heldout", folder / "after", trained, progress)
    return RoundsReport(
        before={**clicks(config, folder / "heldout", heldout), **quality(folder / "before", heldout)},
        after={**clicks(trained, folder / "heldout", heldout), **quality(folder / "after", heldout)},
        person=person,
        train_seconds=seconds,
        train_minutes_all_runs=report.minutes,
    )


def _label(images: Path, labels: Path, config: Config, progress: bool) -> None:
    report = samray.label(images, labels, config, progress=progress)
    if report.exit_code:
        print_report(report)
        raise Stopped(report.exit_code)


def _correct_round(folder: Path, known: dict[str, list[Rle]]) -> Counter[str]:
    """Export, correct, import; returns what the annotator did."""
    options: dict[str, Any] = {"confident": _CONFIDENT, "progress": False}
    samray.export(folder / "round1", folder / "review", format="coco", **options)
    person = correct(folder / "review" / "instances.json", folder / "corrected.json", known)
    samray.import_(folder / "corrected.json", folder / "round1-corrected", corrects=folder / "round1", **options)
    return person


def _settings(config: Config, rounds: Rounds) -> Any:
    model = [f"model.name={config.model.name}"]
    if config.model.checkpoint is not None:
        model.append(f"model.checkpoint={config.model.checkpoint}")
    return load_train_settings(
        None,
        [
            *model, "train.trainable=decoder", f"train.steps={rounds.steps}", "train.interaction_steps=1",
            "train.box_fraction=0", "data.prompts_per_image=8", "train.validate_every=100000",
            # Held-out images are separate files: a split of these would depend on the folder's name.
            "data.validation_fraction=0", *rounds.training,
        ],
    )  # fmt: skip


def make_world(folder: Path, seeds: Sequence[int]) -> dict[str, list[Rle]]:
    """Write folder/<seed>.png; returns the blobs of each file's name."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {}
    for seed in seeds:
        scene, file = striped_scene(seed), folder / f"{seed:05d}.png"
        if not file.exists():
            Image.fromarray(scene.image).save(file)
        known[file.name] = [encode(mask) for mask in scene.masks]
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
        proposed = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        iou = (
            coco_mask.iou([a["segmentation"] for a in proposed], blobs, [0] * len(blobs))
            if proposed and blobs
            else None
        )
        for i, blob in enumerate(blobs):
            best = int(iou[:, i].argmax()) if iou is not None else -1
            fits = float(iou[best, i]) if iou is not None else 0.0
            what = "accepted" if fits >= ACCEPTED else "redrawn" if fits >= REDRAWN else "drawn"
            done[what] += 1
            new = {"id": 10**9 + len(masks), "image_id": image["id"], "category_id": 1, "iscrowd": 0}
            masks.append(proposed[best] if what == "accepted" else {**new, "segmentation": blob})
        done["masks shown"] += len(proposed)
    corrected.write_text(json.dumps({**coco, "annotations": masks}))
    return done


# --- results -------------------------------------------------------------------------------------------------------


def quality(labels: Path, known: dict[str, list[Rle]]) -> dict[str, float]:
    """mean_best_iou of the blobs with their best matching masks, and num_masks per image, for an output."""
    masks = _masks(labels)
    best = [iou for name, records in masks.items() for iou in best_ious(known[name], _rles(records)).tolist()]
    return {"mean_best_iou": float(np.mean(best)), "num_masks": sum(map(len, masks.values())) / len(masks)}


def clicks(config: Config, folder: Path, known: dict[str, list[Rle]]) -> dict[str, Any]:
    """miou and miou_oracle of one click on each blob."""
    images = (RegionImage(name=name, pixels=_pixels(folder / name), annotators=[known[name]]) for name in known)
    return evaluate_points(load_configured(config.model), images, min_area=1)


def draw_before_and_after(folder: Path, rounds: Rounds) -> bytes:
    """Held-out images, and their masks before and after the training, as JPEG."""
    before, after = _masks(folder / "before"), _masks(folder / "after")
    names = sorted(before)[:_PICTURE_IMAGES]
    pixels = [_pixels(folder / "heldout" / name) for name in names]

    def drawn(masks: dict[str, list[dict[str, Any]]]) -> list[Image.Image]:
        return [
            pictures.draw_masks(image, pictures.masks_to_draw(masks[name]), _PICTURE_HEIGHT)
            for name, image in zip(names, pixels, strict=True)
        ]

    return pictures.picture(
        [
            ("held-out images", [pictures.plain(image, _PICTURE_HEIGHT) for image in pixels]),
            ("before: masks of the model as it comes", drawn(before)),
            (f"after {rounds.steps} steps on {rounds.num_images} corrected images", drawn(after)),
        ]
    )


def _masks(labels: Path) -> dict[str, list[dict[str, Any]]]:
    """Each labelled image's masks, by its name."""
    return {
        Path(row["image"]["file_name"]).name: row["annotations"]
        for shard in sorted(done_shards(str(labels)))
        for row in read_shard(str(labels), shard).select(["image", "annotations"]).to_pylist()
    }


def _rles(records: Sequence[dict[str, Any]]) -> list[Rle]:
    return [record["segmentation"] for record in records]


def _pixels(file: Path) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(file).convert("RGB"))
