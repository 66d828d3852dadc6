"""A stand-in for CLIP, for tests of what is around it: the name of a mask is the brightest colour of its pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from samray.config import Config
from samray.config.names import load_names_config
from samray.labels.pixels import Pixels
from samray.labels.zero_shot import Namer
from samray.pipeline.labeler import ShardLabeler
from samray.pipeline.naming import NameGenerator, NamingLabeler, NamingLabelers, name_with
from tests.support.standin import Pace

COLOURS = ("red", "green", "blue")


class MeanColour:
    """A network that embeds a picture as its mean colour, and counts the pictures of each pass."""

    device = torch.device("cpu")
    logit_scale = 100.0
    pixels = Pixels(8, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def __init__(self) -> None:
        self.passes: list[int] = []

    def embed_squares(self, squares: torch.Tensor) -> torch.Tensor:
        self.passes.append(len(squares))
        return torch.nn.functional.normalize(squares.mean(dim=(2, 3)), dim=-1)


def colour_namer(score_thresh: float = 0.0) -> Namer:
    network: Any = MeanColour()
    return Namer(network, COLOURS, torch.eye(3), ("blanked",), score_thresh)


class Paced(NameGenerator):
    """Works at a pace."""

    def __init__(self, namer: Namer, pace: Pace) -> None:
        super().__init__(namer)
        self._pace, self._num_images = pace, 0

    def generate(self, images: Any, masks: Any) -> Any:
        self._pace.take(len(images), self._num_images)
        self._num_images += len(images)
        return super().generate(images, masks)


@dataclass
class ColourLabelers(NamingLabelers):
    """Makes labelers with the stand-in."""

    pace: Pace = Pace()  # noqa: RUF009

    def __call__(self, config: Config, num_threads: int) -> ShardLabeler:
        return NamingLabeler(
            self.source,
            self.images_per_shard,
            lambda _: Paced(colour_namer(), self.pace),
            max_pixels=config.input.max_pixels,
            num_threads=num_threads,
        )


def colour_config(clip: Path | str, *overrides: str) -> Config:
    """Settings for the stand-in. clip: a folder of `tiny_clip.write_clip`, which is only hashed."""
    base = [f"labels.phrases=[{','.join(COLOURS)}]", f"labels.checkpoint={clip}", "output.max_failed_fraction=1.0"]
    return load_names_config(None, [*base, "cluster.max_actors=1", "cluster.num_cpus_per_actor=1", *overrides])


def name_by_colour(root: Path, pace: Pace) -> int:
    """FOLDER/labels into FOLDER/named, by FOLDER/clip."""

    def make(*made_for: Any) -> ColourLabelers:
        return ColourLabelers(*made_for, pace=pace)

    config = colour_config(root / "clip", "output.images_per_shard=2")
    return name_with(root / "labels", root / "named", config, make_labelers=make).exit_code
