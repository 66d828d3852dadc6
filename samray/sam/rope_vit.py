"""SAM 3's image encoder with the neck of its tracker: a plain ViT whose attention rotates queries and keys.

Source: SAM 3 (Carion et al., 2025); `sam3.model.vitdet` and `sam3.model.necks` (see `samray.sam.layouts` for names). As
in `samray.sam.pyramid`, the 1x1 convolutions of the two finest levels are one with the convolutions before them. The
fourth level of the published neck is not used by anything.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samray.sam.encoder import Features, ImageEncoder
from samray.sam.image_encoder import Mlp, merge_windows, partition_windows
from samray.sam.pyramid import composed
from samray.sam.spec import ModelSpec, RopeVitSpec
from samray.sam.tiny_vit import FineFeatures

_THETA = 10_000.0
_LEVELS = 3

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines (side * side, head_dim / 2) of each position's angles."""


@cache
def rotation(side: int, step: float, head_dim: int, device: torch.device) -> Rotation:
    """The rotation at each position of a grid, row by row, `step` apart: angles of x, then of y, in float32."""
    quarter = head_dim // 4
    # Kept for later calls: autograd cannot use what was made in inference mode.
    with torch.inference_mode(False):
        frequencies = _THETA ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
        steps = torch.arange(side, dtype=torch.float32) * step
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        angles = torch.cat([xy.flatten()[:, None] * frequencies for xy in (x, y)], dim=1)
        return angles.cos().to(device), angles.sin().to(device)


def rotated(x: Tensor, by: Rotation) -> Tensor:
    """x: (..., L, head_dim), neighbouring channels as pairs; in float32, returned in x's dtype."""
    cos, sin = by
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over an (H, W) grid."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, by: Rotation) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        b, h, w, dim = x.shape
        # Each (B, heads, H * W, head_dim).
        q, k, v = self.qkv(x).view(b, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(rotated(q, by), rotated(k, by), v)
        return self.proj(out.transpose(1, 2).reshape(b, h, w, dim))


class Block(nn.Module):
    """A transformer block; `window` 0 attends over the whole grid. step: between positions, in those of a window."""

    def __init__(self, spec: RopeVitSpec, window: int, grid: int) -> None:
        super().__init__()
        self.window, self.side = window, window or grid
        self.step = spec.window / self.side
        self.head_dim = spec.dim // spec.num_heads
        self.norm1 = nn.LayerNorm(spec.dim, eps=1e-5)
        self.attn = Attention(spec.dim, spec.num_heads)
        self.norm2 = nn.LayerNorm(spec.dim, eps=1e-5)
        self.mlp = Mlp(spec.dim, spec.mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        y, by = self.norm1(x), rotation(self.side, self.step, self.head_dim, x.device)
        if self.window:
            windows, padded_hw = partition_windows(y, self.window)
            y = merge_windows(self.attn(windows, by), padded_hw, (x.shape[1], x.shape[2]))
        else:
            y = self.attn(y, by)
        x = x + y
        return x + self.mlp(self.norm2(x))


class Level(nn.Module):
    """One level of the neck, at `4 >> number` times the grid's side: its last convolution is applied by the caller."""

    def __init__(self, dim: int, out_channels: int, number: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(2 - number):
            layers += [nn.GELU()] * (i > 0) + [nn.ConvTranspose2d(dim >> i, dim >> (i + 1), kernel_size=2, stride=2)]
        self.scale_layers = nn.Sequential(*layers)
        self.proj1 = nn.Conv2d(dim >> (2 - number), out_channels, kernel_size=1)
        self.proj2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, h, w) -> the input of proj2."""
        out: Tensor = self.proj1(self.scale_layers(x))
        return out


class RopeVitEncoder(ImageEncoder):
    """(B, 3, S, S) normalised pixels -> (B, C, S / patch, S / patch), and high-res features."""

    stem = ("patch_embed", "pos_embed", "ln_pre")

    def __init__(self, spec: RopeVitSpec, image_size: int, out_channels: int) -> None:
        super().__init__()
        self.grid, self.side = image_size // spec.patch, spec.positions
        self.patch_embed = nn.Conv2d(3, spec.dim, kernel_size=spec.patch, stride=spec.patch, bias=False)
        self.pos_embed = nn.Parameter(torch.zeros(1, spec.positions**2, spec.dim))
        self.ln_pre = nn.LayerNorm(spec.dim, eps=1e-5)
        self.blocks = nn.ModuleList(
            Block(spec, 0 if i in spec.global_blocks else spec.window, self.grid) for i in range(spec.depth)
        )
        self.neck = nn.ModuleList(Level(spec.dim, out_channels, number) for number in range(_LEVELS))
        self.fine = FineFeatures((out_channels, out_channels), out_channels)
        # What the tracker adds to an image without a past.
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, out_channels))

    def features(self, pixels: Tensor) -> Features:
        x = self.patch_embed(pixels).permute(0, 2, 3, 1)
        x = self.ln_pre(x + self.positions())
        for block in self.blocks:
            x = block(x)
        x = x.permute(0, 3, 1, 2)
        finest, middle, coarse = self.neck
        assert isinstance(coarse, Level)
        embedding = coarse.proj2(coarse(x)) + self.no_mem_embed.view(1, -1, 1, 1)
        s0 = composed(finest.get_submodule("proj2"), self.fine.conv_s0, finest(x))
        s1 = composed(middle.get_submodule("proj2"), self.fine.conv_s1, middle(x))
        return Features(embedding, (s0, s1))

    def positions(self) -> Tensor:
        """(1, H, W, dim): the learned grid, repeated and cut off."""
        times = -(-self.grid // self.side)
        grid = self.pos_embed.view(1, self.side, self.side, -1)
        return grid.tile(1, times, times, 1)[:, : self.grid, : self.grid]

    def block_names(self) -> list[tuple[str, ...]]:
        return [(f"blocks.{i}",) for i in range(len(self.blocks))]


def build_encoder(spec: ModelSpec) -> RopeVitEncoder:
    """The ViT of a model's row."""
    assert isinstance(spec.encoder, RopeVitSpec)
    return RopeVitEncoder(spec.encoder, spec.image_size, spec.embed_dim)
