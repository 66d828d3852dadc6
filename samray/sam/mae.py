"""Masked autoencoder on a plain ViT: the encoder sees the visible patches alone, a light decoder fills in the others.

Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (2022), section 3 and appendix A.1. Each block
attends over all visible patches; windows and relative positions are added afterwards, when SAM is trained, as in
ViTDet. Shape letters: B images, L patches, V visible patches, D channels, P = patch x patch x 3 pixel values.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samray.sam.image_encoder import Attention, ImageEncoderViT


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """(B, 3, S, S) -> (B, L, P), patches row by row, values in the order row, column, channel."""
    b, c, s, _ = pixels.shape
    grid = s // patch
    cells = pixels.reshape(b, c, grid, patch, grid, patch)  # c, row of patches, y, column of patches, x
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(b, grid * grid, patch * patch * c)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`."""
    b, num, _ = patches.shape
    grid = math.isqrt(num)
    cells = patches.reshape(b, grid, grid, patch, patch, 3)  # rows, columns, y, x, c
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(b, 3, grid * patch, grid * patch)


def draw_order(num_images: int, num_patches: int, generator: torch.Generator) -> Tensor:
    """(B, L) int64: the patches of each image in a random order; the first V of them are visible."""
    return torch.rand(num_images, num_patches, generator=generator, device=generator.device).argsort(dim=1)


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """V, rounded down as in the reference."""
    return int(num_patches * (1 - mask_ratio))


def normalised_patches(patches: Tensor) -> Tensor:
    """Each patch (..., P) with mean 0 and variance 1 over its values. Source: MAE, section 4.1, "norm_pix_loss"."""
    # The unbiased variance, as in MAE's code.
    mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def masked_error(predicted: Tensor, target: Tensor, order: Tensor, visible: int) -> Tensor:
    """Mean squared error over the masked patches, a scalar. predicted, target: (B, L, P); order: (B, L)."""
    error = (predicted - target).square().mean(dim=-1)
    # Every image has as many masked patches, so the mean over all is the mean of the images' means.
    return error.gather(1, order[:, visible:]).mean()


def sine_positions(grid: int, dim: int) -> Tensor:
    """(grid, grid, dim): fixed 2D sine and cosine positions. The first half encodes the column, as in MAE's code."""
    # In float64, as in MAE's code; a quarter of the channels each: sine and cosine of column and row.
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim / 2)
    columns, rows = line[None].expand(grid, -1, -1), line[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=2).float()


def encode_visible(encoder: ImageEncoderViT, pixels: Tensor, visible: Tensor) -> Tensor:
    """The encoder's blocks on visible patches alone. visible: (B, V) indices. Returns (B, V, D), before any norm.

    With all patches visible this is the encoder itself, up to its neck, if its blocks are global and its relative
    positions are zero, with which SAM's training begins.
    """
    # Positions first: a visible patch keeps its own after the others are gone.
    x = (encoder.patch_embed(pixels) + encoder.pos_embed).flatten(1, 2)
    x = x.gather(1, visible[..., None].expand(-1, -1, x.shape[2]))  # (B, V, D)
    for block in encoder.blocks:
        x = x + _attend(block.attn, block.norm1(x))  # type: ignore[arg-type, operator]
        # The MLP takes a grid: here one row of V cells.
        x = x + block.mlp(block.norm2(x)[:, None])[:, 0]  # type: ignore[operator]
    return x


def _attend(attention: Attention, x: Tensor) -> Tensor:
    """(B, V, D) -> the same shape: attention over all tokens, without relative positions."""
    b, n, dim = x.shape
    q, k, v = attention.qkv(x).view(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    read = F.scaled_dot_product_attention(q, k, v)
    return attention.proj(read.transpose(1, 2).reshape(b, n, dim))


class MaeDecoder(nn.Module):
    """(B, V, D) encoded visible patches -> (B, L, P) predicted patches."""

    positions: Tensor

    def __init__(self, in_dim: int, grid: int, patch: int, *, dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim, eps=1e-6)
        """The norm that ends a ViT; SAM's encoder has its neck instead."""
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.register_buffer("positions", sine_positions(grid, dim).view(1, grid * grid, dim), persistent=False)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, num_heads, 4 * dim, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.last_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, patch * patch * 3)
        initialise(self)

    def forward(self, encoded: Tensor, order: Tensor) -> Tensor:
        """order: (B, L), the visible patches first."""
        x = self.embed(self.norm(encoded))
        # Append a mask token for each hidden patch, then put all L back in the order of the image.
        hidden = self.mask_token.to(x.dtype).expand(len(x), order.shape[1] - x.shape[1], -1)
        x = torch.cat([x, hidden], dim=1)
        # argsort of a permutation is its inverse: (B, L, 1) to (B, L, D).
        inverse = order.argsort(dim=1)[..., None].expand(-1, -1, x.shape[2])
        x = x.gather(1, inverse) + self.positions
        for block in self.blocks:
            x = block(x)
        predicted: Tensor = self.predict(self.last_norm(x))
        return predicted


def initialise(module: nn.Module) -> None:
    """Xavier-uniform matrices and zero biases, as MAE starts its encoder and decoder."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def initialise_encoder(encoder: ImageEncoderViT) -> None:
    """A new encoder as MAE starts it: fixed sine positions, Xavier-uniform matrices, also of the patch embedding."""
    initialise(encoder)
    # A convolution over whole patches is a matrix (D, 3 * patch * patch); MAE initialises it as such.
    projection = encoder.patch_embed.proj
    nn.init.xavier_uniform_(projection.weight.data.view(projection.weight.shape[0], -1))
    grid, dim = encoder.pos_embed.shape[1], encoder.pos_embed.shape[3]
    encoder.pos_embed.data.copy_(sine_positions(grid, dim)[None])
