"""Decide whether an exception is caused by the image, by the device, or by a bug."""

from __future__ import annotations

import logging
from typing import Final

from samray.errors import ImageError
from samray.sam.memory import is_out_of_memory

__all__ = ["DeviceFault", "internal_error", "is_out_of_memory", "one_line", "raise_if_fatal"]

logger = logging.getLogger(__name__)

_OF_A_LOST_DEVICE: Final = ("CUDA error", "Triton Error [CUDA]", "cuDNN error")


class DeviceFault(RuntimeError):
    """The accelerator is unusable in this process; only a new process helps."""


def raise_if_fatal(error: Exception) -> None:
    """Raises DeviceFault if the error shows that this process has lost the device."""
    import torch

    # First, because cuBLAS says it as a CUDA error, too, and the process can go on after it.
    if is_out_of_memory(error):
        return
    # After a CUDA error every later call of this process fails, so no image can be blamed.
    is_lost = isinstance(error, RuntimeError) and any(text in str(error) for text in _OF_A_LOST_DEVICE)
    if is_lost or isinstance(error, getattr(torch, "AcceleratorError", ())):  # torch 2.6 does not have it yet
        raise DeviceFault(one_line(error)) from error


def internal_error(error: Exception) -> ImageError:
    """A bug that affects one image: reported in its row, with a traceback in the worker's log."""
    logger.error("an image could not be labelled", exc_info=error)
    return ImageError("internal", one_line(error))


def one_line(error: BaseException) -> str:
    """`Type: message` without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
