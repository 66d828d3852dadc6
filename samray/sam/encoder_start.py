"""Start a plain ViT from a masked autoencoder's file: MAE's own, Hugging Face's ViTMAE, or samray's.

MAE has no windows, relative positions or neck: those of the model stay as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from samray.errors import ConfigError
from samray.sam import fetch
from samray.sam.checkpoints import key_problems, value_problems
from samray.sam.formats import read_tensors
from samray.sam.layouts import renamed
from samray.sam.sam import Sam
from samray.sam.spec import VitSpec
from samray.sam.weights_file import local_weights_file

SETTING: Final = "train.encoder_checkpoint"

_NOT_OF_ENCODER = re.compile(r"^(cls_token|mask_token|norm\.|fc_norm\.|head\.|decoder)")
"""MAE's class token, final norm, decoder and classifiers: SAM's encoder has none of them."""

# ViTMAE's names to samray's, applied in this order: later patterns expect what earlier ones made.
_HF_RENAMES = (
    (r"^vit\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.lin1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.lin2."),
    (r"^layernorm\.", "norm."),
)


def resolve(checkpoint: str) -> Path:
    """The local file. Raises: ConfigError if there is none, StorageError."""
    return local_weights_file(checkpoint, SETTING)


def file_sha256(checkpoint: str) -> str:
    """SHA-256 (hex) of the file: part of a run's identity."""
    return fetch.file_sha256(resolve(checkpoint))


def load_encoder(sam: Sam, checkpoint: str, *, sha256: str | None = None) -> None:
    """Replace the weights of the model's image encoder, except neck and relative positions, which MAE does not have.

    Positions are interpolated to the model's grid, and the patch embedding to its patch size (bicubic), as in ViTDet.
    sha256: expected digest of the file; None accepts any. Raises: ConfigError that names the keys that do not fit,
    or if the model is not a plain ViT; StorageError.
    """
    path = resolve(checkpoint)
    with fetch.unchanged(path, sha256):
        state = read_encoder(path, sam)
    with torch.no_grad():
        sam.image_encoder.load_state_dict(state, strict=False)


def check_encoder(sam: Sam, checkpoint: str) -> None:
    """Raises as `load_encoder` would. sam: may be on the meta device."""
    read_encoder(resolve(checkpoint), sam)


def read_encoder(path: Path, sam: Sam) -> dict[str, Tensor]:
    """The file's tensors with the names and shapes of the model's encoder; sam may be on the meta device.

    Raises: ConfigError.
    """
    return fit_encoder(read_tensors(path), sam, path)


def fit_encoder(tensors: Mapping[str, Tensor], sam: Sam, path: Path) -> dict[str, Tensor]:
    """As `read_encoder`. tensors: as named in the file; path: for messages."""
    spec = sam.spec.encoder
    if not isinstance(spec, VitSpec):
        raise ConfigError(f"{SETTING} is for models with a plain ViT; {sam.spec.name} is not one")
    state = to_encoder_names(tensors)
    if "pos_embed" in state:
        state["pos_embed"] = _positions(state["pos_embed"], sam.spec.grid, path)
    filters = state.get("patch_embed.proj.weight")
    if filters is not None:
        state["patch_embed.proj.weight"] = _resized(filters, spec.patch)
    # What MAE does not have is not expected in the file.
    shapes = {
        key: tuple(value.shape)
        for key, value in sam.image_encoder.state_dict().items()
        if not key.startswith("neck.") and ".rel_pos_" not in key
    }
    problems = key_problems(shapes, state) or value_problems(shapes, state)
    if problems:
        raise ConfigError(
            f"{SETTING}: {path} is not a masked autoencoder that fits {sam.spec.name}: {'; '.join(problems)}"
        )
    return {key: value.float() for key, value in state.items()}


def to_encoder_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of samray's encoder for MAE's, ViTMAE's or samray's own; what the encoder does not have is left out."""
    if any("embeddings.position_embeddings" in key for key in state):
        return _fused({renamed(key, _HF_RENAMES): value for key, value in state.items()})
    plain = {key.removeprefix("image_encoder."): value for key, value in state.items()}
    return {
        key.replace(".mlp.fc1.", ".mlp.lin1.").replace(".mlp.fc2.", ".mlp.lin2."): value
        for key, value in plain.items()
        if not _NOT_OF_ENCODER.match(key)
    }


def _fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One qkv for each block's query, key and value."""
    kept = {key: value for key, value in state.items() if not _NOT_OF_ENCODER.match(key)}
    fused = {}
    for key, value in kept.items():
        if ".attn.query." in key:
            # In the order of qkv. If one is missing or misshapen, the block has no qkv, and `key_problems` names that.
            parts = [kept.get(key.replace(".query.", f".{name}.")) for name in ("query", "key", "value")]
            if all(part is not None and part.shape == value.shape and part.ndim for part in parts):
                fused[key.replace(".query.", ".qkv.")] = torch.cat([part for part in parts if part is not None])
        elif ".attn.key." not in key and ".attn.value." not in key:
            fused[key] = value
    return fused


def _positions(positions: Tensor, grid: int, path: Path) -> Tensor:
    """(1, 1 + n, D) of a class token and n = g x g cells, or (1, g, g, D) -> (1, grid, grid, D)."""
    if positions.ndim == 3 and positions.numel():
        side = math.isqrt(positions.shape[1])
        if side * side + 1 == positions.shape[1]:
            # The class token's position comes first in MAE's files.
            positions = positions[:, 1:]
        elif side * side != positions.shape[1]:
            raise ConfigError(f"{SETTING}: {path} has positions of {positions.shape[1]} cells, which is not a square")
        positions = positions.unflatten(1, (side, side))  # (1, g, g, D)
    if positions.ndim != 4:
        return positions
    return _resized(positions.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)


def _resized(maps: Tensor, side: int) -> Tensor:
    """(N, C, a, a) -> (N, C, side, side). Other shapes are returned as they are: `key_problems` names them."""
    is_square = maps.ndim == 4 and maps.shape[2] == maps.shape[3] and maps.numel() > 0
    if not is_square or maps.shape[2] == side:
        return maps
    return F.interpolate(maps.float(), (side, side), mode="bicubic", align_corners=False)
