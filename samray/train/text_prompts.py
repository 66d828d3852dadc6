"""The objective `text`: prompts by text, learned from images and masks without any text.

The prompt is CLIP's embedding of what a mask shows, through a projection that is trained with the model. CLIP embeds
texts into the same space, so that a text's embedding can take its place (`labels.by=sam_text`).

Source: SAM paper, section 7.5 and appendix D.5. The box of the mask is expanded by a random factor of 1 to 2 and made
square; every second cut-out is black outside of the mask; the embedding is the first prompt, and clicks follow; masks
of less than 100 x 100 pixels are left out. Different from the paper: the attention of CLIP's last layer is not masked,
and a cut-out is of the augmented image, at the model's input size.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from samray import storage
from samray.errors import ConfigError
from samray.evaluate.points import mean_ious
from samray.labels.clip import load_clip, read_pixels
from samray.labels.networks import Network, find_network, loading, opened, weights_sha256
from samray.labels.pixels import Pixels
from samray.labels.zero_shot import ClipNetwork, square_around
from samray.sam.sam import Sam
from samray.sam.spec import ModelSpec
from samray.sam.text_projection import TextProjection
from samray.scenes.scene import Bool, Scene
from samray.train.augment import RGB
from samray.train.examples import Arrays, Frame
from samray.train.interaction import Batch, InteractionLoss, StepLoss
from samray.train.masks import Masks
from samray.train.mixture import Examples, Mixture
from samray.train.objectives import Evaluation, Panel
from samray.train.settings import SCORES, TextConfig, TrainConfig, TrainSettings

MIN_AREA: Final = 100 * 100
"""Smallest masks, in pixels, if data.min_area is not given."""
_NAME: Final = "train.objective=text"


class TextPrompts(Masks):
    """Masks from CLIP embeddings of what they show."""

    panels = (
        Panel("loss", "train", ("mask_loss", "score_loss"), True),
        Panel("IoU in training", "train", ("iou_scored", "iou_oracle", "iou_last")),
        Panel("IoU of held-out masks", "validation", ("miou", "miou_oracle", "miou_other")),
        Panel("learning rate", "train", ("lr",)),
    )
    headline = (
        ("miou", "mean IoU, prompted with the embedding of what the mask shows, mask with the highest score"),
        ("miou_oracle", "mean IoU, the same, best of three"),
        ("miou_other", "mean IoU, prompted with the embedding of another mask of the image"),
    )
    columns = (
        ("miou", "highest score"),
        ("miou_oracle", "best of three"),
        ("miou_other", "another mask's prompt"),
        ("num_regions", "masks"),
    )

    def adjusted(self) -> TrainSettings:
        """Masks as large as in the paper, and no boxes."""
        data, config = self.settings.data, self.settings.train
        if "min_area" not in data.model_fields_set:
            data = data.model_copy(update={"min_area": MIN_AREA})
        if "box_fraction" not in config.model_fields_set:
            config = config.model_copy(update={"box_fraction": 0.0})
        return self.settings.model_copy(update={"data": data, "train": config})

    def check(self, spec: ModelSpec) -> None:
        config = self.settings.train
        for key, is_set in (
            (f"train.trainable = {config.trainable!r}", config.trainable == SCORES),
            (f"train.box_fraction = {config.box_fraction:g}", config.box_fraction > 0),
            (f"train.distill_from = {config.distill_from!r}", config.distill_from is not None),
        ):
            if is_set:
                raise ConfigError(f"{key} is not allowed with {_NAME}, whose first prompt is an embedding")

    def open_data(self, data: Sequence[str]) -> Mixture:
        with _naming_own_settings(), opened(self._network) as folder, loading(self._network.checkpoint):
            pixels = read_pixels(folder)
        mixture = super().open_data(data)
        shown = Shown(self.settings.text, pixels, self.settings.train.seed)
        mixture.parts = [ShownExamples(part, shown, index) for index, part in enumerate(mixture.parts)]
        return mixture

    def identity(self) -> dict[str, dict[str, Any]]:
        return {"text": {"network_sha256": self._network.sha256}}

    def extend(self, sam: Sam, identity: Mapping[str, Any]) -> None:
        expected = identity.get("text", {}).get("network_sha256", self._network.sha256)
        network = Network(self._network.checkpoint, expected)
        with _naming_own_settings():
            self._clip = load_clip(network, "text", "cpu")
        clip_dim = self._clip.model.config.projection_dim
        sha256 = bytes.fromhex(weights_sha256(network))
        sam.prompt_encoder.text_projection = TextProjection(clip_dim, sam.spec.embed_dim, sha256)

    def set_trainable(self, sam: Sam) -> None:
        super().set_trainable(sam)
        # The projection always learns; the driver's check is of a model without it.
        if sam.prompt_encoder.text_projection is not None:
            sam.prompt_encoder.text_projection.requires_grad_(True)

    def make_loss(self, sam: Sam, dtype: torch.dtype, teacher: Sam | None) -> StepLoss:
        self._clip.model.to(sam.device)
        return TextLoss(sam, self.settings.train, dtype, self._clip)

    @torch.no_grad()
    def evaluate(self, sam: Sam, scenes: Iterable[Scene]) -> Evaluation:
        """Each mask prompted with what its box shows, and with what the box of the next mask of the image shows."""
        pairs: list[tuple[float, float]] = []
        others: list[float] = []
        for scene in scenes:
            if not len(scene.masks):
                continue
            squares = [square_around(scene.image, box_of(mask), 1.0) for mask in scene.masks]
            texts = embed(self._clip, torch.from_numpy(np.stack([self._clip.pixels.resized(s) for s in squares])))
            scored, oracle, other = _ious_by_text(sam, scene, texts.to(sam.device))
            pairs += zip(scored, oracle, strict=True)
            others += other
        if not pairs:
            return Evaluation(None)
        return Evaluation({**mean_ious(pairs), "miou_other": float(np.mean(others)) if others else None})

    def in_words(self, figures: dict[str, Any]) -> str:
        other = figures["miou_other"]
        compared = "" if other is None else f", {other:.3f} with another mask's embedding"
        return (
            f"mean IoU {figures['miou']:.3f} (highest score), {figures['miou_oracle']:.3f} (best of three),"
            f" {figures['num_regions']:,} masks, prompted with their embeddings{compared}"
        )

    def next_command(self, model: str, weights: str) -> str:
        checkpoint = shlex.quote(f"model.checkpoint={weights}")
        network = shlex.quote(f"labels.checkpoint={storage.redact(self.settings.text.checkpoint)}")
        return (
            f"samray label INPUT OUTPUT model.name={model} {checkpoint} labels.by=sam_text {network}"
            " labels.phrases=PHRASES.txt"
        )

    @cached_property
    def _network(self) -> Network:
        with _naming_own_settings():
            return find_network(self.settings.text.checkpoint, ("clip",), "text")


@contextlib.contextmanager
def _naming_own_settings() -> Iterator[None]:
    """`samray.labels.networks` names the settings of `samray label`; here they have other names."""
    try:
        yield
    except ConfigError as error:
        message = str(error).replace("labels.checkpoint", "text.checkpoint")
        raise ConfigError(message.replace("labels.by=text", _NAME)) from error


# --- what CLIP sees --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shown:
    """How a mask is shown to CLIP. Small and picklable."""

    config: TextConfig
    pixels: Pixels
    seed: int

    def squares(self, example: Arrays, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        """(N, size, size, 3): a random cut-out of each mask of an example."""
        image = example["image"]
        cut = [self._square(image, enlarged(target, len(image)), rng) for target in example["targets"]]
        return np.stack([self.pixels.resized(square) for square in cut])

    def _square(self, image: RGB, mask: Bool, rng: np.random.Generator) -> RGB:
        expand, blank = rng.uniform(*self.config.expand), rng.random() < self.config.blank_fraction
        shown = np.where(mask[..., None], image, np.uint8(0)) if blank else image
        return square_around(shown, box_of(mask), expand)


class ShownExamples:
    """Examples of one DATA, with `shown`, a random cut-out for CLIP of each mask. Picklable."""

    def __init__(self, examples: Examples, shown: Shown, index: int) -> None:
        self.examples, self.shown, self.index = examples, shown, index

    @property
    def num_images(self) -> int | None:
        return self.examples.num_images

    def example(self, draw: int, frame: Frame) -> Arrays:
        example = self.examples.example(draw, frame)
        rng = np.random.default_rng([self.shown.seed, self.index, draw, _STREAM])
        return {**example, "shown": self.shown.squares(example, rng)}

    def validation(self, limit: int, frame: Frame) -> Iterator[Scene]:
        return self.examples.validation(limit, frame)


_STREAM: Final = 1
"""Makes the random stream differ from that of the example itself."""


def enlarged(target: npt.NDArray[np.uint8], side: int) -> Bool:
    """(R, R) covered fractions times 255 -> (side, side) bool, not empty if any pixel is covered."""
    scaled = Image.fromarray(target).resize((side, side), Image.Resampling.BILINEAR)
    mask: Bool = np.asarray(scaled) > 127
    if not mask.any():  # thinner than a low-res pixel
        mask = np.asarray(scaled) > 0
    return mask


def box_of(mask: Bool) -> tuple[int, int, int, int]:
    """x, y, width, height of the smallest box around a mask that is not empty."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(xs[0]), int(ys[0]), int(xs[-1] - xs[0]) + 1, int(ys[-1] - ys[0]) + 1


