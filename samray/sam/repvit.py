"""EdgeTAM's image encoder: RepViT-M1 with SAM 2's feature pyramid.

Source: RepViT (Wang et al., 2023) as in `timm` (`repvit_m1`, parameter names as there); EdgeTAM (Zhou et al., 2025).
Batch norms that do not learn are folded into the convolutions before them on a CPU, and a token mixer's three branches
into one depthwise convolution: they only read and write memory. timm is not used: it needs torchvision, which samray
does without.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samray.sam import tiny_vit
from samray.sam.encoder import Features
from samray.sam.pyramid import PyramidEncoder
from samray.sam.spec import ModelSpec, RepVitSpec

_EXPANSION = 2


class ConvNorm(tiny_vit.ConvNorm):
    """A convolution without bias and a batch norm, which are one convolution if the norm does not learn."""

    def is_folded(self, x: Tensor) -> bool:
        """Whether to fold for this input.

        On a GPU the many small operations on weights would cost more, and an exported graph needs constant weights.
        """
        return x.device.type == "cpu" and not self[1].training and not torch.onnx.is_in_onnx_export()

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution."""
        conv, norm = self
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
        weight = conv.weight.float() * scale.view(-1, 1, 1, 1)
        bias = norm.bias.float() - norm.running_mean.float() * scale
        return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_folded(x):
            out: Tensor = self[1](self[0](x))
            return out
        conv = self[0]
        assert isinstance(conv, nn.Conv2d)
        return F.conv2d(x, *self.folded(), stride=conv.stride, padding=conv.padding, groups=conv.groups)


class TokenMixer(nn.Module):
    """A depthwise 3x3 convolution, a depthwise 1x1 one, and the input, added up."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, dim, 3, groups=dim)
        self.conv1 = ConvNorm(dim, dim, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        if not self.conv.is_folded(x):
            return self.conv(x) + self.conv1(x) + x
        weight, bias = self.conv.folded()
        weight1, bias1 = self.conv1.folded()
        return F.conv2d(x, weight + F.pad(weight1 + 1, (1, 1, 1, 1)), bias + bias1, padding=1, groups=len(weight))


class SqueezeExcite(nn.Module):
    """Each channel times a factor in 0..1 that follows from the means of all channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # A quarter of the channels, rounded half up to a multiple of eight.
        hidden = max(8, int(dim / 4 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(dim, hidden, kernel_size=1)
        self.fc2 = nn.Conv2d(hidden, dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class ChannelMixer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, dim * _EXPANSION)
        self.conv2 = ConvNorm(dim * _EXPANSION, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(F.gelu(self.conv1(x)))
        return out


class Block(nn.Module):
    def __init__(self, dim: int, *, squeezes: bool) -> None:
        super().__init__()
        self.token_mixer = TokenMixer(dim)
        if squeezes:
            self.se = SqueezeExcite(dim)
        self.channel_mixer = ChannelMixer(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        if hasattr(self, "se"):
            x = self.se(x)
        return x + self.channel_mixer(x)


class Downsample(nn.Module):
    """(B, dim, H, W) -> (B, dim_out, H / 2, W / 2)."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.pre_block = Block(dim, squeezes=False)
        self.spatial_downsample = ConvNorm(dim, dim, 3, stride=2, groups=dim)
        self.channel_downsample = ConvNorm(dim, dim_out)
        self.ffn = ChannelMixer(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channel_downsample(self.spatial_downsample(self.pre_block(x)))
        return x + self.ffn(x)


class Stem(nn.Module):
    """(B, 3, S, S) -> (B, dim, S / 4, S / 4)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, dim // 2, 3, stride=2)
        self.conv2 = ConvNorm(dim // 2, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(F.gelu(self.conv1(x)))
        return out


class Stage(nn.Module):
    """Blocks of one width; every second one, from the first, has squeeze and excitation."""

    def __init__(self, dim: int, dim_out: int, depth: int, *, halves: bool) -> None:
        super().__init__()
        if halves:
            self.downsample = Downsample(dim, dim_out)
        self.blocks = nn.ModuleList(Block(dim_out, squeezes=i % 2 == 0) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class RepVitEncoder(PyramidEncoder):
    stem = ("patch_embed",)

    def __init__(self, spec: RepVitSpec, out_channels: int) -> None:
        super().__init__()
        self.depths = spec.depths
        self.patch_embed = Stem(spec.dims[0])
        dims = (spec.dims[0], *spec.dims)
        self.stages = nn.ModuleList(
            Stage(dims[i], dims[i + 1], depth, halves=i > 0) for i, depth in enumerate(spec.depths)
        )
        self.add_neck(spec.dims, out_channels)

    def features(self, pixels: Tensor) -> Features:
        x = self.patch_embed(pixels.contiguous(memory_format=torch.channels_last))
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return self.pyramid(levels)

    def block_names(self) -> list[tuple[str, ...]]:
        """A layer that halves the grid belongs to the block after it."""
        names: list[tuple[str, ...]] = []
        for i, depth in enumerate(self.depths):
            of_stage: list[tuple[str, ...]] = [(f"stages.{i}.blocks.{j}",) for j in range(depth)]
            of_stage[0] += (f"stages.{i}.downsample",)
            names += of_stage
        return names


def build_encoder(spec: ModelSpec) -> RepVitEncoder:
    """The RepViT of a model's row."""
    assert isinstance(spec.encoder, RepVitSpec)
    return RepVitEncoder(spec.encoder, spec.embed_dim)
