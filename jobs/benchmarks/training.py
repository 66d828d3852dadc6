"""`jobs/benchmark.py train`: the overhead of Ray Train and Ray Data, compared with a plain PyTorch loop."""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from samray.cluster.session import running_ray
from samray.cluster.sizes import cluster_nodes
from samray.config import ClusterConfig
from samray.train.data import ExampleMaker, open_data
from samray.train.learner import Learner, check_settings, frame_of
from samray.train.run import train
from samray.train.settings import TrainSettings, load_train_settings
from samray.train.sizes import choose_sizes
from samray.train.store import Store

_PARTS = 4
"""Parts of the steps; the first is not counted, while caches, queues and clocks settle."""


class _Batches(Dataset[dict[str, torch.Tensor]]):
    """The examples of the stream, step by step, for a DataLoader."""

    def __init__(self, maker: ExampleMaker, batch_size: int, steps: int) -> None:
        self.maker, self.batch_size, self.steps = maker, batch_size, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        numbers = torch.arange(step * self.batch_size, (step + 1) * self.batch_size).numpy()
        return {name: torch.from_numpy(array) for name, array in self.maker({"number": numbers}).items()}


def throughput(data: list[str], rounds: int, steps: int, settings: list[str]) -> dict[str, Any]:
    """Examples per second of both, taking turns: the same model, examples, batches, threads and data processes.

    The plain loop is a DataLoader with as many processes as the run has data actors, and the same step; neither
    validates or saves while it is timed.
    """
    quiet = [f"train.steps={steps}", f"train.validate_every={10 * steps}", "train.save_every_minutes=1000"]
    quiet += [f"train.log_every={max(1, steps // _PARTS)}", "data.validation_images=1"]
    resolved = load_train_settings(None, [*quiet, *settings])
    rates: dict[str, list[float]] = {"plain": [], "samray": []}
    with running_ray(ClusterConfig(address=resolved.cluster.address)):
        sizes = choose_sizes(resolved, cluster_nodes())
        assert sizes.num_workers == 1, "the comparison needs one worker and one process"
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as output:
                rates["samray"].append(_ray(data, output, resolved))
            rates["plain"].append(_plain(data, resolved, sizes.num_threads, sizes.num_data_actors))
    median = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "model": resolved.model.name,
        "batch_size": resolved.train.batch_size,
        "steps": steps,
        "threads": sizes.num_threads,
        "data_processes": sizes.num_data_actors,
        "settings": settings,
        "examples_per_s": rates,
        "median_examples_per_s": median,
        "ratio": median["samray"] / median["plain"],
        "median_of_ratios": statistics.median(a / b for a, b in zip(rates["samray"], rates["plain"], strict=True)),
    }


def _ray(data: list[str], output: str, settings: TrainSettings) -> float:
    train(data, output, settings, progress=False)
    rates = [line["examples_per_s"] for line in Store(output).read_metrics() if line["kind"] == "train"]
    return float(statistics.harmonic_mean(rates[1:]))


def _plain(data: list[str], settings: TrainSettings, threads: int, processes: int) -> float:
    spec = check_settings(settings)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learner = Learner(settings, spec, image_size=spec.image_size, device=device)
    maker = ExampleMaker(open_data(data, settings), frame_of(spec, spec.image_size))
    steps = settings.train.steps or 0
    loader = DataLoader(
        _Batches(maker, settings.train.batch_size, steps), batch_size=None, num_workers=processes, prefetch_factor=4
    )
    first = steps // _PARTS
    started = time.perf_counter()
    for batch in loader:
        learner.step(batch)
        if learner.position.step == first:
            started = time.perf_counter()
    seconds = time.perf_counter() - started
    torch.set_num_threads(before)
    return (steps - first) * settings.train.batch_size / seconds
