"""The mask decoder: tokens and image tokens to mask logits and predicted IoUs.

Source: SAM paper, appendix A, "Mask decoder"; `segment_anything.modeling.mask_decoder` (same parameter names and
numbers); for SAM 2's variant `sam2.modeling.sam.mask_decoder`. Predicted IoUs depend only on the tokens, so the decoder
has two parts: `run` gives the IoUs, and `upscale` computes the logits of only the masks that are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samray.sam.image_encoder import LayerNorm2d
from samray.sam.spec import ModelSpec
from samray.sam.transformer import Guidance, ImageTokens, TwoWayTransformer

NUM_MASK_TOKENS = 4
"""Token 0 is the single mask for unambiguous prompts; 1 to 3 are whole, part and subpart of an ambiguous prompt."""
_STABILITY_DELTA = 0.05
_STABILITY_THRESH = 0.98
"""`dynamic_multimask`: IoU of the mask cut at plus and minus delta logits, from which on it is stable (`sam2`)."""


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


@dataclass(frozen=True, slots=True)
class DecoderState:
    """State between the two parts: mask_tokens (N, 4, C), keys (N, L, C) image tokens per prompt, iou (N, 4)."""

    mask_tokens: Tensor
    keys: Tensor
    iou: Tensor


class MaskDecoder(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        dim = spec.embed_dim
        self.grid, self.variant = spec.grid, spec.decoder
        self.transformer = TwoWayTransformer(dim, spec.decoder_heads, spec.decoder_mlp_dim)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(NUM_MASK_TOKENS, dim)
        if self.variant.object_score_token:
            self.obj_score_token = nn.Embedding(1, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(MlpHead(dim, dim, dim // 8, 3) for _ in range(NUM_MASK_TOKENS))
        self.iou_prediction_head = MlpHead(dim, spec.iou_hidden_dim, NUM_MASK_TOKENS, 3)

    def run(self, image: ImageTokens, sparse: Tensor, guidance: Guidance | None = None) -> DecoderState:
        """sparse: (B, N, P, C) prompt tokens, for N prompts on each of B images. The state's N is B * N."""
        b, n = sparse.shape[:2]
        # Order of tokens: the object's score if the model has it, predicted IoU, four masks, then the prompt's.
        output_tokens = [self.iou_token.weight, self.mask_tokens.weight]
        if self.variant.object_score_token:
            output_tokens.insert(0, self.obj_score_token.weight)
        first = len(output_tokens) - 2
        tokens = torch.cat([torch.cat(output_tokens).to(sparse.dtype).expand(b, n, -1, -1), sparse], dim=2)
        x, keys = self.transformer(image, tokens, guidance)
        iou = self.iou_prediction_head(x[:, first])
        if self.variant.sigmoid_iou:
            iou = iou.sigmoid()
        return DecoderState(x[:, first + 1 : first + 1 + NUM_MASK_TOKENS], keys, iou)

    def hyper(self, mask_tokens: Tensor, masks: slice) -> Tensor:
        """The weights that turn upscaled features into masks: (N, 4, C) -> (N, M, C / 8) for the given mask tokens."""
        # Only for the masks asked for: each mask token has an MLP of its own.
        numbers = range(*masks.indices(NUM_MASK_TOKENS))
        return torch.stack([self.output_hypernetworks_mlps[i](mask_tokens[:, i]) for i in numbers], dim=1)

    def upscale(self, keys: Tensor, hyper: Tensor, fine: Tensor | None = None) -> Tensor:
        """Mask logits at four times the embedding grid.

        keys: (N, L, C); hyper: (N, M, C / 8); fine: (B, L, ...) as `ImageTokens.fine`, for N / B prompts each. Returns
        (N, M, 4h, 4w). The 2x2 transposed convolutions have stride 2, so each is a matrix product per cell. Cells are
        rearranged to image order last, when only M channels of C / 8 are left.
        """
        conv1, norm, _, conv2, _ = self.output_upscaling
        assert isinstance(norm, LayerNorm2d)
        assert isinstance(conv1, nn.ConvTranspose2d)
        assert isinstance(conv2, nn.ConvTranspose2d)
        assert conv1.bias is not None
        assert conv2.bias is not None
        n, cells, _ = keys.shape
        weight1 = conv1.weight.permute(0, 2, 3, 1).flatten(1)  # (C, 2 * 2 * C / 4)
        x = F.linear(keys, weight1.T, conv1.bias.repeat(4)).view(n, cells * 4, len(norm.weight))  # (N, 4 L, C / 4)
        # In `packed` order: the features of the first doubling, then those of the second.
        split = 4 * x.shape[-1]
        if fine is not None and self.variant.high_res_before_norm:
            x = _add_per_image(x, fine[..., :split])
        x = F.layer_norm(x, (len(norm.weight),), norm.weight, norm.bias, norm.eps)
        if fine is not None and not self.variant.high_res_before_norm:
            x = _add_per_image(x, fine[..., :split])
        x = F.gelu(x)
        weight2 = conv2.weight.permute(0, 2, 3, 1).flatten(1)  # (C / 4, 2 * 2 * C / 8)
        x = F.linear(x, weight2.T, conv2.bias.repeat(4)).view(n, cells * 16, hyper.shape[-1])  # (N, 16 L, C / 8)
        x = F.gelu(x if fine is None else _add_per_image(x, fine[..., split:]))
        masks = torch.bmm(hyper.to(x.dtype), x.transpose(1, 2))  # (N, M, h * w * 2 * 2 * 2 * 2)
        g, m = self.grid, masks.shape[1]
        masks = masks.view(n, m, g, g, 2, 2, 2, 2)  # h, w, then (y, x) of the first and of the second doubling
        return masks.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(n, m, 4 * g, 4 * g)

    def single(self, logits: Tensor, iou: Tensor) -> tuple[Tensor, Tensor]:
        """One mask per prompt. logits: (N, 4, 4h, 4w), iou: (N, 4) of all mask tokens. Returns (N, 1, ...) of each.

        With `dynamic_multimask`, a mask 0 that is not stable gives way to the best of the other three.
        """
        if not self.variant.dynamic_multimask:
            return logits[:, :1], iou[:, :1]
        first = logits[:, 0].flatten(1)
        inner, outer = ((first > edge).sum(dim=1) for edge in (_STABILITY_DELTA, -_STABILITY_DELTA))
        # An empty mask is stable, as in the reference.
        is_stable = (outer == 0) | (inner.float() / outer.clamp(min=1) >= _STABILITY_THRESH)
        chosen = torch.where(is_stable, 0, 1 + iou[:, 1:].argmax(dim=1))
        every = torch.arange(iou.shape[0], device=iou.device)
        return logits[every, chosen][:, None], iou[every, chosen][:, None]


def _add_per_image(x: Tensor, fine: Tensor) -> Tensor:
    """x: (N, n, c) plus the features of each of the B images, the same for its N / B prompts, (B, L, n / L * c)."""
    # (B, 1, n, c): broadcast over an image's prompts, without a copy for each.
    per_image = fine.reshape(len(fine), 1, *x.shape[1:])
    each = x.shape[0] // max(len(fine), 1)  # without prompts there are no images either
    return (x.view(len(fine), each, *x.shape[1:]) + per_image).flatten(0, 1)
