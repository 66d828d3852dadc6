"""`labels.by=fastsam`: all masks of an image in one pass of FastSAM's network, and by CLIP those that phrases name.

Source: FastSAM (Zhao et al., arXiv 2306.12156): YOLOv8-seg finds all masks (`samray.labels.yolo_masks`), CLIP chooses
by text. Here as in `labels.by=clip` (`samray.labels.zero_shot`), by default with the authors' cut-outs (`boxed`), their
CLIP and no template. No SAM is loaded.

What the authors' script does with a phrase, and what is different here: it ranks the masks of an image and takes the
best, so one always wins. Here each mask is compared with all phrases and with `labels.negatives`, words for nothing in
particular; it gets a name if that is likely enough, else it is left out. So an image may have no mask.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from samray.labels.clip import load_namer, thresh_of
from samray.labels.networks import Network
from samray.labels.onnx_file import OnnxNetwork, find_onnx, require_onnxruntime
from samray.labels.phrase_inputs import PhraseInputs, read_phrases_and_network
from samray.labels.phrases import Asked
from samray.labels.records import limited_records
from samray.labels.ways import MakeGenerator
from samray.labels.yolo_masks import Image, Window, YoloMasks
from samray.labels.zero_shot import Namer
from samray.masks.crops import Crop
from samray.masks.images import check_images
from samray.masks.records import Mask
from samray.masks.scores import MASK_THRESHOLD, above, stability_scores
from samray.prompts import Prompt
from samray.rle import encode as rle
from samray.rle.records import MaskRecord

if TYPE_CHECKING:
    import torch

    from samray.config import Config

_WAY: Final = "fastsam"
_SETTING: Final = "labels.onnx"
LICENCE: Final = "FastSAM's weights, and Ultralytics, which exports them, are under AGPL-3.0"
EXPORT: Final = "yolo export model=FastSAM-x.pt format=onnx imgsz=1024 dynamic=True"
"""Makes the file: with Ultralytics, which unpickles the authors' weights."""


@dataclass(frozen=True, slots=True)
class FastSamInputs:
    """The network that finds the masks, and the phrases that choose among them."""

    finder: Network
    names: PhraseInputs | None
    """The phrases and their network; None to keep all masks, without names."""

    @property
    def categories(self) -> list[str] | None:
        return None if self.names is None else self.names.categories

    @property
    def identity(self) -> dict[str, Any]:
        return {"onnx_sha256": self.finder.sha256, **({} if self.names is None else self.names.identity)}

    def plan_rows(self, config: Config) -> list[tuple[str, str]]:
        labels = config.labels
        masks = f"{_WAY}, confidence > {labels.conf_thresh:g}"
        finder = ("found by", f"{self.finder.checkpoint} (SHA-256 {self.finder.sha256[:12]}...)")
        licence = ("licence", LICENCE)
        if self.names is None:
            return [("masks", f"{masks}, all of them, without names"), finder, licence]
        chosen = f"{self.names.phrases_in_words}; probability of at least {thresh_of(config):g}"
        return [("masks", masks), finder, licence, ("chosen by", chosen), self.names.network_row()]


def read_inputs(config: Config, texts: Sequence[str] | None = None) -> FastSamInputs:
    """Find the networks, run FastSAM's once, and read the phrases. texts: as in `PhraseInputs.with_texts`.

    Raises: ConfigError that names the setting, StorageError.
    """
    import torch

    require_onnxruntime(_WAY)
    labels = config.labels
    assert labels.onnx is not None
    names = None
    if labels.phrases is not None or texts is not None:
        names = PhraseInputs(*read_phrases_and_network(config, "clip")).with_texts(texts)
    finder = find_onnx(labels.onnx, _SETTING, EXPORT)
    load_finder(config, finder, torch.device("cpu")).check()
    return FastSamInputs(finder, names)


def load_finder(config: Config, finder: Network, device: torch.device) -> YoloMasks:
    """Raises: ConfigError if the file is not the run's, or is not such a network."""
    labels = config.labels
    network = OnnxNetwork(finder, _SETTING, device)
    return YoloMasks(network, conf_thresh=labels.conf_thresh, nms_thresh=labels.nms_thresh)


def build_generator(device: torch.device, config: Config, inputs: FastSamInputs) -> MakeGenerator:
    """Factory of an actor's generators: both networks are loaded, and the phrases are encoded, once for all.

    Raises: ConfigError if a network is not this run's or cannot be loaded.
    """
    require_onnxruntime(_WAY)  # here as well: the actor may run on another machine
    finder = load_finder(config, inputs.finder, device)
    namer = None if inputs.names is None else load_namer(config, inputs.names, device)
    return lambda points_per_batch: FastSamGenerator(config, finder, namer, points_per_batch)


class FastSamGenerator:
    """Masks by FastSAM. `stage_seconds` sums the time per stage: detect, and with phrases name."""

    def __init__(
        self, config: Config, finder: YoloMasks, namer: Namer | None, points_per_batch: int | None = None
    ) -> None:
        """namer: chooses masks by phrases; None to keep all. points_per_batch: so many cut-outs at a time."""
        self.config, self.finder = config, finder
        if namer is not None and points_per_batch is not None:
            namer = replace(namer, crops_at_once=points_per_batch)
        self.namer, self.asked = namer, Asked(() if namer is None else namer.phrases)
        self.stage_seconds = {"detect": 0.0} | ({} if namer is None else {"name": 0.0})

    def generate(
        self, images: Sequence[Image], prompts: Sequence[Sequence[Prompt]] | None = None
    ) -> list[list[MaskRecord]]:
        """The masks of each image, best confidence first; with phrases those that have a name, `label`, and its
        probability, `label_score`.

        images: RGB uint8 (H, W, 3), upright, of any sizes. prompts: a list of texts per image, asked of this image,
        besides the phrases asked of all. An image in which nothing is found, or of which nothing is asked in a run
        with phrases, has no masks.
        Raises: ValueError for invalid images, or if the network's outputs are not as expected.
        """
        check_images(images)
        started = time.perf_counter()
        masks_of_images = [self._masks(image) for image in images]
        detected = time.perf_counter()
        self.stage_seconds["detect"] += detected - started
        if self.namer is None:
            return masks_of_images
        image_phrases = [self.asked.only_of(user_prompts) for user_prompts in prompts or [()] * len(images)]
        named = [
            self.namer.name(image, masks, phrases)
            for image, masks, phrases in zip(images, masks_of_images, image_phrases, strict=True)
        ]
        self.stage_seconds["name"] += time.perf_counter() - detected
        return [[mask for mask in masks if mask["label"] is not None] for masks in named]

    def _masks(self, image: Image) -> list[MaskRecord]:
        image_hw = (image.shape[0], image.shape[1])
        masks = [self._mask(window, image_hw) for window in self.finder.masks(image)]
        return limited_records(masks, image_hw, self.config)

    def _mask(self, window: Window, image_hw: tuple[int, int]) -> Mask:
        """predicted_iou: the network's confidence. stability_score: as SAM's, in the mask's box."""
        logits, (height, width) = window.logits[None], image_hw
        (counts,) = rle.encode_masks(above(logits, MASK_THRESHOLD), window.left_top, image_hw)
        offset = self.config.masks.stability_score_offset
        return Mask(
            counts=counts,
            predicted_iou=window.score,
            stability_score=float(stability_scores(logits, MASK_THRESHOLD, offset)),
            points_xy=np.zeros((0, 2)),
            crop=Crop(0, 0, width, height, layer=0),
        )
