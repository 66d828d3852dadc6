"""How many prompts go to a GPU at once, by the memory that torch says there is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from samray.masks.generator import MaskGenerator
from samray.sam.spec import MODELS

GB = 2**30


@pytest.mark.parametrize(
    ("free", "reserved", "allocated", "expected"),
    [
        (120 * GB, 0, 0, 256),
        (6 * GB, 0, 0, 38),
        (1 * GB, 6 * GB, 1 * GB, 38),  # what torch keeps of freed memory is there for the next batch
        (1 * GB, 1 * GB, 1 * GB, 6),
        (0, 0, 0, 1),
    ],
)
def test_prompts_at_once_follow_the_memory(
    monkeypatch: pytest.MonkeyPatch, free: int, reserved: int, allocated: int, expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 140 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    model: Any = SimpleNamespace(device=torch.device("cuda"), spec=MODELS["vit_h"], dtype=torch.bfloat16)
    assert MaskGenerator(model)._points_per_batch() == expected
