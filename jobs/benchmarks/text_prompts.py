"""`jobs/benchmark.py text`: SAM's own text prompt from training to masks, on painted things with held-out phrases."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from jobs.benchmarks.measuring import progress
from jobs.benchmarks.pretraining import train_here
from jobs.benchmarks.text_world import HELD_OUT, KNOWN, PHRASES, paint, train_clip, write_coco
from samray.config import load_config
from samray.config.model_specs import TinyVitSpec
from samray.config.models import MODELS
from samray.imports.import_ import import_
from samray.labels.sam_text import build_generator, read_inputs
from samray.rle.runs import checked_runs, pixels
from samray.sam.checkpoints import load_model
from samray.scenes.scene import Scene
from samray.train.store import WEIGHTS_FILE

SMALL_SAM: Final = dataclasses.replace(
    MODELS["tiny"],
    name="small_sam",
    image_size=64,
    encoder=TinyVitSpec(dims=(16, 32, 64), depths=(1, 1, 1), num_heads=(1, 1, 2), windows=(8, 8, 8), strides=(2, 1)),
    embed_dim=64,
    decoder_heads=4,
    decoder_mlp_dim=128,
    iou_hidden_dim=32,
)
"""A SAM for images of 64 pixels, small enough to train on a CPU."""
FIRST_TEST_SCENE: Final = 2**45

Bool = npt.NDArray[np.bool_]


def text(
    clip_steps: int, steps: int, images: int, test_images: int, seed: int = 0, folder: Path | None = None
) -> dict[str, Any]:
    """Mean IoU of the masks that phrases get on unseen images, against those that other phrases get.

    A small CLIP is trained on cut-outs and phrases; a small SAM from scratch on images and masks without a text, as
    `samray train train.objective=text`; then all phrases are asked of new images, as `labels.by=sam_text`. Things of
    the held-out phrases are in the new images alone. seed: of both trainings. folder: keeps all files.
    """
    MODELS[SMALL_SAM.name] = SMALL_SAM
    started = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        root = folder or Path(temporary)
        accuracy = train_clip(root / "clip", KNOWN, clip_steps, seed)
        clip_s = time.process_time() - started
        painted = (paint(i, SMALL_SAM.image_size, KNOWN) for i in progress(range(images), "painting images"))
        write_coco(root / "data", painted)
        data, labels = root / "data", root / "labels"
        import_(data / "coco.json", labels, images=data / "images", images_per_shard=8, ray=False, progress=False)
        lines = train_here(SMALL_SAM, str(labels), root / "weights", [
            f"model.name={SMALL_SAM.name}", "train.objective=text", f"text.checkpoint={root / 'clip'}",
            f"train.steps={steps}", f"train.seed={seed}", "train.from_scratch=true", "train.layer_decay=1",
            "train.batch_size=8",
            "train.learning_rate=2e-3", "train.warmup_steps=30", "train.interaction_steps=1", "train.ema_decay=0.95",
            "train.validate_every=1000000", "train.log_every=25", "data.prompts_per_image=3", "data.min_area=1",
            "data.scale_jitter=[1,1]", "data.colour_jitter=0", "data.validation_images=24",
        ])  # fmt: skip
        numbers = range(FIRST_TEST_SCENE, FIRST_TEST_SCENE + test_images)
        scenes = [paint(i, SMALL_SAM.image_size, PHRASES) for i in numbers]
        answers = _answers(root, [scene.image for scene in scenes])
    validation = [line for line in lines if line["kind"] == "validation"][-1]
    return {
        "held_out": HELD_OUT,
        "clip_accuracy": dict(zip(("known", "held_out"), accuracy, strict=True)),
        "held_out_images": {key: validation[key] for key in ("miou", "miou_other")},
        "known": compare(scenes, answers, KNOWN),
        "held_out_phrases": compare(scenes, answers, HELD_OUT),
        "clip_cpu_s": clip_s,
        "cpu_s": time.process_time() - started,
    }


def _answers(root: Path, images: Sequence[npt.NDArray[np.uint8]]) -> list[dict[str, Bool]]:
    """For each image the mask that each phrase got, if any."""
    config = load_config(None, None, [
        f"model.name={SMALL_SAM.name}", f"model.checkpoint={root / 'weights' / WEIGHTS_FILE}", "labels.by=sam_text",
        f"labels.phrases=[{','.join(PHRASES)}]", f"labels.checkpoint={root / 'clip'}",
        "masks.min_mask_area=1", "masks.mask_nms_thresh=1",
    ])  # fmt: skip
    model = load_model(config.model.name, config.model.checkpoint, "cpu")
    generator = build_generator(model, config, read_inputs(config))(None)
    masks_of_images = []
    for image in progress(images, "asking all phrases"):
        (records,) = generator.generate([image])
        hw = (image.shape[0], image.shape[1])
        masks_of_images.append({
            str(record["label"]): pixels(checked_runs(record["segmentation"]["counts"], hw), hw) for record in records
        })  # fmt: skip
    return masks_of_images


def compare(scenes: Sequence[Scene], answers: Sequence[dict[str, Bool]], phrases: Sequence[str]) -> dict[str, Any]:
    """Means over all things of these phrases: the IoU of the mask by its own phrase, by all other phrases, and by the
    phrases of the other things in the image."""
    ious_of_phrase, others, present = [], [], []
    for scene, masks in zip(scenes, answers, strict=True):
        for truth, name in zip(scene.masks, scene.names, strict=True):
            if name not in phrases:
                continue
            ious = {phrase: _iou(masks.get(phrase), truth) for phrase in PHRASES}
            ious_of_phrase.append(ious.pop(str(name)))
            others.append(float(np.mean(list(ious.values()))))
            present += [ious[str(other)] for other in scene.names if other != name]
    miou, random = float(np.mean(ious_of_phrase)), float(np.mean(others))
    return {
        "things": len(ious_of_phrase),
        "miou": miou,
        "miou_of_a_random_phrase": random,
        "times": miou / random if random else None,
        "miou_of_another_thing_in_the_image": float(np.mean(present)),
    }


def _iou(mask: Bool | None, truth: Bool) -> float:
    """0 for a phrase without a mask."""
    return 0.0 if mask is None else float((mask & truth).sum() / (mask | truth).sum())
