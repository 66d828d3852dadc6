"""Tells out-of-memory errors, of whatever library, from others."""

from __future__ import annotations

from typing import Final

_OF_NO_MEMORY: Final = ("can't allocate memory", "not enough memory", "out of memory", "_ALLOC_FAILED")
"""Texts in out-of-memory errors of torch, its CPU allocators, CUDA, Triton, cuBLAS and cuDNN."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the work was too large for the memory of the device or the host; smaller batches may help."""
    import torch  # imported on use: processes without a model also import the labeler

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _OF_NO_MEMORY)
    )
