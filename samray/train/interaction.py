"""Simulated interaction: rounds of prompts on an image, each with a loss.

First a click or box; then clicks sampled where the last mask is wrong, which is also passed back as a mask prompt. Two
of the rounds add no click, which teaches the model to refine its mask without new input.
Source: SAM paper, section 3, "Efficiency and training", and appendix A, "Training algorithm".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from samray.sam.sam import Sam
from samray.train.clicks import corrective_clicks
from samray.train.losses import Losses, sam_loss
from samray.train.settings import TrainConfig

Batch = dict[str, Tensor]
"""A batch of examples (`samray.train.examples.Arrays`), each array with first axis B; with train.objective=text also
`text_embeddings` (B, N, D), which are the first prompts."""


@dataclass(frozen=True, slots=True)
class Course:
    """How one step prompts: sampled from its number, the same for all its images and workers."""

    use_boxes: bool
    adds_click: tuple[bool, ...]
    """For each round after the first."""


def seed_of(purpose: str, *numbers: int) -> int:
    """The seed of a torch random stream, hashed to 32 bits, because torch's CPU generator accepts no more."""
    return int(np.random.SeedSequence([*purpose.encode(), *numbers]).generate_state(1, np.uint32)[0])


def draw_course(config: TrainConfig, step: int) -> Course:
    """Sample the kind of prompts for step number `step`.

    With 3 or more `interaction_steps` the last round adds no click; with 4 or more, neither does a random one before
    it.
    """
    # From the step alone: all workers, and a resumed run, draw the same.
    generator = torch.Generator().manual_seed(seed_of("course", config.seed, step))
    kind, refine, between = (float(x) for x in torch.rand(3, generator=generator))
    num_later = config.interaction_steps - 1 if refine < config.refine_fraction else 0
    adds_click = [True] * num_later
    if num_later >= 2:
        adds_click[-1] = False
    if num_later >= 3:
        adds_click[int(between * (num_later - 1))] = False
    return Course(kind < config.box_fraction, tuple(adds_click))


class Rounds:
    """The rounds on a batch, one after the other.

    sam: in training mode. batch: on its device. generator: for the clicks, on that device.
    """

    def __init__(self, sam: Sam, config: TrainConfig, course: Course, batch: Batch, generator: torch.Generator) -> None:
        self.sam, self.config, self.course, self.generator = sam, config, course, generator
        # (B, N, R, R) -> (B * N, R, R), in 0..1.
        self.targets = (batch["targets"].float() / 255).flatten(0, 1)
        points = batch["points"]
        self.num_images, self.num_prompts = points.shape[:2]
        # (B,) -> (B * N,): labels may be wrong, scenes are exact.
        doubt = config.doubt * batch["from_labels"].float()
        self.doubt = doubt[:, None].expand(-1, self.num_prompts).flatten() if config.doubt > 0 else None
        self.boxes = batch["boxes_xyxy"] if course.use_boxes else None
        self.texts = batch.get("text_embeddings")
        # (B, N, 1, 2), or (B, N, 0, 2) if the first prompt is a box or a text.
        has_click = self.boxes is None and self.texts is None
        clicks = points[:, :, None] if has_click else points[:, :, None][:, :, :0]
        self.clicks = clicks  # (B, N, P, 2)
        self.labels = torch.ones(clicks.shape[:3], dtype=torch.long, device=points.device)
        self.first: Losses | None = None
        self.last_iou: Tensor | None = None
        self.iou = torch.zeros(0, 4, device=points.device)
        """(B * N, 4) actual IoUs of the last round's masks."""

    def run(self, embeddings: Tensor) -> Iterator[Tensor]:
        """Yield each round's loss, a scalar with gradients. embeddings: (B, C, h, w); the caller handles their
        gradients."""
        # A box is not ambiguous, so the single mask counts fully.
        weight = 1.0 if self.course.use_boxes else self.config.single_weight
        losses, answer = self._round(embeddings, None, weight, 1.0, multimask=True)
        self.first, self.last_iou = losses, losses.iou_scored
        yield losses.total
        stride = self.sam.image_size / self.targets.shape[-1]
        for adds_click in self.course.adds_click:
            if adds_click:
                points, labels = corrective_clicks(answer.float(), self.targets, stride, self.generator)
                grid = (self.num_images, self.num_prompts, 1)
                self.clicks = torch.cat([self.clicks, points.view(*grid, 2)], dim=2)
                self.labels = torch.cat([self.labels, labels.view(grid)], dim=2)
            losses, answer = self._round(
                embeddings, answer[:, None], 1.0, self.config.later_multi_weight, multimask=False
            )
            self.last_iou = losses.iou_single
            yield losses.total

    def _round(
        self, embeddings: Tensor, mask_input: Tensor | None, single: float, multi: float, *, multimask: bool
    ) -> tuple[Losses, Tensor]:
        """One round's losses, and the mask passed to the next round: (B * N, R, R) logits without gradients."""
        logits, iou = self.sam.decode_batch(embeddings, self._tokens(), mask_input)
        logits, iou = logits.flatten(0, 1), iou.flatten(0, 1)
        losses = sam_loss(
            logits,
            iou,
            self.targets,
            single_weight=single,
            multi_weight=multi,
            ranking_weight=self.config.ranking_weight if multimask else 0.0,
            doubt=self.doubt,
        )
        self.iou = losses.iou
        # After an ambiguous prompt the mask with the best score is refined, later the single mask.
        best = iou[:, 1:].argmax(dim=1) + 1 if multimask else torch.zeros(len(iou), dtype=torch.long, device=iou.device)
        return losses, logits.detach()[torch.arange(len(best), device=best.device), best]

    def _tokens(self) -> Tensor:
        """(B, N, tokens, C) for all prompts so far."""
        encoder = self.sam.prompt_encoder
        if self.texts is not None:
            first = encoder.encode_texts(self.texts)
        elif self.boxes is not None:
            first = encoder.encode_boxes(self.boxes)
        else:
            return encoder.encode_points(self.clicks, self.labels)
        if self.clicks.shape[2] == 0:
            return first
        # As in SAM, only prompts of points alone get a padding point.
        return torch.cat([encoder.encode_points(self.clicks, self.labels, pad=False), first], dim=2)