def embed(clip: ClipNetwork, squares: Tensor) -> Tensor:
    """(N, size, size, 3) uint8 -> (N, D) float32 unit embeddings on the CPU."""
    embeddings = clip.embed_squares(clip.pixels.normalise(squares.cpu().numpy()))
    return embeddings.clone()  # a tensor of inference mode cannot be the input of what is trained


class TextLoss(InteractionLoss):
    """The loss of a step whose first prompts are CLIP's embeddings of what the masks show."""

    def __init__(self, sam: Sam, config: TrainConfig, dtype: torch.dtype, clip: ClipNetwork) -> None:
        super().__init__(sam, config, dtype)
        self._clip = clip  # not a submodule: not trained, saved or synchronized

    def forward(self, batch: Batch, step: int, stream: int) -> tuple[Tensor, dict[str, Tensor]]:
        shown = batch["shown"]  # (B, N, size, size, 3)
        texts = embed(self._clip, shown.flatten(0, 1)).to(shown.device).unflatten(0, shown.shape[:2])
        return super().forward({**batch, "text_embeddings": texts}, step, stream)


def _ious_by_text(sam: Sam, scene: Scene, texts: Tensor) -> tuple[list[float], list[float], list[float]]:
    """For each mask the IoU of the highest score and the best of three by its own embedding, and, of an image with
    several masks, that of the highest score by the next mask's. texts: (N, D)."""
    pixels, _ = sam.preprocess([scene.image])
    logits, scores = sam.predict(sam.encode_images(pixels), text_embeddings=texts)
    h, w = scene.image.shape[:2]
    masks = [sam.frame.masks_out(three, (h, w)) > 0 for three in logits]
    truth = torch.from_numpy(scene.masks).to(sam.device)
    ious = torch.stack([_ious(three, mask) for three, mask in zip(masks, truth, strict=True)])  # (N, 3)
    best = scores.argmax(dim=1, keepdim=True)
    num = len(truth)
    other = [float(_ious(masks[(i + 1) % num], truth[i])[best[(i + 1) % num, 0]]) for i in range(num if num > 1 else 0)]
    return ious.gather(1, best)[:, 0].tolist(), ious.max(dim=1).values.tolist(), other


def _ious(masks: Tensor, truth: Tensor) -> Tensor:
    """(M,) of masks (M, H, W) with one mask (H, W), bool."""
    union = (masks | truth).sum(dim=(1, 2)).clamp(min=1)
    return (masks & truth).sum(dim=(1, 2)) / union
