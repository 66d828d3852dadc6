"""The precision of computations on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def auto_dtype(device: torch.device) -> torch.dtype:
    """The dtype for `auto`: bfloat16 on a GPU with native bfloat16, float32 elsewhere.

    Below compute capability 8.0 torch only emulates bfloat16.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32


def products_in_tf32() -> bool:
    """Whether this process allows float32 matrix products on a GPU to use TF32; torch's default is not."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # the older name raises if the newer one was used
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


class _Convolutions:
    """torch's process-wide switch for float32 convolutions: the first user turns it off, the last one restores it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # Blocks that are open, in all threads: their order of leaving does not matter.
        self.depth = 0
        self.before: bool | str = True

    def switch(self) -> tuple[object, str, bool | str]:
        """The object that has the switch, its attribute, and the value for exact convolutions."""
        if hasattr(torch.backends.cudnn, "conv"):  # from torch 2.9 on
            return torch.backends.cudnn.conv, "fp32_precision", "ieee"
        return torch.backends.cudnn, "allow_tf32", False

    def enter(self) -> None:
        with self.lock:
            owner, name, exact = self.switch()
            if self.depth == 0:
                self.before = getattr(owner, name)
                setattr(owner, name, exact)
            self.depth += 1

    def leave(self) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                owner, name, _ = self.switch()
                setattr(owner, name, self.before)


_convolutions = _Convolutions()


@contextmanager
def exact_convolutions(device: torch.device) -> Iterator[None]:
    """Make convolutions on a GPU as exact as matrix products: by default torch rounds float32 convolutions to TF32.

    TF32's ten bits are too few for the float32 path to agree with the reference. The switch is process-wide: it also
    affects other threads during the block.
    """
    # Convolutions are to be as exact as matrix products: if those may use TF32, nothing changes.
    if device.type != "cuda" or products_in_tf32():
        yield
        return
    _convolutions.enter()
    try:
        yield
    finally:
        _convolutions.leave()
