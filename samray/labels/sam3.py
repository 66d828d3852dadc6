"""`labels.by=sam3`: SAM 3 finds every instance of what a phrase names, with its mask. No other model is loaded.

Source: SAM 3 (Carion et al., "Segment Anything with Concepts", 2025), as `transformers` has it (`Sam3Model`,
`Sam3Processor.post_process_instance_segmentation`). Each phrase is asked alone, so phrases do not compete, and one
thing may be an instance of several. The score of an instance is the network's score for it times its presence score:
the probability that the image shows what the phrase names at all. Instances above `score_thresh` are kept.

What is computed how often: the image encoder once per image, the text encoder once per actor, because neither depends
on the other; the encoder that fuses them and the decoder once per phrase and image. The mask decoder, which works on
pixels, runs only for phrases that are found, and only for their instances.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from samray.errors import ConfigError
from samray.labels.networks import Network, load_network, load_tokenizer, loading, opened, require_transformers
from samray.labels.phrase_inputs import PhraseInputs, read_phrases_and_network
from samray.labels.pixels import Pixels, read_settings
from samray.labels.records import limited_records, named_mask
from samray.labels.ways import MakeGenerator
from samray.masks.images import check_images
from samray.masks.records import Mask
from samray.masks.stages import timed
from samray.rle.records import MaskRecord

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


class SegmenterInputs(PhraseInputs):
    """Phrases, and the network that finds them."""

    def plan_rows(self, config: Config) -> list[tuple[str, str]]:
        return [("masks", f"by SAM 3 (no other model is loaded), {self.phrases_in_words}"), self.network_row()]


def read_inputs(config: Config) -> SegmenterInputs:
    """Read the phrases and find the network. Raises: ConfigError that names the setting, StorageError."""
    return SegmenterInputs(*read_phrases_and_network(config, *_KINDS))


def build_generator(device: torch.device, config: Config, inputs: SegmenterInputs) -> MakeGenerator:
    """What creates the generators of an actor: the network is loaded, and the phrases are encoded, once for all.

    Raises: ConfigError if the network is not this run's or cannot be loaded.
    """
    segmenter = Segmenter(inputs.network, inputs.categories, device)
    return lambda points_per_batch: ConceptGenerator(config, segmenter, points_per_batch)


@dataclass(frozen=True, slots=True)
class Instances:
    """What one phrase finds in an image: N instances, in the network's order."""

    phrase: int
    """Its index."""
    xyxy: Tensor
    """(N, 4) boxes as shares of the image's sides."""
    scores: Tensor
    """(N,) in [0, 1]."""
    masks: Tensor
    """(N, h, w) probability of each pixel of the network's mask, which shows the whole image."""


