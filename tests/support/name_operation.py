"""The operation `names` of `tests.support.operation`: all that names, one after the other, in one Ray.

FOLDER/in into FOLDER/grounding_dino, FOLDER/clip_labels and FOLDER/example, with a stand-in that names the masks of the
stand-in labeler by the phrases asked of their image; then FOLDER/labels into FOLDER/named, which names masks by colour.
The networks FOLDER/dino and FOLDER/clip are only hashed.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from samray.cluster.session import local_ray
from samray.config import Config, load_config
from samray.pipeline.labeler import ShardLabeler
from samray.pipeline.run import label_with
from samray.prompts import Prompt
from tests.support import standin
from tests.support.naming import name_by_colour
from tests.support.networks import write_hashed

STEPS: Final = ("grounding_dino", "clip_labels", "example", "named")
"""The folders of the outputs, in their order."""

TEXTS: Final = {"0001.png": "own", "0005.png": "Own"}
"""Image -> its phrase, which no other image is asked for, with labels.by=grounding_dino."""


def write_inputs(root: Path) -> None:
    """The networks, the prompt file, and the example."""
    write_hashed(f"{root}/dino", "grounding-dino")
    write_hashed(f"{root}/clip", "clip")
    for name in ("key.png", "mask.png"):
        (root / name).write_bytes(standin.make_image(99))
    rows = [{"file_name": name, "prompts": [{"text": text}]} for name, text in TEXTS.items()]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Naming(standin.StandIn):
    """The stand-in of a labeler with names: the last phrase that is asked of an image."""

    def generate(
        self, images: list[np.ndarray], prompts: list[list[Prompt]] | None = None
    ) -> list[list[dict[str, object]]]:
        names = [own[-1].text if own else "thing" for own in prompts or [[]] * len(images)]
        each = zip(super().generate(images), names, strict=True)
        return [[{**mask, "label": name, "label_score": 0.5} for mask in masks] for masks, name in each]


def make_labeler(config: Config, num_threads: int, seconds: float) -> ShardLabeler:
    return ShardLabeler(lambda _: Naming(seconds), max_pixels=config.input.max_pixels, num_threads=num_threads)


def settings(root: Path) -> dict[str, list[str]]:
    """Folder of the output -> how its masks get names."""
    return {
        "grounding_dino": [
            "labels.by=grounding_dino", "labels.phrases=[thing]", f"labels.checkpoint={root}/dino",
            f"input.prompts={root}/texts.jsonl",
        ],
        "clip_labels": ["labels.by=clip", "labels.phrases=[thing,other]", f"labels.checkpoint={root}/clip"],
        "example": [
            "labels.by=example", f"labels.example={root}/key.png", f"labels.example_mask={root}/mask.png",
            "labels.name=thing",
        ],
    }  # fmt: skip


def label_and_name(root: Path, seconds: float) -> int:
    """The operation. Returns the highest exit code."""
    base = [f"model.checkpoint={standin.__file__}", "output.images_per_shard=2", "cluster.max_actors=1"]
    labeler: Any = functools.partial(make_labeler, seconds=seconds)
    exit_codes = []
    with local_ray(num_cpus=2, object_store_memory=200 * 2**20):
        for folder, own in settings(root).items():
            config = load_config(None, None, [*base, "cluster.num_cpus_per_actor=1", *own])
            exit_codes.append(label_with(str(root / "in"), str(root / folder), config, make_labeler=labeler).exit_code)
        exit_codes.append(name_by_colour(root, seconds))
    return max(exit_codes)
