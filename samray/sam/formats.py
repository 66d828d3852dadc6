"""Read checkpoint files of various projects as state dicts with Meta's names.

Supports Meta's `.pth`, MobileSAM's `.pt`, Hugging Face's `facebook/sam-vit-*` (safetensors or `pytorch_model.bin`) and
samray's safetensors. The format is detected from a file's first bytes and keys, never from its extension. Nothing in a
file is executed: safetensors has only tensors, and `torch.load` runs with `weights_only=True`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from samray.errors import ConfigError

_ZIP_MAGIC = b"PK\x03\x04"  # torch.save since PyTorch 1.6
_PICKLE_MAGIC = b"\x80"  # older torch.save
_LFS_MAGIC = b"version https://git-lfs"

# In MobileSAM's file, but not needed for segmentation: TinyViT's classifier, and tables derived from the window size.
_MOBILE_SAM_EXTRAS = re.compile(r"^image_encoder\.(norm_head|head)\.|\.attention_bias_idxs$")

_HF_SHARED_POSITIONS = "shared_image_embedding.positional_embedding"
_HF_TIED_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"  # the same tensor; some files have it twice

_GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"

# Hugging Face's names to Meta's, applied in this order. An MLP's `layers.0` is its second layer, so it is renamed
# first.
_HF_RENAMES = (
    (r"^shared_image_embedding\.positional_embedding$", _GAUSSIAN),
    (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head)\.)layers\.0\.", r"\1layers.1."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head)\.)proj_in\.", r"\1layers.0."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head)\.)proj_out\.", r"\1layers.2."),
    (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file with Meta's names, on the CPU, in their stored dtypes.

    Raises ConfigError if the file is not a checkpoint, is truncated, or cannot be loaded without executing code.
    """
    return to_meta_names(read_tensors(path), path)


def to_meta_names(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Rename Hugging Face's keys and drop MobileSAM's classifier; keys with Meta's names are unchanged."""
    if _HF_SHARED_POSITIONS in state or any(key.startswith("vision_encoder.") for key in state):
        # Hugging Face's layout, which may have the table twice. If the two differ, neither is certain.
        tied = state.get(_HF_TIED_POSITIONS)
        if tied is not None and not torch.equal(state.get(_HF_SHARED_POSITIONS, tied), tied):
            raise ConfigError(
                f"{path}: {_HF_SHARED_POSITIONS} and {_HF_TIED_POSITIONS} differ; SAM has one table of positions"
            )
        shared = {} if tied is None else {_HF_SHARED_POSITIONS: tied}
        state = {key: value for key, value in (shared | state).items() if key != _HF_TIED_POSITIONS}
        return {meta_name(key): value for key, value in state.items()}
    return {key: value for key, value in state.items() if not _MOBILE_SAM_EXTRAS.search(key)}


def meta_name(key: str) -> str:
    """Meta's name for a tensor's name in a Hugging Face checkpoint."""
    return renamed(key, _HF_RENAMES)


def renamed(key: str, renames: Iterable[tuple[str, str]]) -> str:
    """The name after all substitutions (pattern, replacement), in their order."""
    for pattern, name in renames:
        key = re.sub(pattern, name, key)
    return key


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file as they are named in it. Raises: as `read_state_dict`."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)  # enough for every magic number
    except OSError as error:
        raise ConfigError(f"the checkpoint {path} cannot be read: {error.strerror or error}") from error
    # A clone without LFS has a small text file in place of the weights.
    if head.startswith(_LFS_MAGIC):
        raise ConfigError(f"{path} is a Git LFS pointer, not the weights themselves; fetch them with `git lfs pull`")
    if _is_safetensors(head, size):
        try:
            return load_file(path, device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            raise ConfigError(f"{path} is a damaged safetensors file: {error}") from error
    if head.startswith((_ZIP_MAGIC, _PICKLE_MAGIC)):
        return _torch_load(path, is_zip=head.startswith(_ZIP_MAGIC))
    raise ConfigError(
        f"{path} ({size:,} bytes) is not a checkpoint: expected a PyTorch state dict (.pth, .pt, .bin) or safetensors"
    )


def _is_safetensors(head: bytes, size: int) -> bool:
    """A little-endian uint64 length of the JSON header, then that header."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _torch_load(path: Path, *, is_zip: bool) -> dict[str, Tensor]:
    try:
        # mmap: the file's pages are read as they are copied into the model, without an extra copy in memory.
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except EOFError as error:
        raise ConfigError(f"{path} is truncated") from error
    except pickle.UnpicklingError as error:
        # A truncated file raises the same error as forbidden code; only the text differs.
        if "truncated" in str(error):
            raise ConfigError(f"{path} is truncated") from error
        raise ConfigError(
            f"{path} has more than tensors, and samray does not execute code in checkpoints; "
            "save only its state_dict() and use that file"
        ) from error
    except Exception as error:  # flipped bytes can make an unpickler raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path} is a damaged PyTorch file: {reason}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} is not a state dict: expected a dict of tensors, found a {type(loaded).__name__}")
    if list(loaded) == ["model"] and isinstance(loaded["model"], dict):  # as MAE's files are
        loaded = loaded["model"]
    # A training checkpoint, for example, also has an optimizer's state and counters.
    if others := [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]:
        raise ConfigError(
            f"{path} is not a state dict: expected only tensors, but {', '.join(others[:3])} "
            f"({len(others)} of {len(loaded)} entries) are something else"
        )
    return {str(key): value for key, value in loaded.items()}
