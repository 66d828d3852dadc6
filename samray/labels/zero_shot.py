"""Names for masks by CLIP: cut each mask out of the image, embed it, and compare it with the phrases.

A mask is cut out in one or more ways (`labels.crops`); the unit embeddings of its cut-outs are averaged and normalised
again, as are those of a phrase in several templates. The probability of a phrase is the softmax over all phrases of
cosine similarity times the network's own `logit_scale`: CLIP's zero-shot classification.

- `plain`: the mask's box, made square, with its background. Source: SAM paper, section D.5, with a box expanded 1x.
- `blanked`: the same, with the pixels outside of the mask black. Source: the same section, for every second crop.
- `enlarged`: the box expanded 1.5x, the middle of the paper's 1x to 2x, with its background.
- `boxed`: the whole image, white outside of the mask's box. Source: FastSAM's choice of a mask by text (`text_prompt`).

Differences from the sources: a square that reaches beyond the image is padded with black, of which the paper says
nothing. FastSAM crops the centre of the image, which loses masks at the sides; here the image is padded to a square.
FastSAM ranks the masks of an image for one phrase, so one always wins; here the phrases of a mask are ranked, so that a
mask may stay unnamed. The paper's masked attention in the last layer is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from samray.labels.pixels import Pixels
from samray.rle.records import MaskRecord
from samray.rle.runs import bbox_xywh, checked_runs, pixels
from samray.text import plain

if TYPE_CHECKING:
    from samray.inputs.decode import RGBArray

ENLARGED: Final = 1.5
"""Factor by which `enlarged` expands the mask's box."""

DEFAULT_SCORE_THRESH: Final = 0.5
"""Least probability of a name if `labels.score_thresh` is null: the name is likelier than all others together."""

CROPS_AT_ONCE: Final = 128
"""Most cut-outs in one pass of the image encoder."""

_PHRASES_AT_ONCE: Final = 256

Bool = npt.NDArray[np.bool_]


