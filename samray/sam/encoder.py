"""The interface of image encoders, and how a model's encoder is built."""

from __future__ import annotations

import importlib
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from samray.sam.spec import ModelSpec


class Features(NamedTuple):
    """The outputs of an encoder for B images."""

    embedding: Tensor
    """(B, C, h, w)."""
    high_res: tuple[Tensor, Tensor] | None = None
    """(B, C / 8, 4h, 4w) and (B, C / 4, 2h, 2w), which the decoder adds as it upscales; None if it adds nothing."""
    early: Tensor | None = None
    """(B, D, h, w) from an early block, for a decoder with `hq_dim` D; otherwise None."""


class ImageEncoder(nn.Module):
    """(B, 3, S, S) normalised pixels -> `Features`. The names serve partial training and layer-wise decay."""

    stem: ClassVar[tuple[str, ...]] = ()
    """Starts of the names of parameters that come before the blocks."""

    def features(self, pixels: Tensor) -> Features:
        """The outputs for pixels (B, 3, S, S)."""
        raise NotImplementedError

    def block_names(self) -> list[tuple[str, ...]]:
        """The blocks from the image to the neck: each one's name as a submodule, then those of what belongs to it."""
        raise NotImplementedError

    def blocks_in_order(self) -> list[nn.Module]:
        """The blocks themselves."""
        return [self.get_submodule(names[0]) for names in self.block_names()]

    def forward(self, pixels: Tensor) -> Tensor:
        """The features as one tensor, see `packed`."""
        return packed(self.features(pixels))


def build_encoder(spec: ModelSpec) -> ImageEncoder:
    """The encoder of a model, by the function that its row names."""
    # Imported by name: a new encoder is a file and a row, and no code here lists them.
    module, _, function = spec.encoder.builder.partition(":")
    encoder: ImageEncoder = getattr(importlib.import_module(module), function)(spec)
    return encoder


def packed(features: Features) -> Tensor:
    """Features as one tensor (B, C + ..., h, w), which can be sliced by image: the high-res ones cell by cell.

    Channels: C of the embedding, then the C / 4 features of a cell's four quarters (y, x), then the C / 8 features of
    its sixteen sixteenths (y, x of the quarter, y, x within it): the order in which `MaskDecoder.upscale` makes them.
    Or, after the embedding, the D early ones.
    """
    if features.early is not None:
        return torch.cat([features.embedding, features.early], dim=1)
    if features.high_res is None:
        return features.embedding
    s0, s1 = features.high_res
    b, _, h, w = s1.shape
    halves = s1.view(b, -1, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)  # (B, y, x, C / 4, h, w)
    # (B, y, x, y, x, C / 8, h, w)
    quarters = s0.view(b, -1, h // 2, 2, 2, w // 2, 2, 2).permute(0, 3, 6, 4, 7, 1, 2, 5)
    cells = [part.reshape(b, -1, h // 2, w // 2) for part in (halves, quarters)]
    return torch.cat([features.embedding, *cells], dim=1)


def unpacked(tensor: Tensor, channels: int, early: int = 0) -> Features:
    """The inverse of `packed`. channels: C of the embedding; early: D of the early features, 0 if there are none."""
    if tensor.shape[1] == channels:
        return Features(tensor)
    if early:
        return Features(tensor[:, :channels], early=tensor[:, channels:])
    b, _, h, w = tensor.shape
    embedding, halves, quarters = tensor.split([channels, channels, 2 * channels], dim=1)
    # (B, y, x, C / 4, h, w) -> (B, C / 4, h, y, w, x)
    s1 = halves.reshape(b, 2, 2, -1, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, -1, 2 * h, 2 * w)
    # (B, y, x, y, x, C / 8, h, w) -> (B, C / 8, h, y, y, w, x, x)
    s0 = quarters.reshape(b, 2, 2, 2, 2, -1, h, w).permute(0, 5, 6, 1, 3, 7, 2, 4).reshape(b, -1, 4 * h, 4 * w)
    return Features(embedding, (s0, s1))
