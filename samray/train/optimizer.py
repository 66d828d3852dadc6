"""Which weights learn, and how fast: parameter groups, schedule, drop path, running average."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from samray.errors import ConfigError
from samray.sam.sam import Sam
from samray.train.lora import is_adapter
from samray.train.settings import LAST_BLOCKS, LORA, SCORES, TrainConfig

ENCODER = "image_encoder."

# --- layers ----------------------------------------------------------------------------------------------------------


def layer_of(sam: Sam) -> dict[str, int]:
    """Each parameter's and buffer's layer: 0 before the encoder's blocks, i + 1 for block i, the last for all after."""
    encoder = sam.image_encoder
    blocks = encoder.block_names()
    prefixes = [(f"{ENCODER}{name}.", i + 1) for i, names in enumerate(blocks) for name in names]
    stem = tuple(f"{ENCODER}{name}" for name in encoder.stem)
    layers = {}
    for name, _ in [*sam.named_parameters(), *sam.named_buffers()]:
        layer = next((layer for prefix, layer in prefixes if name.startswith(prefix)), None)
        # What belongs to no block comes before all of them (the stem) or after all (neck, prompt encoder, decoder).
        if layer is None:
            layer = 0 if name.startswith(stem) else len(blocks) + 1
        layers[name] = layer
    return layers


def set_trainable(sam: Sam, trainable: str, *, distilling: bool = False) -> None:
    """Let only the weights learn that `train.trainable` names; all others keep every number, statistics included.

    Raises: ConfigError where the encoder has fewer blocks than asked for.
    """
    blocks = len(sam.image_encoder.block_names())
    # blocks + 2 is beyond the encoder's last layer: nothing of it learns.
    first = 0 if trainable == "all" else blocks + 2
    if trainable.startswith(LAST_BLOCKS):
        number = int(trainable.removeprefix(LAST_BLOCKS))
        if number > blocks:
            raise ConfigError(f"train.trainable = {trainable!r}: the image encoder has only {blocks} blocks")
        first = blocks - number + 1
    layers = layer_of(sam)
    for name, parameter in sam.named_parameters():
        if trainable == LORA:
            learns = is_adapter(name)
        elif name.startswith(ENCODER):
            learns = layers[name] >= first
        elif name.startswith("prompt_encoder."):
            learns = trainable not in ("decoder", SCORES) and not distilling
        elif trainable == SCORES:
            learns = name.startswith("mask_decoder.iou_prediction_head.")
        else:
            learns = not distilling
        parameter.requires_grad_(learns)


def train_mode(sam: Sam) -> None:
    """Training mode for what learns; batch norms that do not learn go on with the statistics that they have."""
    sam.train()
    for module in sam.modules():
        parameters = list(module.parameters(recurse=False))
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.training = False  # not eval(), which would reach children that do learn


# --- optimizer -------------------------------------------------------------------------------------------------------


def make_optimizer(sam: Sam, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what learns, without decay on biases, norms and single embeddings, layer by layer.

    Each group's `lr_scale` multiplies its learning rate. Source: SAM paper, appendix A, except for the
    second beta, there 0.999: runs here are of thousands of steps, not of 90,000.
    """
    layers = layer_of(sam)
    last = len(sam.image_encoder.block_names()) + 1
    groups: dict[tuple[int, bool], list[Tensor]] = {}
    for name, parameter in sam.named_parameters():
        if parameter.requires_grad:
            layer = layers[name] if config.layer_decay < 1 else last
            # Only matrices decay; a single embedding is a matrix of one row.
            decays = parameter.ndim >= 2 and min(parameter.shape[:2]) > 1
            groups.setdefault((layer, decays), []).append(parameter)
    made: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr_scale": config.layer_decay ** (last - layer),
        }
        for (layer, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    return torch.optim.AdamW(made, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """The rate of step number `step`, before each group's scale. progress: used fraction of the budget, 0 to 1."""
    rate = config.learning_rate * min(1.0, (step + 1) / config.warmup_steps)
    if config.schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "step":
        return rate * config.decay_factor ** sum(progress >= start for start in config.decay_at)
    return rate


# --- drop path -------------------------------------------------------------------------------------------------------


def add_drop_path(sam: Sam, rate: float) -> None:
    """Leave residual branches of encoder blocks out of random images in training, scaling up those that stay.

    rate: of the last block; it grows evenly from 0 before the first. By hooks, so that the model's own code and its
    parameter names stay what checkpoints know. Source: Huang et al., "Deep Networks with Stochastic Depth" (2016).
    """
    if rate == 0:
        return
    blocks = sam.image_encoder.blocks_in_order()
    for i, block in enumerate(blocks):
        block_rate = rate * (i + 1) / len(blocks)
        # What a block adds to its input: in a ViT or TinyViT, an MBConv, a RepViT.
        for name in ("attn", "mlp", "conv3", "channel_mixer"):
            branch = getattr(block, name, None)
            if isinstance(branch, nn.Module):
                branch.register_forward_hook(_Drop(block_rate, sam))


class _Drop:
    """A forward hook that drops a branch's output, image by image."""

    def __init__(self, rate: float, sam: Sam) -> None:
        self.rate = rate
        self.num_images = 1
        sam.image_encoder.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.num_images = len(inputs[0])

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        # Divided by the chance to stay, which keeps the expected value.
        keep = (torch.rand(self.num_images, device=output.device) >= self.rate).to(output.dtype) / (1 - self.rate)
        # A windowed attention's first axis is images times windows.
        return output * keep.repeat_interleave(len(output) // self.num_images).view(-1, *[1] * (output.ndim - 1))


# --- running average -------------------------------------------------------------------------------------------------


@torch.no_grad()
def update_average(average: Sam, current: Sam, decay: float, step: int) -> None:
    """Move the running average towards the current weights; in the first steps faster, as it began with nothing.

    step: how many steps were done, this one included.
    """
    decay = min(decay, (1 + step) / (10 + step))
    learning = {name for name, parameter in current.named_parameters() if parameter.requires_grad}
    for (name, mean), (_, new) in zip(_tensors(average), _tensors(current), strict=True):
        if not mean.is_floating_point():
            # Counters, such as the number of batches of a batch norm.
            mean.copy_(new)
        elif name in learning or not isinstance(new, nn.Parameter):
            # Frozen weights stay exactly as they were loaded.
            mean.lerp_(new, 1 - decay)


def _tensors(sam: Sam) -> Iterator[tuple[str, Tensor]]:
    yield from sam.named_parameters()
    yield from sam.named_buffers()
