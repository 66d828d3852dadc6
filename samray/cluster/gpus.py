"""The GPUs of this machine; imports torch only if there may be one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

_DRIVER_FILES: Final = ("nvidia*", "nvhost*", "nvgpu*", "nvmap", "kfd", "dxg")
"""Files in /dev of the drivers that PyTorch uses on Linux: NVIDIA's (the next three on Jetsons), AMD's, and WSL's."""


def num_gpus() -> int:
    """GPUs that PyTorch can use in this process."""
    if not _may_have_gpu():
        return 0
    import torch  # takes a second

    return torch.cuda.device_count()


def _may_have_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether there is a driver of a GPU; True where that cannot be seen from files."""
    return sys.platform != "linux" or any(True for kind in _DRIVER_FILES for _ in devices.glob(kind))
