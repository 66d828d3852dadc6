"""`labels.by=sam_text`: SAM's own text prompt, one mask per phrase.

The phrase's CLIP embedding goes through the projection that `samray train train.objective=text` has learned, and is the
prompt. Source: SAM paper, sections 7.5 and D.5. Of the three masks of an ambiguous prompt the one with the highest
predicted IoU is kept, as for a single click. The published checkpoints have no projection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from samray import storage
from samray.errors import ConfigError
from samray.labels.clip import load_clip, phrase_embedder
from samray.labels.networks import weights_sha256
from samray.labels.phrase_inputs import PhraseInputs, read_phrases_and_network
from samray.labels.phrases import Asked
from samray.labels.records import limited_records, named_mask
from samray.labels.ways import MakeGenerator
from samray.labels.zero_shot import phrase_embeddings
from samray.masks.images import check_images
from samray.masks.prompted import PromptedGenerator, check_prompts
from samray.masks.records import Mask
from samray.prompts import Prompt
from samray.rle.records import MaskRecord
from samray.sam.checkpoints import read_clip_sha256
from samray.sam.frames import frame_of
from samray.sam.sam import Sam

if TYPE_CHECKING:
    from samray.config import Config

Image = npt.NDArray[np.uint8]

_WAY: Final = "sam_text"
SCORE_THRESH: Final = 0.0
"""`labels.score_thresh` if it is null: a mask for each phrase."""
_GPU_PHRASES, _CPU_PHRASES = 32, 2
"""Phrases decoded together, as for prompts (`samray.masks.prompted`): bounds the memory, and fits a CPU's caches."""


class TextInputs(PhraseInputs):
    """Phrases, and the CLIP that embeds them."""

    def plan_rows(self, config: Config) -> list[tuple[str, str]]:
        return [("masks", f"{_WAY}, {self.phrases_in_words}"), self.network_row()]


def read_inputs(config: Config, texts: Sequence[str] | None = None) -> TextInputs:
    """Check that the weights know text prompts, read the phrases, and find the network.

    texts: as in `PhraseInputs.with_texts`. Raises: ConfigError that names the setting, StorageError.
    """
    # First: without it a large network would be downloaded for nothing.
    clip_sha256 = read_clip_sha256(config.model.name, config.model.checkpoint)
    if clip_sha256 is None:
        raise ConfigError(
            f"labels.by={_WAY} needs weights with a text projection, and {_weights_in_words(config)} have none; the"
            " published checkpoints have none either. Train one: samray train LABELS WEIGHTS train.objective=text"
            f" model.name={config.model.name}, then set model.checkpoint=WEIGHTS/weights.safetensors"
        )
    inputs = TextInputs(*read_phrases_and_network(config, "clip")).with_texts(texts)
    sha256 = weights_sha256(inputs.network)
    if sha256 != clip_sha256:
        raise ConfigError(
            f"labels.checkpoint {storage.redact(inputs.network.checkpoint)} is not the network with which"
            f" {_weights_in_words(config)} learned text prompts: the SHA-256 of its model.safetensors is {sha256},"
            f" expected {clip_sha256}"
        )
    return inputs


def _weights_in_words(config: Config) -> str:
    checkpoint = config.model.checkpoint
    return f"the weights of {config.model.name}" + ("" if checkpoint is None else f" in {storage.redact(checkpoint)}")


def build_generator(model: Sam, config: Config, inputs: TextInputs) -> MakeGenerator:
    """Factory of an actor's generators: the phrases are encoded once for all. The network is let go, unless
    images have phrases of their own.

    Raises: ConfigError if the network is not this run's or cannot be loaded.
    """
    # Weights and network are those that `read_inputs` has compared, by their SHA-256.
    network = load_clip(inputs.network, _WAY, model.device)
    templates = config.labels.templates
    texts = phrase_embeddings(network, inputs.common, templates).to(model.device)
    embed_phrase = None if inputs.num_common is None else phrase_embedder(network, templates)
    phrases = Phrases(tuple(inputs.common), texts, embed_phrase)
    return lambda points_per_batch: TextGenerator(model, config, phrases, points_per_batch)


