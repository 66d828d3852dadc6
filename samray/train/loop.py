"""The training loop of one worker, on batches from anywhere: train, log, validate, save, until the leg is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from samray.scenes import Scene
from samray.train.curves import draw_curves
from samray.train.evaluate import evaluate_clicks
from samray.train.interaction import Batch
from samray.train.learner import Learner
from samray.train.settings import TrainConfig
from samray.train.store import Store

Line = dict[str, Any]


def _alone(progress: float, stop: bool) -> tuple[float, bool]:
    return progress, stop


@dataclass(kw_only=True)
class Worker:
    """What a worker's loop is given beside its learner and its batches."""

    config: TrainConfig
    store: Store | None
    """Of the first worker, which alone validates and writes."""
    validation: Callable[[], Iterator[Scene]]
    until: float = 1.0
    """Progress at which the leg ends, as another input size is due."""
    max_steps: int | None = None
    """Steps of the leg at most."""
    save_every_steps: int = 1
    """Saves fall on multiples of this many steps of the leg, where all workers together have seen whole batches."""
    agree: Callable[[float, bool], tuple[float, bool]] = _alone
    """(progress, stop) of the first worker, from all workers at once; they must not differ in what they do next."""
    report: Callable[[Line], bool] = lambda line: False
    """Called after each step of the first worker with how things are; whether to stop."""


def run_leg(learner: Learner, batches: Iterable[Batch], worker: Worker) -> None:
    """Train until the budget is used up, the leg ends, or a stop is asked for; then save. Resumes are further legs."""
    config, position, store = worker.config, learner.position, worker.store
    lines = store.read_metrics(position.step) if store else []
    started = saved = time.monotonic()
    elapsed_before, first_step = position.elapsed_s, position.step

    def record(kind: str, figures: dict[str, Any]) -> None:
        minutes = round(position.elapsed_s / 60, 2)
        place = {"kind": kind, "step": position.step, "minutes": minutes, "progress": round(learner.progress, 5)}
        lines.append(place | figures)

    def validate() -> None:
        if store and learner.average is not None:
            record("validation", evaluate_clicks(learner.average, worker.validation()))
            store.write_metrics(lines)
            store.write_curves(draw_curves(lines))

    def save() -> None:
        if store:
            store.write_metrics(lines)
            save_all(learner, store)

    if position.step == 0:  # what there is to improve on
        validate()
    progress, stop = worker.agree(learner.progress, False)
    is_whole = True
    for batch in batches:
        if stop or progress >= 1 or (progress >= worker.until and is_whole):
            break
        figures = learner.step(batch, progress)
        step = position.step
        if step % config.log_every == 0:
            rate = {"lr": learner.optimizer.param_groups[-1]["lr"] / learner.optimizer.param_groups[-1]["lr_scale"]}
            record("train", rate | learner.means.flush(config.batch_size))
        if step % config.validate_every == 0 and step != config.steps:
            validate()
        position.elapsed_s = elapsed_before + time.monotonic() - started
        asked = worker.report(
            {"step": step, "progress": learner.progress, "minutes": position.elapsed_s / 60, **figures}
        )
        is_whole = (step - first_step) % worker.save_every_steps == 0
        progress, stop = worker.agree(learner.progress, asked and is_whole)
        if worker.max_steps is not None and step - first_step >= worker.max_steps:
            break
        if is_whole and time.monotonic() - saved > 60 * config.save_every_minutes:
            save()
            saved = time.monotonic()
    if progress >= 1:
        validate()
    position.elapsed_s = elapsed_before + time.monotonic() - started
    save()


def save_all(learner: Learner, store: Store) -> None:
    """The weights, then the state: the state is what says that a save is done."""
    metadata = {"model": learner.spec.name, "steps": str(learner.position.step)}
    store.write_weights(learner.weights(), metadata)
    store.write_state(learner.position, learner.state())