class ClipNetwork:
    """A CLIP of `transformers` on a device. Safe to use in several threads."""

    def __init__(self, model: Any, tokenizer: Any, numbers: Pixels) -> None:
        """model: a CLIPModel in eval mode, on its device. tokenizer: its CLIPTokenizer."""
        self.model, self.tokenizer, self.pixels = model, tokenizer, numbers
        self.num_crops = 0  # counted for tests: each cut-out is encoded once

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def logit_scale(self) -> float:
        """Factor of cosine similarities before the softmax; CLIP's is at most 100."""
        return float(self.model.logit_scale.detach().exp())

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(T, D) float32 unit embeddings on the CPU. A text longer than the network's context is cut off at its end."""
        longest = self.model.config.text_config.max_position_embeddings
        parts = []
        for start in range(0, len(texts), _PHRASES_AT_ONCE):
            batch = list(texts[start : start + _PHRASES_AT_ONCE])
            tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            tokens = {key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask")}
            parts.append(_embedding(self.model.get_text_features(**tokens)))
        return torch.cat(parts)

    @torch.inference_mode()
    def embed_squares(self, squares: Tensor) -> Tensor:
        """(N, D) float32 unit embeddings on the CPU of prepared cut-outs (N, 3, size, size)."""
        self.num_crops += len(squares)
        return _embedding(self.model.get_image_features(squares.to(self.device, self.model.dtype)))


def _embedding(output: Any) -> Tensor:
    # Older versions return the tensor itself.
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return normalize(features.float().cpu(), dim=-1)


def phrase_embeddings(network: ClipNetwork, phrases: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(P, D) unit embeddings of the phrases, each averaged over the templates, of which `{}` is the phrase.

    Source: CLIP's notebook "Prompt Engineering for ImageNet".
    """
    if not phrases:
        return torch.zeros(0, network.model.config.projection_dim)
    texts = [template.replace("{}", phrase) for phrase in phrases for template in templates]
    of_templates = network.embed_texts(texts)
    return normalize(of_templates.reshape(len(phrases), len(templates), -1).mean(dim=1), dim=-1)


def cut_out(image: RGBArray, mask: Bool, box_xywh: Sequence[float], crop: str) -> RGBArray:
    """A square (side, side, 3) uint8 with the mask, cut out in the way that crop names (`labels.crops`).

    image: (H, W, 3) RGB. mask: (H, W). box_xywh: the smallest box around the mask, in whole pixels.
    """
    x, y, width, height = (int(value) for value in box_xywh)
    if crop == "boxed":
        shown = np.full_like(image, 255)
        shown[y : y + height, x : x + width] = image[y : y + height, x : x + width]
        return _square(shown, 0, 0, image.shape[1], image.shape[0], fill=255)
    if crop == "blanked":
        # Only the box: the rest of the square is outside of the mask, too.
        inside = mask[y : y + height, x : x + width, None]
        return _square(np.where(inside, image[y : y + height, x : x + width], 0), 0, 0, width, height)
    return square_around(image, box_xywh, ENLARGED if crop == "enlarged" else 1.0)


def square_around(image: RGBArray, box_xywh: Sequence[float], expand: float) -> RGBArray:
    """The square around a box, expanded by a factor; black where it reaches beyond the image."""
    x, y, width, height = (int(value) for value in box_xywh)
    side = round(expand * max(width, height))
    return _square(image, x + (width - side) // 2, y + (height - side) // 2, side, side)


def _square(image: RGBArray, left: int, top: int, width: int, height: int, fill: int = 0) -> RGBArray:
    """The part of an image in the middle of a square, with fill where the image has no pixels."""
    side = max(width, height)
    left, top = left + (width - side) // 2, top + (height - side) // 2
    square = np.full((side, side, 3), fill, np.uint8)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + side, image.shape[1]), min(top + side, image.shape[0])
    square[y0 - top : y1 - top, x0 - left : x1 - left] = image[y0:y1, x0:x1]
    return square


@dataclass(frozen=True, slots=True)
class Namer:
    """A network with the phrases asked of every image, which are encoded once for all images."""

    network: ClipNetwork
    phrases: tuple[str, ...]
    vectors: Tensor
    """(P, D) of the phrases, then of the negatives, from `phrase_embeddings`."""
    crops: tuple[str, ...]
    score_thresh: float = DEFAULT_SCORE_THRESH
    crops_at_once: int = CROPS_AT_ONCE
    cutters: Executor | None = None
    """Threads that cut out masks next to the network's work; None to do both in turn."""
    embed_phrase: Callable[[str], Tensor] | None = None
    """(D,), the vector of a phrase of a single image; None if images have none."""
    negatives: tuple[str, ...] = ()
    """Phrases that are not names (`labels.negatives`), none of them one of the phrases."""

    def probabilities(self, image: RGBArray, masks: Sequence[MaskRecord], image_phrases: Sequence[str] = ()) -> Tensor:
        """(M, P) float32: for each mask the probability of each phrase, which sum to 1.

        image: (H, W, 3) uint8 RGB, upright, as the masks were made for. image_phrases: phrases of this image alone. The
        order is phrases of every image, image_phrases, negatives. Raises: ValueError, phrased as the end of a sentence,
        for a mask that does not fit the image or has no pixel.
        """
        names, vectors = self._asked(image_phrases)
        parts = [
            self.network.embed_squares(part)
            for batch in self._batches(image, masks)
            for part in batch.split(self.crops_at_once)
        ]
        if not parts:
            return torch.zeros(0, len(names))
        of_crops = torch.cat(parts).reshape(len(masks), len(self.crops), -1)
        logits = self.network.logit_scale * normalize(of_crops.mean(dim=1), dim=-1) @ vectors.T
        return logits.softmax(dim=-1)

    def _asked(self, image_phrases: Sequence[str]) -> tuple[list[str | None], Tensor]:
        """The phrases to compare the masks of one image with: names, None for a negative, and the vectors (P, D)."""
        # A phrase that is asked of this image is a name, even if it is a negative for the others.
        plain_phrases = set(map(plain, image_phrases))
        negatives = [
            i for i, phrase in enumerate(self.negatives, len(self.phrases)) if plain(phrase) not in plain_phrases
        ]
        names = [*self.phrases, *image_phrases, *(None for _ in negatives)]
        if not image_phrases:
            return names, self.vectors
        assert self.embed_phrase is not None
        common, more = self.vectors[: len(self.phrases)], [self.embed_phrase(phrase)[None] for phrase in image_phrases]
        return names, torch.cat([common, *more, self.vectors[negatives]])

    def _batches(self, image: RGBArray, masks: Sequence[MaskRecord]) -> Iterator[Tensor]:
        """(n, 3, size, size) prepared cut-outs of all masks in order, of whole masks each."""
        cut = functools.partial(self._cut_outs, image)
        step = max(1, self.crops_at_once // len(self.crops))
        groups = [masks[start : start + step] for start in range(0, len(masks), step)]
        if self.cutters is None:
            yield from (torch.cat([cut(mask) for mask in group]) for group in groups)
            return
        # One group ahead: the network's small squares are kept, but not those of all masks.
        coming = [self.cutters.submit(cut, mask) for group in groups[:1] for mask in group]
        for following in [*groups[1:], []]:
            ready = torch.cat([future.result() for future in coming]) if coming else None
            coming = [self.cutters.submit(cut, mask) for mask in following]
            if ready is not None:
                yield ready

    def _cut_outs(self, image: RGBArray, mask: MaskRecord) -> Tensor:
        """(crops, 3, size, size) of one mask. Raises: as `probabilities`."""
        hw = (image.shape[0], image.shape[1])
        runs = checked_runs(mask["segmentation"]["counts"], hw)
        box = bbox_xywh(runs, hw)
        if not box[2]:
            raise ValueError("a mask without a pixel")
        inside = pixels(runs, hw)
        return torch.stack([self.network.pixels.prepare(cut_out(image, inside, box, crop)) for crop in self.crops])

    def name(self, image: RGBArray, masks: Sequence[MaskRecord], image_phrases: Sequence[str] = ()) -> list[MaskRecord]:
        """The same masks with `label` and `label_score`: the likeliest phrase and its probability, or null for both if
        that is below the threshold, the phrase is not a name or none was asked.

        image_phrases, Raises: as `probabilities`.
        """
        if not (self.phrases or image_phrases):
            return [{**mask, "label": None, "label_score": None} for mask in masks]
        names, _ = self._asked(image_phrases)
        named: list[MaskRecord] = []
        best, phrase = (
            self.probabilities(image, masks, image_phrases).max(dim=-1) if masks else (torch.zeros(0), torch.zeros(0))
        )
        for mask, score, index in zip(masks, best.tolist(), phrase.tolist(), strict=True):
            label = names[int(index)] if score >= self.score_thresh else None
            named.append({**mask, "label": label, "label_score": None if label is None else score})
        return named
