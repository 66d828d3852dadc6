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
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from samray.errors import ConfigError
from samray.sam.weights_file import ADAPTER_FILE
from samray.sam.weights_file import ADAPTER_SETTING as SETTING

FORMAT: Final = "samray-lora"
"""Value of `format` in the metadata."""
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class Adapter:
    """The content of a file."""

    path: Path
    model: str
    """Name of the base model."""
    base_sha256: str
    scale: float
    pairs: dict[str, tuple[Tensor, Tensor]]
    """Name of the adapted module -> A (r, in) and B (out, r)."""

    def check(self, model: str, shapes: Mapping[str, tuple[int, ...]], base_sha256: str) -> None:
        """Raises: ConfigError if this is not an adapter of that model with those weights.

        shapes: of the model's tensors. base_sha256: of the weights file.
        """
        if self.model != model:
            raise ConfigError(
                f"{SETTING}: {self.path} adapts {self.model}, not {model}: set model.name={self.model}, or {SETTING} to"
                f" one of {model}"
            )
        if self.base_sha256 != base_sha256:
            raise ConfigError(
                f"{SETTING}: {self.path} was trained on other weights of {model}: their SHA-256 is {self.base_sha256},"
                f" that of these is {base_sha256}; set model.checkpoint to the weights that it was trained on"
            )
        for name, (a, b) in self.pairs.items():
            shape, product = shapes.get(f"{name}.weight"), (b.shape[0], a.shape[1])
            if shape != product or a.shape[0] != b.shape[1]:
                raise ConfigError(
                    f"{SETTING}: {self.path} does not fit {model}: {name}.weight is {shape or 'not there'}, the"
                    f" adapter's is {product}"
                )

    @torch.no_grad()
    def merge(self, sam: nn.Module) -> None:
        """Add the products to the weights of a float32 model, in place. It must have been checked."""
        for name, (a, b) in self.pairs.items():
            sam.get_parameter(f"{name}.weight").add_(b.float() @ a.float(), alpha=self.scale)


def metadata(model: str, base_sha256: str, scale: float) -> dict[str, str]:
    """Metadata of a file."""
    return {"format": FORMAT, "model": model, "base_sha256": base_sha256, "scale": repr(scale)}


def is_adapter(names: Iterable[str]) -> bool:
    """Whether tensors with these names are an adapter."""
    return any(name.endswith(_A) for name in names)


def read_adapter(path: Path) -> Adapter:
    """Raises: ConfigError if the file is not an adapter."""
    advice = f"`samray train train.trainable=lora` writes one, {ADAPTER_FILE}"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            info = file.metadata() or {}
            if info.get("format") != FORMAT:
                raise ConfigError(f"{SETTING}: {path} is not an adapter; {advice}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{SETTING}: {path} is not an adapter: {error}; {advice}") from error
    names = {key.removesuffix(_A).removesuffix(_B) for key in tensors}
    expected = {f"{name}{end}" for name in names for end in (_A, _B)}
    is_sound = expected == tensors.keys() and all(
        tensor.ndim == 2 and tensor.is_floating_point() for tensor in tensors.values()
    )
    try:
        scale, model, base_sha256 = float(info["scale"]), info["model"], info["base_sha256"]
    except (KeyError, ValueError):
        is_sound = False
    if not is_sound or not tensors or not math.isfinite(scale):
        content = f"{len(tensors)} tensors and the metadata {info}"
        raise ConfigError(f"{SETTING}: {path} is damaged, or of another version of samray: it has {content}")
    pairs = {name: (tensors[f"{name}{_A}"], tensors[f"{name}{_B}"]) for name in sorted(names)}
    return Adapter(path, model, base_sha256, scale, pairs)
