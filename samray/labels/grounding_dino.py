"""`labels.by=grounding_dino`: Grounding DINO finds a box for each thing that a phrase names, SAM makes it a mask.

Source: Grounding DINO (Liu et al., arXiv 2303.05499), as `transformers` has it; together with SAM known as Grounded SAM
and LangSAM. The prompt is all phrases in lower case, each followed by ` . `.

What the authors' scripts do, and what is different here:
- A box is kept if its highest token score is above `score_thresh` (their box_threshold). That is its score.
- Its phrase is the one with the highest token score, if that is above `text_thresh`. The scripts join all tokens above
  it, also of several phrases, so that a box may be called "cat dog".
- Non-maximum suppression at `nms_thresh` over the boxes of all phrases together, as in their demo, before SAM.
- A prompt of more tokens than the network takes (256) is split, and each part is asked in its own pass. The scripts cut
  it off.

What is computed how often: the image's backbone (Swin) once per image, the text's (BERT) once per phrase and actor,
because neither depends on the other, and no phrase on another. The encoder that follows fuses image and text: it and
the decoder run once per part of the prompt and image.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from samray.errors import ConfigError, ImageError
from samray.labels.networks import Network, load_network, loading, opened, require_transformers
from samray.labels.phrase_inputs import PhraseInputs, read_phrases_and_network
from samray.labels.phrases import IMAGE_PHRASES_KEPT, Asked
from samray.labels.records import limited_records, named_mask
from samray.labels.ways import MakeGenerator
from samray.masks.images import check_images
from samray.masks.nms import box_nms
from samray.masks.prompted import PromptedGenerator, check_prompts
from samray.masks.records import Mask
from samray.masks.stages import timed
from samray.prompts import Prompt
from samray.rle.records import MaskRecord
from samray.sam.frames import frame_of
from samray.sam.sam import Sam
from samray.text import plain

if TYPE_CHECKING:
    from samray.config import Config

Image = npt.NDArray[np.uint8]

_WAY: Final = "grounding_dino"
_SETTING: Final = "labels.phrases: "
_KIND: Final = "grounding-dino"
"""The `model_type` of its config.json."""
SCORE_THRESH: Final = 0.3
"""`labels.score_thresh` if it is null: box_threshold in the authors' demo with SAM."""
_GPU_BOXES, _CPU_BOXES = 32, 2
"""Boxes decoded together, as for prompts (`samray.masks.prompted`): bounds the memory, and fits a CPU's caches."""


class DetectorInputs(PhraseInputs):
    """Phrases, and the network that finds them."""

    def plan_rows(self, config: Config) -> list[tuple[str, str]]:
        return [("masks", f"{_WAY}, {self.phrases_in_words}"), self.network_row()]


def read_inputs(config: Config, texts: Sequence[str] | None = None) -> DetectorInputs:
    """Read the phrases and find the network. texts: as in `PhraseInputs.with_texts`.

    Raises: ConfigError that names the setting, StorageError.
    """
    return DetectorInputs(*read_phrases_and_network(config, _KIND)).with_texts(texts)


def build_generator(model: Sam, config: Config, inputs: DetectorInputs) -> MakeGenerator:
    """Factory of an actor's generators: the network is loaded, and the phrases are encoded, once for all.

    Raises: ConfigError if the network is not this run's or cannot be loaded.
    """
    detector = Detector(inputs.network, inputs.common, model.device)
    return lambda points_per_batch: GroundedGenerator(model, config, detector, points_per_batch)


@dataclass(frozen=True, slots=True)
class Boxes:
    """Boxes of one image, best score first."""

    xyxy: npt.NDArray[np.float32]
    """(N, 4) in pixels of the image; a box may reach a little beyond it."""
    scores: npt.NDArray[np.float32]
    """(N,) in [0, 1]."""
    phrases: list[int]
    """Index of the phrase of each: of the detector's phrases, and after them the image's own."""


@dataclass(frozen=True, slots=True)
class Part:
    """Phrases that are asked in one pass."""

    input_ids: Tensor
    """(1, T) token ids of the prompt, on the network's device."""
    phrases: tuple[str, ...]
    first: int
    """Index of its first phrase."""
    spans: list[tuple[int, int]]
    """The first token of each phrase, and the one after its last: its full stop."""


Encoded = tuple[Tensor, Tensor, Tensor]
"""The start of a prompt, the tokens of a phrase and its full stop, and the prompt's end: (tokens, C) each."""


