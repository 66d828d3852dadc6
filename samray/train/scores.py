"""Train only the IoU prediction: the head learns, on many prompts at once, the actual IoUs of the masks.

Everything before the head is frozen, so its input for a prompt never changes, and a step can reuse prompts of earlier
steps: a prompt costs an image encoding and a decoder pass the first time, and almost nothing later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samray.sam.sam import Sam
from samray.train.interaction import Batch, Rounds, StepLoss, draw_course, normalise, seed_of
from samray.train.losses import ranking_loss
from samray.train.settings import TrainConfig

MEMORY_PROMPTS = 65_536
"""Maximum stored prompts; the oldest are dropped first. At 256 channels they take 70 MB."""
SAMPLE_PROMPTS = 4_096
"""Stored prompts per step, sampled at random."""
RANKING_WEIGHT = 1.0


class ScoreLoss(StepLoss):
    """Squared error of the predicted IoUs, as in `sam_loss`, plus `ranking_loss` of the masks of ambiguous prompts.

    Over prompts of this and of earlier steps.
    """

    def __init__(self, sam: Sam, config: TrainConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.sam, self.config, self.dtype = sam, config, dtype
        # memory: tokens (M, C) that the head reads, and ious (M, 4) of the masks, float32, oldest first.

    def forward(self, batch: Batch, step: int, stream: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with gradients, and metrics of the step's own prompts without. stream: as in `InteractionLoss`."""
        generator = torch.Generator(batch["image"].device).manual_seed(
            seed_of("clicks", self.config.seed, step, stream)
        )
        rounds = self._remember(batch, step, generator)
        total = len(self.memory["ious"])
        pick = torch.randint(total, (min(total, SAMPLE_PROMPTS),), generator=generator, device=generator.device)
        predicted = self.sam.mask_decoder.predicted_iou(self.memory["tokens"][pick])
        ious = self.memory["ious"][pick]
        error = (predicted - ious).square().sum(dim=1).mean()
        loss = error + RANKING_WEIGHT * ranking_loss(predicted[:, 1:], ious[:, 1:]).mean()
        first = rounds.first
        assert first is not None
        figures = {"score_loss": error.detach(), "iou_scored": first.iou_scored, "iou_oracle": first.iou_oracle}
        return loss, figures

    @torch.no_grad()
    def _remember(self, batch: Batch, step: int, generator: torch.Generator) -> Rounds:
        """Decode the batch's prompts round by round, and store the head's inputs and the masks' IoUs."""
        tokens: list[Tensor] = []
        ious: list[Tensor] = []
        head = self.sam.mask_decoder.iou_prediction_head
        # A hook sees the head's inputs without a change of the decoder.
        hook = head.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0].float()))
        try:
            with torch.autocast(batch["image"].device.type, self.dtype, enabled=self.dtype != torch.float32):
                embeddings = self.sam.encode_images(normalise(self.sam, batch["image"], batch["input_hw"]))
                rounds = Rounds(self.sam, self.config, draw_course(self.config, step), batch, generator)
                # One entry per round, as the hook adds one to `tokens`.
                ious.extend(rounds.iou for _ in rounds.run(embeddings))
        finally:
            hook.remove()
        new = {"tokens": torch.cat(tokens), "ious": torch.cat(ious)}
        memory = self.memory
        self.memory = {
            name: (torch.cat([memory[name], value]) if memory else value)[-MEMORY_PROMPTS:]
            for name, value in new.items()
        }
        return rounds
