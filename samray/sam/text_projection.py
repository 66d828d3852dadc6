"""SAM's text prompt: a learned projection of CLIP embeddings to a prompt token, stored with the weights.

Trained on CLIP's embeddings of images; a text's embedding then takes their place. Source: SAM paper, section 7.5 and
appendix D.5. The authors did not publish one, so its names are samray's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

PREFIX: Final = "prompt_encoder.text_projection."
CLIP_SHA256: Final = f"{PREFIX}clip_sha256"


class TextProjection(nn.Linear):
    """Linear, from unit CLIP embeddings (..., D) to tokens (..., C)."""

    clip_sha256: Tensor

    def __init__(self, clip_dim: int, embed_dim: int, clip_sha256: bytes = bytes(32)) -> None:
        """clip_sha256: SHA-256 of the weights file of the CLIP whose embeddings it takes."""
        super().__init__(clip_dim, embed_dim)
        # Tokens of the size of the learned ones: with nn.Linear's own start they would be lost next to these at first.
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)
        # A tensor, because a file of weights has nothing else: another CLIP of the same width would give noise.
        self.register_buffer("clip_sha256", torch.tensor(list(clip_sha256), dtype=torch.uint8))

    @property
    def clip_sha256_hex(self) -> str:
        return bytes(self.clip_sha256.tolist()).hex()


def projection_shapes(state: Mapping[str, Tensor], embed_dim: int) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint with these tensors should have of a text projection; {} if it has none of them."""
    if not any(key.startswith(PREFIX) for key in state):
        return {}
    weight = state.get(f"{PREFIX}weight")
    clip_dim = weight.shape[1] if weight is not None and weight.ndim == 2 else 1
    return {
        f"{PREFIX}weight": (embed_dim, clip_dim),
        f"{PREFIX}bias": (embed_dim,),
        CLIP_SHA256: (hashlib.sha256().digest_size,),
    }


def initial_state(begun: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with which a training begins, from those of a checkpoint, for a model with the tensors `wanted`.

    Without a text projection if the model has none, or one for another CLIP: it keeps its own initial values then.
    """
    fits = CLIP_SHA256 in begun and CLIP_SHA256 in wanted and torch.equal(begun[CLIP_SHA256], wanted[CLIP_SHA256])
    kept = {key: value for key, value in wanted.items() if key.startswith(PREFIX)}
    return {key: value for key, value in begun.items() if fits or not key.startswith(PREFIX)} | ({} if fits else kept)
