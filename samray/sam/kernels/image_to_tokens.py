"""Image tokens attend to prompt tokens, with residual and layer norm: one pass over the image tokens.

The plain code (`samray.sam.transformer`) writes the scores, reads them for the softmax, adds the product to the keys
and reads the sum for the norm. Here a block of image tokens stays on the chip from load to store; the prompt side, a
few dozen rows per prompt, comes from the cache. Intermediate arithmetic is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from samray.sam.precision import products_in_tf32

_ROWS = 16
"""Rows (heads times tokens) processed together: more rows, or longer blocks, would spill registers."""
_MIN_DOT = 16
"""The smallest side of a matrix product in Triton."""
LAUNCH = {"num_warps": 8, "num_stages": 2}


def image_to_tokens(
    keys: Tensor, queries: Tensor, heads: Tensor, absorbed: Tensor | None, folded: Tensor, norm: nn.LayerNorm
) -> Tensor:
    """norm(keys + P^T folded), P the softmax over each head's T of heads . queries (+ absorbed . keys).

    keys: (B, L, C) for N / B prompts each, C a power of two; not modified. queries: (B, H, L, d), or (H, d, L)
    if equal for all, with any strides. heads: (N, H, T, d), scaled; T at most `MAX_TOKENS`. absorbed and folded:
    (N, H * T, C). Returns (N, L, C) in the dtype of keys.
    """
    n, num_heads, t, d = heads.shape
    b, length, c = keys.shape
    if queries.dim() == 3:
        # (H, d, L) to (B, H, L, d).
        queries = queries.transpose(1, 2).expand(b, -1, -1, -1)  # stride 0: no copy per image
    dtype = keys.dtype
    keys, queries, heads = keys.contiguous(), queries.to(dtype), heads.to(dtype).contiguous()
    folded = folded.to(dtype).contiguous()
    out = keys.new_empty(n, length, c)
    sizes = kernel_sizes(num_heads, t, d, c, dtype)
    with torch.cuda.device_of(keys):  # Triton uses the current GPU, which may not be the tensors'
        # One program per block of image tokens and prompt.
        kernel[(triton.cdiv(length, sizes["BLOCK"]), n)](
            keys,
            queries,
            heads,
            folded if absorbed is None else absorbed.to(dtype).contiguous(),  # any tensor, if not read
            folded,
            norm.weight,
            norm.bias,
            out,
            n // b,
            length,
            norm.eps,
            *queries.stride(),
            **sizes,
            ABSORBED=absorbed is not None,
            # For float32, as exact as torch's products: three tf32 products are, one is not.
            PRECISION="tf32" if products_in_tf32() else "tf32x3",
            **LAUNCH,
        )
    return out


def kernel_sizes(num_heads: int, t: int, d: int, c: int, dtype: torch.dtype) -> dict[str, int]:
    """The kernel's sizes for `num_heads` heads of width d, t tokens, c channels; powers of two where required."""
    # Triton's shapes are powers of two, and the sides of its products at least 16: pad tokens and widths,
    # and take several heads at a time if the tokens are few.
    padded_t, group = max(triton.next_power_of_2(t), 8), 1
    while num_heads % (2 * group) == 0 and 2 * group * padded_t <= _ROWS:
        group *= 2
    return {
        "H": num_heads,
        "T": t,
        "D": d,
        "C": c,
        "GROUP": group,
        "PADDED_T": max(padded_t, _MIN_DOT // group),
        "PADDED_D": max(triton.next_power_of_2(d), _MIN_DOT // group),
        "BLOCK": 16 if dtype == torch.float32 else 64,
    }


@triton.jit
def kernel(
    keys,
    queries,
    heads,
    absorbed,
    folded,
    norm_weight,
    norm_bias,
    out,
    prompts_per_image,
    length,
    eps,
    query_stride_b,
    query_stride_h,
    query_stride_l,
    query_stride_d,
    H: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_T: tl.constexpr,
    PADDED_D: tl.constexpr,
    ABSORBED: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK image tokens of one prompt, GROUP heads at a time. A group's rows are (head, token), tokens padded.

    Long, because a kernel keeps everything in registers: parts split off would be inlined again.
    """
    prompt = tl.program_id(1).to(tl.int64)  # hundreds of prompts have more elements than int32 can index
    image = prompt // prompts_per_image
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (at < length)[:, None]
    channel = tl.arange(0, C)
    cells = at[:, None] * C + channel[None, :]
    x = tl.load(keys + image * length * C + cells, mask=inside, other=0.0)
    total = x.to(tl.float32)  # the residual; heads are added to it

    row = tl.arange(0, GROUP * PADDED_T)
    row_head, token = row // PADDED_T, row % PADDED_T
    inner = tl.arange(0, GROUP * PADDED_D)
    inner_head, dim = inner // PADDED_D, inner % PADDED_D
    # The blocks of the block-diagonal matrix: rows and columns of the same head.
    is_same_head = inner_head[:, None] == row_head[None, :]
    real = token < T
    for first in range(0, H, GROUP):
        # Put the group's queries next to each other against a block-diagonal matrix: one product for all heads.
        row_at = (prompt * H + first + row_head) * T + token
        of_image = (first + inner_head) * query_stride_h + dim * query_stride_d
        query = tl.load(
            queries + image * query_stride_b + at[:, None].to(tl.int64) * query_stride_l + of_image[None, :],
            mask=inside & (dim < D)[None, :],
            other=0.0,
        )
        head = tl.load(
            heads + row_at[None, :] * D + dim[:, None],
            mask=is_same_head & (dim < D)[:, None] & real[None, :],
            other=0.0,
        )
        scores = tl.dot(query, head, input_precision=PRECISION)
        if ABSORBED:
            weight = tl.load(absorbed + row_at[None, :] * C + channel[:, None], mask=real[None, :], other=0.0)
            scores = tl.dot(x, weight, scores, input_precision=PRECISION)
        # A softmax per head over its real tokens: (BLOCK, GROUP, PADDED_T).
        scores = tl.where(real[None, :], scores, float("-inf")).reshape(BLOCK, GROUP, PADDED_T)
        scores = tl.exp(scores - tl.max(scores, axis=2, keep_dims=True))
        shares = (scores / tl.sum(scores, axis=2, keep_dims=True)).reshape(BLOCK, GROUP * PADDED_T)
        value = tl.load(folded + row_at[:, None] * C + channel[None, :], mask=real[:, None], other=0.0)
        total = tl.dot(shares.to(value.dtype), value, total, input_precision=PRECISION)

    # Layer norm over the channels, which a block has whole.
    centred = total - tl.sum(total, axis=1, keep_dims=True) / C
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / C
    weight = tl.load(norm_weight + channel).to(tl.float32)[None, :]
    bias = tl.load(norm_bias + channel).to(tl.float32)[None, :]
    normed = centred / tl.sqrt(variance + eps) * weight + bias
    tl.store(out + prompt * length * C + cells, normed.to(out.dtype.element_ty), mask=inside)
