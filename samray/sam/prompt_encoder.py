"""Prompts to tokens: points and boxes by random Fourier positions, masks by a small convolution, text by a projection.

Source: SAM paper, appendix A, "Prompt encoder"; `segment_anything.modeling.prompt_encoder` (same parameter names).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from samray.sam.image_encoder import LayerNorm2d
from samray.sam.text_projection import TextProjection

PAD_LABEL = -1
"""Label of a padding point (the reference adds one if there is no box)."""


class PositionEncoding(nn.Module):
    """Random Fourier features of positions in the unit square.

    Its matrix stays float32 for any dtype of the model: rounding it to bfloat16 would move every click.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", nn.init.normal_(torch.empty(2, num_features)))

    def forward(self, xy: Tensor) -> Tensor:
        """xy: (..., 2) in [0, 1]. Returns (..., 2 * num_features) float32, sines then cosines."""
        with torch.autocast(xy.device.type, enabled=False):
            # From [0, 1] to [-1, 1], as in the reference.
            angles = 2 * math.pi * ((2 * xy.float() - 1) @ self._matrix())
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PositionEncoding:
        # `to`, `half` and `cuda` all come through here: follow the device, but keep the dtype.
        exact = self._matrix()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.positional_encoding_gaussian_matrix = exact.to(self._matrix().device)
        return self

    def _matrix(self) -> Tensor:
        matrix = self.positional_encoding_gaussian_matrix
        assert isinstance(matrix, Tensor)
        return matrix


class PromptEncoder(nn.Module):
    def __init__(
        self, embed_dim: int, grid: int, image_size: int, mask_in_chans: int, *, pad_boxes: bool = False
    ) -> None:
        super().__init__()
        self.grid, self.image_size, self.pad_boxes = grid, image_size, pad_boxes
        self.pe_layer = PositionEncoding(embed_dim // 2)
        # Rows: background click, foreground click, a box's top-left corner, its bottom-right corner.
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, embed_dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_in_chans // 4, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans // 4),
            nn.GELU(),
            nn.Conv2d(mask_in_chans // 4, mask_in_chans, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans),
            nn.GELU(),
            nn.Conv2d(mask_in_chans, embed_dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, embed_dim)
        # Published checkpoints have none; `samray train train.objective=text` adds one.
        self.text_projection: TextProjection | None = None

    def dense_positions(self) -> Tensor:
        """(L, C): the position code of every cell of the embedding grid, row by row."""
        device = self.no_mask_embed.weight.device
        centres = (torch.arange(self.grid, device=device, dtype=torch.float32) + 0.5) / self.grid
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        return self._positions(torch.stack([x, y], dim=-1)).flatten(0, 1)

    def encode_points(self, points: Tensor, labels: Tensor, *, pad: bool = True, corners: bool = False) -> Tensor:
        """Tokens of clicks.

        points: (..., P, 2) float xy, pixels of the padded square input. labels: (..., P), 1 foreground, 0 background,
        -1 no point; with corners also 2 and 3, the top-left and the bottom-right corner of a box. pad: append the
        reference's "not a point" (as it does if there is no box). Returns (..., P or P + 1, C).
        """
        if pad:
            points = torch.cat([points, points.new_zeros(*points.shape[:-2], 1, 2)], dim=-2)
            labels = torch.cat([labels, labels.new_full((*labels.shape[:-1], 1), PAD_LABEL)], dim=-1)
        # Half a pixel: a click is at its pixel's centre, as in the reference.
        encoded = self._positions((points.float() + 0.5) / self.image_size)
        # One table lookup instead of masked writes: rows are (not a point, background, foreground, two corners).
        # Corners that cannot occur are left out: in training they would get gradients of zero instead of none.
        table = torch.cat([self.not_a_point_embed.weight, *self._learned()[: 4 if corners else 2]])
        is_point = (labels != PAD_LABEL).unsqueeze(-1)
        # A padding point has no position, only its learned vector, as in the reference.
        return torch.where(is_point, encoded, torch.zeros_like(encoded)) + table[labels.long() + 1]

    def encode_boxes(self, boxes_xyxy: Tensor) -> Tensor:
        """boxes_xyxy: (..., 4), pixels of the square input. Returns (..., 2, C): the two corners.

        With `pad_boxes`, (..., 3, C): "not a point" is appended.
        """
        corners = boxes_xyxy.float().unflatten(-1, (2, 2)) + 0.5  # (..., corner, xy)
        table = torch.cat(self._learned()[2:])
        tokens = self._positions(corners / self.image_size) + table
        if not self.pad_boxes:
            return tokens
        return torch.cat([tokens, self.not_a_point_embed.weight.expand(*tokens.shape[:-2], 1, -1)], dim=-2)

    def encode_texts(self, embeddings: Tensor) -> Tensor:
        """embeddings: (..., D) unit embeddings of CLIP, of texts or of images. Returns (..., 1, C).

        Only for a model with a text projection.
        """
        assert self.text_projection is not None, "the caller checks that the weights have a text projection"
        token: Tensor = self.text_projection(embeddings)
        return token.unsqueeze(-2)

    def _positions(self, xy: Tensor) -> Tensor:
        """xy: (..., 2) in [0, 1]. Returns (..., C), the model's dtype."""
        encoded: Tensor = self.pe_layer(xy)
        return encoded.to(self.no_mask_embed.weight.dtype)

    def _learned(self) -> list[Tensor]:
        return [embedding.weight for embedding in self.point_embeddings if isinstance(embedding, nn.Embedding)]

    def encode_masks(self, mask_logits: Tensor) -> Tensor:
        """mask_logits: (N, 1, 4h, 4w), unthresholded. Returns (N, C, h, w)."""
        out: Tensor = self.mask_downscaling(mask_logits)
        return out
