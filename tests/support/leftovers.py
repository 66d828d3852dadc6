"""What a test must not leave behind: processes of Ray, orphans, listening sockets, folders of runs."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

RUN = "SAMRAY_TEST_RUN"
"""Environment variable of all that these tests start, however deep below them, and also when its parent is gone."""
SERVICE = "SAMRAY_TEST_SERVICE"
"""Environment variable of what a fixture of a wider scope than one test has started."""

FOLDERS = ("samray-*", ".samray-*", "ray*", "drive-*", "head-*", "session_*")
PATIENCE_S = 120.0
SETTLED_S = 5.0

_began = time.time() - 1.0  # a process's start is known to a hundredth of a second
_not_ours: set[int] = set()
"""Processes that are not looked at again: this runs twice for each of some thousand tests."""


@dataclass
class Leftovers:
    """What is there now, except services of a wider scope."""

    processes: dict[int, str] = field(default_factory=dict)
    ports: set[int] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)

    @classmethod
    def look(cls) -> Leftovers:
        """What this run of the tests has now."""
        here = psutil.Process()
        processes, ours = {}, set[int]()
        for pid in psutil.pids():
            if pid in _not_ours:
                continue
            with contextlib.suppress(psutil.Error, OSError):
                process = psutil.Process(pid)
                if process.create_time() < _began:
                    _not_ours.add(pid)
                    continue
                if process.status() == psutil.STATUS_ZOMBIE:  # ended; some machines never collect them
                    _not_ours.add(pid)
                    continue
                environment = process.environ()
                if environment.get(RUN) != os.environ[RUN] or SERVICE in environment or process.pid == here.pid:
                    # A process has the environment of its parent until it has started its own program.
                    if time.time() - process.create_time() > SETTLED_S:
                        _not_ours.add(pid)
                    continue
                # A child of these tests may be there to serve the next one, a Ray or an orphan may not.
                ours = ours or {child.pid for child in here.children(recursive=True)} | {here.pid}
                if "SAMRAY_RAY_FOLDER" in environment or process.ppid() not in ours:
                    processes[process.pid] = " ".join(process.cmdline())[:200]
        temporary = Path(tempfile.gettempdir())
        names = [name for name in os.listdir(temporary) if any(fnmatch.fnmatch(name, kind) for kind in FOLDERS)]
        folders = {str(temporary / name) for name in names if (temporary / name).is_dir()}
        return cls(processes, _listening_ports(), folders)

    def since(self, before: Leftovers) -> list[str]:
        """What has come since, a line each."""
        return [
            *(f"process {pid}: {what}" for pid, what in self.processes.items() if pid not in before.processes),
            *(f"listening on port {port}" for port in sorted(self.ports - before.ports)),
            *sorted(self.folders - before.folders),
        ]

    def wait_for_the_last(self, before: Leftovers) -> Leftovers:
        """Give processes that are just ending the time to; kills what stays. Returns what there was to wait for."""
        left = []
        for pid in self.processes.keys() - before.processes.keys():
            with contextlib.suppress(psutil.NoSuchProcess):
                left.append(psutil.Process(pid))
        _, alive = psutil.wait_procs(left, timeout=PATIENCE_S)
        after = Leftovers.look()
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return after


def _listening_ports() -> set[int]:
    """TCP ports at which this process listens. psutil would read all connections of the machine, after each test."""
    ports = set()
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # closed since, as that of the folder itself
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as copy:
                    is_inet = copy.family in (socket.AF_INET, socket.AF_INET6)
                    if is_inet and copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        ports.add(copy.getsockname()[1])
    return ports


@contextlib.contextmanager
def private_temporary_folder() -> Iterator[None]:
    """A TMPDIR of this run of the tests alone, so that what is left in it is ours; short, for Ray's sockets."""
    os.environ[RUN] = uuid.uuid4().hex
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # where pytest keeps the last runs' tmp_path
    before = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="st-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = folder
        tempfile.tempdir = None
        try:
            yield
        finally:
            os.environ.pop("TMPDIR")
            if before is not None:
                os.environ["TMPDIR"] = before
            tempfile.tempdir = None
