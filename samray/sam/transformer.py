"""The two-way transformer between prompt tokens and image tokens; the image side's work is shared or avoided.

Source: SAM paper, appendix A, "Mask decoder"; `segment_anything.modeling.transformer` (same parameter names, same
numbers). The published form projects all L image tokens to queries, keys and values for every prompt. Here:

1. In the first layer the image tokens are the same for every prompt of an image, so their three projections are made
   once per image (`ImageTokens`).
2. Later, T tokens x H heads (about 56) rows attend to L = 4,096 image tokens, so the image side's projection is
   absorbed into the token side. Token to image, head j:
       scores = (W_k,j^T q_j) . keys + q_j . (W_k,j pe)        out = W_v,j (P . keys) + b_v
   since rows of P sum to one; the key's bias adds the same to a whole row and drops out of the softmax. Image to token:
       scores = keys . (W_q,j^T k_j) + (W_q,j pe + b_q,j) . k_j        out = P (V_j W_o,j) + b_o

`tests/parity` compares both with the textbook form.

After `Sam.cast_image_side` only arrays as large as the image tokens are in half precision; the few tokens of a prompt
stay float32 through all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samray.sam.kernels import MAX_TOKENS, enabled


def weight_of(projection: nn.Linear) -> Tensor:
    """The weight as it is used: while an adapter is trained, `peft` keeps its addition apart (`samray.train.lora`)."""
    addition = getattr(projection, "get_delta_weight", None)
    return projection.weight if addition is None else projection.weight + addition("default")


class Attention(nn.Module):
    """The projections of multi-head attention with reduced inner width. Their use depends on the side."""

    def __init__(self, dim: int, num_heads: int, downsample: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = dim // downsample  # half the width in cross attention, as published
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    @property
    def head_dim(self) -> int:
        return self.q_proj.out_features // self.num_heads

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def split(self, x: Tensor) -> Tensor:
        """(..., n, inner) -> (..., heads, n, head_dim)."""
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(-3, -2)

    def per_head(self, weight: Tensor) -> Tensor:
        """(inner, dim) -> (heads, head_dim, dim)."""
        return weight.unflatten(0, (self.num_heads, -1))

    def merge(self, x: Tensor) -> Tensor:
        """(..., heads, n, head_dim) -> out_proj of the joined heads, (..., n, dim)."""
        out: Tensor = self.out_proj(x.transpose(-3, -2).flatten(-2))
        return out

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Plain attention, among the few prompt tokens."""
        q, k, v = self.split(self.q_proj(q)), self.split(self.k_proj(k)), self.split(self.v_proj(v))
        return self.merge(F.scaled_dot_product_attention(q, k, v))

    # --- the absorbed forms ------------------------------------------------------------------------------------------

    def tokens_to_image(
        self, tokens: Tensor, keys: Tensor, pe_keys: Tensor, guidance: Guidance | None = None
    ) -> Tensor:
        """Tokens attend to image tokens.

        tokens: (N, T, C) with positions added. keys: (N, L, C) without. pe_keys: (heads, head_dim, L), W_k pe.
        Returns (N, T, C).
        """
        n, t, _ = tokens.shape
        q = self.split(self.q_proj(tokens)) * self.scale  # (N, H, T, d)
        scores = self.absorbed_scores(q, weight_of(self.k_proj), keys, pe_keys)
        weights = _attention(scores, guidance)
        read = torch.bmm(weights, keys).view(n, self.num_heads, t, -1)  # (N, H, T, C)
        # Values are projected after reading: (N, H, T, C) by (H, C, d), for a few tokens instead of L.
        out = read.to(tokens.dtype) @ self.per_head(weight_of(self.v_proj)).transpose(1, 2)
        return self.merge(out + self.v_proj.bias.view(self.num_heads, 1, -1))

    def image_to_tokens(self, keys: Tensor, pe_queries: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
        """Image tokens attend to tokens; the result is added to them.

        keys: (N, L, C). pe_queries: (heads, head_dim, L), W_q pe + b_q. tokens: (N, T, C) with positions; values
        without. Returns (N, L, C).
        """
        k = self.split(self.centred_keys(tokens))  # (N, H, T, d)
        scores = self.absorbed_scores(k, weight_of(self.q_proj), keys, pe_queries)
        return self.spread(keys, scores, values, in_place=not torch.is_grad_enabled())

    def centred_keys(self, tokens: Tensor) -> Tensor:
        """Scaled keys of tokens (N, T, C), minus their mean over T: (N, T, inner).

        A softmax over T ignores what all T have in common, but a low-precision dtype rounds scores relative to their
        size.
        """
        keys = self.k_proj(tokens) * self.scale
        return keys - keys.mean(dim=1, keepdim=True)

    def absorbed_scores(self, heads: Tensor, weight: Tensor, keys: Tensor, pe: Tensor) -> Tensor:
        """heads (N, H, T, d), from tokens, times keys (N, L, C) projected by weight (H * d, C), plus pe (H, d, L).

        Returns (N, H * T, L).
        """
        n, h, t, _ = heads.shape
        absorbed = (heads @ self.per_head(weight)).flatten(1, 2).to(keys.dtype)  # (N, H * T, C)
        scores = torch.bmm(absorbed, keys.transpose(1, 2))
        # Positions are the same for all prompts: one product per head, without repeating an operand N times.
        of_positions = heads.transpose(0, 1).flatten(1, 2).to(pe.dtype) @ pe
        # In place, to save a second array of the scores' size.
        added = scores.view(n, h, t, -1).add_(of_positions.view(h, n, t, -1).transpose(0, 1))
        return added.view(n, h * t, -1)

    def spread(self, keys: Tensor, scores: Tensor, values: Tensor, *, in_place: bool = False) -> Tensor:
        """keys (N, L, C) plus attention output: softmax of scores (N, H * T, L) over each head's T, then V W_o at once.

        Each head's weights sum to one, so a share of the bias in every row adds up to the bias; with the residual as
        the product's addend, (N, L, C) is accessed only once. in_place: the sum may overwrite keys.
        """
        n, t, _ = values.shape
        weights = scores.view(n, self.num_heads, t, -1).softmax(dim=2).flatten(1, 2)  # (N, H * T, L)
        add = keys.baddbmm_ if in_place else keys.baddbmm
        return add(weights.transpose(1, 2), self.folded(values).to(keys.dtype))

    def folded(self, values: Tensor) -> Tensor:
        """values (N, T, C) through V W_o of each head, with the head's share of the bias: (N, H * T, C)."""
        out_weight = weight_of(self.out_proj).T.unflatten(0, (self.num_heads, -1))  # (H, d, C)
        # Values through the output projection first: (N, H, T, C), a few rows, instead of N x L of them.
        folded = (self.split(self.v_proj(values)) @ out_weight).flatten(1, 2)
        return folded + self.out_proj.bias / self.num_heads


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """Decoder inputs from B images, computed once for all of their prompts.

    src: (B, L, C) image tokens (embedding plus dense prompt). The first layer's projections: read_keys and read_values,
    (B, heads, L, head_dim), for tokens -> image, write_queries for image -> tokens. Of the later attentions only the
    part that depends on positions: pe_keys[i] and pe_queries[i], (heads, head_dim, L); the last of pe_keys is for the
    final one.
    """

    src: Tensor
    read_keys: Tensor
    read_values: Tensor
    write_queries: Tensor
    pe_keys: list[Tensor]
    pe_queries: list[Tensor]
    fine: Tensor | None = None
    """(B, L, 4 * C / 4 + 16 * C / 8) features added during upscaling, from encoders that provide them; or, with
    `hq_dim`, (B, L, 16 * C / 8) of the HQ mask. If each of N prompts has its own image tokens (B = N), still one row
    for each image."""

    def __len__(self) -> int:
        return self.src.shape[0]

    def __getitem__(self, i: int) -> ImageTokens:
        """Image i alone, as a batch of one."""
        image = slice(i, i + 1)
        assert self.fine is None or len(self.fine) == len(self), "prompts with their own image tokens have no number i"
        return ImageTokens(
            self.src[image],
            self.read_keys[image],
            self.read_values[image],
            self.write_queries[image],
            self.pe_keys,  # without B: the same for all images
            self.pe_queries,
            None if self.fine is None else self.fine[image],
        )


@dataclass(frozen=True, slots=True)
class Guidance:
    """Guidance of a decoder towards one target, without training (PerSAM, arXiv 2305.03048, section 3.2)."""

    similarity: Tensor
    """(L,) in [0, 1]: added to what each token attends to in the image, followed by a second softmax (target-guided
    attention)."""
    target: Tensor
    """(C,) the target's embedding, added to every token before each layer (target-semantic prompting)."""


def _attention(scores: Tensor, guidance: Guidance | None) -> Tensor:
    """Attention weights (..., L) from scores of the same shape."""
    weights = scores.softmax(dim=-1)
    return weights if guidance is None else (weights + guidance.similarity.to(weights.dtype)).softmax(dim=-1)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden_dim)
        self.lin2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.self_attn = Attention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = Attention(dim, num_heads, downsample=2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = Attention(dim, num_heads, downsample=2)

    # --- tokens attend to the image: the same in both paths -----------------------------------------------------------

    def read_shared(self, image: ImageTokens, positions: Tensor, guidance: Guidance | None = None) -> Tensor:
        """The first layer's token side: all prompts of an image attend to the same image tokens.

        positions: (B * N, T, C), which are also the tokens. Returns (B * N, T, C).
        """
        # The first layer adds neither positions nor a residual, as published (`skip_first_layer_pe`).
        x = self.norm1(self.self_attn(positions, positions, positions))
        read = self.cross_attn_token_to_image
        # The prompts of an image are rows of one product: (B, H, N * T, d) times (B, H, L, d).
        q = read.split(read.q_proj(x + positions).view(len(image), -1, read.q_proj.out_features))
        q = q.to(image.read_keys.dtype)
        if guidance is None:
            out = F.scaled_dot_product_attention(q, image.read_keys, image.read_values)
        else:
            # torch's attention has no place for the second softmax.
            scores = q @ image.read_keys.transpose(-2, -1) * read.scale
            out = _attention(scores, guidance) @ image.read_values
        x = self.norm2(x + read.merge(out.to(positions.dtype)).view_as(x))
        return self.norm3(x + self.mlp(x))

    def read(
        self, x: Tensor, positions: Tensor, keys: Tensor, pe_keys: Tensor, guidance: Guidance | None = None
    ) -> Tensor:
        """A later layer's token side: each prompt has its own image tokens, keys (B * N, L, C)."""
        q = x + positions
        x = self.norm1(x + self.self_attn(q, q, x))
        x = self.norm2(x + self.cross_attn_token_to_image.tokens_to_image(x + positions, keys, pe_keys, guidance))
        return self.norm3(x + self.mlp(x))

    # --- image tokens attend to tokens: plain -------------------------------------------------------------------------

    def write_shared(self, image: ImageTokens, x: Tensor, positions: Tensor) -> Tensor:
        """The first layer's image side: image tokens per prompt, (B * N, L, C), from those of its image."""
        attn, b, (_, t, _) = self.cross_attn_image_to_token, len(image), x.shape
        centred = attn.centred_keys(x + positions)
        k = attn.split(centred.view(b, -1, centred.shape[-1]))
        scores = k.to(image.write_queries.dtype) @ image.write_queries.transpose(-2, -1)  # (B, H, N * T, L)
        # Rows of one product per image, back to one block per prompt: (B * N, H * T, L).
        scores = scores.view(b, attn.num_heads, -1, t, scores.shape[-1]).transpose(1, 2)
        scores = scores.reshape(x.shape[0], attn.num_heads * t, -1)
        # Not written in place: the prompts of an image share src.
        src = image.src[:, None].expand(b, x.shape[0] // b, -1, -1).flatten(0, 1)
        return self.norm4(attn.spread(src, scores, x))

    def write_absorbed(self, keys: Tensor, pe_queries: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        """A later layer's image side. keys: (B * N, L, C); their memory is reused if no gradient is needed."""
        return self.norm4(self.cross_attn_image_to_token.image_to_tokens(keys, pe_queries, x + positions, x))

    # --- image tokens attend to tokens: kernel ------------------------------------------------------------------------

    def write(self, keys: Tensor, queries: Tensor, tokens: Tensor, values: Tensor, *, absorb: bool) -> Tensor:
        """Image tokens attend to tokens, then norm4, in one pass, without storing the scores.

        keys: (B, L, C) for N / B prompts each. queries: (B, heads, L, head_dim), `write_queries`; or with absorb only
        those of the positions, (heads, head_dim, L), because the rest depends on keys. tokens and values: (N, T, C) as
        in
        `image_to_tokens`. Returns (N, L, C).
        """
        from samray.sam.kernels.image_to_tokens import image_to_tokens

        attn = self.cross_attn_image_to_token
        k = attn.split(attn.centred_keys(tokens))  # (N, H, T, d)
        absorbed = (k @ attn.per_head(weight_of(attn.q_proj))).flatten(1, 2) if absorb else None
        return image_to_tokens(keys, queries, k, absorbed, attn.folded(values), self.norm4)


class TwoWayTransformer(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_dim: int, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(dim, num_heads, mlp_dim) for _ in range(depth))
        self.final_attn_token_to_image = Attention(dim, num_heads, downsample=2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def blocks(self) -> list[TwoWayBlock]:
        return [b for b in self.layers if isinstance(b, TwoWayBlock)]

    def prepare(
        self, src: Tensor, pe: Tensor, fine: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> ImageTokens:
        """src: (B, L, C) image tokens; pe: (L, C) their positions; fine: passed on. dtype: to store them in."""
        src = src.contiguous()  # every prompt starts with a copy of it
        first, *later = self.blocks()
        read, write = first.cross_attn_token_to_image, first.cross_attn_image_to_token
        # The first layer's projections see the whole image tokens; the later ones only their positions in advance.
        placed = src + pe
        # Without the key's bias, which drops out of the softmax over L.
        pe_keys = [
            a.split(F.linear(pe, weight_of(a.k_proj))).transpose(1, 2).contiguous()
            for a in (*(b.cross_attn_token_to_image for b in later), self.final_attn_token_to_image)
        ]
        writes = [b.cross_attn_image_to_token for b in later]
        # With the query's bias: this softmax is over T, and its product with each key differs.
        pe_queries = [a.split(a.q_proj(pe)).transpose(1, 2).contiguous() for a in writes]

        def as_stored(x: Tensor) -> Tensor:
            return x if dtype in (None, src.dtype) else x.to(dtype)

        # Computed in the prompt side's dtype, usually float32, and rounded only to be stored.
        return ImageTokens(
            src=as_stored(src),
            read_keys=as_stored(read.split(read.k_proj(placed))),
            read_values=as_stored(read.split(read.v_proj(src))),
            write_queries=as_stored(write.split(write.q_proj(placed))),
            pe_keys=[as_stored(x) for x in pe_keys],
            pe_queries=[as_stored(x) for x in pe_queries],
            fine=fine,
        )

    def forward(self, image: ImageTokens, tokens: Tensor, guidance: Guidance | None = None) -> tuple[Tensor, Tensor]:
        """tokens: (B, N, T, C), N prompts per image. Returns tokens (B * N, T, C) and image tokens (B * N, L, C)."""
        positions = tokens.flatten(0, 1)
        if guidance is not None:
            # PerSAM adds the target to the tokens in place, and so to what it uses as their positions.
            positions = positions + guidance.target.to(positions.dtype)
        # The kernel has no backward pass, and with many tokens its rows do not fit on the chip.
        fused = enabled(tokens.device) and tokens.shape[2] <= MAX_TOKENS and not torch.is_grad_enabled()
        fused = fused and guidance is None
        x, keys = self._fused(image, positions) if fused else self._plain(image, positions, guidance)
        query = x + positions if guidance is None else x + positions + guidance.target.to(x.dtype)
        # Positions are added once more to the queries of the last attention, as published.
        x = x + self.final_attn_token_to_image.tokens_to_image(query, keys, image.pe_keys[-1])
        return self.norm_final_attn(x), keys

    def _plain(self, image: ImageTokens, positions: Tensor, guidance: Guidance | None = None) -> tuple[Tensor, Tensor]:
        """All layers with torch's own operations."""
        first, *later = self.blocks()
        x = first.read_shared(image, positions, guidance)
        keys = first.write_shared(image, x, positions)
        # Not strict: the last of pe_keys is for the attention after the layers.
        for block, pe_keys, pe_queries in zip(later, image.pe_keys, image.pe_queries, strict=False):
            if guidance is not None:
                # Before each layer; in the first it is already a part of positions.
                x = x + guidance.target.to(x.dtype)
            x = block.read(x, positions, keys, pe_keys, guidance)
            keys = block.write_absorbed(keys, pe_queries, x, positions)
        return x, keys

    def _fused(self, image: ImageTokens, positions: Tensor) -> tuple[Tensor, Tensor]:
        """All layers, with the image side's writes in the kernel `samray.sam.kernels.image_to_tokens`."""
        first, *later = self.blocks()
        x = first.read_shared(image, positions)
        keys = first.write(image.src, image.write_queries, x + positions, x, absorb=False)
        for block, pe_keys, pe_queries in zip(later, image.pe_keys, image.pe_queries, strict=False):
            x = block.read(x, positions, keys, pe_keys)
            keys = block.write(keys, pe_queries, x + positions, x, absorb=True)
        return x, keys