class StepLoss(nn.Module):
    """The loss of a step: called with a batch, the step's number and the worker's, it returns the loss with gradients
    and metrics without."""

    def __init__(self) -> None:
        super().__init__()
        self.idle: list[nn.Parameter] = []
        """Parameters without a part in the last step, for example box corners in a step with clicks. Data parallel
        training gives them zero gradients, and an optimizer would still change them by momentum and decay."""
        self.memory: dict[str, Tensor] = {}
        """State that a resumed run needs in addition to the model."""


class InteractionLoss(StepLoss):
    """A whole training step's loss as one forward pass, as data parallel training requires."""

    def __init__(self, sam: Sam, config: TrainConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.sam, self.config, self.dtype = sam, config, dtype

    def forward(self, batch: Batch, step: int, stream: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with gradients, and metrics without.

        stream: index of the random stream for the clicks, one per worker.
        """
        sam, device = self.sam, batch["image"].device
        generator = torch.Generator(device).manual_seed(seed_of("clicks", self.config.seed, step, stream))
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            pixels = normalise(sam, batch["image"], batch["input_hw"])
            # A frozen encoder stores nothing for a backward pass.
            learns = any(p.requires_grad for p in sam.image_encoder.parameters())
            with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                embeddings = sam.encode_images(pixels)
            rounds = Rounds(sam, self.config, draw_course(self.config, step), batch, generator)
            others = [p for m in (sam.prompt_encoder, sam.mask_decoder) for p in m.parameters() if p.requires_grad]
            self.idle = list(others)
            total: Tensor = _RoundByRound.apply(rounds.run, self.idle, embeddings, *others)  # type: ignore[no-untyped-call]
        first = rounds.first
        assert first is not None
        assert rounds.last_iou is not None
        figures = {
            "mask_loss": first.mask,
            "score_loss": first.score,
            "iou_scored": first.iou_scored,
            "iou_oracle": first.iou_oracle,
            "iou_last": rounds.last_iou,
        }
        return total, figures


class DistillationLoss(StepLoss):
    """Mean squared error between the image embeddings of a model and of its teacher.

    Source: MobileSAM (Zhang et al., 2023), section 4, decoupled distillation.
    """

    def __init__(self, sam: Sam, teacher: Sam, dtype: torch.dtype) -> None:
        super().__init__()
        self.sam, self.dtype = sam, dtype
        self._teacher = [teacher]  # in a list, not a submodule: not trained, saved or synchronized

    def forward(self, batch: Batch, step: int, stream: int) -> tuple[Tensor, dict[str, Tensor]]:
        sam, teacher, device = self.sam, self._teacher[0], batch["image"].device
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            pixels = normalise(sam, batch["image"], batch["input_hw"])
            with torch.no_grad():
                wanted = teacher.encode_images(pixels).float()
            loss = (sam.encode_images(pixels).float() - wanted).square().mean()
        return loss, {"distill_loss": loss.detach()}


def normalise(sam: Sam, images: Tensor, input_hw: Tensor) -> Tensor:
    """(B, S, S, 3) uint8 and (B, 2) -> (B, 3, S, S), zero padded, as from `Sam.preprocess`."""
    pixels = (images.permute(0, 3, 1, 2).float() - sam.pixel_mean) / sam.pixel_std
    position = torch.arange(images.shape[1], device=images.device)
    # (B, S, S): True inside the image, False in the padding.
    inside = (position[:, None] < input_hw[:, :1, None]) & (position < input_hw[:, 1:, None])
    return pixels * inside[:, None]


class _RoundByRound(torch.autograd.Function):
    """The sum of losses that share embeddings and parameters; each loss's gradients are computed at once.

    Losses depend on earlier ones only through clicks and masks, which have no gradients. Memory is therefore that of
    one round, not eleven, while hooks on gradients (data parallel training) see one backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor], Iterator[Tensor]],
        idle: list[nn.Parameter],
        embeddings: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        """idle: updated to the parameters that no loss depends on."""
        # A leaf of its own: each round's gradients are taken at once, and no graph spans several rounds.
        leaf = embeddings.detach().requires_grad_(embeddings.requires_grad)
        inputs = [leaf, *parameters]
        wanted = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
        sums: list[Tensor | None] = [None] * len(inputs)
        total = torch.zeros((), device=embeddings.device)
        with torch.enable_grad():
            for loss in run(leaf):
                total += loss.detach()
                if not wanted:
                    continue
                # allow_unused: a round without a box has no gradient for the box corners.
                gradients = torch.autograd.grad(loss, [inputs[i] for i in wanted], allow_unused=True)
                for i, gradient in zip(wanted, gradients, strict=True):
                    gradient_sum = sums[i]
                    sums[i] = gradient if gradient_sum is None or gradient is None else gradient_sum.add_(gradient)
                    if gradient is None:
                        sums[i] = gradient_sum
        ctx.sums = sums
        idle[:] = [p for p, gradient_sum in zip(parameters, sums[1:], strict=True) if gradient_sum is None]  # type: ignore[misc]
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # All gradients exist already; only their scale comes from the caller.
        return (None, None, *(None if gradient_sum is None else gradient_sum * gradient for gradient_sum in ctx.sums))
