"""Shared by the commands that run the main job: run it, print its plan and its report, and say why it failed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console

from samray import storage

if TYPE_CHECKING:
    from samray.pipeline.plan_run import RunPlan
    from samray.pipeline.report import LabelReport


def run_and_print(start: Callable[..., LabelReport], on_plan: Callable[[RunPlan], None] | None = None) -> int:
    """Call start(on_plan=...), and print the plan and the report. Returns the exit code."""
    from samray.cli.plan_view import print_plan
    from samray.pipeline.report import print_report

    try:
        report = start(on_plan=on_plan or print_plan)
    except KeyboardInterrupt:  # pressed before the run handles it, or pressed twice
        return fail("interrupted; run the same command to resume", 130)
    print_report(report)
    return report.exit_code


def fail(message: str, exit_code: int) -> int:
    """Print why the command ends; returns the exit code."""
    if os.environ.get("SAMRAY_DEBUG", "") not in ("", "0") and sys.exc_info()[0] is not None:
        # A traceback may quote URIs with credentials.
        print(storage.redact_error(traceback.format_exc()), end="", file=sys.stderr)
    console = Console(stderr=True)
    with _no_interrupts():
        console.print("samray: ", style="bold red", end="")
        console.print(storage.redact_error(message), markup=False, highlight=False, soft_wrap=True)
    return exit_code


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as an error does, so that its temporary files are removed, and then the process, with 143.

    Further ones are ignored meanwhile. Outside the main thread Python allows no handlers: there, nothing is caught.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, frame: object) -> None:
        signal.signal(signum, signal.SIG_IGN)
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except SystemExit:
        raise SystemExit(fail("stopped by SIGTERM", 143)) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C while the reason for the exit is printed; otherwise a second one shows a traceback instead."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
