"""Triton kernels for a GPU, and whether they are used. What they replace stays: it is the path of every other device.

`image_to_tokens`: image tokens read prompt tokens, with residual and layer norm. `measure`: stability, area and box of
masks that are never brought to full resolution. Both modules import triton, so they are imported where they are called.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from samray.errors import ConfigError

MAX_TOKENS = 16
"""With more prompt tokens than that a head's rows crowd the chip (72 KiB of shared memory as it is): the plain form
reads those."""


def enabled(device: torch.device) -> bool:
    """Whether the kernels do their part of the work on this device.

    They are off unless SAMRAY_TRITON=1: so far no GPU was at hand to run them and measure whether they win. On a CPU
    they run only in Triton's interpreter (TRITON_INTERPRET=1), for tests. Raises ConfigError where they are asked for
    and triton is missing.
    """
    wanted = os.environ.get("SAMRAY_TRITON") or "0"
    if wanted not in ("0", "1"):
        raise ConfigError(f"SAMRAY_TRITON is 0 or 1; got {wanted!r}")
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if wanted == "0" or not (device.type == "cuda" or interpreted):
        return False
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("SAMRAY_TRITON=1, but triton is not installed: pip install triton, or unset SAMRAY_TRITON")
    return True
