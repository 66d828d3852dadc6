"""The mask decoder: tokens and image tokens to mask logits and predicted IoUs.

Source: SAM paper, appendix A, "Mask decoder"; `segment_anything.modeling.mask_decoder` (same parameter names and
numbers); for SAM 2's variant `sam2.modeling.sam.mask_decoder`, for SAM-HQ's see `samray.sam.hq`. Predicted IoUs depend
only on the tokens, so the decoder has two parts: `run` gives the IoUs, and `upscale` computes the logits of only the
masks that are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samray.sam.heads import MlpHead, double_twice, norm_of_cells
from samray.sam.hq import HqHead
from samray.sam.image_encoder import LayerNorm2d
from samray.sam.spec import ModelSpec
from samray.sam.transformer import Guidance, ImageTokens, TwoWayTransformer

NUM_MASK_TOKENS = 4
"""Token 0 is the single mask for unambiguous prompts; 1 to 3 are whole, part and subpart of an ambiguous prompt."""
_STABILITY_DELTA = 0.05
_STABILITY_THRESH = 0.98
"""`dynamic_multimask`: IoU of the mask cut at plus and minus delta logits, from which on it is stable (`sam2`)."""


@dataclass(frozen=True, slots=True)
class DecoderState:
    """State between the two parts: mask_tokens (N, 4, C), keys (N, L, C) image tokens per prompt, iou (N, 4).

    With `hq_dim`, mask_tokens are (N, 5, C): the HQ token is the last.
    """

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
        if self.variant.hq_dim:
            self.hq = HqHead(dim, self.variant.hq_dim)

    def image_features(self, embeddings: Tensor) -> Tensor | None:
        """Features that upscaling adds for each image, from all tokens of the encoder (B, L, C + ...)."""
        dim = self.mask_tokens.embedding_dim
        if embeddings.shape[-1] == dim:
            return None
        extra_channels = embeddings[..., dim:]
        return self.hq.image_features(embeddings[..., :dim], extra_channels) if self.variant.hq_dim else extra_channels

    def run(self, image: ImageTokens, sparse: Tensor, guidance: Guidance | None = None) -> DecoderState:
        """sparse: (B, N, P, C) prompt tokens, for N prompts on each of B images. The state's N is B * N."""
        b, n = sparse.shape[:2]
        # Order of tokens: the object's score if the model has it, predicted IoU, four masks, HQ, then the prompt's.
        output_tokens = [self.iou_token.weight, self.mask_tokens.weight]
        if self.variant.object_score_token:
            output_tokens.insert(0, self.obj_score_token.weight)
        first = len(output_tokens) - 2
        if self.variant.hq_dim:
            output_tokens.append(self.hq.hf_token.weight)
        end = sum(map(len, output_tokens))
        tokens = torch.cat([torch.cat(output_tokens).to(sparse.dtype).expand(b, n, -1, -1), sparse], dim=2)
        x, keys = self.transformer(image, tokens, guidance)
        return DecoderState(x[:, first + 1 : end], keys, self.predicted_iou(x[:, first]))

    def predicted_iou(self, token: Tensor) -> Tensor:
        """(N, C) of the token for it, behind the transformer -> (N, 4)."""
        iou: Tensor = self.iou_prediction_head(token)
        return iou.sigmoid() if self.variant.sigmoid_iou else iou

    def best(self, iou: Tensor) -> Tensor | None:
        """The masks to decode of these: (N, M) predicted IoUs -> (N, 1) indices of the best, with `hq_dim`; None: all.

        SAM-HQ gives one mask for a prompt, also for an ambiguous one.
        """
        return iou.argmax(dim=1, keepdim=True) if self.variant.hq_dim and iou.shape[1] > 1 else None

    def hyper(self, mask_tokens: Tensor, masks: slice, best: Tensor | None = None) -> Tensor:
        """The weights that turn upscaled features into masks: (N, 4, C) -> (N, M, C / 8) for the given mask tokens.

        best: (N, 1) which one of them, see `best`; M is then 1. With `hq_dim`, the weights of the HQ mask are appended.
        """
        # Only for the masks asked for: each mask token has an MLP of its own.
        numbers = range(*masks.indices(NUM_MASK_TOKENS))
        weights = torch.stack([self.output_hypernetworks_mlps[i](mask_tokens[:, i]) for i in numbers], dim=1)
        if best is not None:
            weights = weights.gather(1, best[..., None].expand(-1, -1, weights.shape[-1]))
        return torch.cat([weights, self.hq.hf_mlp(mask_tokens[:, -1:])], dim=1) if self.variant.hq_dim else weights

    def upscale(self, keys: Tensor, hyper: Tensor, fine: Tensor | None = None) -> Tensor:
        """Mask logits at four times the embedding grid.

        keys: (N, L, C); hyper: (N, M, C / 8) as `hyper` gives them; fine: (B, L, ...) as `ImageTokens.fine`, for N / B
        prompts each. Returns (N, M, 4h, 4w). Cells are rearranged to image order last, when only M channels of C / 8
        are left.
        """
        high_res = fine if self.variant.hq_dim == 0 else None
        # In `packed` order: the features of the first doubling, then those of the second.
        split = 4 * (keys.shape[-1] // 4)

        def normed(x: Tensor, norm: LayerNorm2d) -> Tensor:
            if high_res is None:
                return norm_of_cells(x, norm)
            if self.variant.high_res_before_norm:
                return norm_of_cells(_add_per_image(x, high_res[..., :split]), norm)
            return _add_per_image(norm_of_cells(x, norm), high_res[..., :split])

        x = double_twice(keys, self.output_upscaling, normed)  # (N, 16 L, C / 8)
        x = F.gelu(x if high_res is None else _add_per_image(x, high_res[..., split:]))
        if self.variant.hq_dim:
            return self._with_hq(x, hyper, fine)
        return self._in_image_order(torch.bmm(hyper.to(x.dtype), x.transpose(1, 2)))

    def _with_hq(self, x: Tensor, hyper: Tensor, fine: Tensor | None) -> Tensor:
        """The masks of upscaled features x (N, 16 L, C / 8), each plus the HQ mask, whose weights are the last."""
        assert fine is not None
        hyper, hq = hyper.to(x.dtype).split([hyper.shape[1] - 1, 1], dim=1)
        masks = torch.bmm(hyper, x.transpose(1, 2))
        # (B, N / B, C / 8) by (B, 16 L, C / 8): the prompts of an image are rows of one product.
        features = fine.view(len(fine), x.shape[1], -1).to(x.dtype)
        of_image = hq.reshape(len(fine), -1, hq.shape[-1]) @ features.transpose(1, 2)
        masks = self._in_image_order(masks + of_image.view(x.shape[0], 1, -1))
        return masks + self.hq.refined_masks(self._in_image_order(x.transpose(1, 2)), hq)

    def _in_image_order(self, x: Tensor) -> Tensor:
        """(N, M, 16 L), the pixels of one cell after the other -> (N, M, 4h, 4w)."""
        n, m, g = x.shape[0], x.shape[1], self.grid
        x = x.reshape(n, m, g, g, 2, 2, 2, 2)  # h, w, then (y, x) of the first and of the second doubling
        return x.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(n, m, 4 * g, 4 * g)

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
    prompts_per_image = x.shape[0] // max(len(fine), 1)  # without prompts there are no images either
    return (x.view(len(fine), prompts_per_image, *x.shape[1:]) + per_image).flatten(0, 1)
