"""`labels.by=sam3`: SAM 3 finds every instance of what a phrase names, with its mask. No other model is loaded.

Source: SAM 3 (Carion et al., "Segment Anything with Concepts", 2025), as `transformers` has it (`Sam3Model`,
`Sam3Processor.post_process_instance_segmentation`). Each phrase is asked alone, so phrases do not compete, and one
thing may be an instance of several. The score of an instance is the network's score for it times its presence score:
the probability that the image shows what the phrase names at all. Instances above `score_thresh` are kept.

What is computed how often: the image encoder once per image, the text encoder once per phrase and actor, because
neither depends on the other; the encoder that fuses them and the decoder once per phrase and image. The mask decoder,
which works on pixels, runs only for phrases that are found, and only for their instances.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from samray.errors import ConfigError, ImageError
from samray.labels.networks import Network, load_network, load_tokenizer, loading, opened, require_transformers
from samray.labels.phrase_inputs import PhraseInputs, read_phrases_and_network
from samray.labels.phrases import IMAGE_PHRASES_KEPT, Asked, FoundMasks
from samray.labels.pixels import Pixels, read_settings
from samray.labels.records import limited_records, named_mask
from samray.labels.ways import MakeGenerator
from samray.masks.images import check_images
from samray.masks.records import Mask
from samray.masks.stages import timed
from samray.prompts import Prompt
from samray.storage.strict_json import parse_json

if TYPE_CHECKING:
    from samray.config import Config

Image = npt.NDArray[np.uint8]

_WAY: Final = "sam3"
_KINDS: Final = ("sam3", "sam3_video")
"""`model_type` in its config.json. The published folder is of the second: it has a tracker for videos, too."""
SCORE_THRESH: Final = 0.5
"""`labels.score_thresh` if it is null: confidence_threshold of the authors' image processor."""
_GPU_PHRASES, _CPU_PHRASES = 8, 1
"""Phrases asked together. Each takes some 0.3 GB at the published size."""
_TEXTS_AT_ONCE: Final = 64
_TOKENS: Final = 32
"""Most tokens of a phrase if config.json does not say it, with the two of `_START_AND_END`."""
_START_AND_END: Final = 2


class SegmenterInputs(PhraseInputs):
    """Phrases, and the network that finds them."""

    def plan_rows(self, config: Config) -> list[tuple[str, str]]:
        return [("masks", f"by SAM 3 (no other model is loaded), {self.phrases_in_words}"), self.network_row()]


def read_inputs(config: Config, texts: Sequence[str] | None = None) -> SegmenterInputs:
    """Read the phrases and find the network. texts: as in `PhraseInputs.with_texts`.

    Raises: ConfigError that names the setting, StorageError.
    """
    phrases, network = read_phrases_and_network(config, *_KINDS)
    _refuse_long(phrases, network)
    return SegmenterInputs(phrases, network).with_texts(texts)


def _refuse_long(phrases: Sequence[str], network: Network) -> None:
    """Raises: ConfigError for a phrase that the network cannot take, before OUTPUT is begun with it."""
    with opened(network) as folder:
        most = _most_tokens(parse_json((folder / "config.json").read_bytes()))
        # A token has a byte or more: of short phrases nothing has to be counted, and transformers takes seconds to
        # import.
        long = [phrase for phrase in phrases if len(phrase.lower().encode()) + _START_AND_END > most]
        if not long:
            return
        from transformers import CLIPTokenizer

        with loading(network.checkpoint):
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    for phrase in long:
        if problem := too_long(tokenizer, phrase, most):
            raise ConfigError(f"labels.phrases: {problem}")


def _most_tokens(settings: Any) -> int:
    """The number in config.json, else the published one; both with start and end."""
    for key in ("detector_config", "text_config"):
        inner = settings.get(key)
        settings = inner if isinstance(inner, dict) else settings
    most = settings.get("max_position_embeddings")
    return most if isinstance(most, int) else _TOKENS


