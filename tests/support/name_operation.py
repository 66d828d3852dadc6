"""The operation `names` of `tests.support.operation`: all that names or embeds, one after the other, in one Ray.

FOLDER/in into an output per way (`STEPS`), with a stand-in that names the masks of the stand-in labeler by the phrases
asked of their image; then FOLDER/in into FOLDER/embedded, and that into FOLDER/relabelled
(`tests.support.embed_operation`); then FOLDER/labels into FOLDER/named, which names masks by colour. The networks
FOLDER/dino, FOLDER/sam3 and FOLDER/clip are only hashed; FOLDER/fast.onnx is run once by each driver, which also reads
for which CLIP FOLDER/text.safetensors is.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from samray.cluster.session import running_ray
from samray.config import ClusterConfig, Config, load_config
from samray.labels.phrases import FoundMasks
from samray.pipeline.labeler import ShardLabeler
from samray.pipeline.run import label_with
from samray.prompts import Prompt
from tests.support import standin

STEPS: Final = (
    "grounding_dino", "clip_labels", "sam3", "fastsam", "sam_text", "example", "embedded", "relabelled", "named",
)  # fmt: skip
"""The folders of the outputs, in their order."""

TEXTS: Final = {"0001.png": "own", "0005.png": "Own"}
"""Image -> its phrase, which no other image is asked for."""
ASKED_ALONE: Final = ("grounding_dino", "sam3", "fastsam", "sam_text")
"""The outputs whose images have those."""


def write_inputs(root: Path) -> None:
    """The networks, the prompt file, and the example."""
    from tests.support.networks import write_hashed, write_text_weights
    from tests.support.tiny_yolo import write_yolo

    write_hashed(f"{root}/dino", "grounding-dino")
    write_hashed(f"{root}/clip", "clip")
    write_hashed(f"{root}/sam3", "sam3")
    write_yolo(root / "fast.onnx", size=(32, 32))
    write_text_weights(root / "text.safetensors", clip=root / "clip")
    for name in ("key.png", "mask.png"):
        (root / name).write_bytes(standin.make_image(99))
    rows = [{"file_name": name, "prompts": [{"text": text}]} for name, text in TEXTS.items()]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Naming(standin.StandIn):
    """The stand-in of a labeler with names: the last phrase that is asked of an image."""

    def generate(self, images: list[np.ndarray], prompts: list[list[Prompt]] | None = None) -> list[Any]:
        named_images = []
        for masks, user_prompts in zip(super().generate(images), prompts or [[]] * len(images), strict=True):
            asked = ["thing", *(str(prompt.text) for prompt in user_prompts)]
            named: Any = [{**mask, "label": asked[-1], "label_score": 0.5} for mask in masks]
            named_images.append(FoundMasks(named, [(phrase, 0.5) for phrase in asked]))
        return named_images


def make_labeler(config: Config, num_threads: int, pace: standin.Pace) -> ShardLabeler:
    return ShardLabeler(lambda _: Naming(pace), max_pixels=config.input.max_pixels, num_threads=num_threads)


def settings(root: Path) -> dict[str, list[str]]:
    """Folder of the output -> how its masks get names."""
    return {
        "grounding_dino": [
            "labels.by=grounding_dino", "labels.phrases=[thing]", f"labels.checkpoint={root}/dino",
            f"input.prompts={root}/texts.jsonl",
        ],
        "clip_labels": ["labels.by=clip", "labels.phrases=[thing,other]", f"labels.checkpoint={root}/clip"],
        "sam3": [
            "labels.by=sam3", "labels.phrases=[thing]", f"labels.checkpoint={root}/sam3",
            f"input.prompts={root}/texts.jsonl",
        ],
        "fastsam": [
            "labels.by=fastsam", f"labels.onnx={root}/fast.onnx", "labels.phrases=[thing]",
            f"labels.checkpoint={root}/clip", f"input.prompts={root}/texts.jsonl",
        ],
        "sam_text": [
            "labels.by=sam_text", "labels.phrases=[thing]", f"labels.checkpoint={root}/clip",
            f"input.prompts={root}/texts.jsonl",
        ],
        "example": [
            "labels.by=example", f"labels.example={root}/key.png", f"labels.example_mask={root}/mask.png",
            "labels.name=thing",
        ],
    }  # fmt: skip


def label_and_name(root: Path, pace: standin.Pace) -> int:
    """The operation. Returns the highest exit code."""
    # Not above: every labelling process would import torch with them.
    from tests.support.embed_operation import embed_and_label
    from tests.support.naming import name_by_colour

    base = ["output.images_per_shard=2", "cluster.max_actors=1", "cluster.num_cpus_per_actor=1"]
    exit_codes = []
    with running_ray(ClusterConfig()):
        for folder, values in settings(root).items():
            file = root / "text.safetensors" if folder == "sam_text" else standin.__file__
            weights = [] if folder in ("sam3", "fastsam") else [f"model.checkpoint={file}"]
            config = load_config(None, None, [*base, *weights, *values])
            labeler: Any = functools.partial(make_labeler, pace=pace.of(folder))
            exit_codes.append(label_with(str(root / "in"), str(root / folder), config, make_labeler=labeler).exit_code)
        exit_codes.append(embed_and_label(root, pace))
        exit_codes.append(name_by_colour(root, pace.of("named")))
    return max(exit_codes)
