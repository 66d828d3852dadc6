"""The operation `tiles` of `tests.support.operation`: FOLDER/in into FOLDER/tiles with masks.tile, and a stand-in.

Every tile that is labelled adds a line to FOLDER/labelled.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from samray.config import Config, load_config
from samray.pipeline.labeler import ShardLabeler
from samray.pipeline.run import label_with
from tests.support import standin

TILE = 64


class InTiles(standin.StandIn):
    """The stand-in, which also takes tiles, and notes each of them in a file."""

    def __init__(self, pace: standin.Pace, log: Path) -> None:
        super().__init__(pace)
        self.log = log

    def generate(self, images: list[np.ndarray], prompts: Sequence[list[Any]] = ()) -> list[Any]:
        masks = super().generate(images)
        if prompts:
            with self.log.open("a") as file:
                file.writelines(f"{hashlib.sha256(image.tobytes()).hexdigest()} {os.getpid()}\n" for image in images)
        return masks


def make_labeler(config: Config, num_threads: int, pace: standin.Pace, log: Path) -> ShardLabeler:
    return ShardLabeler(lambda _: InTiles(pace, log), max_pixels=config.input.max_pixels, num_threads=1)


def label_in_tiles(root: Path, pace: standin.Pace) -> int:
    """The operation `tiles`."""
    base = [f"model.checkpoint={standin.__file__}", "output.images_per_shard=2", f"masks.tile={TILE}"]
    settings = ["cluster.max_actors=2", "cluster.num_cpus_per_actor=0.8", "input.max_pixels=10000"]
    config = load_config(None, None, [*base, *settings])
    # Each of two actors gets to some tiles of 55, and both are far from the last.
    pace = dataclasses.replace(pace, num_before_hold=12)
    labeler = functools.partial(make_labeler, pace=pace, log=root / "labelled")
    return label_with(str(root / "in"), str(root / "tiles"), config, make_labeler=labeler).exit_code