@dataclass(frozen=True, slots=True)
class Phrases:
    """The phrases asked of every image, which are encoded once for all of them."""

    names: tuple[str, ...]
    embeddings: Tensor
    """(P, D), unit embeddings on the model's device."""
    embed_phrase: Callable[[str], Tensor] | None = None
    """(D,), the embedding of a phrase of a single image; None if images have none."""

    def with_phrases(self, image_phrases: Sequence[str]) -> tuple[list[str], Tensor]:
        """The names asked of one image, and their embeddings (P, D)."""
        if not image_phrases:
            return list(self.names), self.embeddings
        assert self.embed_phrase is not None
        more = torch.stack([self.embed_phrase(phrase) for phrase in image_phrases]).to(self.embeddings.device)
        return [*self.names, *image_phrases], torch.cat([self.embeddings, more])


class TextGenerator:
    """Masks of what phrases name. `stage_seconds` sums the time per stage: encode, decode."""

    def __init__(self, model: Sam, config: Config, phrases: Phrases, points_per_batch: int | None = None) -> None:
        """points_per_batch: phrases decoded together; None chooses by the device."""
        self.model, self.config, self.phrases, self.frame = model, config, phrases, frame_of(model)
        frugal = {} if points_per_batch is None else {"points_per_batch": points_per_batch}
        self.asked = Asked(phrases.names)
        self.prompted = PromptedGenerator(model, config.masks.model_copy(update=frugal))
        self.phrases_per_batch = points_per_batch or (_CPU_PHRASES if model.device.type == "cpu" else _GPU_PHRASES)
        self.stage_seconds = {"encode": 0.0, "decode": 0.0}

    @torch.inference_mode()
    def generate(
        self, images: Sequence[Image], prompts: Sequence[Sequence[Prompt]] | None = None
    ) -> list[list[MaskRecord]]:
        """The masks of each image, at most one per phrase, best score first.

        Each has `label`, a phrase as the user wrote it, and `label_score`, the predicted IoU.
        images: RGB uint8 (H, W, 3), upright, of any sizes. prompts: a list per image; texts are asked of this image,
        besides the phrases asked of all. Clicks and boxes give one mask each, without a name, before the others.
        Raises: ImageError (`bad_prompt`) for a wrong prompt, ValueError for invalid images.
        """
        check_images(images)
        prompts = [()] * len(images) if prompts is None else prompts
        for image, user_prompts in zip(images, prompts, strict=True):
            check_prompts(image.shape[:2], user_prompts)
        with self._stage("encode"):
            embeddings = self.model.encode_images(self.model.preprocess(list(images))[0])
        records = []
        with self._stage("decode"):
            for image, embedding, user_prompts in zip(images, embeddings, prompts, strict=True):
                image_hw = (image.shape[0], image.shape[1])
                masks = list(self._masks(embedding[None], self.asked.only_of(user_prompts), image_hw))
                clicked = self.prompted.masks_of(embedding[None], image_hw, user_prompts)
                records.append(clicked + limited_records(masks, image_hw, self.config))
        return records

    def _masks(self, embedding: Tensor, image_phrases: Sequence[str], image_hw: tuple[int, int]) -> Iterator[Mask]:
        """One mask per phrase whose score is above the threshold. embedding: (1, C, h, w)."""
        thresh = self.config.labels.score_thresh
        thresh = SCORE_THRESH if thresh is None else thresh
        names, texts = self.phrases.with_phrases(image_phrases)
        for start in range(0, len(texts), self.phrases_per_batch):
            batch = texts[start : start + self.phrases_per_batch]
            logits, iou = self.model.predict(embedding, text_embeddings=batch)
            scores, best = iou.max(dim=1)
            for i, (score, index) in enumerate(zip(scores.tolist(), best.tolist(), strict=True)):
                if score <= thresh:
                    continue
                mask = self.frame.masks_out(logits[i, index][None], image_hw)[0]
                yield named_mask(mask, self.config, predicted_iou=score, label=names[start + i], label_score=score)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.stage_seconds[name] += time.perf_counter() - started
