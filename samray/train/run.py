"""`samray.train`: train a model from DATA and settings on Ray Train; the same code for one CPU worker or many GPUs.

A run is a sequence of legs. Each leg is one TorchTrainer of bounded length at one input size, and starts from what
OUTPUT has, whether the previous leg ended, a worker died (Ray Train restarts the workers) or the driver was killed.
Ray's own checkpoints are not used: on object stores they may be incomplete, and they would be a second source of truth
next to OUTPUT.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samray import storage
from samray.config import ClusterConfig
from samray.errors import SamrayError, StorageError
from samray.labels.networks import absolute_checkpoint
from samray.output.destination import check_writable
from samray.pipeline.preflight import machine_nodes
from samray.train.data import SCENES, example_stream
from samray.train.learner import check_settings, frame_of, size_due
from samray.train.mixture import Mixture
from samray.train.monitor import Monitor
from samray.train.objectives import objective_of
from samray.train.progress import TrainReport, TrainView
from samray.train.settings import LORA, TrainSettings, load_train_settings
from samray.train.sizes import Sizes, choose_sizes
from samray.train.store import Position, Store
from samray.train.worker import DATA_NAME, LegArguments, work

if TYPE_CHECKING:
    import ray.data

    from samray.cluster.control import StopRequest

LEG_STEPS = 4096
"""Maximum steps of a leg: the driver passes each step's block to Ray Data before the first one begins."""
POLL_S = 0.5


def train(
    data: Sequence[str | Path] | str | Path,
    output: str | Path,
    settings: TrainSettings | None = None,
    *,
    progress: bool = True,
) -> TrainReport:
    """Train a model on DATA into OUTPUT, or finish an earlier run.

    data: outputs of `samray label` or `samray import`, or the word `scenes`. progress: show progress on stderr.
    Raises ConfigError before anything starts, StorageError if storage is unavailable. An exit_code of 130 or 143 in the
    report means that a signal ended the run early; call again to resume.
    """
    settings = objective_of(_absolute(settings or load_train_settings())).adjusted()
    objective = objective_of(settings)
    uris = [str(data)] if isinstance(data, str | Path) else [str(uri) for uri in data]
    uris = [uri if uri == SCENES else objective.location(uri) for uri in uris]
    spec = check_settings(settings)
    _check_trainable(settings)
    mixture = objective.open_data(uris)
    store = Store(str(output))
    # Temporary files of a killed run.
    storage.remove_leftovers(store.output)
    num_images = [(uri, part.num_images) for uri, part in zip(uris, mixture.parts, strict=True)]
    identity = full_identity(settings, spec.name, num_images)
    is_done = store.read_position().progress(settings.train) >= 1
    # What can be refused is refused before OUTPUT is written.
    if not is_done:
        _check_start(store.output, settings, mixture)
    is_new = store.claim(identity, settings.model_dump(mode="json"), TrainSettings().identity())
    stopped_by = None
    if not is_done:
        try:
            with TrainView(settings.train.batch_size, enabled=progress) as view:
                stopped_by = _run_on_ray(_Run(mixture, settings, identity, store, view))
        except SamrayError:
            # If nothing was trained, leave OUTPUT free for other settings.
            if is_new:
                with contextlib.suppress(StorageError):
                    store.give_back()
            raise
    return _conclude(store, settings, num_images, stopped_by)


def _check_start(output: str, settings: TrainSettings, mixture: Mixture) -> None:
    """Raises: ConfigError if a training could not start: disk, weights, Ray, workers that do not fit, or DATA whose
    images cannot be read (StorageError if their storage is the reason)."""
    from samray.sam.checkpoints import check_checkpoint

    check_writable(output)
    if not settings.train.from_scratch:
        check_checkpoint(settings.model.name, settings.model.checkpoint)
    if settings.train.distill_from is not None:
        check_checkpoint(settings.train.distill_from, settings.train.distill_checkpoint)
    # One small example of each DATA shows whether its images can be read.
    frame = frame_of(check_settings(settings), 64)
    for part in mixture.parts:
        part.example(0, frame)
    nodes = machine_nodes(ClusterConfig(address=settings.cluster.address))
    if nodes is not None:
        choose_sizes(settings, nodes, can_grow=False)


