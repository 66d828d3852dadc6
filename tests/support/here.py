"""The stages of a run in this process, one shard after the other: for tests of what a run does, not of where it runs.

Each run on Ray starts two processes, which import Ray Data and, with a real model, torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest
import ray.cloudpickle
import ray.exceptions

from samray.cluster.sizes import choose_sizes
from samray.pipeline import fetch
from samray.pipeline import run as run_module
from samray.pipeline.drive import Run, _Progress
from samray.pipeline.stream import ShardDone, _event_of


class _Stages:
    """As much of `ray.data.Dataset` as `build_pipeline` uses."""

    def __init__(self, batches: Iterator[pa.Table]) -> None:
        self.batches = batches

    def map_batches(
        self,
        stage: Callable[..., Any],
        *,
        fn_kwargs: Mapping[str, Any] = {},
        fn_constructor_kwargs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> _Stages:
        # As Ray would send them to another process.
        options, constructor_options = (
            ray.cloudpickle.loads(ray.cloudpickle.dumps(a)) for a in (fn_kwargs, fn_constructor_kwargs)
        )
        call = stage if constructor_options is None else stage(**constructor_options)
        return _Stages(call(batch, **options) for batch in self.batches)


class _NoState:
    """In place of the state actor: one that does not respond."""

    def __getattr__(self, name: str) -> _NoState:
        return self

    def remote(self, *args: object, **options: object) -> None:
        raise ray.exceptions.RayError("there is none")


def use_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runs that follow take place in this process."""
    monkeypatch.setattr(run_module, "_run_on_ray", _run_here)


def _run_here(run: Run) -> None:
    torch: Any = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    sizes = choose_sizes(run.config.cluster, [{"CPU": 2.0}], len(run.todo), run.config.model.device)

    def source(table: pa.Table) -> _Stages:
        return _Stages(table.slice(i, 1) for i in range(table.num_rows))

    with mock.patch.object(fetch, "shards_to_do", source):
        stages: Any = run_module.build_pipeline(run, sizes, _NoState())
    progress = _Progress(run)
    try:
        for written in stages.batches:
            event = _event_of(written.to_pylist()[0])
            assert isinstance(event, ShardDone)
            progress.add(event)
        progress.show()
    finally:
        run.history.save()
        if threads:  # an actor has a process, and its number of threads, of its own
            torch.set_num_threads(threads)
