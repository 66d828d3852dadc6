"""LoRA adapters (`train.trainable=lora`): small safetensors files, merged into a model's weights when it is loaded.

For each adapted matrix W of shape (out, in) a file has `NAME.lora_A.weight` (r, in) and `NAME.lora_B.weight` (out, r).
The merged matrix is W + scale * B A. Its metadata name the base model, the SHA-256 of the base weights, and the scale.
Source: Hu et al., "LoRA" (2021), section 4.1; the tensors' names are those of `peft`, which is needed only to train.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from samray.errors import ConfigError
from samray.sam.formats import FLOATS, LARGEST, is_within
from samray.sam.weights_file import ADAPTER_FORMAT, read_adapter_header
from samray.sam.weights_file import ADAPTER_SETTING as SETTING

_A, _B = ".lora_A.weight", ".lora_B.weight"
_LARGEST_CHANGE: Final = torch.finfo(torch.float16).max
"""Largest change of a weight: with model.dtype=float16 a larger one is infinite. Real ones are far smaller."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """The content of a file."""

    path: Path
    scale: float
    pairs: dict[str, tuple[Tensor, Tensor]]
    """Name of the adapted module -> A (r, in) and B (out, r)."""

    def check(self, model: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises: ConfigError if a pair does not fit the model's tensors, which have these shapes."""
        for name, (a, b) in self.pairs.items():
            shape, product = shapes.get(f"{name}.weight"), (b.shape[0], a.shape[1])
            if shape != product:
                raise ConfigError(
                    f"{SETTING}: {self.path} does not fit {model}: {name}.weight is {shape or 'not there'}, the"
                    f" adapter's is {product}"
                )
            if not is_within(self._change(name), _LARGEST_CHANGE):
                raise _damaged(self.path, f"with its scale {self.scale:g}, {name} is not finite in half precision")

    @torch.no_grad()
    def merge(self, sam: nn.Module) -> None:
        """Add the products to the weights of a float32 model, in place. It must have been checked."""
        for name in self.pairs:
            sam.get_parameter(f"{name}.weight").add_(self._change(name))

    def _change(self, name: str) -> Tensor:
        a, b = self.pairs[name]
        return (b.float() @ a.float()).mul_(self.scale)


def metadata(model: str, base_sha256: str, scale: float) -> dict[str, str]:
    """Metadata of a file."""
    return {"format": ADAPTER_FORMAT, "model": model, "base_sha256": base_sha256, "scale": repr(scale)}


def is_adapter(names: Iterable[str]) -> bool:
    """Whether tensors with these names are an adapter."""
    return any(name.endswith(_A) for name in names)


def read_adapter(path: Path, model: str, base_sha256: str | None) -> Adapter:
    """The content of a file. base_sha256: of the weights file; None: not known yet.

    Raises: ConfigError if it is not an adapter of that model with those weights.
    """
    info = read_adapter_header(path, model, base_sha256)
    try:
        tensors = load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{SETTING}: {path} is not an adapter: {error}") from error
    try:
        scale = float(info["scale"])
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise _damaged(path, "its scale is not a number")
    if problem := _problem(tensors):
        raise _damaged(path, problem)
    names = sorted(key.removesuffix(_A) for key in tensors if key.endswith(_A))
    return Adapter(path, scale, {name: (tensors[f"{name}{_A}"], tensors[f"{name}{_B}"]) for name in names})


def _damaged(path: Path, problem: str) -> ConfigError:
    # Names in a file that is no adapter can be of any length.
    what = f"{SETTING}: {path} is damaged, or of another version of samray: {problem[:300]}"
    return ConfigError(f"{what}; copy it again, or train it again")


def _problem(tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the first of the tensors that is wrong; None if they are pairs of matrices of numbers."""
    if not tensors:
        return "it has no tensors"
    for key, tensor in sorted(tensors.items()):
        end = next((end for end in (_A, _B) if key.endswith(end)), None)
        if end is None:
            return f"{key} does not belong in an adapter"
        name = key.removesuffix(end)
        if (other := f"{name}{_B if end == _A else _A}") not in tensors:
            return f"{other} is missing"
        if tensor.ndim != 2 or not tensor.numel():
            return f"{key} is {tuple(tensor.shape)}, expected a matrix of rank 1 or more"
        if tensor.dtype not in FLOATS:
            return f"{key} is {str(tensor.dtype).removeprefix('torch.')}, expected floats"
        if not is_within(tensor, LARGEST):
            return f"{key} has values that are not finite"
    for key, tensor in sorted(tensors.items()):
        name = key.removesuffix(_A)
        if key.endswith(_A) and (rank := tensors[f"{name}{_B}"].shape[1]) != tensor.shape[0]:
            return f"lora_A of {name} has rank {tensor.shape[0]}, lora_B has rank {rank}"
    return None
