"""`labels.by=clip`: SAM finds all masks, CLIP names each of them or leaves it unnamed (`samray.labels.zero_shot`).

`samray name` uses the same for the masks that an output has.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from samray.labels.networks import Network, load_network, load_tokenizer, loading, opened, require_transformers
from samray.labels.phrase_inputs import PhraseInputs, read_phrases_and_network
from samray.labels.phrases import IMAGE_PHRASES_KEPT, Asked
from samray.labels.pixels import Pixels, read_settings
from samray.labels.ways import MakeGenerator
from samray.labels.zero_shot import DEFAULT_SCORE_THRESH, ClipNetwork, Namer, phrase_embeddings
from samray.masks.generator import MaskGenerator
from samray.rle.records import MaskRecord
from samray.text import plain

if TYPE_CHECKING:
    from samray.config import Config
    from samray.inputs.decode import RGBArray
    from samray.prompts import Prompt
    from samray.sam.sam import Sam

_WAY: Final = "clip"
_CUTTING_THREADS: Final = 8


class ClipInputs(PhraseInputs):
    """Phrases, and the network that compares masks with them."""

    def plan_rows(self, config: Config) -> list[tuple[str, str]]:
        return [
            ("names", f"{self.phrases_in_words}; probability of at least {thresh_of(config)}"),
            self.network_row(),
        ]


def thresh_of(config: Config) -> float:
    """The probability below which a mask stays unnamed."""
    thresh = config.labels.score_thresh
    return DEFAULT_SCORE_THRESH if thresh is None else thresh


def read_inputs(config: Config, texts: Sequence[str] | None = None) -> ClipInputs:
    """Read the phrases and find the network. texts: as in `PhraseInputs.with_texts`.

    Raises: ConfigError that names the setting, StorageError.
    """
    return ClipInputs(*read_phrases_and_network(config, "clip")).with_texts(texts)


def load_clip(network: Network, way: str, device: str | torch.device | None) -> ClipNetwork:
    """Load the network. device: None uses a GPU if there is one. way: what needs it, for messages.

    Raises: ConfigError if the network is not the one that the driver found, or cannot be loaded.
    """
    require_transformers(way)  # here as well: the actor may run on another machine
    from transformers import CLIPModel, CLIPTokenizer

    where = network.checkpoint
    with opened(network) as folder:
        model = load_network(CLIPModel, folder, where)
        tokenizer = load_tokenizer(CLIPTokenizer, folder, where, model.config.text_config.vocab_size)
        with loading(where):
            numbers = read_pixels(folder)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return ClipNetwork(model.to(device), tokenizer, numbers)


def read_pixels(folder: Path) -> Pixels:
    """How pixels get into the CLIP of a folder. Raises: as transformers, ValueError; see `loading`."""
    from transformers import CLIPConfig

    settings = CLIPConfig.from_pretrained(folder, local_files_only=True)
    return Pixels.from_json(read_settings(folder), settings.vision_config.image_size)


def load_namer(config: Config, inputs: PhraseInputs, device: str | torch.device | None) -> Namer:
    """Load the network and encode the phrases asked of every image and `labels.negatives`. device: None uses a GPU if
    there is one.

    Raises: as `load_clip`.
    """
    network, templates = load_clip(inputs.network, _WAY, device), config.labels.templates
    asked = {plain(phrase) for phrase in inputs.common}
    negatives = tuple(phrase for phrase in config.labels.negatives if plain(phrase) not in asked)
    # A GPU would wait for one thread that cuts and resizes. On CPUs each thread of the labeler does its own.
    num_threads = min(_CUTTING_THREADS, os.cpu_count() or 1)
    on_cpu = network.device.type == "cpu"
    return Namer(
        network,
        tuple(inputs.common),
        phrase_embeddings(network, [*inputs.common, *negatives], templates),
        config.labels.crops,
        thresh_of(config),
        negatives=negatives,
        cutters=None if on_cpu else ThreadPoolExecutor(num_threads, thread_name_prefix="cut"),
        embed_phrase=phrase_embedder(network, templates),
    )


def phrase_embedder(network: ClipNetwork, templates: Sequence[str]) -> Callable[[str], torch.Tensor]:
    """A function that returns the vector (D,) of a phrase of a single image; keeps the most recent ones."""
    embedding = lru_cache(IMAGE_PHRASES_KEPT)(lambda phrase: phrase_embeddings(network, [phrase], templates)[0])
    encoding = threading.Lock()

    def embed_phrase(phrase: str) -> torch.Tensor:
        with encoding:  # two threads with the same phrase encode it once
            return embedding(phrase)

    return embed_phrase


def build_generator(model: Sam, config: Config, inputs: ClipInputs) -> MakeGenerator:
    """Factory of an actor's generators: the network is loaded, and the phrases are encoded, once for all.

    Raises: as `load_namer`.
    """
    namer = load_namer(config, inputs, model.device)
    return lambda points_per_batch: ClipGenerator(model, config, namer, points_per_batch)


class ClipGenerator:
    """All masks of each image, with their names. `stage_seconds` has those of `MaskGenerator`, and name."""

    def __init__(self, model: Sam, config: Config, namer: Namer, points_per_batch: int | None = None) -> None:
        """points_per_batch: use little memory: so many points, and as many cut-outs, at a time."""
        masks, self.namer = config.masks, namer
        if points_per_batch is not None:
            masks = masks.model_copy(update={"points_per_batch": points_per_batch})
            self.namer = replace(namer, crops_at_once=points_per_batch)
        self.asked = Asked(namer.phrases)
        self.masks = MaskGenerator(model, masks, frugal=points_per_batch is not None)
        self._name_s = 0.0

    @property
    def stage_seconds(self) -> dict[str, float]:
        return {**self.masks.stage_seconds, "name": self._name_s}

    def generate(
        self, images: Sequence[RGBArray], prompts: Sequence[Sequence[Prompt]] | None = None
    ) -> list[list[MaskRecord]]:
        """As in `MaskGenerator`; each mask has `label` and `label_score`, both null if it stays unnamed.

        prompts: a list of texts per image, asked of this image, besides the phrases asked of all.
        """
        masks_of_images = self.masks.generate(list(images))
        started = time.perf_counter()
        image_phrases = [self.asked.only_of(user_prompts) for user_prompts in prompts or [()] * len(images)]
        named = [
            self.namer.name(image, masks, phrases)
            for image, masks, phrases in zip(images, masks_of_images, image_phrases, strict=True)
        ]
        self._name_s += time.perf_counter() - started
        return named