def full_identity(settings: TrainSettings, model: str, num_images: Sequence[tuple[str, int | None]]) -> dict[str, Any]:
    """The settings' identity, plus the SHA-256 of the initial weights, and DATA in order."""
    from samray.sam.checkpoints import checkpoint_sha256
    from samray.sam.encoder_start import file_sha256

    identity = settings.identity()
    if not settings.train.from_scratch:
        identity["model"]["checkpoint_sha256"] = checkpoint_sha256(model, settings.model.checkpoint)
    if settings.train.distill_from is not None:
        teacher = checkpoint_sha256(settings.train.distill_from, settings.train.distill_checkpoint)
        identity["train"]["distill_checkpoint_sha256"] = teacher
    if settings.train.encoder_checkpoint is not None:
        identity["train"]["encoder_checkpoint_sha256"] = file_sha256(settings.train.encoder_checkpoint)
    for section, values in objective_of(settings).identity().items():
        identity[section] |= values
    identity["data"]["uris"] = [[uri, "endless" if n is None else n] for uri, n in num_images]
    return identity


def _check_trainable(settings: TrainSettings) -> None:
    """Raises: ConfigError if the model does not have these parts, before anything starts."""
    import torch

    from samray.sam.encoder_start import check_encoder
    from samray.sam.sam import Sam
    from samray.train.lora import require_peft

    if settings.train.trainable == LORA:
        require_peft()
    # Shapes only: no memory for weights.
    with torch.device("meta"):
        sam = Sam(check_settings(settings))
    objective_of(settings).set_trainable(sam)
    if settings.train.encoder_checkpoint is not None:
        check_encoder(sam, settings.train.encoder_checkpoint)


def _absolute(settings: TrainSettings) -> TrainSettings:
    """Make paths absolute: workers run in another folder, and relative paths refer to the driver's."""

    def absolute(uri: str | None) -> str | None:
        return None if uri is None else storage.normalize(uri)

    model = settings.model.model_copy(update={"checkpoint": absolute(settings.model.checkpoint)})
    files = ("distill_checkpoint", "encoder_checkpoint")
    config = settings.train.model_copy(update={name: absolute(getattr(settings.train, name)) for name in files})
    sources = tuple(storage.normalize(folder) for folder in settings.data.sources)
    data = settings.data.model_copy(update={"sources": sources, "cache": storage.normalize(settings.data.cache)})
    text = settings.text.model_copy(update={"checkpoint": absolute_checkpoint(settings.text.checkpoint)})
    return settings.model_copy(update={"model": model, "train": config, "data": data, "text": text})


@dataclass
class _Run:
    mixture: Mixture
    settings: TrainSettings
    identity: dict[str, Any]
    """From `full_identity`."""
    store: Store
    view: TrainView


def _run_on_ray(run: _Run) -> StopRequest | None:
    """Run legs until the budget is used up; returns the signal that ended it early, if any."""
    import ray

    from samray.cluster.control import stop_on_signals
    from samray.cluster.session import running_ray
    from samray.cluster.sizes import cluster_nodes, data_settings

    config = run.settings.train
    cluster = ClusterConfig(address=run.settings.cluster.address)
    run.view.update(note="starting Ray")
    with (
        stop_on_signals() as stop,
        running_ray(cluster, runtime_envs=True) as is_fixed,
        data_settings(cluster),
        _ray_folder(run, is_fixed) as folder,
        _without_watcher(is_fixed),
    ):
        stop.listen()
        sizes = choose_sizes(run.settings, cluster_nodes(), can_grow=not is_fixed)
        # Stored once, for all legs, workers and data actors.
        mixture = ray.put(run.mixture)
        while stop.signum is None and (before := run.store.read_position()).progress(config) < 1:
            trainer = _make_trainer(run, sizes, mixture, before, folder)
            _drive(trainer.fit, trainer.train_loop_config["monitor"], run, stop)
            # A leg without a step would be repeated forever.
            if stop.signum is None and run.store.read_position().step == before.step:
                raise SamrayError("the training ended without a step; run the same command to resume")
        return stop if stop.signum is not None else None


@contextlib.contextmanager
def _ray_folder(run: _Run, is_local: bool) -> Iterator[str]:
    """Folder for Ray Train's notes on a run; not needed afterwards."""
    if is_local:
        with tempfile.TemporaryDirectory(prefix="samray-train-") as folder:
            yield folder
    else:  # all nodes need access to it
        yield run.store.uri("_ray_train")


