"""Parts that the mask decoder and its variants share."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from samray.sam.image_encoder import LayerNorm2d


class MlpHead(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, depth: int) -> None:
        super().__init__()
        dims = [in_dim, *[hidden_dim] * (depth - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        out: Tensor = last(x)
        return out


def double_twice(cells: Tensor, layers: nn.Sequential, normed: Callable[..., Tensor] | None = None) -> Tensor:
    """Two transposed 2x2 convolutions with stride 2, a norm and GELU between them.

    cells: (N, L, D). layers: convolution, norm, GELU, convolution, and what follows, which is not applied. normed: in
    place of the norm, called with its input and the norm. Returns (N, 16 L, E): for each cell its sixteen pixels,
    (y, x) of the quarter, then (y, x) within it. Each convolution is a matrix product per cell, because none overlap.
    """
    conv1, norm, _, conv2 = list(layers)[:4]
    assert isinstance(norm, LayerNorm2d)
    assert isinstance(conv1, nn.ConvTranspose2d)
    assert isinstance(conv2, nn.ConvTranspose2d)
    assert conv1.bias is not None
    assert conv2.bias is not None
    n, number, _ = cells.shape
    weight1 = conv1.weight.permute(0, 2, 3, 1).flatten(1)  # (D, 2 * 2 * hidden)
    x = F.linear(cells, weight1.T, conv1.bias.repeat(4)).view(n, number * 4, len(norm.weight))
    x = F.gelu(norm_of_cells(x, norm) if normed is None else normed(x, norm))
    weight2 = conv2.weight.permute(0, 2, 3, 1).flatten(1)  # (hidden, 2 * 2 * E)
    return F.linear(x, weight2.T, conv2.bias.repeat(4)).view(n, number * 16, conv2.out_channels)


def norm_of_cells(x: Tensor, norm: LayerNorm2d) -> Tensor:
    """The norm of maps, of (N, cells, channels)."""
    return F.layer_norm(x, (len(norm.weight),), norm.weight, norm.bias, norm.eps)
