"""Where the time goes: seconds per stage, which every generator sums up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def timed(stage_seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Add the block's seconds to a stage; on a GPU until its work is done, which costs little with few prompts."""
    started = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    stage_seconds[name] += time.perf_counter() - started