def too_long(tokenizer: Any, phrase: str, most_tokens: int) -> str | None:
    """A sentence if the network takes fewer tokens, most_tokens with those of start and end."""
    number = len(tokenizer(phrase).input_ids)
    if number <= most_tokens:
        return None
    return (
        f"{phrase!r} has {number - _START_AND_END} tokens, and this network takes {most_tokens - _START_AND_END}; name "
        "the thing in fewer words"
    )


def build_generator(device: torch.device, config: Config, inputs: SegmenterInputs) -> MakeGenerator:
    """Factory of an actor's generators: the network is loaded, and the phrases are encoded, once for all.

    Raises: ConfigError if the network is not this run's or cannot be loaded.
    """
    segmenter = Segmenter(inputs.network, inputs.common, device, takes_image_phrases=inputs.num_common is not None)
    return lambda points_per_batch: ConceptGenerator(config, segmenter, points_per_batch)


@dataclass(frozen=True, slots=True)
class Instances:
    """The result of one phrase in an image: N instances, possibly none, in the network's order."""

    phrase: str
    presence: float
    """Probability that the image shows what the phrase names at all."""
    xyxy: Tensor
    """(N, 4) boxes as shares of the image's sides."""
    scores: Tensor
    """(N,) in [0, 1]."""
    masks: Tensor
    """(N, h, w) probability of each pixel of the network's mask, which shows the whole image."""


