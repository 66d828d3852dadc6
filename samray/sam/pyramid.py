"""The neck of SAM 2's encoders: a feature pyramid, whose two finest levels serve the decoder's upscaling.

Source: `sam2.modeling.backbones.image_encoder`. The published form makes a map of C channels for every level and
reduces the two finest to C / 8 and C / 4; here both convolutions are one, and the full maps, 64 MB for the finest, are
never made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samray.sam.encoder import Features, ImageEncoder
from samray.sam.tiny_vit import FineFeatures


class PyramidEncoder(ImageEncoder):
    """(B, 3, S, S) normalised pixels -> (B, C, S / 16, S / 16), and high-res features."""

    def add_neck(self, dims: Sequence[int], out_channels: int) -> None:
        """Make the neck of four levels with these widths, the finest first."""
        # From the coarsest level to the finest, as published.
        self.neck = nn.ModuleList(nn.Conv2d(dim, out_channels, kernel_size=1) for dim in reversed(dims))
        self.fine = FineFeatures((out_channels, out_channels), out_channels)
        # What SAM 2 adds to an image without a past.
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, out_channels))

    def pyramid(self, levels: Sequence[Tensor]) -> Features:
        """The features of four levels (B, dim, S / 4, S / 4) to (B, dim, S / 32, S / 32)."""
        coarsest, coarse, middle, finest = self.neck
        top = F.interpolate(coarsest(levels[3]).float(), scale_factor=2, mode="nearest")
        embedding = coarse(levels[2]) + top.to(levels[2].dtype) + self.no_mem_embed.view(1, -1, 1, 1)
        s0, s1 = (
            composed(a, b, y)
            for a, b, y in ((finest, self.fine.conv_s0, levels[0]), (middle, self.fine.conv_s1, levels[1]))
        )
        return Features(embedding, (s0, s1))


def composed(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    """second(first(x)) of two convolutions, the second one 1x1, as one."""
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    assert first.bias is not None
    assert second.bias is not None
    outer = second.weight[:, :, 0, 0]
    weight = torch.einsum("oc,cdyx->odyx", outer, first.weight)
    # The padding is of the input, where both forms have zeros.
    return F.conv2d(x, weight, outer @ first.bias + second.bias, padding=first.padding)
