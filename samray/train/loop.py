"""The training loop of one worker, on batches from any source: train, log, validate, save, until the leg is over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from samray.scenes.scene import Scene
from samray.train.curves import draw_curves
from samray.train.interaction import Batch
from samray.train.learner import Learner
from samray.train.settings import TrainConfig
from samray.train.store import CURVES_FILE, Store, weights_file

Line = dict[str, Any]


def _alone(progress: float, stop: bool) -> tuple[float, bool]:
    return progress, stop


@dataclass(kw_only=True)
class Worker:
    """Inputs of a worker's loop besides its learner and batches."""

    config: TrainConfig
    store: Store | None
    """Only for the first worker, which validates and writes."""
    validation: Callable[[], Iterator[Scene]]
    until: float = 1.0
    """Progress at which the leg ends, because the input size changes."""
    max_steps: int | None = None
    """Maximum steps of the leg."""
    save_every_steps: int = 1
    """Saves happen at multiples of this many steps, when all workers together have seen whole batches."""
    agree: Callable[[float, bool], tuple[float, bool]] = _alone
    """Synchronizes (progress, stop) from the first worker to all, which must act alike. A collective call."""
    average: Callable[[dict[str, float]], dict[str, float]] = dict
    """Averages metrics over all workers. A collective call."""
    report: Callable[[Line], bool] = lambda line: False
    """Called after each step with the current state; returns whether to stop."""


def run_leg(learner: Learner, batches: Iterable[Batch], worker: Worker) -> None:
    """Train until the budget is used up, the leg ends, or a stop is requested; then save. Resuming adds legs."""
    config, position, log = worker.config, learner.position, _Log(learner, worker)
    started = saved = time.monotonic()
    elapsed_before, first_step = position.elapsed_s, position.step
    if position.step == 0:  # the baseline to improve on
        log.validate()
    # A collective call: all workers make it, also if nothing is left to do.
    progress, stop = worker.agree(learner.progress, False)
    left = math.inf if worker.max_steps is None else worker.max_steps
    # Without steps to do, no batch is requested.
    stream = iter(batches if progress < worker.until and left > 0 else ())
    for batch in stream:
        figures = learner.step(batch, progress)
        step = position.step
        if step % config.log_every == 0:
            steps_per_s, figures_of_worker = learner.means.flush()
            # Collective as well: all workers are at the same step, so all get here.
            figures_of_all = worker.average(figures_of_worker)
            rates = {"lr": learner.learning_rate, "examples_per_s": round(config.batch_size * steps_per_s, 2)}
            log.add("train", rates | {name: round(value, 5) for name, value in figures_of_all.items()})
        # The last validation follows after the loop.
        if step % config.validate_every == 0 and step != config.steps:
            log.validate()
        position.elapsed_s = elapsed_before + time.monotonic() - started
        asked = worker.report({"step": step, "progress": learner.progress, **figures})
        # Only then is the position a prefix of the order (see samray.train.data).
        is_whole = (step - first_step) % worker.save_every_steps == 0
        # One decision for all: a worker that stopped by itself would leave the others waiting in a collective call.
        progress, stop = worker.agree(learner.progress, asked and is_whole)
        if stop or progress >= 1 or (progress >= worker.until and is_whole) or step - first_step >= left:
            break
        if is_whole and time.monotonic() - saved > 60 * config.save_every_minutes:
            log.save()
            saved = time.monotonic()
    if progress >= 1:
        log.validate()
    position.elapsed_s = elapsed_before + time.monotonic() - started
    log.save()


class _Log:
    """The metrics, pictures and saves of a run; only the first worker writes any."""

    def __init__(self, learner: Learner, worker: Worker) -> None:
        self.learner, self.worker, self.store = learner, worker, worker.store
        # Later lines belong to steps that a crash undid; they will be written again.
        self.lines = self.store.read_metrics(learner.position.step) if self.store else []

    def add(self, kind: str, figures: dict[str, Any]) -> None:
        position = self.learner.position
        minutes, progress = round(position.elapsed_s / 60, 2), round(self.learner.progress, 5)
        self.lines.append({"kind": kind, "step": position.step, "minutes": minutes, "progress": progress} | figures)

    def validate(self) -> None:
        # A resumed run may begin at a step that was validated already.
        step = self.learner.position.step
        is_done = any(line["kind"] == "validation" and line["step"] == step for line in self.lines)
        if self.store and self.learner.average is not None and not is_done:
            figures, pictures = self.learner.evaluate(self.worker.validation())
            if figures is not None:
                self.add("validation", figures)
            self.store.write_metrics(self.lines)
            self.store.write_picture(CURVES_FILE, draw_curves(self.lines, self.learner.objective.panels))
            for name, png in pictures.items():
                self.store.write_picture(name, png)

    def save(self) -> None:
        if self.store:
            # Before the state: its position is the last file of a save, and makes it valid.
            self.store.write_metrics(self.lines)
            save_all(self.learner, self.store)


def save_all(learner: Learner, store: Store) -> None:
    """Write the weights, then the state, which marks the save as complete."""
    store.write_weights(learner.weights(), learner.metadata(), weights_file(learner.config))
    store.write_state(learner.position, learner.state())