class Texts:
    """The prompts as the text's backbone reads them. Each phrase is encoded once, because in a prompt a token sees only
    those of its own phrase, with positions of their own. Several threads may use it at once."""

    def __init__(self, model: Any, common: Sequence[Part], part_of: Callable[[str], Part]) -> None:
        """model: the `GroundingDinoModel`. common: kept as long as the actor; of others the most recent phrases.
        part_of: the prompt of one phrase."""
        self._backbone = model.text_backbone.forward
        self._parts = {phrase: part for part in common for phrase in part.phrases}
        self._common: dict[str, Encoded] = {}
        # Encoded alone: the same numbers whatever was asked of other images before.
        self._encoded_phrase = lru_cache(IMAGE_PHRASES_KEPT)(lambda phrase: self._encode(part_of(phrase))[0])
        # Held while encoding, so that two threads with the same phrase encode it once.
        self._lock = threading.Lock()

    def of(self, part: Part) -> Any:
        """The output of the text's backbone for a prompt."""
        from transformers.modeling_outputs import BaseModelOutput

        with self._lock:
            phrases = [self._phrase(phrase) for phrase in part.phrases]
        tokens = torch.cat([phrases[0][0], *(tokens for _, tokens, _ in phrases), phrases[-1][2]])
        return BaseModelOutput(last_hidden_state=tokens[None])

    def _phrase(self, phrase: str) -> Encoded:
        if phrase not in self._parts:
            return self._encoded_phrase(plain(phrase))
        if phrase not in self._common:
            part = self._parts[phrase]
            self._common |= zip(part.phrases, self._encode(part), strict=True)
        return self._common[phrase]

    def _encode(self, part: Part) -> list[Encoded]:
        ids = part.input_ids
        sees = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
        positions = torch.zeros_like(ids)
        for start, stop in part.spans:
            sees[start : stop + 1, start : stop + 1] = True
            positions[0, start : stop + 1] = torch.arange(stop + 1 - start)
        hidden = self._backbone(ids, sees[None, None], torch.zeros_like(ids), positions).last_hidden_state[0]
        return [(hidden[:1], hidden[start : stop + 1], hidden[-1:]) for start, stop in part.spans]


class Detector:
    """Grounding DINO with phrases that are asked of every image. Several threads may use it at once."""

    def __init__(self, network: Network, phrases: Sequence[str], device: torch.device) -> None:
        """Raises: ConfigError if the network is another one than in the driver or cannot be loaded."""
        require_transformers(_WAY)  # here as well: the actor may run on another machine
        from transformers import BertTokenizerFast, GroundingDinoForObjectDetection, GroundingDinoImageProcessorPil

        with opened(network) as folder:
            with loading(network.checkpoint):
                tokenizer = BertTokenizerFast.from_pretrained(folder, local_files_only=True)
                # Pillow's resizing whether torchvision is installed or not: the same boxes on every machine.
                self.processor = GroundingDinoImageProcessorPil.from_pretrained(folder, local_files_only=True)
            self.model = load_network(GroundingDinoForObjectDetection, folder, network.checkpoint).to(device)
        self.phrases, self.device = tuple(phrases), device
        longest = self.model.config.max_text_len
        self._split = lru_cache(16)(lambda phrases: split_prompt(tokenizer, phrases, longest, device))
        self.parts: list[Part] = self._split(self.phrases)
        self._texts = Texts(self.model.model, self.parts, lambda phrase: self._split((phrase,))[0])
        self._image_side = Once(self.model.model.backbone)
        self._text_side = Once(self.model.model.text_backbone)

    def _parts_with(self, image_phrases: Sequence[str]) -> list[Part]:
        """Raises: ImageError if one of an image's own phrases has too many tokens."""
        try:
            return self._split((*self.phrases, *image_phrases)) if image_phrases else self.parts
        except ConfigError as error:
            raise ImageError("bad_prompt", str(error).removeprefix(_SETTING)) from error

    @torch.inference_mode()
    def detect(
        self,
        image: Image,
        image_phrases: Sequence[str] = (),
        *,
        score_thresh: float,
        text_thresh: float,
        nms_thresh: float,
    ) -> Boxes:
        """The boxes of all phrases in one image (H, W, 3) uint8 RGB, after non-maximum suppression.

        image_phrases: phrases of this image alone, none of which is one of the detector's. Raises: ImageError
        (`bad_prompt`) if one has more tokens than the network takes.
        """
        parts = self._parts_with(image_phrases)
        if not parts:
            return Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), [])
        size = self._size_of(image)
        inputs = self.processor(images=image, input_data_format="channels_last", return_tensors="pt", **size)
        pixels, mask = (inputs[name].to(self.device) for name in ("pixel_values", "pixel_mask"))
        features: dict[int, Any] = {}  # of this image only
        boxes_of_parts = []
        for part in parts:
            text = {0: self._texts.of(part)}
            with self._image_side.kept_in(features, 0), self._text_side.kept_in(text, 0):
                outputs = self.model(pixel_values=pixels, pixel_mask=mask, input_ids=part.input_ids)
            scores = outputs.logits[0].sigmoid().float()  # (queries, tokens); 0 behind the prompt's last token
            boxes_of_parts.append(_chosen(scores, outputs.pred_boxes[0].float(), part, score_thresh, text_thresh))
        boxes, scores, phrases = (
            torch.cat(list(columns)).cpu().numpy() for columns in zip(*boxes_of_parts, strict=True)
        )
        xyxy = boxes * np.array([image.shape[1], image.shape[0]] * 2, dtype=np.float32)
        keep = box_nms(xyxy, scores, nms_thresh)
        return Boxes(xyxy[keep], scores[keep], phrases[keep].tolist())

    def _size_of(self, image: Image) -> dict[str, Any]:
        """At least one pixel for an image so slender that its scaled short side would have none."""
        sides, longest = image.shape[:2], self.processor.size["longest_edge"]
        if not longest or min(sides) * longest / max(sides) >= 1:
            return {}
        height, width = (longest if side == max(sides) else 1 for side in sides)
        return {"size": {"height": height, "width": width}}