class Texts:
    """Phrases as the text encoder reads them: those of every image at once, an image's own when they are needed.
    Several threads may use it at once."""

    def __init__(self, model: Any, tokenizer: Any, common: Sequence[str]) -> None:
        """model: a `Sam3Model`. Raises: ConfigError if the network cannot take a phrase."""
        self._model, self._tokenizer = model, tokenizer
        self.most_tokens: int = model.config.text_config.max_position_embeddings
        for phrase in common:
            if problem := self.problem_of(phrase):
                raise ConfigError(f"labels.phrases: {problem}")
        starts = range(0, len(common), _TEXTS_AT_ONCE)
        self.common = [self._encode(common[start : start + _TEXTS_AT_ONCE]) for start in starts]
        self._encoded_phrase = lru_cache(IMAGE_PHRASES_KEPT)(lambda phrase: self._encode([phrase]))
        # Held while encoding, so that two threads with the same phrase encode it once.
        self._lock = threading.Lock()

    def problem_of(self, phrase: str) -> str | None:
        """A sentence if the network takes fewer tokens."""
        return too_long(self._tokenizer, phrase, self.most_tokens)

    def of(self, image_phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings of the common phrases, then of an image's own, (P, T, C), and which of their tokens are not
        padding, (P, T) bool. Raises: ImageError (`bad_prompt`) if the network cannot take one."""
        for phrase in image_phrases:
            if problem := self.problem_of(phrase):
                raise ImageError("bad_prompt", problem)
        with self._lock:
            parts = [*self.common, *(self._encoded_phrase(phrase) for phrase in image_phrases)]
        longest = max((texts.shape[1] for texts, _ in parts), default=0)
        texts = [pad(texts, (0, 0, 0, longest - texts.shape[1])) for texts, _ in parts]
        masks = [pad(mask, (0, longest - mask.shape[1])) for _, mask in parts]
        return torch.cat(texts), torch.cat(masks)

    @torch.inference_mode()
    def _encode(self, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
        # Padded as the processor does it, then cut to the longest phrase: padding has no influence.
        batch = self._tokenizer(
            list(phrases), padding="max_length", max_length=self.most_tokens, return_tensors="pt"
        ).to(self._model.device)
        mask = batch.attention_mask.bool()
        longest = int(mask.sum(dim=1).max())
        features = self._model.get_text_features(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        return features.pooler_output[:, :longest].clone(), mask[:, :longest]


class Segmenter:
    """SAM 3 with phrases that are asked of every image. Several threads may use it at once."""

    def __init__(
        self, network: Network, phrases: Sequence[str], device: torch.device, *, takes_image_phrases: bool = False
    ) -> None:
        """takes_image_phrases: whether images may have phrases of their own, for which the text encoder is kept.

        Raises: ConfigError if the network is another one than in the driver or cannot be loaded.
        """
        require_transformers(_WAY)  # here as well: the actor may run on another machine
        from transformers import CLIPTokenizer, Sam3Model

        where = network.checkpoint
        with opened(network) as folder:
            self.model = load_network(Sam3Model, folder, where).to(device)
            tokenizer = load_tokenizer(CLIPTokenizer, folder, where, self.model.config.text_config.vocab_size)
            with loading(where):
                side = self.model.config.image_size
                self.pixels = Pixels.from_json(read_settings(folder), side)
                if self.pixels.resize != side:
                    raise ValueError(f"images of {self.pixels.resize} pixels a side, but the network takes {side}")
        self.phrases, self.device = tuple(phrases), device
        self.texts = Texts(self.model, tokenizer, self.phrases)
        if not takes_image_phrases:
            self.model.text_encoder = None  # a third of the network, and used up
        self.model.geometry_encoder = None  # boxes as prompts are not offered
        self._mask_decoder = self.model.mask_decoder
        self.model.mask_decoder = self._postponed = Postponed()

    @torch.inference_mode()
    def encode(self, image: Image) -> Any:
        """The features of one image (H, W, 3) uint8 RGB, for `find`."""
        return self.model.get_vision_features(self.pixels.stretch(image)[None].to(self.device))

    @torch.inference_mode()
    def find(
        self, features: Any, image_phrases: Sequence[str] = (), *, score_thresh: float, phrases_at_once: int
    ) -> Iterator[Instances]:
        """Yield the instances of each phrase, then of each of image_phrases, those of this image alone.

        Raises: ImageError (`bad_prompt`) if one of image_phrases has more tokens than the network takes.
        """
        phrases = [*self.phrases, *image_phrases]
        if not phrases:
            return
        all_texts, all_masks = self.texts.of(image_phrases)
        for start in range(0, len(phrases), phrases_at_once):
            texts, text_mask = (all[start : start + phrases_at_once] for all in (all_texts, all_masks))
            # transformers 5.0 takes the embeddings, later versions an object that has them.
            texts.pooler_output = texts.view_as(texts)  # type: ignore[attr-defined]
            outputs = self.model(
                vision_embeds=_repeated(features, len(texts)), text_embeds=texts, attention_mask=text_mask
            )
            presence = outputs.presence_logits.sigmoid()  # (P, 1)
            scores = outputs.pred_logits.sigmoid() * presence
            for i, present in enumerate(presence[:, 0].tolist()):
                keep = scores[i] > score_thresh
                masks = scores.new_zeros((0, 1, 1))
                if keep.any():
                    masks = self._mask_decoder(**self._postponed.inputs_of(i, keep)).pred_masks[0].sigmoid()
                yield Instances(phrases[start + i], present, outputs.pred_boxes[i, keep], scores[i, keep], masks)


def _repeated(features: Any, times: int) -> Any:
    """The features of an image as those of so many equal images, without copying them."""

    def expanded(levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(level.expand(times, -1, -1, -1) for level in levels)

    return type(features)(
        fpn_hidden_states=expanded(features.fpn_hidden_states),
        fpn_position_encoding=expanded(features.fpn_position_encoding),
    )


class Postponed(nn.Module):
    """Stands in for the network's mask decoder: keeps what that is called with, for the instances that are wanted."""

    def __init__(self) -> None:
        super().__init__()
        self._of_thread = threading.local()

    def forward(self, **inputs: Any) -> Any:
        from transformers.models.sam3.modeling_sam3 import Sam3MaskDecoderOutput

        self._of_thread.inputs = inputs
        return Sam3MaskDecoderOutput()

    def inputs_of(self, i: int, queries: Tensor) -> dict[str, Any]:
        """Arguments of the mask decoder for item i of this thread's last batch. queries: (Q,) bool, the wanted."""
        inputs: dict[str, Any] = {}
        for key, value in self._of_thread.inputs.items():
            if isinstance(value, list):
                inputs[key] = [level[i : i + 1] for level in value]
            else:
                inputs[key] = value[i : i + 1] if isinstance(value, Tensor) else value
        return {**inputs, "decoder_queries": inputs["decoder_queries"][:, queries]}


class ConceptGenerator:
    """The masks of every instance of each phrase. `stage_seconds` sums the time per stage: encode, decode."""

    def __init__(self, config: Config, segmenter: Segmenter, points_per_batch: int | None = None) -> None:
        """points_per_batch: use little memory: ask one phrase at a time. None chooses by the device."""
        self.config, self.segmenter = config, segmenter
        is_frugal = points_per_batch is not None or segmenter.device.type == "cpu"
        self.asked = Asked(segmenter.phrases)
        self.phrases_at_once = _CPU_PHRASES if is_frugal else _GPU_PHRASES
        self.stage_seconds = {"encode": 0.0, "decode": 0.0}

    def generate(self, images: Sequence[Image], prompts: Sequence[Sequence[Prompt]] | None = None) -> list[FoundMasks]:
        """The masks of each image, best score first, with `label`, a phrase as the user wrote it, and `label_score`;
        and its presence scores.

        SAM 3 predicts no IoU: `predicted_iou` is the score, too. images: RGB uint8 (H, W, 3), upright, of any sizes.
        prompts: a list of texts per image, asked of this image, besides the phrases asked of all. An image in which
        nothing is found has no masks.
        Raises: ImageError (`bad_prompt`) for a text that the network cannot take, ValueError for invalid images.
        """
        check_images(images)
        image_phrases = [self.asked.only_of(user_prompts) for user_prompts in prompts or [()] * len(images)]
        # One after the other: an image fills a GPU, and the features of many would fill its memory.
        return [self._of_image(image, texts) for image, texts in zip(images, image_phrases, strict=True)]

    @torch.inference_mode()
    def _of_image(self, image: Image, image_phrases: Sequence[str]) -> FoundMasks:
        thresh = self.config.labels.score_thresh
        if not (self.segmenter.phrases or image_phrases):
            return FoundMasks([], [])
        with self._stage("encode"):
            features = self.segmenter.encode(image)
        presence: list[tuple[str, float]] = []
        masks: list[Mask] = []
        hw = (image.shape[0], image.shape[1])
        with self._stage("decode"):
            for instances in self.segmenter.find(
                features,
                image_phrases,
                score_thresh=SCORE_THRESH if thresh is None else thresh,
                phrases_at_once=self.phrases_at_once,
            ):
                presence.append((instances.phrase, instances.presence))
                masks += self._masks(instances, hw)
        masks.sort(key=lambda mask: -mask.predicted_iou)  # stable: of equal scores the earlier phrase is first
        return FoundMasks(limited_records(masks, hw, self.config), presence)

    def _masks(self, instances: Instances, image_hw: tuple[int, int]) -> Iterator[Mask]:
        for probability, score in zip(instances.masks, instances.scores.tolist(), strict=True):
            # Probabilities are interpolated, not logits, as the processor does it; one mask at a time.
            full_size = interpolate(probability[None, None], image_hw, mode="bilinear", align_corners=False)[0, 0]
            yield named_mask(
                full_size.logit(),
                self.config,
                predicted_iou=score,
                label=instances.phrase,
                label_score=score,
            )

    def _stage(self, name: str) -> AbstractContextManager[None]:
        return timed(self.stage_seconds, name, self.segmenter.device)
