"""What numbers a GPU computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def auto_dtype(device: torch.device) -> torch.dtype:
    """The dtype that `auto` stands for: bfloat16 on a GPU that computes in it, float32 elsewhere.

    Before compute capability 8.0 torch emulates bfloat16, which is slower than float32.
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


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions are rounded only where products are: torch by itself lets float32 ones on a GPU be, to TF32.

    Its ten bits are too few for the agreement with the reference that the float32 path promises.
    """
    convolutions = torch.backends.cudnn
    name = "allow_tf32"
    exact: bool | str = False
    if hasattr(convolutions, "conv"):  # from torch 2.9 on
        convolutions, name, exact = convolutions.conv, "fp32_precision", "ieee"
    if products_in_tf32():
        yield
        return
    before = getattr(convolutions, name)
    setattr(convolutions, name, exact)
    try:
        yield
    finally:
        setattr(convolutions, name, before)
