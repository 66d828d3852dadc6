"""SAM's ViT image encoder: windowed attention with decomposed relative positions, four global blocks, a neck.

Source: SAM paper, appendix A; `segment_anything.modeling.image_encoder` (parameter names are the same).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samray.sam.encoder import Features, ImageEncoder
from samray.sam.spec import ModelSpec, VitSpec

# A global block's bias is (heads, 4096, 4096) float32 an image: 0.8 GB for ViT-B. Queries go through in slices so that
# a slice's bias stays below this many elements.
_CPU_BIAS_ELEMENTS = 10 * 1024 * 1024
_GPU_BIAS_ELEMENTS = 256 * 1024 * 1024

# Rows of the grid that go through an MLP together on a CPU without gradients.
_CPU_MLP_ROWS = 8


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Channels last for torch's fused norm; the result is a view, without a copy back.
        normed = F.layer_norm(x.permute(0, 2, 3, 1), (len(self.weight),), self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)


def make_neck(in_channels: int, out_channels: int) -> nn.Sequential:
    """The 1x1 and 3x3 convolutions, each with a norm, that take any encoder's features to C channels."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )


def partition_windows(x: Tensor, window: int) -> tuple[Tensor, tuple[int, int]]:
    """(B, H, W, C) -> (B * windows, window, window, C), zero-padded at the bottom and right; and the padded (H, W)."""
    b, h, w, c = x.shape
    # The padding is not masked: zeros take part in attention, as in the reference.
    x = F.pad(x, (0, 0, 0, -w % window, 0, -h % window))
    padded_h, padded_w = x.shape[1:3]
    x = x.view(b, padded_h // window, window, padded_w // window, window, c)  # rows, y, columns, x
    return x.transpose(2, 3).reshape(-1, window, window, c), (padded_h, padded_w)


def merge_windows(windows: Tensor, padded_hw: tuple[int, int], hw: tuple[int, int]) -> Tensor:
    """The inverse of `partition_windows`: (B * windows, window, window, C) -> (B, H, W, C), padding cut off."""
    window, c = windows.shape[1], windows.shape[-1]
    (padded_h, padded_w), (h, w) = padded_hw, hw
    x = windows.view(-1, padded_h // window, padded_w // window, window, window, c)  # rows, columns, y, x
    return x.transpose(2, 3).reshape(-1, padded_h, padded_w, c)[:, :h, :w]


class Attention(nn.Module):
    """Multi-head self-attention over an (H, W) grid with decomposed relative position biases."""

    def __init__(self, dim: int, num_heads: int, size: int) -> None:
        super().__init__()
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        # One vector per offset between two rows (columns), from -(size - 1) to size - 1.
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size - 1, head_dim))
        # On the CPU even where only shapes are wanted: arithmetic on the meta device loads half of torch's compiler.
        steps = torch.arange(size, device="cpu")
        offsets = steps[:, None] - steps[None, :] + size - 1
        self.register_buffer("offsets", offsets, persistent=False)  # (size, size): query row x key row -> table row

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        b, h, w, dim = x.shape
        heads = self.num_heads
        q, k, v = self.qkv(x).view(b, h * w, 3, heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, H * W, head_dim)
        assert isinstance(self.offsets, Tensor)
        rel_h = self.rel_pos_h[self.offsets]  # (H, H, head_dim)
        rel_w = self.rel_pos_w[self.offsets]  # (W, W, head_dim)
        most = _CPU_BIAS_ELEMENTS if x.device.type == "cpu" else _GPU_BIAS_ELEMENTS
        rows = max(1, min(h, most // (b * heads * w * h * w)))
        # Allocated before the slices: an allocation between them would keep malloc from reusing a slice's memory.
        out = q.new_empty(b, h * w, heads, dim // heads)
        for top in range(0, h, rows):
            bottom = min(h, top + rows)
            # Some rows of queries against all keys: exact, because a softmax is over the keys of one query.
            q_rows = q[:, :, top * w : bottom * w]
            grid = q_rows.view(b, heads, bottom - top, w, -1)
            # Laid out as the bias is to be: their sum would otherwise take on a layout that is copied once more.
            bias_h = torch.einsum("bnhwc,hkc->bnhwk", grid, rel_h[top:bottom]).contiguous()
            bias_w = torch.einsum("bnhwc,wkc->bnhwk", grid, rel_w).contiguous()
            # (B, heads, rows * W, H * W), the sum of a bias for the key's row and one for its column.
            bias = (bias_h[..., :, None] + bias_w[..., None, :]).reshape(b, heads, -1, h * w)
            # The bias comes from unscaled queries, as in the reference; torch scales only q k.
            read = F.scaled_dot_product_attention(q_rows, k, v, attn_mask=bias)
            out[:, top * w : bottom * w] = read.transpose(1, 2)
        return self.proj(out.view(b, h, w, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden_dim)
        self.lin2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> the same shape. On a CPU a few rows of the grid at a time: the hidden layer is wide."""
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return self.lin2(F.gelu(self.lin1(x)))
        out = torch.empty_like(x)
        for rows, into in zip(x.split(_CPU_MLP_ROWS, dim=1), out.split(_CPU_MLP_ROWS, dim=1), strict=True):
            into.copy_(self.lin2(F.gelu(self.lin1(rows))))
        return out


class Block(nn.Module):
    """A transformer block; `window` 0 attends over the whole grid."""

    def __init__(self, dim: int, num_heads: int, window: int, grid: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, window or grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, dim * 4)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if self.window:
            windows, padded_hw = partition_windows(y, self.window)
            y = merge_windows(self.attn(windows), padded_hw, (x.shape[1], x.shape[2]))
        else:
            y = self.attn(y)
        x = x + y
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out.permute(0, 2, 3, 1)


class ImageEncoderViT(ImageEncoder):
    """(B, 3, S, S) normalised pixels -> (B, C, S / patch, S / patch).

    gives_early: also give the features after the first global block, as SAM-HQ uses them.
    """

    stem = ("patch_embed", "pos_embed")

    def __init__(self, spec: VitSpec, image_size: int, out_channels: int, *, gives_early: bool = False) -> None:
        super().__init__()
        self.early_block = min(spec.global_blocks) if gives_early else -1
        grid = image_size // spec.patch
        self.patch_embed = PatchEmbed(spec.patch, spec.dim)
        # Learned for one grid, which is why a ViT takes only its own input size.
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, spec.dim))
        self.blocks = nn.ModuleList(
            Block(spec.dim, spec.num_heads, 0 if i in spec.global_blocks else spec.window, grid)
            for i in range(spec.depth)
        )
        self.neck = make_neck(spec.dim, out_channels)

    def features(self, pixels: Tensor) -> Features:
        x = self.patch_embed(pixels) + self.pos_embed
        early = None
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == self.early_block:
                early = x.permute(0, 3, 1, 2)
        return Features(self.neck(x.permute(0, 3, 1, 2)), early=early)

    def block_names(self) -> list[tuple[str, ...]]:
        return [(f"blocks.{i}",) for i in range(len(self.blocks))]


def build_encoder(spec: ModelSpec) -> ImageEncoderViT:
    """The ViT of a model's row."""
    assert isinstance(spec.encoder, VitSpec)
    return ImageEncoderViT(spec.encoder, spec.image_size, spec.embed_dim, gives_early=spec.decoder.hq_dim > 0)
