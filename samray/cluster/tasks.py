"""Run many small independent tasks: one after another in this process, or as Ray Data tasks on a cluster."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final, TypeVar

import pyarrow as pa

RAY_FROM_IMAGES: Final = 20_000
"""Minimum number of images to use Ray by default: below, starting Ray takes longer than it saves."""

T = TypeVar("T")
R = TypeVar("R")


def wants_ray(ray_wanted: bool | None, address: str | None, num_images: int) -> bool:
    """Whether to run the tasks on Ray: as requested, else if a cluster is given or the work is large."""
    return ray_wanted if ray_wanted is not None else address is not None or num_images >= RAY_FROM_IMAGES


def run_tasks(task: Callable[[T], R], items: Iterable[T], *, on_ray: bool, address: str | None = None) -> Iterator[R]:
    """Yield task(item) for each item: with Ray as they finish, else in order.

    With Ray: task, items and results are pickled; the cluster is the one that this process is connected to, else the
    one at address or RAY_ADDRESS, else a private one that ends with the loop.
    Raises: what task raises, ConfigError if there is no cluster at address.
    """
    if not on_ray:
        yield from map(task, items)
        return
    import ray.data

    from samray.cluster.errors import plain_error
    from samray.cluster.session import running_ray
    from samray.cluster.sizes import data_settings
    from samray.config import ClusterConfig

    config = ClusterConfig(address=address)
    with running_ray(config), data_settings(config):
        # One block per item: Ray Data passes one block to each task.
        results: Any = ray.data.from_arrow([_pickled(item) for item in items]).map_batches(
            partial(_run_one, task=task), batch_size=1, batch_format="pyarrow", num_cpus=1
        )
        try:
            # No prefetching: results are small, and are passed on as they finish.
            for batch in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                yield from map(pickle.loads, batch["data"].to_pylist())
        except Exception as error:
            raise plain_error(error) from error


def _run_one(batch: pa.Table, *, task: Callable[[Any], Any]) -> pa.Table:
    from samray.cluster.processes import end_with_ray

    end_with_ray()
    (data,) = batch["data"].to_pylist()
    # Only what this module itself has pickled.
    return _pickled(task(pickle.loads(data)))


def _pickled(value: object) -> pa.Table:
    return pa.table({"data": pa.array([pickle.dumps(value)], pa.large_binary())})
