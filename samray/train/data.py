"""The stream of examples: Ray Data actors read, decode and augment; workers take batches in a fixed order.

One block has one step's examples for all workers. Several workers receive blocks in turn, and each cuts its blocks into
its own batches: after W steps, W workers have seen W whole blocks. A position saved at such a step is therefore a
prefix of the order, whatever the number of workers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from samray import storage
from samray.config.base import did_you_mean
from samray.errors import ConfigError
from samray.output.shards import FOLDER
from samray.train.cutouts import CutoutSource
from samray.train.examples import Frame, MaskExamples, SceneExamples
from samray.train.mixture import Examples, Mixture
from samray.train.objectives import objective_of
from samray.train.settings import TrainSettings

if TYPE_CHECKING:
    import ray.data

SCENES = "scenes"
"""The name of synthetic scenes among DATA."""

DATA_CPUS = 0.25
"""CPUs that a data actor reserves. It may use a whole one, but must fit next to the workers, which use all the rest."""
AHEAD_STEPS = 32
"""Steps whose examples are prepared in advance, in addition to those that workers and data actors hold."""
POLL_S = 0.2


def open_data(data: Sequence[str], settings: TrainSettings) -> Mixture:
    """All DATA of the run's objective, mixed. Raises: ConfigError, StorageError."""
    return objective_of(settings).open_data(data)


def open_masks(data: Sequence[str], settings: TrainSettings) -> Mixture:
    """All DATA, mixed. Raises: ConfigError if one is not a labelled output or has no masks, StorageError."""
    config, seed = settings.data, settings.train.seed
    check_names(data, "an output of `samray label`")
    parts: list[Examples] = []
    for index, uri in enumerate(data):
        if uri != SCENES:
            parts.append(MaskExamples(output_of(uri), config, seed, index))
            continue
        source = CutoutSource(config.sources, Path(config.cache)) if config.sources else None
        parts.append(SceneExamples(source, config, seed))
    if config.image_root is not None and not any(isinstance(part, MaskExamples) and part.is_moved for part in parts):
        old = storage.redact(config.image_root[0])
        raise ConfigError(f"data.image_root: no image of the DATA is below {old}")
    if config.where is not None and not any(isinstance(part, MaskExamples) for part in parts):
        raise ConfigError(f"data.where selects labelled images and masks, and {SCENES} have none; leave it out")
    _refuse_unknown_labels(parts, config.labels or ())
    return Mixture(parts, config.shares, seed)


def _refuse_unknown_labels(parts: Sequence[Examples], labels: Sequence[str]) -> None:
    """Raises: ConfigError for the first name that no DATA has."""
    known = [name for part in parts if isinstance(part, MaskExamples) for name in part.dataset.classes[1:]]
    for label in labels:
        if label not in known:
            raise ConfigError(f"data.labels: no DATA has the name {label!r}{did_you_mean(label, known)}")


def check_names(data: Sequence[str], what: str) -> None:
    """Raises: ConfigError if there is no DATA, or scenes twice. what: what DATA may be."""
    if not data:
        raise ConfigError(f"expected DATA to train on: {what}, or {SCENES}")
    if list(data).count(SCENES) > 1:
        raise ConfigError(f"DATA has {SCENES} twice, which would repeat the same scenes: use data.shares")


def output_of(uri: str) -> str:
    """The OUTPUT that DATA refers to, which may also be given as its folder of shards or a glob of them."""
    uri = storage.normalize(uri)
    for ending in (f"/{FOLDER}/*.parquet", f"/{FOLDER}/*", f"/{FOLDER}"):
        if uri.endswith(ending):
            return uri.removesuffix(ending)
    return uri


class Pace:
    """Holds data actors back while they are `ahead` steps before the training.

    Without it Ray Data would first fill the object store, using cores that the training needs, and discard most of it
    at the end of a leg; with a memory limit its scheduler busy-waits on a core (Ray 2.60).
    monitor: a `samray.train.monitor.Monitor`. first_step: the leg's first step.
    """

    def __init__(self, monitor: Any, first_step: int, batch_size: int, ahead: int) -> None:
        self.monitor, self.step, self.batch_size, self.ahead = monitor, first_step, batch_size, ahead

    def wait(self, number: int) -> None:
        """Wait until example `number` is due."""
        import ray

        # Step of this example, less the steps that may be prepared before it.
        due = number // self.batch_size - self.ahead
        while due > self.step:
            with contextlib.suppress(ray.exceptions.RayError):  # ignored, because the loop asks again
                line = ray.get(self.monitor.read.remote(), timeout=30.0)
                self.step = line["step"] if line else self.step
            if due > self.step:
                time.sleep(POLL_S)


class ExampleMaker:
    """Turns example numbers into examples: what a data actor runs."""

    def __init__(self, mixture: Any, frame: Frame, pace: Pace | None = None) -> None:
        from samray.cluster.processes import end_with_ray

        # A killed raylet must not leave this process behind.
        end_with_ray()
        # A reference of Ray's, so that the actors of a node share one copy.
        if not isinstance(mixture, Mixture):
            import ray

            mixture = ray.get(mixture)
        self.mixture: Mixture = mixture
        self.frame, self.pace = frame, pace

    def __call__(self, block: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """{"number": (B,)} -> the arrays of B examples (`samray.train.examples.Arrays`), each with first axis B."""
        if self.pace is not None:
            self.pace.wait(int(block["number"][0]))
        examples = [self.mixture.example(int(number), self.frame) for number in block["number"]]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def blocks(first_step: int, num_steps: int, batch_size: int) -> Iterator[npt.NDArray[np.int64]]:
    """The example numbers of each of these steps."""
    for step in range(first_step, first_step + num_steps):
        yield np.arange(step * batch_size, (step + 1) * batch_size)


def example_stream(
    mixture: Any,
    frame: Frame,
    first_step: int,
    num_steps: int,
    batch_size: int,
    *,
    num_workers: int,
    num_actors: int,
    monitor: Any,
) -> ray.data.Dataset:
    """The examples of `num_steps` steps as a Ray dataset, one block per step.

    mixture: or Ray's reference to it. num_workers: training workers. num_actors: data actors. monitor: knows the
    progress of the training.

    Created within `samray.cluster.sizes.data_settings`, which keep blocks whole.
    """
    import ray.data

    # A worker has one block in use and one prefetched, each with as many steps as there are workers, and Ray Data holds
    # back about as many to distribute them evenly.
    pace = Pace(monitor, first_step, batch_size, AHEAD_STEPS + 4 * num_workers + 2 * num_actors)
    # Unlike from_arrow, from_blocks starts no task for each block.
    numbers: Any = ray.data.from_blocks(
        [pa.table({"number": numbers}) for numbers in blocks(first_step, num_steps, batch_size)]
    )
    stream: ray.data.Dataset = numbers.map_batches(
        ExampleMaker,
        fn_constructor_kwargs={"mixture": mixture, "frame": frame, "pace": pace},
        # A block is one step: it must be neither split nor merged.
        batch_size=None,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_cpus=DATA_CPUS,
        udf_modifying_row_count=False,
    )
    return stream
