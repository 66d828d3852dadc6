"""Resources of a training."""

from __future__ import annotations

from dataclasses import dataclass

from samray.errors import ConfigError
from samray.train.data import DATA_CPUS
from samray.train.settings import TrainSettings


@dataclass(frozen=True)
class Sizes:
    """Resources of a training."""

    num_workers: int
    num_threads: int
    """Per worker."""
    worker_cpus: float
    worker_gpus: float
    num_data_actors: int


def choose_sizes(settings: TrainSettings, nodes: list[dict[str, float]], *, can_grow: bool = True) -> Sizes:
    """Number of workers and their resources: by default all GPUs, or the cores of one node.

    nodes: resources of each node, with Ray's names. can_grow: whether nodes may be added, so that workers can wait for
    them. Raises ConfigError if no worker fits, or the batch cannot be divided among the workers.
    """
    config = settings.cluster
    gpus = config.num_gpus_per_worker
    if gpus is None:
        # By default only whole GPUs are used.
        gpus = float(any(node.get("GPU", 0.0) >= 1 for node in nodes))
    workers_by_gpus = [int(node.get("GPU", 0.0) / gpus) if gpus else 0 for node in nodes]  # workers per node by GPUs
    workers = config.num_workers or (1 if 0 < gpus < 1 else max(1, sum(workers_by_gpus)))
    if 0 < gpus < 1 < workers:
        raise ConfigError(
            f"cluster.num_gpus_per_worker = {gpus:g} is for a single worker: workers cannot communicate on a shared"
            " GPU; give each a whole one, or set cluster.num_workers=1"
        )
    if settings.train.batch_size % workers:
        raise ConfigError(
            f"train.batch_size = {settings.train.batch_size} cannot be divided among {workers} workers; it takes a"
            " multiple of cluster.num_workers"
        )
    num_cpus = [node.get("CPU", 0.0) for node in nodes]
    if gpus:
        # Each node's cores are divided among its workers; the smallest share decides for all.
        cores = min(
            (cpus / min(n, workers) for cpus, n in zip(num_cpus, workers_by_gpus, strict=True) if n), default=1.0
        )
    else:
        cores = _largest_share(num_cpus, workers)
    cores = config.num_cpus_per_worker or max(cores, DATA_CPUS)
    # A GPU worker needs its data made faster than by one core; without a GPU, training takes all cores.
    actors = config.num_data_actors or workers * (max(1, min(8, int(cores) - 1)) if gpus else 1)
    # Room for the data actors next to the workers, or Ray would never start them.
    reserved = min(cores, max(DATA_CPUS, cores - DATA_CPUS * (actors / workers + 1)))
    sizes = Sizes(workers, max(1, int(cores)), min(reserved, 1.0) if gpus else reserved, gpus, actors)
    room = [int(cpus / sizes.worker_cpus) for cpus in num_cpus]
    if gpus:
        room = [min(n, m) for n, m in zip(room, workers_by_gpus, strict=True)]
    is_fixed = config.num_workers is not None and config.num_gpus_per_worker is not None
    # If nodes may join, one place is enough for now, and none if the user gave the workers' number and GPUs.
    if sum(room) < (int(not is_fixed) if can_grow else workers):
        needed = f"{sizes.worker_cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        resources = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        growing = ", or set cluster.num_workers and cluster.num_gpus_per_worker for nodes that will be added"
        raise ConfigError(
            f"no room for {workers} training worker{'' if workers == 1 else 's'} of {needed}: the nodes have"
            f" {resources}; lower cluster.num_workers, cluster.num_cpus_per_worker or cluster.num_gpus_per_worker"
            f"{growing if can_grow else ''}"
        )
    return sizes


def _largest_share(num_cpus: list[float], workers: int) -> float:
    """The most cores that each of this many workers can have, each on one node, given the nodes' cores."""
    shares = sorted({cpus / n for cpus in num_cpus if cpus for n in range(1, workers + 1)}, reverse=True)
    # 1e-9: a share of 16 / 3 cores must fit three times into 16.
    fits = (share for share in shares if sum(int(cpus / share + 1e-9) for cpus in num_cpus) >= workers)
    return next(fits, 1.0)
