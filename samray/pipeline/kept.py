"""Mask generators that also give the embedding of each image, to be stored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from samray.output.embeddings import EARLY, EMBEDDING, HIGH_RES, Maps
from samray.rle.records import MaskRecord

if TYPE_CHECKING:
    from torch import Tensor

    from samray.inputs.decode import RGBArray
    from samray.masks.generator import MaskGenerator
    from samray.masks.prompted import PromptedGenerator
    from samray.sam.sam import Sam


@dataclass(frozen=True, slots=True)
class WithEmbedding:
    """The result of one image."""

    masks: list[MaskRecord]
    maps: Maps
    input_hw: tuple[int, int]
    dtype: str
    """How to store the values."""


class EmbeddingKeeper:
    """Generates the masks of a generator, and keeps the embeddings that it makes on the way."""

    def __init__(self, generator: MaskGenerator | PromptedGenerator, dtype: str) -> None:
        """dtype: how to store the values: float32, float16 or int8."""
        self._generator: Any = generator
        self._dtype = dtype
        self._embeddings: dict[int, Tensor] = {}
        self.stage_seconds = generator.stage_seconds
        self.stage_seconds["keep"] = 0.0
        generator.keep_embedding = self._embeddings.__setitem__

    def generate(self, images: Sequence[RGBArray], *prompts: Any) -> list[WithEmbedding]:
        """As the generator does, with the embedding of each image."""
        self._embeddings.clear()
        try:
            masks = self._generator.generate(images, *prompts)
            started = time.perf_counter()
            model = self._generator.model
            results = [
                with_embedding(model, image, records, self._embeddings.pop(i), self._dtype)
                for i, (image, records) in enumerate(zip(images, masks, strict=True))
            ]
            self.stage_seconds["keep"] += time.perf_counter() - started
            return results
        finally:  # also after an error: they may fill a GPU's memory
            self._embeddings.clear()


class Embedder:
    """Encodes images and finds no masks, for `samray embed`."""

    def __init__(self, generator: MaskGenerator, dtype: str) -> None:
        self._generator, self._dtype = generator, dtype
        self.stage_seconds = {"preprocess": 0.0, "encode": 0.0, "keep": 0.0}

    def generate(self, images: Sequence[RGBArray]) -> list[WithEmbedding]:
        """The embedding of each image. images: RGB uint8 (H, W, 3). Raises ValueError for invalid images."""
        encoded = self._generator.encode(list(images))
        started = time.perf_counter()
        model = self._generator.model
        results = [
            with_embedding(model, image, [], embedding, self._dtype)
            for image, embedding in zip(images, encoded, strict=True)
        ]
        self.stage_seconds["keep"] += time.perf_counter() - started
        self.stage_seconds |= {key: self._generator.stage_seconds[key] for key in ("preprocess", "encode")}
        return results


def with_embedding(
    model: Sam, image: RGBArray, masks: list[MaskRecord], embedding: Tensor, dtype: str
) -> WithEmbedding:
    """embedding: (C + ..., h, w) as `Sam.encode_images` gives it for one image, on any device."""
    from samray.sam.encoder import unpacked
    from samray.sam.frames import frame_of

    features = unpacked(embedding[None].float().cpu(), model.spec.embed_dim, model.spec.decoder.hq_dim)
    tensors = {EMBEDDING: features.embedding, **dict(zip(HIGH_RES, features.high_res or (), strict=False))}
    if features.early is not None:
        tensors[EARLY] = features.early
    maps = {name: tensor[0].contiguous().numpy() for name, tensor in tensors.items()}
    return WithEmbedding(masks, maps, frame_of(model).input_hw((image.shape[0], image.shape[1])), dtype)


def packed_embedding(maps: Maps) -> Tensor:
    """The inverse for a stored embedding: (C + ..., h, w) float32, as the decoder takes it."""
    import torch

    from samray.sam.encoder import Features, packed

    tensors = {name: torch.from_numpy(values)[None] for name, values in maps.items()}
    s0, s1 = (tensors.get(name) for name in HIGH_RES)
    high_res = None if s0 is None or s1 is None else (s0, s1)
    return packed(Features(tensors[EMBEDDING], high_res, tensors.get(EARLY)))[0]
