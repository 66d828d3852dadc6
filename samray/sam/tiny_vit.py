"""TinyViT: MobileSAM's image encoder, and with smaller numbers the embedded model's.

Source: TinyViT (Wu et al., ECCV 2022) as changed by MobileSAM (Zhang et al., 2023); parameter names are MobileSAM's.
The classification head that MobileSAM's file also carries is not part of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samray.sam.encoder import Features, ImageEncoder
from samray.sam.image_encoder import make_neck, merge_windows, partition_windows
from samray.sam.spec import ModelSpec, TinyVitSpec

_EARLY_STAGES = 2  # stages before SAM-HQ's early features


class ConvNorm(nn.Sequential):
    """A convolution without bias and a batch norm, named `c` and `bn`."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        # MobileSAM's names: the keys of its checkpoint follow them.
        self.add_module("c", nn.Conv2d(in_dim, out_dim, kernel, stride, kernel // 2, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(out_dim))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(ConvNorm(3, dim // 2, 3, 2), nn.GELU(), ConvNorm(dim // 2, dim, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.seq(x)
        return out


class MBConv(nn.Module):
    """Inverted bottleneck with a residual."""

    def __init__(self, dim: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = dim * expansion
        self.conv1 = ConvNorm(dim, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvNorm(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class PatchMerging(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        # The depthwise one shrinks the grid; stride 1 keeps it, as in MobileSAM's last merging.
        self.conv1 = ConvNorm(in_dim, out_dim)
        self.conv2 = ConvNorm(out_dim, out_dim, 3, stride, groups=out_dim)
        self.conv3 = ConvNorm(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))
        return out


class Attention(nn.Module):
    """Self-attention within a window, with one learned bias per head and absolute offset."""

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window * window))
        # On the CPU even where only shapes are wanted: arithmetic on the meta device loads half of torch's compiler.
        steps = torch.arange(window, device="cpu")
        rows, cols = torch.meshgrid(steps, steps, indexing="ij")
        rows, cols = rows.flatten(), cols.flatten()
        # Absolute offsets: a bias is shared by the two directions. (window ** 2, window ** 2).
        index = (rows[:, None] - rows[None, :]).abs() * window + (cols[:, None] - cols[None, :]).abs()
        # Not in the state: MobileSAM's file has it, but it follows from the window size.
        self.register_buffer("attention_bias_idxs", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(windows, window * window, dim) -> the same shape."""
        n, tokens, dim = x.shape
        qkv = self.qkv(self.norm(x)).view(n, tokens, self.num_heads, 3, dim // self.num_heads)
        # The published weights store q, k and v interleaved per head, unlike ViT's.
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        assert isinstance(self.attention_bias_idxs, Tensor)
        bias = self.attention_biases[:, self.attention_bias_idxs].to(q.dtype)
        if q.device.type == "cpu" and torch.is_grad_enabled() and bias.requires_grad:
            # Where a bias learns torch falls back on a path that looks for rows without any key, and takes much longer.
            out = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias).softmax(dim=-1).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        return self.proj(out.transpose(1, 2).reshape(n, tokens, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, dim * 4)
        self.fc2 = nn.Linear(dim * 4, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TinyVitBlock(nn.Module):
    """Windowed attention, a depthwise 3x3 that lets windows talk, and an MLP."""

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = Attention(dim, num_heads, window)
        self.local_conv = ConvNorm(dim, dim, 3, groups=dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (B, H, W, dim), for windows and norms
        windows, padded_hw = partition_windows(x, self.window)
        attended = self.attn(windows.flatten(1, 2)).view(windows.shape)
        x = x + merge_windows(attended, padded_hw, (x.shape[1], x.shape[2]))
        # Over the whole map, across the borders of windows; it has no residual, as published.
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (x + self.mlp(x)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    def __init__(self, blocks: list[nn.Module], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if downsample is not None:
            self.downsample = downsample


class FineFeatures(nn.Module):
    """Features that the decoder's upscaling adds at its first and second doubling.

    Source: SAM 2 (Ravi et al., 2024), the decoder's skip connections; the two projections begin at zero.
    """

    def __init__(self, dims: tuple[int, ...], embed_dim: int) -> None:
        super().__init__()
        self.conv_s0 = nn.Conv2d(dims[0], embed_dim // 8, kernel_size=1)
        self.conv_s1 = nn.Conv2d(dims[1], embed_dim // 4, kernel_size=1)
        for conv in (self.conv_s0, self.conv_s1):
            nn.init.zeros_(conv.weight)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, stage0: Tensor, stage1: Tensor) -> tuple[Tensor, Tensor]:
        """stage0: (B, dims[0], 4h, 4w), stage1: (B, dims[1], 2h, 2w). Returns them as `Features.high_res`."""
        s1, s0 = self.conv_s1(stage1), self.conv_s0(stage0)
        return s0, s1


class TinyViT(ImageEncoder):
    """(B, 3, S, S) normalised pixels -> (B, C, S / stride, S / stride), and high-res features with `fine_features`.

    gives_early: also give what the third stage begins with, as the light SAM-HQ uses it; it must have the last grid.
    """

    stem = ("patch_embed",)

    def __init__(self, spec: TinyVitSpec, out_channels: int, *, gives_early: bool = False) -> None:
        super().__init__()
        self.depths, self.gives_early = spec.depths, gives_early
        self.patch_embed = PatchEmbed(spec.dims[0])
        self.layers = nn.ModuleList()
        for i, (dim, depth, heads, window) in enumerate(
            zip(spec.dims, spec.depths, spec.num_heads, spec.windows, strict=True)
        ):
            blocks: list[nn.Module] = [
                MBConv(dim) if i == 0 else TinyVitBlock(dim, heads, window) for _ in range(depth)
            ]
            last = i == len(spec.dims) - 1
            self.layers.append(Stage(blocks, None if last else PatchMerging(dim, spec.dims[i + 1], spec.strides[i])))
        self.neck = make_neck(spec.dims[-1], out_channels)
        if spec.fine_features:
            self.fine = FineFeatures(spec.dims, out_channels)

    def features(self, pixels: Tensor) -> Features:
        x = self.patch_embed(pixels.contiguous(memory_format=torch.channels_last))
        features, early = [], None
        for stage in self.layers:
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                x = block(x)
            # Before the merging: at strides 4 and 8, as fine as the decoder's two doublings need.
            features.append(x)
            x = stage.downsample(x) if hasattr(stage, "downsample") else x
            if self.gives_early and len(features) == _EARLY_STAGES:
                early = x
        return Features(self.neck(x), self.fine(*features[:2]) if hasattr(self, "fine") else None, early)

    def block_names(self) -> list[tuple[str, ...]]:
        """A layer that merges patches after a stage belongs to the stage's last block."""
        names: list[tuple[str, ...]] = []
        for i, depth in enumerate(self.depths):
            names += [(f"layers.{i}.blocks.{j}",) for j in range(depth)]
            names[-1] += (f"layers.{i}.downsample",)
        return names


def build_encoder(spec: ModelSpec) -> TinyViT:
    """The TinyViT of a model's row."""
    assert isinstance(spec.encoder, TinyVitSpec)
    return TinyViT(spec.encoder, spec.embed_dim, gives_early=spec.decoder.hq_dim > 0)
