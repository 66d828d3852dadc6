"""Fixtures that several unit tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def micro_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Sam of `micro.py` is a model by its name, and torch has one thread."""
    import torch

    from samray.sam.spec import MODELS
    from tests.support.micro import MICRO

    monkeypatch.setitem(MODELS, MICRO.name, MICRO)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
