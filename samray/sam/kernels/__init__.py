"""Triton kernels for GPUs, and whether to use them. The plain code that they replace is used on all other devices.

`image_to_tokens`: image tokens attend to prompt tokens, with residual and layer norm. `measure`: stability, area and
box of masks without upsampling them to full resolution. Both modules import triton, so they are imported on use.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from samray.errors import ConfigError

MAX_TOKENS = 16
"""With more prompt tokens a head's rows do not fit on the chip (72 KiB of shared memory at this limit): use the plain
code."""


def enabled(device: torch.device) -> bool:
    """Whether the kernels are used on this device.

    Off unless SAMRAY_TRITON=1: no GPU was available yet to run them and to measure a speed-up. On a CPU they run only
    in Triton's interpreter (TRITON_INTERPRET=1), for tests. Raises ConfigError if they are requested but triton is
    missing.
    """
    wanted = os.environ.get("SAMRAY_TRITON") or "0"
    if wanted not in ("0", "1"):
        raise ConfigError(f"SAMRAY_TRITON must be 0 or 1; got {wanted!r}")
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if wanted == "0" or not (device.type == "cuda" or interpreted):
        return False
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("SAMRAY_TRITON=1, but triton is not installed: pip install triton, or unset SAMRAY_TRITON")
    return True
