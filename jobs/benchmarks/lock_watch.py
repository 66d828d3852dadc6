"""What share of a thread's time is spent under the interpreter lock, also on a machine that is busy with other work.

Another process samples, through /proc/PID/mem, whether the lock is taken and which stage the thread says it is in. If
the thread waits for a CPU, it is sampled as it was, so that shares stay right. For Linux and CPython 3.11, whose lock
is found in memory by its switch interval.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_LOCKED: Final = 16
"""Offset, in the lock's state, of the int that is 1 while the lock is taken: after the interval and the last holder."""

_SAMPLER: Final = """
import json, os, select, struct, sys, time
pid, lock, stage, number = map(int, sys.argv[1:])
counts = [[0, 0] for _ in range(number)]
memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
print("ready", flush=True)
while not select.select([0], [], [], 0)[0]:
    (at,), (taken,) = (struct.unpack("i", os.pread(memory, 4, where)) for where in (stage, lock))
    counts[at][taken] += 1
    time.sleep(0.0005)
print(json.dumps(counts))
"""


class LockWatch:
    """Samples within the `with` block, per stage. Only one thread may run Python."""

    def __init__(self, stages: list[str]) -> None:
        self._stages = ["", *stages]
        self._stage = ctypes.c_int(0)
        self.samples: dict[str, tuple[int, int]] = {}
        """Stage -> samples without and with the lock taken."""

    def __enter__(self) -> LockWatch:
        numbers = (os.getpid(), _lock_address(), ctypes.addressof(self._stage), len(self._stages))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SAMPLER, *map(str, numbers)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        counts = json.loads(self._process.communicate()[0])
        self.samples = {name: (free, taken) for name, (free, taken) in zip(self._stages, counts, strict=True)}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        before, self._stage.value = self._stage.value, self._stages.index(name)
        try:
            yield
        finally:
            self._stage.value = before

    def share(self, name: str) -> float:
        """Share of a stage's samples with the lock taken; 0 without samples."""
        free, taken = self.samples[name]
        return taken / max(free + taken, 1)


def _lock_address() -> int:
    runtime = ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "_PyRuntime"))
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    end = next(stop for start, stop in (tuple(int(x, 16) for x in each) for each in ranges) if start <= runtime < stop)
    interval = sys.getswitchinterval()
    addresses: set[int] | None = None
    # The state begins with the switch interval in microseconds: where both values appear in turn.
    for microseconds in (123457, 98765):
        sys.setswitchinterval(microseconds / 1e6)
        value = struct.pack("L", round(sys.getswitchinterval() * 1e6))
        memory = ctypes.string_at(runtime, end - runtime)
        now = {at for at in range(0, len(memory) - 8, 8) if memory[at : at + 8] == value}
        addresses = now if addresses is None else addresses & now
    sys.setswitchinterval(interval)
    if not addresses or len(addresses) > 1:
        raise SystemExit("the interpreter lock was not found in this build of Python: CPython 3.11 is expected")
    return runtime + addresses.pop() + _LOCKED
