"""Progress of a run: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from samray.text import duration

LOG_EVERY_S = 10.0


class ProgressView:
    """Images done, rate, time left, failures. Writes to stderr, because stdout belongs to the program."""

    def __init__(
        self, num_images: int, num_done_before: int, *, enabled: bool = True, file: TextIO | None = None
    ) -> None:
        self.file = file or sys.stderr
        self.num_images = num_images
        self.num_before = self.num_done = num_done_before
        self.num_failed = 0
        self.enabled = enabled
        self.note = "starting Ray"
        self.detail = ""
        self._first_image_at: tuple[float, int] | None = None
        self._logged_at = time.monotonic()
        self._num_logged = num_done_before
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressView:
        # Decided on entering: without a terminal a bar would fill a log with control characters.
        console = Console(file=self.file)
        if self.enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("images"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[rate]}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(self.note, total=self.num_images, completed=self.num_done, rate="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.enabled and self.num_done != self._num_logged:  # the last line shows the final state
            print(f"samray: {self._line(time.monotonic())}", file=self.file, flush=True)

    def update(
        self,
        *,
        num_done: int | None = None,
        num_failed: int | None = None,
        note: str | None = None,
        detail: str | None = None,
    ) -> None:
        """Show the current state; cheap enough to call often. note: the activity; detail: what is done within it."""
        self.detail = self.detail if detail is None else detail
        self.num_done = self.num_done if num_done is None else num_done
        self.num_failed = self.num_failed if num_failed is None else num_failed
        now = time.monotonic()
        # The rate counts from here: before it, Ray was starting and models were loading.
        if self._first_image_at is None and self.num_done > self.num_before:
            self._first_image_at = (now, self.num_done)
        if note is not None and note != self.note:
            self.note = note
            self._logged_at = 0.0  # print a changed note immediately
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=self._activity(), completed=self.num_done, rate=self._rate(now))
        elif self.enabled and now - self._logged_at >= LOG_EVERY_S:
            self._logged_at, self._num_logged = now, self.num_done
            print(f"samray: {self._line(now)}", file=self.file, flush=True)

    def _line(self, now: float) -> str:
        percent = f"{100 * self.num_done / max(self.num_images, 1):.0f}%"
        parts = [self._activity(), f"{self.num_done}/{self.num_images} images ({percent})", self._rate(now)]
        return ", ".join(part for part in parts if part)

    def _activity(self) -> str:
        return f"{self.note}, {self.detail}" if self.detail else self.note

    def _rate(self, now: float) -> str:
        """Rate and time left, measured from the first image: start-up would distort both."""
        failed = [f"{self.num_failed} failed"] if self.num_failed else []
        if self._first_image_at is None or now - self._first_image_at[0] < 1.0:
            return ", ".join(failed)
        # Without the first image itself, which was done when the clock started.
        since, num_then = self._first_image_at
        rate = (self.num_done - num_then) / (now - since)
        if rate == 0:  # nothing since the first image: not known yet
            return ", ".join(failed)
        num_left = self.num_images - self.num_done
        left = [f"{duration(num_left / rate)} left"] if num_left > 0 else []
        return ", ".join([f"{rate:.2f} images/s", *left, *failed])
