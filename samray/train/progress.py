"""Progress of a training: a live line on a terminal, a line every ten seconds elsewhere; and the closing summary."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from samray import storage
from samray.text import duration, two_columns
from samray.train.objectives import objective_of
from samray.train.settings import TrainSettings
from samray.train.store import CURVES_FILE, Store, weights_file

LOG_EVERY_S = 10.0
_SHOWN = {
    "mask_loss": "loss",
    "distill_loss": "loss",
    "reconstruction_loss": "loss",
    "iou_scored": "IoU",
    "iou_last": "last IoU",
}
_MEMORY = 0.9
"""Smoothing of the displayed metrics: single steps are noisy."""


class TrainView:
    """Progress, losses, examples per second, time left. Writes to stderr, because stdout belongs to the program."""

    def __init__(self, batch_size: int, *, enabled: bool = True, file: TextIO | None = None) -> None:
        self.file, self.enabled, self.batch_size = file or sys.stderr, enabled, batch_size
        self.note = "starting Ray"
        self._figures: dict[str, float] = {}
        self._first: tuple[float, float, int] | None = None  # time, progress and step of the first metrics
        self._last_step = -1
        self._rate = ""
        self._logged_at = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> TrainView:
        console = Console(file=self.file)
        if self.enabled and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[words]}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(self.note, total=1.0, words="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, line: Mapping[str, Any] | None = None, *, note: str | None = None) -> None:
        """Show a step's metrics, or the current activity; cheap enough to call often."""
        now = time.monotonic()
        if note is not None and note != self.note:
            self.note = note
            self._logged_at = 0.0  # print a changed note immediately
        if line is not None and line["step"] != self._last_step:
            self._take(line, now)
        progress = 0.0 if line is None else float(line["progress"])
        words = ", ".join([*(f"{name} {value:.3f}" for name, value in self._figures.items()), *self._rate.split("; ")])
        words = words.strip(", ")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=self.note, completed=progress, words=words)
        elif self.enabled and now - self._logged_at >= LOG_EVERY_S:
            self._logged_at = now
            step = "" if line is None else f", step {line['step']:,} ({100 * progress:.0f}%)"
            figures = f", {words}" if words else ""
            print(f"samray: {self.note}{step}{figures}", file=self.file, flush=True)

    def _take(self, line: Mapping[str, Any], now: float) -> None:
        self._last_step = line["step"]
        for name, shown in _SHOWN.items():
            if name in line:
                before = self._figures.get(shown, line[name])
                self._figures[shown] = _MEMORY * before + (1 - _MEMORY) * line[name]
        if self._first is None or self._first[2] > line["step"]:  # the latter if a worker died and begins further back
            self._first = (now, line["progress"], line["step"])
        since, progress, step = self._first
        if now - since > 1.0 and line["progress"] > progress:
            rate = (line["step"] - step) * self.batch_size / (now - since)
            left = (1 - line["progress"]) * (now - since) / (line["progress"] - progress)
            self._rate = f"{rate:.2f} examples/s; {duration(left)} left"


@dataclass
class TrainReport:
    """Result of `samray train`."""

    output: str
    step: int
    minutes: float
    """In training, including earlier runs."""
    settings: TrainSettings
    num_images: list[tuple[str, int | None]]
    """DATA and the number of its training images; None for scenes, which are unlimited."""
    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    """The run's first and last validation."""
    exit_code: int = 0
    problem: str | None = None


def print_train_report(report: TrainReport) -> None:
    """Print the closing summary to stdout, with the next command."""
    store, objective = Store(report.output), objective_of(report.settings)
    table = two_columns()
    shown = {uri: "unlimited" if n is None else f"{n:,} images" for uri, n in report.num_images}
    table.add_row("data", escape("; ".join(f"{storage.redact(uri)}: {words}" for uri, words in shown.items())))
    table.add_row("trained", f"{report.step:,} steps, {duration(60 * report.minutes)}")
    if report.last is not None:
        key, _ = objective.headline[0]
        table.add_row("held out", objective.in_words(report.last))
        if report.first is not None and report.first["step"] < report.last["step"]:
            table.add_row("", f"at step {report.first['step']:,} it was {report.first[key]:.3f}")
    where = storage.redact(store.uri(weights_file(report.settings.train)))
    table.add_row("weights", escape(where))
    table.add_row("curves", escape(storage.redact(store.uri(CURVES_FILE))))
    if report.problem:
        table.add_row("[red]problem[/red]", escape(report.problem))
    console = Console(highlight=False)
    console.print(table, soft_wrap=True)
    if not report.problem:  # outside of the table, which would wrap it, to be copied
        console.print(f"\n{objective.next_command(report.settings.model.name, where)}", soft_wrap=True, markup=False)
        console.print(f"samray report {shlex.quote(storage.redact(store.output))}", soft_wrap=True, markup=False)
