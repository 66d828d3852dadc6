"""Read checkpoint files of various projects as state dicts with samray's names, which are those of Meta's SAM.

Supports Meta's `.pth` and `.pt`, MobileSAM's `.pt`, Hugging Face's safetensors or `pytorch_model.bin`, and samray's
safetensors; `samray.sam.layouts` has the names in each. The format is detected from a file's first bytes and keys,
never from its extension. Nothing in a file is executed: safetensors has only tensors, and `torch.load` runs with
`weights_only=True`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from samray.errors import ConfigError
from samray.sam.layouts import HF_SAM, HF_SHARED_POSITIONS, HF_TIED_POSITIONS, layout_of, renamed

_ZIP_MAGIC = b"PK\x03\x04"  # torch.save since PyTorch 1.6
_PICKLE_MAGIC = b"\x80"  # older torch.save
_LFS_MAGIC = b"version https://git-lfs"

FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The types of weights in a file. Those of 8 bits are meant with scales, which a model here does not have."""
LARGEST: Final = torch.finfo(torch.float32).max
"""The largest weight of a model, which is in float32."""


class StateDict(dict[str, Tensor]):
    """Tensors with samray's names."""

    family: str | None = None
    """The model family, if the names in the file say more than the tensors here do."""


def read_state_dict(path: Path) -> StateDict:
    """The tensors of a checkpoint file with Meta's names, on the CPU, in their stored dtypes.

    Raises ConfigError if the file is not a checkpoint, is truncated, or cannot be loaded without executing code.
    """
    return to_meta_names(read_tensors(path), path)


def to_meta_names(state: dict[str, Tensor], path: Path) -> StateDict:
    """samray's names, which are those of Meta's SAM, for the names of a known layout; what it does not use is left out.

    Raises: ConfigError if a file has the table of positions twice, with different values.
    """
    layout = layout_of(state)
    family = layout.family(state)
    tied = next((key for key in state if renamed(key, layout.prefixes) == HF_TIED_POSITIONS), None)
    if tied is not None:
        state = dict(state)
        shared = tied.removesuffix(HF_TIED_POSITIONS) + HF_SHARED_POSITIONS
        value = state.pop(tied)
        if not torch.equal(state.setdefault(shared, value), value):
            # If the two differ, neither is certain.
            raise ConfigError(f"{path}: {shared} and {tied} differ; SAM has one table of positions")
    named = StateDict(layout.named(state))
    named.family = family
    return named


def meta_name(key: str) -> str:
    """Meta's name for a tensor's name in a Hugging Face checkpoint of SAM."""
    return renamed(key, HF_SAM.renames)


def is_within(tensor: Tensor, largest: float = LARGEST) -> bool:
    """Whether all values are numbers of at most this size. tensor: one of `FLOATS`, not empty."""
    # One pass without a copy; NaN is passed on, and is not within.
    low, high = torch.aminmax(tensor.detach())
    return -largest <= float(low) and float(high) <= largest


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file as they are named in it, all with values in memory. Raises: as `read_state_dict`."""
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
        if "PytorchStreamReader" in str(error):
            raise ConfigError(
                f"{path} is truncated or damaged, or a zip that is not PyTorch's; download or copy it again"
            ) from error
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
            f"({len(others)} of {len(loaded)} entries) are something else{_advice(loaded)}"
        )
    for key, value in loaded.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            kind = "quantized" if value.is_quantized else "without values (meta)" if value.is_meta else "sparse"
            raise ConfigError(f"{path}: {key} is {kind}; save the weights as ordinary tensors of floats")
    return {str(key): value for key, value in loaded.items()}


def _advice(loaded: dict[Any, Any]) -> str:
    """What to do with a training checkpoint, if an entry of it is a state dict; else ""."""
    for key, value in loaded.items():
        if isinstance(value, dict) and value and all(isinstance(part, Tensor) for part in value.values()):
            return f"; {key} has tensors: save only that entry, torch.save(torch.load(FILE)[{key!r}], NEW_FILE)"
    return ""
