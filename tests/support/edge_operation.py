"""The operation `edges` of `tests.support.operation`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from samray.config import Config
from samray.config.edges import load_edges_config
from samray.pipeline.edges import EdgeLabeler, EdgeLabelers, detect_edges_with
from samray.pipeline.labeler import ShardLabeler
from tests.support import standin


class RedChannel(standin.StandIn):
    """A stand-in for edge detection."""

    def generate(self, images: list[np.ndarray]) -> list[np.ndarray]:  # type: ignore[override]
        super().generate(images)
        return [image[..., 0] / 255 for image in images]


class RedChannels(EdgeLabelers):
    """Makes labelers with `RedChannel`."""

    pace = standin.Pace()

    def __call__(self, config: Config, num_threads: int) -> ShardLabeler:
        limit = config.input.max_pixels
        return EdgeLabeler(self, 8, lambda _: RedChannel(self.pace), max_pixels=limit, num_threads=num_threads)


def detect(root: Path, pace: standin.Pace) -> int:
    """The operation `edges`."""
    base = [f"model.checkpoint={standin.__file__}", "output.images_per_shard=2", "cluster.max_actors=1"]

    def make_labelers(folder: str) -> RedChannels:
        made = RedChannels(folder)
        made.pace = pace
        return made

    config = load_edges_config(None, [*base, "cluster.num_cpus_per_actor=1"])
    return detect_edges_with(root / "in", root / "edges", config, make_labelers=make_labelers).exit_code
