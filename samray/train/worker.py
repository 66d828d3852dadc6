"""The work of each worker of Ray Train: one leg of a training (`samray.train.loop`), in step with the other workers."""

from __future__ import annotations

import contextlib
import time
import traceback
from typing import TYPE_CHECKING, Any, Final, TypedDict, cast

from samray.cluster.processes import end_with_ray
from samray.errors import ConfigError, SamrayError
from samray.train.learner import Learner, check_settings, frame_of
from samray.train.loop import Line, Worker, run_leg
from samray.train.mixture import Mixture
from samray.train.settings import TrainSettings
from samray.train.store import Store

if TYPE_CHECKING:
    import torch

DATA_NAME: Final = "train"
"""By which the workers ask Ray Train for their batches."""
MAX_STARTS: Final = 3
"""Consecutive starts of the workers without a step before giving up."""
BEAT_S: Final = 0.25
"""Seconds between two messages from the first worker to the driver."""


class LegArguments(TypedDict):
    """Arguments of each worker; a dict, because Ray Train passes one on."""

    settings: TrainSettings
    identity: dict[str, Any]
    """As `samray.train.run.full_identity` gives it."""
    store: Store
    mixture: Any
    """Reference of Ray's to a `Mixture`."""
    image_size: int
    until: float
    """Progress at which the leg ends, as another input size is due."""
    end: int
    """Step at which the leg ends at the latest."""
    num_threads: int
    """Per worker, on CPUs."""
    monitor: Any
    """Handle of the actor `samray.train.monitor.Monitor`."""


def work(arguments: dict[str, Any]) -> None:
    """One worker's leg, given `LegArguments`. Errors that would occur again are reported to the driver, which ends."""
    import ray
    import ray.train

    end_with_ray()
    monitor = arguments["monitor"]
    # The workers start together, so the first one counts for all.
    if ray.train.get_context().get_world_rank() == 0:
        num_starts, failure = ray.get(monitor.begin.remote())
        if num_starts > MAX_STARTS:
            problem = failure or _died()
            ray.get(monitor.give_up.remote(problem))
            raise problem
    try:
        _train_leg(cast(LegArguments, arguments))
    except Exception as error:
        plain = _plain(error)
        if isinstance(plain, ConfigError):  # Ray Train would start the workers again, with the same settings
            ray.get(monitor.give_up.remote(ConfigError(str(plain))))
        else:
            with contextlib.suppress(ray.exceptions.RayError):  # if Ray is ending, too
                ray.get(monitor.fail.remote(SamrayError(str(plain))))
        raise


def _plain(error: Exception) -> BaseException:
    """As the driver shows it."""
    import ray

    from samray.cluster.errors import plain_error

    is_rays = isinstance(error, ray.exceptions.RayError)
    if isinstance(error, SamrayError) and not is_rays:
        return error
    plain = plain_error(error)
    if is_rays or plain.__cause__ is not error:
        return plain
    # Not from another process: the message is without a type, and alone may say nothing, as that of a KeyError.
    return plain_error(RuntimeError("".join(traceback.format_exception_only(error))))


def _died() -> SamrayError:
    return SamrayError(
        f"the training worker died {MAX_STARTS} times before its first step, most often for lack of memory for"
        " model and batch (lower train.batch_size, or use a smaller model.name); see Ray's log of the worker"
    )


def _train_leg(arguments: LegArguments) -> None:
    import ray
    import ray.train
    import ray.train.torch
    import torch

    settings, store = arguments["settings"], arguments["store"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(arguments["num_threads"])
    spec = check_settings(settings)
    learner = Learner(
        settings,
        spec,
        identity=arguments["identity"],
        image_size=arguments["image_size"],
        device=device,
        state=store.read_state(),
        wrap=ray.train.torch.prepare_model,
        stream=rank,
        keeps_average=rank == 0,
    )
    mixture: Mixture = ray.get(arguments["mixture"])
    # Validation is always at the size at which the model is used.
    frame = frame_of(spec, spec.image_size)
    peers = _Peers(world, device)
    worker = Worker(
        config=settings.train,
        store=store if rank == 0 else None,
        validation=lambda: mixture.validation(settings.data.validation_images, frame),
        until=arguments["until"],
        max_steps=arguments["end"] - learner.position.step,
        save_every_steps=world,
        agree=peers.agree,
        average=peers.average,
        report=_Reports(arguments["monitor"] if rank == 0 else None, settings.train.log_every),
    )
    batches = ray.train.get_dataset_shard(DATA_NAME).iter_torch_batches(
        batch_size=settings.train.batch_size // world, prefetch_batches=2
    )
    run_leg(learner, batches, worker)


class _Peers:
    """All workers of a leg: what they must do alike is asked of all at once."""

    def __init__(self, world_size: int, device: torch.device) -> None:
        self.world_size, self.device = world_size, device

    def agree(self, progress: float, stop: bool) -> tuple[float, bool]:
        """Progress and stop of the first worker."""
        if self.world_size == 1:
            return progress, stop
        import torch

        # One tensor: a single broadcast per step.
        decision = torch.tensor([progress, float(stop)], device=self.device)
        torch.distributed.broadcast(decision, src=0)
        return float(decision[0]), bool(decision[1])

    def average(self, figures: dict[str, float]) -> dict[str, float]:
        """Means of figures over all workers."""
        if self.world_size == 1:
            return figures
        import torch

        means = torch.tensor(list(figures.values()), device=self.device) / self.world_size
        torch.distributed.all_reduce(means)
        return dict(zip(figures, means.tolist(), strict=True))


class _Reports:
    """Called after each step with its figures; says whether the driver asked for a stop."""

    def __init__(self, monitor: Any, log_every: int) -> None:
        """monitor: that of the first worker, which alone talks with the driver; None for the others."""
        self._monitor, self._log_every = monitor, log_every
        self._last_beat, self._stop_asked = 0.0, False

    def __call__(self, line: Line) -> bool:
        import ray
        import ray.train

        # At the same steps in all workers, because Ray Train's report waits for all of them.
        if line["step"] % self._log_every == 0:
            ray.train.report(line)
        if self._monitor is not None and time.monotonic() - self._last_beat > BEAT_S:
            self._last_beat = time.monotonic()
            # Go on if the driver does not answer: its last request still holds.
            with contextlib.suppress(ray.exceptions.RayError):
                self._stop_asked = ray.get(self._monitor.beat.remote(line), timeout=30.0)
        return self._stop_asked
