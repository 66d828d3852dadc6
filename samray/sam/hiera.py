"""SAM 2's image encoder: Hiera with a feature pyramid.

Source: SAM 2 (Ravi et al., 2024); `sam2.modeling.backbones.hieradet` (parameter names as there, see
`samray.sam.layouts`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samray.sam.encoder import Features
from samray.sam.image_encoder import merge_windows, partition_windows
from samray.sam.pyramid import PyramidEncoder
from samray.sam.spec import HieraSpec, ModelSpec


class PatchEmbed(nn.Module):
    """Overlapping 7x7 patches, four pixels apart: (B, 3, S, S) -> (B, S / 4, S / 4, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=7, stride=4, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out.permute(0, 2, 3, 1)


def halved(x: Tensor) -> Tensor:
    """Largest value of each 2x2 cells: (B, H, W, C) -> (B, H / 2, W / 2, C)."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), kernel_size=2).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Multi-head attention over an (H, W) grid; `pools` halves the grid of the queries."""

    def __init__(self, dim: int, dim_out: int, num_heads: int, pools: bool) -> None:
        super().__init__()
        self.num_heads, self.pools = num_heads, pools
        self.qkv = nn.Linear(dim, dim_out * 3)
        self.proj = nn.Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim_out), or half of H and W."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.pools:
            q = halved(q)
        h, w = q.shape[1:3]
        heads = (y.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(*heads)  # (B, heads, h * w, head_dim)
        return self.proj(out.transpose(1, 2).flatten(2).unflatten(1, (h, w)))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim * 4), nn.Linear(dim * 4, dim)])

    def forward(self, x: Tensor) -> Tensor:
        expand, project = self.layers
        return project(F.gelu(expand(x)))


class Block(nn.Module):
    """A transformer block; `window` 0 attends over the whole grid. The first block of a stage halves the grid."""

    def __init__(self, dim: int, dim_out: int, num_heads: int, window: int, pools: bool) -> None:
        super().__init__()
        self.window, self.pools = window, pools
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, dim_out, num_heads, pools)
        self.norm2 = nn.LayerNorm(dim_out, eps=1e-6)
        self.mlp = Mlp(dim_out)
        if dim != dim_out:
            self.proj = nn.Linear(dim, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim_out), or half of H and W."""
        y = self.norm1(x)
        if hasattr(self, "proj"):
            x = self.proj(y)
        if self.pools:
            x = halved(x)
        if self.window:
            windows, padded_hw = partition_windows(y, self.window)
            shrink = 2 if self.pools else 1
            padded = (padded_hw[0] // shrink, padded_hw[1] // shrink)
            y = merge_windows(self.attn(windows), padded, (x.shape[1], x.shape[2]))
        else:
            y = self.attn(y)
        x = x + y
        return x + self.mlp(self.norm2(x))


class HieraEncoder(PyramidEncoder):
    """(B, 3, S, S) normalised pixels -> (B, C, S / 16, S / 16), and high-res features."""

    stem = ("patch_embed", "pos_embed")

    def __init__(self, spec: HieraSpec, out_channels: int) -> None:
        super().__init__()
        dims = [spec.dim * 2**stage for stage in range(len(spec.depths))]
        self.depths = spec.depths
        self.patch_embed = PatchEmbed(spec.dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, spec.dim, spec.positions, spec.positions))
        self.pos_embed_window = nn.Parameter(torch.zeros(1, spec.dim, spec.windows[0], spec.windows[0]))
        self.blocks = nn.ModuleList()
        for stage, depth in enumerate(spec.depths):
            for i in range(depth):
                enters = (
                    stage > 0 and i == 0
                )  # a stage's first block still has the width and window of the stage before
                window = 0 if len(self.blocks) in spec.global_blocks else spec.windows[stage - enters]
                heads = spec.num_heads * 2**stage
                self.blocks.append(Block(dims[stage - enters], dims[stage], heads, window, pools=enters))
        self.add_neck(dims, out_channels)

    def features(self, pixels: Tensor) -> Features:
        x = self.patch_embed(pixels)
        x = x + self.positions(x.shape[1], x.shape[2])
        levels = []
        blocks = iter(self.blocks)
        for depth in self.depths:
            for _ in range(depth):
                x = next(blocks)(x)
            levels.append(x.permute(0, 3, 1, 2))
        return self.pyramid(levels)

    def positions(self, height: int, width: int) -> Tensor:
        """(1, H, W, dim): a coarse grid, interpolated, plus one window's positions, repeated."""
        coarse = F.interpolate(self.pos_embed, size=(height, width), mode="bicubic")
        side = self.pos_embed_window.shape[-1]
        return (coarse + self.pos_embed_window.tile(1, 1, height // side, width // side)).permute(0, 2, 3, 1)

    def block_names(self) -> list[tuple[str, ...]]:
        return [(f"blocks.{i}",) for i in range(len(self.blocks))]


def build_encoder(spec: ModelSpec) -> HieraEncoder:
    """The Hiera of a model's row."""
    assert isinstance(spec.encoder, HieraSpec)
    return HieraEncoder(spec.encoder, spec.embed_dim)
