"""Starting drivers as processes, waiting for what they write, and leaving nothing behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from samray.output.shards import done_shards
from tests.support import REPOSITORY

DRIVE = ("-m", "tests.support.drive")


class Driver:
    """`tests.support.drive`, or what else program is, in a process group of its own, with a Ray of its own."""

    def __init__(
        self,
        log: Path,
        *arguments: str,
        environment: dict[str, str] | None = None,
        program: tuple[str, ...] = DRIVE,
    ) -> None:
        self.log = log
        self.temp_dir = tempfile.mkdtemp(prefix="drive-", dir="/tmp")  # short: Ray's sockets lie in it
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=REPOSITORY,
                env={**os.environ, "TMPDIR": self.temp_dir, "OMP_NUM_THREADS": "1", **(environment or {})},
            )
        self.family: dict[int, psutil.Process] = {}

    def look_around(self) -> None:
        """Note the processes that this driver has started by now, its Ray and workers included."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self.family.setdefault(process.pid, process)

    def workers(self, name: str) -> list[psutil.Process]:
        """Living processes of this driver's Ray whose title contains name."""
        self.look_around()
        drivers = []
        for process in self.family.values():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if name in " ".join(process.cmdline()):
                    drivers.append(process)
        return drivers

    def wait(self, timeout_s: float = 500.0) -> int:
        """The exit code; fails with the log where the driver does not end."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the driver did not end in {timeout_s} s:\n{self.text()}") from None

    def kill(self) -> None:
        """kill -9 of the driver alone, as the kernel would; what it started is left to notice."""
        self.look_around()
        self.process.kill()
        self.process.wait()

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def clean_up(self, patience_s: float = 0.0) -> list[str]:
        """End the driver and all it started; returns what was still there after patience_s, a line each."""
        self.look_around()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        _, alive = psutil.wait_procs(list(self.family.values()), timeout=patience_s)
        left = []
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:  # ended; some machines never collect them
                    left.append(f"{process.pid} {process.status()} {' '.join(process.cmdline())[:300]}")
                    process.kill()
        psutil.wait_procs(alive, timeout=10)
        shutil.rmtree(self.temp_dir, ignore_errors=True)
        return left


@contextlib.contextmanager
def driver(log: Path, *arguments: str, **options: Any) -> Iterator[Driver]:
    """A driver that is gone at the end of the block, with all it started. options: as `Driver` takes them."""
    running = Driver(log, *arguments, **options)
    try:
        yield running
    finally:
        running.clean_up()


def wait_until(condition: Callable[[], bool], running: Driver, timeout_s: float = 500.0) -> None:
    """Poll until it holds; fails with the log where the driver ends before or time runs out."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert running.process.poll() is None, f"the driver ended too early:\n{running.text()}"
        assert time.monotonic() < deadline, f"waited {timeout_s} s:\n{running.text()}"
        time.sleep(0.05)


def has_shards(output: str, count: int) -> Callable[[], bool]:
    """A condition for wait_until: so many shards are committed."""
    return lambda: len(done_shards(output)) >= count


def send(running: Driver, signum: signal.Signals, *, group: bool = False) -> None:
    """A signal to the driver, or to its whole process group as a terminal sends it."""
    if group:
        os.killpg(running.process.pid, signum)
    else:
        running.process.send_signal(signum)
