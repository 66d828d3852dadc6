"""The objective `masks`: promptable segmentation, as SAM is trained."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch

from samray import storage
from samray.evaluate.scenes import evaluate_clicks
from samray.sam.sam import Sam
from samray.scenes.scene import Scene
from samray.train.data import open_masks, output_of
from samray.train.interaction import DistillationLoss, InteractionLoss, StepLoss
from samray.train.mixture import Mixture
from samray.train.objectives import Evaluation, Objective, Panel
from samray.train.optimizer import set_trainable
from samray.train.scores import ScoreLoss
from samray.train.settings import LORA, SCORES


class Masks(Objective):
    """Masks, their predicted IoU, or a teacher's embeddings, from labelled images."""

    panels = (
        Panel("loss", "train", ("mask_loss", "score_loss", "distill_loss"), True),
        Panel("IoU in training", "train", ("iou_scored", "iou_oracle", "iou_last")),
        Panel("IoU of held-out masks, one click", "validation", ("miou", "miou_oracle")),
        Panel("learning rate", "train", ("lr",)),
    )
    headline: ClassVar[tuple[tuple[str, str], ...]] = (
        ("miou", "mean IoU, one click, mask with the highest score"),
        ("miou_oracle", "mean IoU, one click, best of three"),
    )
    columns: ClassVar[tuple[tuple[str, str], ...]] = (
        ("miou", "highest score"),
        ("miou_oracle", "best of three"),
        ("num_regions", "masks"),
    )

    def location(self, uri: str) -> str:
        return output_of(uri)

    def open_data(self, data: Sequence[str]) -> Mixture:
        return open_masks(data, self.settings)

    def set_trainable(self, sam: Sam) -> None:
        config = self.settings.train
        set_trainable(sam, config.trainable, distilling=config.distill_from is not None)

    def make_loss(self, sam: Sam, dtype: torch.dtype, teacher: Sam | None) -> StepLoss:
        config = self.settings.train
        if teacher is not None:
            return DistillationLoss(sam, teacher, dtype)
        return (ScoreLoss if config.trainable == SCORES else InteractionLoss)(sam, config, dtype)

    def evaluate(self, sam: Sam, scenes: Iterable[Scene]) -> Evaluation:
        figures = evaluate_clicks(sam, scenes)
        return Evaluation(figures if figures["num_regions"] else None)

    def in_words(self, figures: dict[str, Any]) -> str:
        best = f"mean IoU {figures['miou']:.3f} (highest score), {figures['miou_oracle']:.3f} (best of three)"
        return f"{best}, {figures['num_regions']:,} masks, one click each"

    def next_command(self, model: str, weights: str) -> str:
        setting = f"model.checkpoint={weights}"
        if self.settings.train.trainable == LORA:
            base = self.settings.model.checkpoint
            setting = f"model.adapter={weights}"
            model += "" if base is None else " " + shlex.quote(f"model.checkpoint={storage.redact(base)}")
        return f"samray label INPUT OUTPUT model.name={model} {shlex.quote(setting)}"