class Segmenter:
    """SAM 3 with fixed phrases. Several threads may use it at once."""

    def __init__(self, network: Network, phrases: Sequence[str], device: torch.device) -> None:
        """Raises: ConfigError if the network is another one than in the driver or cannot be loaded."""
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
        self.phrases, self.device = list(phrases), device
        self.texts, self.text_mask = self._encode_texts(tokenizer)
        # A third of the network, and used up. Boxes as prompts are not offered.
        self.model.text_encoder = self.model.geometry_encoder = None
        self._mask_decoder = self.model.mask_decoder
        self.model.mask_decoder = self._postponed = Postponed()

    @torch.inference_mode()
    def _encode_texts(self, tokenizer: Any) -> tuple[Tensor, Tensor]:
        """The phrases' embeddings (P, T, C), and which of their tokens are not padding (P, T) bool.

        Raises: ConfigError if the network cannot take a phrase.
        """
        most = self.model.config.text_config.max_position_embeddings
        lengths = [len(ids) for ids in tokenizer(self.phrases).input_ids]
        for phrase, length in zip(self.phrases, lengths, strict=True):
            if length > most:
                raise ConfigError(
                    f"labels.phrases: {phrase!r} has {length - 2} tokens, and this network takes {most - 2}; name the "
                    "thing in fewer words"
                )
        texts, masks = [], []
        for start in range(0, len(self.phrases), _TEXTS_AT_ONCE):
            # Padded as the processor does it, then cut to the longest phrase: padding has no influence.
            batch = tokenizer(
                self.phrases[start : start + _TEXTS_AT_ONCE], padding="max_length", max_length=most, return_tensors="pt"
            ).to(self.device)
            found = self.model.get_text_features(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            texts.append(found.pooler_output[:, : max(lengths)].clone())
            masks.append(batch.attention_mask[:, : max(lengths)].bool())
        return torch.cat(texts), torch.cat(masks)

    @torch.inference_mode()
    def encode(self, image: Image) -> Any:
        """The features of one image (H, W, 3) uint8 RGB, for `find`."""
        return self.model.get_vision_features(self.pixels.stretch(image)[None].to(self.device))

    @torch.inference_mode()
    def find(self, features: Any, *, score_thresh: float, phrases_at_once: int) -> Iterator[Instances]:
        """The instances of each phrase that is found, in the order of the phrases."""
        for start in range(0, len(self.phrases), phrases_at_once):
            texts, text_mask = (all[start : start + phrases_at_once] for all in (self.texts, self.text_mask))
            # transformers 5.0 takes the embeddings, later versions an object that has them.
            texts.pooler_output = texts.view_as(texts)  # type: ignore[attr-defined]
            outputs = self.model(
                vision_embeds=_repeated(features, len(texts)), text_embeds=texts, attention_mask=text_mask
            )
            scores = outputs.pred_logits.sigmoid() * outputs.presence_logits.sigmoid()
            for i in (scores > score_thresh).any(dim=1).nonzero().flatten().tolist():
                keep = scores[i] > score_thresh
                masks = self._mask_decoder(**self._postponed.inputs_of(i, keep)).pred_masks[0].sigmoid()
                yield Instances(start + i, outputs.pred_boxes[i, keep], scores[i, keep], masks)


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
        """What to call the mask decoder with for item i of this thread's last batch. queries: (Q,) bool, the wanted."""
        own: dict[str, Any] = {}
        for key, value in self._of_thread.inputs.items():
            if isinstance(value, list):
                own[key] = [level[i : i + 1] for level in value]
            else:
                own[key] = value[i : i + 1] if isinstance(value, Tensor) else value
        return {**own, "decoder_queries": own["decoder_queries"][:, queries]}


class ConceptGenerator:
    """The masks of every instance of each phrase. `stage_seconds` sums the time per stage: encode, decode."""

    def __init__(self, config: Config, segmenter: Segmenter, points_per_batch: int | None = None) -> None:
        """points_per_batch: use little memory: ask one phrase at a time. None chooses by the device."""
        self.config, self.segmenter = config, segmenter
        is_frugal = points_per_batch is not None or segmenter.device.type == "cpu"
        self.phrases_at_once = _CPU_PHRASES if is_frugal else _GPU_PHRASES
        self.stage_seconds = {"encode": 0.0, "decode": 0.0}

    def generate(self, images: Sequence[Image]) -> list[list[MaskRecord]]:
        """The masks of each image, best score first, with `label`, a phrase as the user wrote it, and `label_score`.

        SAM 3 predicts no IoU: `predicted_iou` is the score, too. images: RGB uint8 (H, W, 3), upright, of any sizes. An
        image in which nothing is found has no masks. Raises: ValueError for invalid images.
        """
        check_images(images)
        # One after the other: an image fills a GPU, and the features of many would fill its memory.
        return [self._of_image(image) for image in images]

    @torch.inference_mode()
    def _of_image(self, image: Image) -> list[MaskRecord]:
        thresh = self.config.labels.score_thresh
        with self._stage("encode"):
            features = self.segmenter.encode(image)
        with self._stage("decode"):
            found = self.segmenter.find(
                features,
                score_thresh=SCORE_THRESH if thresh is None else thresh,
                phrases_at_once=self.phrases_at_once,
            )
            hw = (image.shape[0], image.shape[1])
            masks = [mask for instances in found for mask in self._masks(instances, hw)]
        masks.sort(key=lambda mask: -mask.predicted_iou)  # stable: of equal scores the earlier phrase is first
        return limited_records(masks, hw, self.config)

    def _masks(self, instances: Instances, image_hw: tuple[int, int]) -> Iterator[Mask]:
        for probability, score in zip(instances.masks, instances.scores.tolist(), strict=True):
            # Probabilities are interpolated, not logits, as the processor does it; one mask at a time.
            whole = interpolate(probability[None, None], image_hw, mode="bilinear", align_corners=False)[0, 0]
            yield named_mask(
                whole.logit(),
                self.config,
                predicted_iou=score,
                label=self.segmenter.phrases[instances.phrase],
                label_score=score,
            )

    def _stage(self, name: str) -> AbstractContextManager[None]:
        return timed(self.stage_seconds, name, self.segmenter.device)
