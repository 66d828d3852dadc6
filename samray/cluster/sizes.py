"""Number of actors that fit on the cluster, and Ray Data's settings."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
import ray.data

from samray.errors import ConfigError

if TYPE_CHECKING:
    from samray.config import ClusterConfig

IO_CPUS = 0.05
"""CPUs per fetch or write task: small, because they wait for storage and must fit next to the actors."""

ACTOR_CPUS_LEFT = 0.25
"""CPUs that actors leave unreserved, which leaves room for fetch and write tasks even on one core."""

WHOLE_CPU_LEFT = 1.0
"""The same inside a user's own pipeline, where Ray Data tasks such as those of read_images take a whole CPU each."""

MAX_THREADS_PER_CPU_ACTOR = 4
MAX_THREADS_PER_GPU_ACTOR = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Resources of each stage."""

    min_actors: int
    max_actors: int
    num_threads: int
    """Threads per actor; on a CPU each thread labels a separate image."""
    actor_cpus: float
    actor_gpus: float
    num_fetch_tasks: int
    num_write_tasks: int


def choose_sizes(
    config: ClusterConfig,
    nodes: list[dict[str, float]],
    num_shards: int,
    device: str | None = None,
    *,
    cpus_left: float = ACTOR_CPUS_LEFT,
) -> Sizes:
    """nodes: resources of each node, with Ray's names. At most one actor per shard. device: model.device.

    cpus_left: CPUs that each actor uses but does not reserve, for the stages before and after it.
    """
    num_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    actor_gpus = config.num_gpus_per_actor
    if actor_gpus is None:
        actor_gpus = 1.0 if num_gpus >= 1 and device != "cpu" else 0.0
    fitting = [node for node in nodes if node.get("GPU", 0.0) >= actor_gpus]
    if config.num_cpus_per_actor is not None:
        threads = max(1, round(config.num_cpus_per_actor))
    elif actor_gpus > 0:
        # A GPU's part of its node's CPUs; of the smallest node, so that actors fit on each of them.
        shares = [node.get("CPU", 0.0) * actor_gpus / node["GPU"] for node in fitting]
        threads = max(1, min([MAX_THREADS_PER_GPU_ACTOR, *(int(share) for share in shares)]))
    else:
        threads = max(1, min(MAX_THREADS_PER_CPU_ACTOR, int(max((n.get("CPU", 0.0) for n in nodes), default=1))))
    used_cpus = config.num_cpus_per_actor or threads
    # Reserved is less than used: what is left over is for tasks that mostly wait.
    actor_cpus = max(used_cpus - cpus_left, 0.0 if cpus_left >= 1 else 0.25)
    if cpus_left >= 1:  # each actor leaves a CPU: at most one actor per usable CPU
        room = num_places(nodes, used_cpus, actor_gpus, 0.0)
    else:
        room = num_places(nodes, actor_cpus, actor_gpus, 2 * IO_CPUS)
    # At least min_actors although they do not fit now: a cluster may grow.
    max_actors = min(config.max_actors or max(room, config.min_actors), num_shards)
    return Sizes(
        min_actors=min(config.min_actors, max_actors),
        max_actors=max_actors,
        num_threads=threads,
        actor_cpus=actor_cpus,
        actor_gpus=actor_gpus,
        # About one shard ahead per actor.
        num_fetch_tasks=config.num_fetch_tasks or max_actors,
        num_write_tasks=max(1, max_actors // 2),
    )


def num_places(nodes: list[dict[str, float]], cpus: float, gpus: float, spare_cpus: float) -> int:
    """Number of actors with this reservation that fit on the nodes, with spare_cpus left on one node for other
    stages."""
    places, too_many = 0, math.inf
    for node in nodes:
        cpus_here, gpus_here = node.get("CPU", 0.0), node.get("GPU", 0.0)
        limits = [have / need for have, need in ((cpus_here, cpus), (gpus_here, gpus)) if need]
        # 1e-9: fractions such as 0.05 are not exact, and 0.3 / 0.1 is below 3.
        on_node = int(min(limits) + 1e-9) if limits else sys.maxsize
        places += on_node
        if cpus_here >= spare_cpus:
            # How many actors this node must do without; the node where it is fewest gives the room.
            missing = spare_cpus - (cpus_here - on_node * cpus)
            too_many = min(too_many, math.ceil(missing / cpus - 1e-9) if missing > 0 and cpus else 0)
    return max(0, int(places - min(too_many, places)))


def cluster_nodes() -> list[dict[str, float]]:
    """Resources of each live node."""
    nodes: Any = ray.nodes
    return [node["Resources"] for node in nodes() if node["Alive"]]


def check_fits(
    sizes: Sizes, nodes: list[dict[str, float]], device: str | None = None, *, spare_cpus: float = 2 * IO_CPUS
) -> Sizes:
    """Limit the actors to those that fit: on a Ray that does not grow, others would wait forever.

    device: model.device. spare_cpus: needed by the other stages. Raises: ConfigError if not even min_actors fit, or if
    no node has the GPU that device names.
    """
    if device is not None and device.startswith("cuda") and not any(node.get("GPU", 0) for node in nodes):
        raise ConfigError(
            f"model.device = {device!r} is not possible: this machine has no GPU; leave it out, or use cpu"
        )
    # Ray sets CUDA_VISIBLE_DEVICES to what an actor reserves, and torch counts only those.
    number = device.partition(":")[2] if device is not None and device.startswith("cuda") else ""
    if number.isdecimal() and int(number) >= sizes.actor_gpus > 0:
        raise ConfigError(
            f"model.device = {device!r} is not possible: an actor sees only the {sizes.actor_gpus:g} GPUs that it"
            " reserves, counted from 0; use cuda, and select GPUs with CUDA_VISIBLE_DEVICES"
        )
    places = num_places(nodes, sizes.actor_cpus, sizes.actor_gpus, spare_cpus)
    if places < sizes.min_actors:
        gpus = f" and {sizes.actor_gpus:g} GPUs" if sizes.actor_gpus else ""
        needed = f"{sizes.actor_cpus:g} CPUs{gpus}"
        resources = "; ".join(f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for n in nodes)
        who = "an actor needs" if sizes.min_actors == 1 else f"{sizes.min_actors} actors (cluster.min_actors) each need"
        raise ConfigError(
            f"{who} {needed}, and reading and writing need {spare_cpus:g} CPUs, but the nodes have {resources}: lower"
            " cluster.min_actors, cluster.num_cpus_per_actor or cluster.num_gpus_per_actor"
        )
    return replace(sizes, max_actors=min(sizes.max_actors, places))


@contextmanager
def data_settings(config: ClusterConfig) -> Iterator[None]:
    """Ray Data's settings for datasets created in the block; other datasets of this process keep theirs."""
    # A copy: changes to the current context would reach the user's own datasets.
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = None  # one row = one shard = one block, however large
    context.max_errored_blocks = 0  # above 0 Ray drops a failed block, and calls the run a success
    context.max_consecutive_actor_init_deaths = 5  # an actor may die while it loads the model
    context.execution_no_progress_timeout_s = config.no_progress_timeout_s
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # an error ends the run and is reported once, by the caller
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)
