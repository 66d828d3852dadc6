"""Which Ray the pipeline runs on, how many actors fit, and Ray Data's settings."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.data

import samray
from samray.errors import ConfigError

if TYPE_CHECKING:
    from samray.config import ClusterConfig

IO_CPUS = 0.05
"""CPU that a fetch or write task reserves: they wait for storage, and must fit beside actors that hold all the rest."""

ACTOR_CPUS_LEFT = 0.25
"""Actors reserve this much less than they use, so that even on one core there is room for fetch and write tasks."""

QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}

MAX_THREADS_PER_CPU_ACTOR = 4
MAX_THREADS_PER_GPU_ACTOR = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much of the cluster each stage takes."""

    min_actors: int
    max_actors: int
    num_threads: int
    """Of an actor; on a CPU each labels an image of its own."""
    actor_cpus: float
    actor_gpus: float
    num_fetch_tasks: int
    num_write_tasks: int


def choose_sizes(
    config: ClusterConfig, nodes: list[dict[str, float]], num_shards: int, device: str | None = None
) -> Sizes:
    """nodes: each one's resources, as Ray names them. No more actors than shards. device: model.device.

    Raises ConfigError where no actor fits on any node and none can be expected to appear.
    """
    num_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    actor_gpus = config.num_gpus_per_actor
    if actor_gpus is None:
        actor_gpus = 1.0 if num_gpus >= 1 and device != "cpu" else 0.0
    fitting = [node for node in nodes if node.get("GPU", 0.0) >= actor_gpus]
    if config.num_cpus_per_actor is not None:
        threads = max(1, round(config.num_cpus_per_actor))
    elif actor_gpus > 0:
        shares = [node.get("CPU", 0.0) * actor_gpus / node["GPU"] for node in fitting]
        threads = max(1, min([MAX_THREADS_PER_GPU_ACTOR, *(int(share) for share in shares)]))
    else:
        threads = max(1, min(MAX_THREADS_PER_CPU_ACTOR, int(max((n.get("CPU", 0.0) for n in nodes), default=1))))
    actor_cpus = max((config.num_cpus_per_actor or threads) - ACTOR_CPUS_LEFT, 0.25)
    room = sum(
        int(min(node.get("CPU", 0.0) / actor_cpus, node["GPU"] / actor_gpus if actor_gpus else math.inf))
        for node in fitting
    )
    max_actors = min(config.max_actors or max(room, config.min_actors), num_shards)
    return Sizes(
        min_actors=min(config.min_actors, max_actors),
        max_actors=max_actors,
        num_threads=threads,
        actor_cpus=actor_cpus,
        actor_gpus=actor_gpus,
        num_fetch_tasks=config.num_fetch_tasks or max_actors,
        num_write_tasks=max(1, max_actors // 2),
    )


def cluster_nodes() -> list[dict[str, float]]:
    """Resources of each node that is alive."""
    nodes: Any = ray.nodes
    return [node["Resources"] for node in nodes() if node["Alive"]]


def check_fits(sizes: Sizes, nodes: list[dict[str, float]], device: str | None = None) -> None:
    """Raises ConfigError when no node can hold one actor: on a cluster that does not grow it would wait forever.

    device: model.device; a GPU that no node has is refused as well.
    """
    if device is not None and device.startswith("cuda") and not any(node.get("GPU", 0) for node in nodes):
        raise ConfigError(f"model.device = {device!r} is not possible: there is no GPU here; leave it out, or give cpu")
    needed = f"{sizes.actor_cpus:g} CPUs" + f" and {sizes.actor_gpus:g} GPUs" * bool(sizes.actor_gpus)
    if not any(n.get("CPU", 0) >= sizes.actor_cpus and n.get("GPU", 0) >= sizes.actor_gpus for n in nodes):
        held = "; ".join(f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for n in nodes)
        raise ConfigError(
            f"an actor needs {needed}, but the nodes have {held}: lower cluster.num_cpus_per_actor or"
            " cluster.num_gpus_per_actor"
        )


@contextmanager
def running_ray(config: ClusterConfig) -> Iterator[bool]:
    """Ray, ready to use. Yields whether it is a local one of our own, which ends with the block.

    In this order: the Ray this process is connected to already; config.address; RAY_ADDRESS, which a submitted job
    finds set; else a Ray of our own on this machine. Workers of an existing cluster keep its environment: credentials
    are never sent along.
    """
    if ray.is_initialized():
        yield False
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address, runtime_env=_code_to_ship(), **QUIET)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"there is no Ray cluster to join at {address}: {error}") from error
        try:
            yield False
        finally:
            ray.shutdown()
        return
    temp_dir = start_local_ray()
    try:
        yield True
    finally:
        ray.shutdown()
        shutil.rmtree(temp_dir, ignore_errors=True)


def start_local_ray(**options: Any) -> str:
    """A quiet Ray on this machine, whose workers import what this process can. Returns its folder of logs."""
    # Ray keeps its sockets here, and a socket's path may have 107 bytes: hence not in a long TMPDIR.
    parent = tempfile.gettempdir()
    temp_dir = tempfile.mkdtemp(prefix="samray-", dir=parent if len(parent) <= 30 else "/tmp")
    # Ray passes on the script's folder and the current one, not what else sys.path holds (a checkout, say).
    import_path = os.pathsep.join(str(Path(entry or ".").absolute()) for entry in sys.path)
    # Ray's C++ side else warns on our stderr that every actor of Ray Data has an argument in the object store.
    level = os.environ.get("RAY_BACKEND_LOG_LEVEL", "fatal")
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < (os.cpu_count() or 1):
        options.setdefault("num_cpus", len(os.sched_getaffinity(0)))  # of taskset and batch systems Ray knows nothing
    with _environment(PYTHONPATH=import_path, RAY_BACKEND_LOG_LEVEL=level), _no_log_level_notice():
        ray.init("local", include_dashboard=False, _temp_dir=temp_dir, **QUIET, **options)
    return temp_dir


@contextmanager
def _no_log_level_notice() -> Iterator[None]:
    """Drop the line in which Ray's C++ side tells on stderr that it obeys RAY_BACKEND_LOG_LEVEL; keep all others."""
    with tempfile.TemporaryFile() as caught:
        stderr = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            os.write(2, b"".join(line for line in caught if b"RAY_BACKEND_LOG_LEVEL" not in line))


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables for the processes that are started in the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _code_to_ship() -> dict[str, Any] | None:
    """A source checkout has to travel to the nodes; an installed package is expected there, a job brings its own."""
    package = Path(samray.__file__).parent
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if in_job or package.parent.name in ("site-packages", "dist-packages"):
        return None
    return {"py_modules": [str(package)]}


@contextmanager
def data_settings(config: ClusterConfig) -> Iterator[None]:
    """Ray Data's settings for datasets that are made in the block; others of this process keep theirs."""
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = None  # one row = one shard = one block, however large
    context.max_errored_blocks = 0
    context.max_consecutive_actor_init_deaths = 5
    context.execution_no_progress_timeout_s = config.no_progress_timeout_s
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # an error ends the run and is told once, by whoever catches it
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)