@contextlib.contextmanager
def _without_watcher(is_local: bool) -> Iterator[None]:
    """On a Ray of this machine alone, start no process that waits for the cloud to take nodes away.

    It imports torch and Ray Train, with each start of the workers.
    """
    name = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    if not is_local or name in os.environ:
        yield
        return
    os.environ[name] = "0"
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _make_trainer(run: _Run, sizes: Sizes, mixture: Any, position: Position, folder: str) -> Any:
    """One leg's trainer."""
    import ray
    from ray.data import ExecutionOptions
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    settings, spec = run.settings, check_settings(run.settings)
    image_size, until = size_due(settings.train, spec, position)
    frame = frame_of(spec, image_size)
    end = position.step + _steps_of_leg(settings.train.steps, position.step, sizes.num_workers)
    store, batch_size = run.store, settings.train.batch_size
    # No CPU: it only waits, and must fit next to the workers. Correctness does not depend on it.
    monitor = ray.remote(Monitor).options(num_cpus=0, max_restarts=-1).remote()

    def stream() -> ray.data.Dataset:
        """Called for each group of workers: after a death the position is a later one."""
        from samray.cluster.sizes import data_settings

        first = store.read_position().step
        with data_settings(ClusterConfig()):
            return example_stream(
                mixture, frame, first, max(1, end - first), batch_size,
                num_workers=sizes.num_workers, num_actors=sizes.num_data_actors, monitor=monitor,
            )  # fmt: skip

    arguments: LegArguments = {
        "settings": settings,
        "identity": run.identity,
        "store": store,
        "mixture": mixture,
        "image_size": image_size,
        "until": until,
        "end": end,
        "num_threads": sizes.num_threads,
        "monitor": monitor,
    }
    filesystem, path = storage.for_arrow(folder)
    resources = {"CPU": sizes.worker_cpus, **({"GPU": sizes.worker_gpus} if sizes.worker_gpus else {})}
    return TorchTrainer(
        work,
        train_loop_config=dict(arguments),
        scaling_config=ScalingConfig(
            num_workers=sizes.num_workers, use_gpu=sizes.worker_gpus > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=f"from-step-{position.step}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=settings.cluster.max_failures),
        ),
        datasets={DATA_NAME: stream},
        # The order determines the curve: the same after a death, and for any number of workers.
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True), enable_shard_locality=False),
    )


def _steps_of_leg(budget: int | None, step: int, num_workers: int) -> int:
    """LEG_STEPS, or those left of the budget, rounded up to a multiple of the workers.

    At the end of a leg all workers have then seen whole blocks (see samray.train.data).
    """
    steps = LEG_STEPS if budget is None else min(LEG_STEPS, max(1, budget - step))
    return -(-steps // num_workers) * num_workers


def _drive(fit: Callable[[], object], monitor: Any, run: _Run, stop: StopRequest) -> None:
    """Run a leg and show its progress, until it ends or a stop is requested and the workers have saved.

    The leg runs in a separate thread, which keeps this one free for signals and the progress line.
    """
    import ray

    outcome: list[BaseException | None] = []

    def body() -> None:
        try:
            fit()
            outcome.append(None)
        except BaseException as error:  # the main thread raises it
            outcome.append(error)

    thread = threading.Thread(target=body, name="samray-train", daemon=True)
    thread.start()
    deadline = None
    line: dict[str, Any] | None = None
    while thread.is_alive():
        thread.join(POLL_S)
        if stop.signum is not None:
            deadline = deadline or time.monotonic() + run.settings.cluster.drain_timeout_s
            # At every look, because a restarted monitor has forgotten it.
            monitor.stop.remote()
            if time.monotonic() > deadline:
                # The thread ends with this process; the last save is where a resumed run begins.
                return
        problem = None
        with contextlib.suppress(ray.exceptions.RayError):
            problem = ray.get(monitor.why_given_up.remote(), timeout=5.0)
            line = ray.get(monitor.read.remote(), timeout=5.0) or line
        if problem is not None:  # Ray Train would restart the workers
            raise problem
        note = "stopping" if stop.signum is not None else "training" if line else "starting the workers"
        run.view.update(line, note=note)
    # After a stop, errors of the ending workers are expected.
    if outcome and outcome[0] is not None and stop.signum is None:
        raise plain_train_error(outcome[0])


def plain_train_error(error: BaseException) -> BaseException:
    """Unwrap a samray error from Ray Train's, or reduce Ray's error to one line."""
    from samray.cluster.errors import plain_error

    failures = getattr(error, "worker_failures", None)
    inner = next(iter(failures.values())) if failures else error
    return plain_error(inner)


def _conclude(
    store: Store, settings: TrainSettings, num_images: list[tuple[str, int | None]], stopped_by: StopRequest | None
) -> TrainReport:
    position = store.read_position()
    validations = [line for line in store.read_metrics(position.step) if line["kind"] == "validation"]
    report = TrainReport(
        store.output, position.step, position.elapsed_s / 60, settings, num_images,
        validations[0] if validations else None, validations[-1] if validations else None,
    )  # fmt: skip
    if stopped_by is not None and position.progress(settings.train) < 1:
        report.exit_code = stopped_by.exit_code
        report.problem = f"interrupted at step {position.step:,}; run the same command to resume"
    return report
