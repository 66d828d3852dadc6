"""Make workers end when they should: with their raylet, and without hanging on exit."""

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
"""Seconds allowed for a worker's exit handlers: one that hangs in Ray's would hold its GPU's memory."""

_PR_SET_PDEATHSIG: Final = 1


def end_with_ray() -> None:
    """Make this Ray worker end with its raylet, even after kill -9, and within LEAVE_S of its own exit.

    The former only on Linux. Does nothing outside a worker, or when called again.
    """
    if worker.global_worker.mode == worker.WORKER_MODE:
        _end_with_parent()


@functools.cache
def _end_with_parent() -> None:
    # Registered after Ray's handlers, so it runs before them; its timer also fires while Python hangs.
    atexit.register(faulthandler.dump_traceback_later, LEAVE_S, exit=True)
    if sys.platform != "linux":
        return
    parent = os.getppid()
    # From now on the kernel kills this process when its parent, the raylet, ends.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent ended just before
        os._exit(1)
