"""Embeddings in `tests.support.name_operation`, apart: FOLDER/in into FOLDER/embedded, and that into FOLDER/relabelled.

The stand-in's embedding of an image is its pixels, so the masks made from it are those of the image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from samray.config import Config, load_config
from samray.config.embed import load_embed_config
from samray.output.embeddings import EMBEDDING
from samray.output.plan import Plan
from samray.pipeline.embed import embed_with
from samray.pipeline.kept import WithEmbedding
from samray.pipeline.label_from import StoredLabeler, label_from_with
from samray.pipeline.labeler import MakeLabeler, ShardLabeler
from tests.support import standin


class Encoding(standin.StandIn):
    """A stand-in for an encoder."""

    def generate(self, images: list[np.ndarray]) -> list[Any]:
        super().generate(images)
        maps = [{EMBEDDING: image.transpose(2, 0, 1).astype(np.float32)} for image in images]
        return [WithEmbedding([], maps_of_image, (1, 1), "float16") for maps_of_image in maps]


class Decoding(standin.StandIn):
    """A stand-in for what makes masks from embeddings."""

    def generate(self, images: list[np.ndarray], prompts: list[Any] = []) -> list[Any]:  # noqa: B006
        if not prompts:  # the built-in picture
            return super().generate(images)
        pixels = [user_prompts[0].embedding.numpy().transpose(1, 2, 0) for user_prompts in prompts]
        return super().generate([one.astype(np.uint8) for one in pixels])


def embed_and_label(root: Path, pace: standin.Pace) -> int:
    """Both, one after the other. Returns the highest exit code."""
    base = [f"model.checkpoint={standin.__file__}", "output.images_per_shard=2", "cluster.max_actors=1"]
    base += ["cluster.num_cpus_per_actor=1"]

    def encoding(config: Config, num_threads: int) -> ShardLabeler:
        return ShardLabeler(
            lambda _: Encoding(pace.of("embedded")), max_pixels=config.input.max_pixels, num_threads=num_threads
        )

    def decoding(source: Plan, images_per_shard: int) -> MakeLabeler:
        def make(config: Config, num_threads: int) -> ShardLabeler:
            options = {"max_pixels": config.input.max_pixels, "num_threads": num_threads}
            return StoredLabeler(source, images_per_shard, lambda _: Decoding(pace.of("relabelled")), **options)

        return make

    first = embed_with(root / "in", root / "embedded", load_embed_config(None, base), make_labeler=encoding)
    labels = load_config(None, None, base)
    second = label_from_with(root / "embedded", root / "relabelled", labels, make_labelers=decoding)
    return max(first.exit_code, second.exit_code)
