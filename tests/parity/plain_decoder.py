"""The mask decoder as the paper's appendix A describes it, written out plainly: the oracle of samray's rearranged one.

Every prompt has image tokens of its own, every attention projects queries, keys and values, all four masks are upscaled
by transposed convolutions. Weights come from a state dict under Meta's names. Slow on purpose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def decode(
    state: State,
    num_heads: int,
    embedding: Tensor,
    positions: Tensor,
    sparse: Tensor,
    dense: Tensor,
    similarity: Tensor | None = None,
    target: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """embedding, positions: (C, h, w); sparse: (N, P, C); dense: (N, C, h, w). Returns (N, 4, 4h, 4w), IoU (N, 4).

    similarity: (L,) and target: (C,) as PerSAM's code adds them (arXiv 2305.03048, section 3.2).
    """
    prefix = "mask_decoder."
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    n, (c, h, w) = len(sparse), embedding.shape
    output_tokens = torch.cat([state["iou_token.weight"], state["mask_tokens.weight"]])
    tokens = torch.cat([output_tokens.expand(n, -1, -1), sparse], dim=1)
    image = (embedding + dense).flatten(2).transpose(1, 2)  # (N, L, C)
    image_positions = positions.flatten(1).T.expand(n, -1, -1)

    tokens, image = _two_way_transformer(state, num_heads, tokens, image, image_positions, similarity, target)

    iou = _mlp(state, "iou_prediction_head", tokens[:, 0])
    maps = image.transpose(1, 2).reshape(n, c, h, w)
    maps = F.conv_transpose2d(maps, state["output_upscaling.0.weight"], state["output_upscaling.0.bias"], stride=2)
    mean = maps.mean(dim=1, keepdim=True)
    variance = (maps - mean).square().mean(dim=1, keepdim=True)
    maps = (maps - mean) / torch.sqrt(variance + 1e-6)
    maps = maps * state["output_upscaling.1.weight"][:, None, None] + state["output_upscaling.1.bias"][:, None, None]
    maps = F.gelu(maps)
    maps = F.conv_transpose2d(maps, state["output_upscaling.3.weight"], state["output_upscaling.3.bias"], stride=2)
    maps = F.gelu(maps)
    masks = []
    for i in range(4):
        weights = _mlp(state, f"output_hypernetworks_mlps.{i}", tokens[:, 1 + i])
        masks.append(torch.einsum("nc,nchw->nhw", weights, maps))
    return torch.stack(masks, dim=1), iou


def _two_way_transformer(
    state: State,
    num_heads: int,
    prompt: Tensor,
    image: Tensor,
    image_positions: Tensor,
    similarity: Tensor | None,
    target: Tensor | None,
) -> tuple[Tensor, Tensor]:
    prompt = prompt.clone()
    queries, keys = prompt, image
    for i in range(2):
        if target is not None:
            queries += target  # in place, as published: in the first layer this changes `prompt`, too
        layer = f"transformer.layers.{i}"
        if i == 0:  # the first layer's tokens are their own positions
            queries = _attention(state, f"{layer}.self_attn", num_heads, queries, queries, queries)
        else:
            placed = queries + prompt
            queries = queries + _attention(state, f"{layer}.self_attn", num_heads, placed, placed, queries)
        queries = _norm(state, f"{layer}.norm1", queries)

        placed, placed_keys = queries + prompt, keys + image_positions
        name = f"{layer}.cross_attn_token_to_image"
        queries = queries + _attention(state, name, num_heads, placed, placed_keys, keys, similarity)
        queries = _norm(state, f"{layer}.norm2", queries)

        hidden = F.relu(_linear(state, f"{layer}.mlp.lin1", queries))
        queries = _norm(state, f"{layer}.norm3", queries + _linear(state, f"{layer}.mlp.lin2", hidden))

        placed, placed_keys = queries + prompt, keys + image_positions
        name = f"{layer}.cross_attn_image_to_token"
        keys = _norm(state, f"{layer}.norm4", keys + _attention(state, name, num_heads, placed_keys, placed, queries))

    placed, placed_keys = queries + prompt, keys + image_positions
    if target is not None:
        placed += target
    name = "transformer.final_attn_token_to_image"
    queries = queries + _attention(state, name, num_heads, placed, placed_keys, keys)
    return _norm(state, "transformer.norm_final_attn", queries), keys


def _attention(
    state: State, name: str, num_heads: int, q: Tensor, k: Tensor, v: Tensor, similarity: Tensor | None = None
) -> Tensor:
    q, k, v = (_linear(state, f"{name}.{part}_proj", x) for part, x in (("q", q), ("k", k), ("v", v)))
    heads = []
    for q_head, k_head, v_head in zip(*(x.chunk(num_heads, dim=-1) for x in (q, k, v)), strict=True):
        scores = q_head @ k_head.transpose(1, 2) / q_head.shape[-1] ** 0.5
        weights = scores.softmax(dim=-1)
        if similarity is not None:
            weights = (weights + similarity).softmax(dim=-1)
        heads.append(weights @ v_head)
    return _linear(state, f"{name}.out_proj", torch.cat(heads, dim=-1))


def _mlp(state: State, name: str, x: Tensor) -> Tensor:
    x = F.relu(_linear(state, f"{name}.layers.0", x))
    x = F.relu(_linear(state, f"{name}.layers.1", x))
    return _linear(state, f"{name}.layers.2", x)


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)
