"""The objective `mae`: pre-train a plain ViT on unlabelled images, by reconstruction of masked patches.

Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (2022), arXiv 2111.06377, from which SAM's
encoders start (SAM paper, section 3).
"""

from __future__ import annotations

import io
import itertools
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor

from samray.config.model_specs import VitSpec
from samray.config.models import MODELS
from samray.errors import ConfigError
from samray.sam import mae
from samray.sam.image_encoder import ImageEncoderViT
from samray.sam.sam import Sam
from samray.sam.spec import ModelSpec
from samray.scenes.scene import Scene
from samray.train.augment import RGB
from samray.train.images import open_images, to_png_rows
from samray.train.interaction import Batch, StepLoss, seed_of
from samray.train.mixture import Mixture
from samray.train.objectives import Evaluation, Objective, Panel
from samray.train.settings import MaeConfig, TrainSettings

PICTURE_FILE: Final = "reconstructions.png"
_NUM_PICTURED = 8
_PICTURE_SIDE = 256
_BATCH = 8

DECODER: Final = "mae_decoder"
"""Name of the decoder as a part of the model while it is trained."""


class Mae(Objective):
    """Pixels of masked patches, from unlabelled images."""

    panels = (
        Panel("error of masked patches", "train", ("reconstruction_loss",)),
        Panel("error on held-out images", "validation", ("reconstruction_loss",)),
        Panel("gradient norm", "train", ("grad_norm",), True),
        Panel("learning rate", "train", ("lr",)),
    )
    headline = (("reconstruction_loss", "error of masked patches, held-out images"),)
    columns = (("reconstruction_loss", "error of masked patches"), ("num_images", "images"))

    def adjusted(self) -> TrainSettings:
        """Random weights unless train.encoder_checkpoint is set, and one learning rate for all layers."""
        config = self.settings.train
        defaults = {"from_scratch": True, "layer_decay": 1.0}
        changes = {name: value for name, value in defaults.items() if name not in config.model_fields_set}
        return self.settings.model_copy(update={"train": config.model_copy(update=changes)})

    def check(self, spec: ModelSpec) -> None:
        config, name = self.settings.train, "train.objective=mae"
        if not isinstance(spec.encoder, VitSpec):
            plain = [row.name for row in MODELS.values() if isinstance(row.encoder, VitSpec)]
            raise ConfigError(
                f"{name} needs a model whose image encoder is a plain ViT, and {spec.name} is not one: set model.name"
                f" to one of {', '.join(plain)}"
            )
        if self.settings.model.checkpoint is not None or not config.from_scratch:
            raise ConfigError(
                f"{name} trains the image encoder alone, from random weights or from train.encoder_checkpoint: leave"
                " model.checkpoint at null, and train.from_scratch at true"
            )
        for key, is_set in (
            (f"train.trainable = {config.trainable!r}", config.trainable != "all"),
            (f"train.drop_path = {config.drop_path:g}", config.drop_path > 0),
            (f"train.distill_from = {config.distill_from!r}", config.distill_from is not None),
            (f"input.prompts = {self.settings.input.prompts!r}", self.settings.input.prompts is not None),
        ):
            if is_set:
                raise ConfigError(f"{key} is not allowed with {name}; leave it at its default")
        if mae.num_visible(spec.grid**2, self.settings.mae.mask_ratio) < 1:
            raise ConfigError(f"mae.mask_ratio leaves none of {spec.name}'s {spec.grid**2} patches visible; lower it")

    def open_data(self, data: Sequence[str]) -> Mixture:
        return open_images(data, self.settings)

    def extend(self, sam: Sam, identity: Mapping[str, Any]) -> None:
        spec, config = sam.spec, self.settings.mae
        assert isinstance(spec.encoder, VitSpec)
        decoder = mae.MaeDecoder(
            spec.encoder.dim, spec.grid, spec.encoder.patch, dim=config.decoder_dim, depth=config.decoder_depth,
            num_heads=config.decoder_heads,
        )  # fmt: skip
        sam.add_module(DECODER, decoder)
        mae.initialise_encoder(encoder_of(sam))

    def set_trainable(self, sam: Sam) -> None:
        for name, parameter in sam.named_parameters():
            parameter.requires_grad_(name.startswith(f"{DECODER}.") or (self.is_written(name) and name != _POSITIONS))

    def make_loss(self, sam: Sam, dtype: torch.dtype, teacher: Sam | None) -> StepLoss:
        return MaeLoss(sam, self.settings.mae, self.settings.train.seed, dtype)

    @torch.no_grad()
    def evaluate(self, sam: Sam, scenes: Iterable[Scene]) -> Evaluation:
        loss = MaeLoss(sam, self.settings.mae, 0, torch.float32)
        images = (scene.image for scene in scenes)
        errors: list[float] = []
        rows: list[list[RGB]] = []
        while batch := list(itertools.islice(images, _BATCH)):
            pixels = loss.pixels(torch.from_numpy(np.stack(batch)).to(sam.device))
            # Each image is masked by its number: the same in every validation, and in any batch.
            orders = [loss.draw_order(1, sam.device, "validation", len(errors) + i) for i in range(len(batch))]
            order = torch.cat(orders)
            predicted = loss.predict(pixels, order)
            errors += [
                float(loss.error(predicted[i : i + 1], pixels[i : i + 1], order[i : i + 1])) for i in range(len(batch))
            ]
            if len(rows) < _NUM_PICTURED:
                rows += loss.pictures(predicted, pixels, order)
        if not errors:
            return Evaluation(None)
        figures = {"reconstruction_loss": float(np.mean(errors)), "num_images": len(errors)}
        return Evaluation(figures, {PICTURE_FILE: _png(rows[:_NUM_PICTURED])})

    def is_written(self, name: str) -> bool:
        """The encoder as far as MAE trains it: without its neck and its relative positions."""
        return name.startswith("image_encoder.") and ".neck." not in name and ".rel_pos_" not in name

    def in_words(self, figures: dict[str, Any]) -> str:
        return f"error of masked patches {figures['reconstruction_loss']:.3f}, {figures['num_images']:,} images"

    def next_command(self, model: str, weights: str) -> str:
        start = shlex.quote(f"train.encoder_checkpoint={weights}")
        return f"samray train LABELS OUTPUT model.name={model} train.from_scratch=true {start}"


