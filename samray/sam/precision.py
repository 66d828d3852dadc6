"""What numbers a GPU computes in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def auto_dtype(device: torch.device) -> torch.dtype:
    """The dtype that `auto` stands for: bfloat16 on a GPU that computes in it, float32 elsewhere.

    Before compute capability 8.0 torch only emulates bfloat16.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32


def products_in_tf32() -> bool:
    """Whether this process lets float32 matrix products on a GPU be rounded to TF32; torch by itself does not."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # the older name raises where somebody has used the newer one
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


class _Convolutions:
    """torch's switch for float32 convolutions, which is the whole process's: the first one in turns it off, the last
    one out back to what it was."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.depth = 0
        self.before: bool | str = True

    def switch(self) -> tuple[object, str, bool | str]:
        """The object that has it, its name there, and its value for exact convolutions."""
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
    """Convolutions on a GPU are rounded only where products are: torch by itself lets float32 ones be, to TF32.

    Its ten bits are too few for the agreement with the reference that the float32 path promises. The switch is the
    process's: meanwhile it holds for other threads, too.
    """
    if device.type != "cuda" or products_in_tf32():
        yield
        return
    _convolutions.enter()
    try:
        yield
    finally:
        _convolutions.leave()
