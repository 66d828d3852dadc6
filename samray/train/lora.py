"""`train.trainable=lora`: low-rank additions to the attention projections, by `peft` (extra `lora`).

`peft` replaces each projection by a module that has the frozen one as `base_layer`. The model's own modules stay where
they are: saved adapters are merged into them, see `samray.sam.adapter`.
"""

from __future__ import annotations

import importlib.util

from torch import Tensor, nn

from samray.errors import ConfigError
from samray.sam.sam import Sam

_PART = ".lora_"
"""In the names of all parameters that learn."""
SCALE = 2
"""Factor of the product of the matrices; the same for any rank."""
_ADAPTER = "default"
"""peft's name of the only adapter; it is a part of the parameters' names."""


def require_peft() -> None:
    """Raises: ConfigError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("train.trainable=lora needs the package peft: pip install 'samray[lora]'")


def projections(sam: Sam) -> list[str]:
    """The linear layers directly in an attention, of encoder and decoder, by their names in the model."""
    names = []
    for name, module in sam.named_modules():
        parent = name.rpartition(".")[0].rpartition(".")[2]
        if isinstance(module, nn.Linear) and "attn" in parent.replace("attention", "attn"):
            names.append(name)
    return names


def add_adapter(sam: Sam, rank: int) -> None:
    """Add the matrices, which change nothing at first: A is random, from torch's seed, and B is zero.

    Raises: ConfigError if peft is not installed.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=projections(sam)), sam)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name was added."""
    return _PART in name


def adapter_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The added tensors in half precision, as a file has them. state: of a model with an adapter."""
    return {
        name.replace(f".{_ADAPTER}.", "."): value.half().cpu().contiguous()
        for name, value in state.items()
        if is_adapter(name)
    }
