"""The CPUs of this machine; imports nothing, so that a plan can show them without Ray."""

from __future__ import annotations

import os


def allowed_cpus() -> int:
    """CPUs that the kernel lets this process use; where it does not tell, as on macOS, all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
