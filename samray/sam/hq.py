"""SAM-HQ's part of the mask decoder: one more output token, whose mask is added to the others.

Source: Segment Anything in High Quality (Ke et al., 2023); `segment_anything_hq.modeling.mask_decoder_hq` (parameter
names as there). The mask comes from the upscaled features of a prompt, refined by two 3x3 convolutions, plus features
of the image. The published form makes all C / 8 refined channels and reduces them to one mask by the token's weights;
here the token's weights are multiplied into the last convolution, which then has nine numbers per input channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samray.sam.heads import MlpHead, double_twice
from samray.sam.image_encoder import LayerNorm2d


class HqHead(nn.Module):
    """dim: C of the decoder; early_dim: D of the encoder's early features."""

    def __init__(self, dim: int, early_dim: int) -> None:
        super().__init__()
        self.hf_token = nn.Embedding(1, dim)
        self.hf_mlp = MlpHead(dim, dim, dim // 8, 3)
        self.compress_vit_feat = _upscaling(early_dim, dim, dim // 8)
        self.embedding_encoder = _upscaling(dim, dim // 4, dim // 8)
        self.embedding_maskfeature = nn.Sequential(
            nn.Conv2d(dim // 8, dim // 4, kernel_size=3, padding=1),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.Conv2d(dim // 4, dim // 8, kernel_size=3, padding=1),
        )

    def image_features(self, embedding: Tensor, early: Tensor) -> Tensor:
        """Features shared by all prompts of an image.

        embedding: (B, L, C), early: (B, L, D) cells. Returns (B, L, 16 * C / 8), a cell's pixels in the order of
        `double_twice`.
        """
        b, cells, _ = embedding.shape
        features = double_twice(embedding, self.embedding_encoder) + double_twice(early, self.compress_vit_feat)
        return features.view(b, cells, -1)

    def refined_masks(self, upscaled: Tensor, hyper: Tensor) -> Tensor:
        """The part of the mask that depends on the prompt.

        upscaled: (N, C / 8, 4h, 4w); hyper: (N, 1, C / 8) of the token. Returns (N, 1, 4h, 4w).
        """
        first, norm, _, last = self.embedding_maskfeature
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        n, _, height, width = upscaled.shape
        x = F.gelu(norm(first(upscaled)))
        hyper = hyper.to(x.dtype)
        # What each pixel gives to its nine neighbours, for which the kernel is mirrored, is added up by a transposed
        # convolution: `fold` does the same, but cannot be exported.
        kernel = torch.einsum("nmc,cdyx->nyxd", hyper, last.weight).flip(1, 2).flatten(1, 2)  # (N, 9, C / 4)
        contributions = torch.bmm(kernel, x.flatten(2)).view(n, 9, height, width)
        neighbours = torch.eye(9, dtype=x.dtype, device=x.device).view(9, 1, 3, 3)
        masks = F.conv_transpose2d(contributions, neighbours, padding=1)
        return masks + (hyper @ last.bias).view(n, 1, 1, 1)


def _upscaling(dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(dim, hidden_dim, kernel_size=2, stride=2),
        LayerNorm2d(hidden_dim),
        nn.GELU(),
        nn.ConvTranspose2d(hidden_dim, out_dim, kernel_size=2, stride=2),
    )
