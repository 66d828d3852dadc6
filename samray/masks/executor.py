"""An executor without threads, for devices on which work done at the same time gains nothing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class InlineExecutor(Executor):
    """Runs submitted calls immediately, in the same thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        # An exception is raised here, by `submit`, and not later by `result`.
        done.set_result(fn(*args, **kwargs))
        return done
