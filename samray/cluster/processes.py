"""Workers that end when they should: with the raylet that started them, and not stuck on their way out."""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import functools
import os
import signal
import sys
from typing import Final

from ray._private import worker

LEAVE_S: Final = 30.0
"""How long a worker's exit handlers may take: one that hung in Ray's would hold the memory of its GPU."""

_PR_SET_PDEATHSIG: Final = 1


def end_with_ray() -> None:
    """Make this worker of Ray's end with its raylet, even by kill -9, and within LEAVE_S of its own exit.

    The former on Linux only. In a process that is not a worker, and when called again, it does nothing.
    """
    if worker.global_worker.mode == worker.WORKER_MODE:
        _end_with_parent()


@functools.cache
def _end_with_parent() -> None:
    atexit.register(faulthandler.dump_traceback_later, LEAVE_S, exit=True)
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended just before
        os._exit(1)