_POSITIONS: Final = "image_encoder.pos_embed"
"""Fixed during pre-training, as in the paper."""


def encoder_of(sam: Sam) -> ImageEncoderViT:
    """The plain ViT of a model."""
    return cast(ImageEncoderViT, sam.image_encoder)


class MaeLoss(StepLoss):
    """Squared error of the masked patches' normalised pixels. sam: extended by `Mae.extend`."""

    def __init__(self, sam: Sam, config: MaeConfig, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.sam, self.config, self.seed, self.dtype = sam, config, seed, dtype
        spec = sam.spec
        assert isinstance(spec.encoder, VitSpec)
        self.patch, self.num_patches = spec.encoder.patch, spec.grid**2
        self.visible = mae.num_visible(self.num_patches, config.mask_ratio)

    def forward(self, batch: Batch, step: int, stream: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with gradients, and metrics without. stream: this worker's number, for the masks."""
        pixels = self.pixels(batch["image"])
        order = self.draw_order(len(pixels), pixels.device, "mask", self.seed, step, stream)
        with torch.autocast(pixels.device.type, self.dtype, enabled=self.dtype != torch.float32):
            predicted = self.predict(pixels, order)
        # In float32, outside of autocast: the targets are normalised pixels.
        loss = self.error(predicted.float(), pixels, order)
        return loss, {"reconstruction_loss": loss.detach()}

    def pixels(self, images: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 -> (B, 3, S, S) normalised."""
        return (images.permute(0, 3, 1, 2).float() - self.sam.pixel_mean) / self.sam.pixel_std

    def draw_order(self, num_images: int, device: torch.device, purpose: str, *numbers: int) -> Tensor:
        """(B, L) random orders of patches, by these numbers."""
        generator = torch.Generator(device).manual_seed(seed_of(purpose, *numbers))
        return mae.draw_order(num_images, self.num_patches, generator)

    def predict(self, pixels: Tensor, order: Tensor) -> Tensor:
        """(B, L, P) predicted normalised patches."""
        encoded = mae.encode_visible(encoder_of(self.sam), pixels, order[:, : self.visible])
        predicted: Tensor = self.sam.get_submodule(DECODER)(encoded, order)
        return predicted

    def error(self, predicted: Tensor, pixels: Tensor, order: Tensor) -> Tensor:
        target = mae.normalised_patches(mae.patchify(pixels, self.patch))
        return mae.masked_error(predicted, target, order, self.visible)

    def pictures(self, predicted: Tensor, pixels: Tensor, order: Tensor) -> list[list[RGB]]:
        """For each image: original, visible patches, and these with the predicted ones.

        Predicted patches have mean 0 and variance 1; they get back those of the original, as in MAE's own pictures.
        """
        patches = mae.patchify(pixels, self.patch)
        mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
        is_visible = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
        is_visible.scatter_(1, order[:, : self.visible], True)
        filled = torch.where(is_visible[..., None], patches, predicted * (variance + 1e-6).sqrt() + mean)
        grey = torch.where(is_visible[..., None], patches, torch.zeros_like(patches))
        columns = [self._rgb(pixels), *(self._rgb(mae.unpatchify(part, self.patch)) for part in (grey, filled))]
        return [list(row) for row in zip(*columns, strict=True)]

    def _rgb(self, pixels: Tensor) -> list[RGB]:
        images = (pixels * self.sam.pixel_std + self.sam.pixel_mean).round().clamp(0, 255).to(torch.uint8)
        return list(images.permute(0, 2, 3, 1).cpu().numpy())


def _png(rows: Sequence[Sequence[RGB]]) -> bytes:
    """Rows of original, masked and reconstructed image, each at most _PICTURE_SIDE wide."""
    sheet = to_png_rows(rows)
    side = rows[0][0].shape[1]
    if side > _PICTURE_SIDE:
        scale = _PICTURE_SIDE / side
        sheet = sheet.resize((round(sheet.width * scale), round(sheet.height * scale)))
    png = io.BytesIO()
    sheet.save(png, format="PNG")
    return png.getvalue()