def _chosen(
    token_scores: Tensor, cxcywh: Tensor, part: Part, score_thresh: float, text_thresh: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The boxes above the thresholds: corners (N, 4) as shares of the image, scores (N,), phrases (N,) int64.

    token_scores: (queries, T). cxcywh: (queries, 4).
    """
    scores = token_scores.amax(dim=1)
    by_phrase = torch.stack([token_scores[:, start:stop].amax(dim=1) for start, stop in part.spans], dim=1)
    phrase_scores, phrases = by_phrase.max(dim=1)
    keep = (scores > score_thresh) & (phrase_scores > text_thresh)
    centre, half = cxcywh[keep, :2], 0.5 * cxcywh[keep, 2:]
    return torch.cat([centre - half, centre + half], dim=1), scores[keep], phrases[keep] + part.first


def split_prompt(tokenizer: Any, phrases: Sequence[str], max_tokens: int, device: torch.device) -> list[Part]:
    """The prompt in as few parts of at most max_tokens as the order of the phrases allows.

    Raises: ConfigError if one phrase has more tokens.
    """
    parts: list[Part] = []
    if not phrases:
        return parts
    lengths = [len(ids) for ids in tokenizer([*map(plain, phrases)], add_special_tokens=False).input_ids]
    first = 0
    while first < len(phrases):
        spans: list[tuple[int, int]] = []
        position = 1  # after [CLS]
        for length in lengths[first:]:
            if position + length + 2 > max_tokens:  # its full stop, and [SEP]
                break
            spans.append((position, position + length))
            position += length + 1
        if not spans:
            raise ConfigError(
                f"{_SETTING}{phrases[first]!r} has {lengths[first]} tokens, and this network takes "
                f"{max_tokens - 3} of one phrase; name the thing in fewer words"
            )
        prompt = prompt_of(phrases[first : first + len(spans)])
        input_ids = torch.tensor([tokenizer(prompt).input_ids], device=device)
        if input_ids.shape[1] != position + 1:
            raise ConfigError(
                "labels.checkpoint: its tokenizer is not that of a Grounding DINO, because the prompt has "
                f"{input_ids.shape[1]} tokens, and {position + 1} were expected with [CLS], [SEP] and the full stops"
            )
        parts.append(Part(input_ids, tuple(phrases[first : first + len(spans)]), first, spans))
        first += len(spans)
    return parts


def prompt_of(phrases: Sequence[str]) -> str:
    """The prompt for these phrases: `cat . fire hydrant . `."""
    return "".join(f"{plain(phrase)} . " for phrase in phrases)


class Once:
    """Computes a module's output once per key, and hands it out again to later calls of the network around it."""

    def __init__(self, module: nn.Module) -> None:
        self._compute = module.forward
        self._of_thread = threading.local()
        module.forward = self._forward  # by its own attribute: the class's method stays

    @contextmanager
    def kept_in(self, store: dict[int, Any], key: int) -> Iterator[None]:
        """Within the block, the output for `key` is taken from store if it is there, else computed and kept there."""
        self._of_thread.store_and_key = store, key
        yield
        del self._of_thread.store_and_key

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        store, key = self._of_thread.store_and_key
        if key not in store:
            store[key] = self._compute(*args, **kwargs)
        output = store[key]
        # The network appends to the lists that its backbone returns.
        return tuple(list(part) for part in output) if isinstance(output, tuple) else output


class GroundedGenerator:
    """Masks of what phrases name. `stage_seconds` sums the time per stage: detect, encode, decode."""

    def __init__(self, model: Sam, config: Config, detector: Detector, points_per_batch: int | None = None) -> None:
        """points_per_batch: boxes decoded together; None chooses by the device."""
        self.model, self.config, self.detector, self.frame = model, config, detector, frame_of(model)
        self.asked = Asked(detector.phrases)
        frugal = {} if points_per_batch is None else {"points_per_batch": points_per_batch}
        self.prompted = PromptedGenerator(model, config.masks.model_copy(update=frugal))
        self.boxes_per_batch = points_per_batch or (_CPU_BOXES if model.device.type == "cpu" else _GPU_BOXES)
        self.stage_seconds = {"detect": 0.0, "encode": 0.0, "decode": 0.0}

    @torch.inference_mode()
    def generate(
        self, images: Sequence[Image], prompts: Sequence[Sequence[Prompt]] | None = None
    ) -> list[list[MaskRecord]]:
        """The masks of each image, best score first, with `label`, a phrase as the user wrote it, and `label_score`.

        images: RGB uint8 (H, W, 3), upright, of any sizes. prompts: a list per image; texts are asked of this image,
        besides the phrases asked of all. Clicks and boxes give one mask each, without a name, before the others. An
        image in which nothing is found has no masks.
        Raises: ImageError (`bad_prompt`) for a wrong prompt, ValueError for invalid images.
        """
        check_images(images)
        prompts = [()] * len(images) if prompts is None else prompts
        for image, user_prompts in zip(images, prompts, strict=True):
            check_prompts(image.shape[:2], user_prompts)
        image_phrases = [self.asked.only_of(user_prompts) for user_prompts in prompts]
        with self._stage("detect"):
            boxes = [self._detect(image, texts) for image, texts in zip(images, image_phrases, strict=True)]
        records: list[list[MaskRecord]] = [[] for _ in images]
        # The others need no encoding.
        to_encode = [
            i
            for i, user_prompts in enumerate(prompts)
            if len(boxes[i].xyxy) or any(prompt.text is None for prompt in user_prompts)
        ]
        if to_encode:
            with self._stage("encode"):
                embeddings = self.model.encode_images(self.model.preprocess([images[i] for i in to_encode])[0])
            with self._stage("decode"):
                for i, embedding in zip(to_encode, embeddings, strict=True):
                    height, width = images[i].shape[:2]
                    names = [*self.detector.phrases, *image_phrases[i]]
                    masks = list(self._masks(embedding[None], boxes[i], names, (height, width)))
                    records[i] = self.prompted.masks_of(embedding[None], (height, width), prompts[i])
                    records[i] += limited_records(masks, (height, width), self.config)
        return records

    def _detect(self, image: Image, image_phrases: Sequence[str] = ()) -> Boxes:
        labels = self.config.labels
        score_thresh = SCORE_THRESH if labels.score_thresh is None else labels.score_thresh
        return self.detector.detect(
            image,
            image_phrases,
            score_thresh=score_thresh,
            text_thresh=labels.text_thresh,
            nms_thresh=labels.nms_thresh,
        )

    def _masks(
        self, embedding: Tensor, boxes: Boxes, names: Sequence[str], image_hw: tuple[int, int]
    ) -> Iterator[Mask]:
        """One mask per box. embedding: (1, C, h, w)."""
        # float64 until the model's frame, as in the reference's predictor.
        corners = self.frame.points_in(boxes.xyxy.astype(np.float64).reshape(-1, 2, 2), image_hw)
        prompts = torch.from_numpy(corners).float().flatten(1).to(self.model.device)
        for start in range(0, len(prompts), self.boxes_per_batch):
            batch = prompts[start : start + self.boxes_per_batch]
            # A box is not ambiguous: the single mask, as in the authors' demo.
            logits, iou = self.model.predict(embedding, boxes_xyxy=batch, multimask=False)
            for i, (mask, predicted_iou) in enumerate(zip(logits[:, 0], iou[:, 0].tolist(), strict=True), start):
                yield named_mask(
                    self.frame.masks_out(mask[None], image_hw)[0],
                    self.config,
                    predicted_iou=predicted_iou,
                    label=names[boxes.phrases[i]],
                    label_score=float(boxes.scores[i]),
                )

    def _stage(self, name: str) -> AbstractContextManager[None]:
        return timed(self.stage_seconds, name, self.model.device)
