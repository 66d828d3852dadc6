"""Shared by `jobs/benchmark.py` and `jobs/scale.py`: the machine, and the output of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import samray

T = TypeVar("T")


def timed(body: Callable[[], object]) -> float:
    start = time.perf_counter()
    body()
    return time.perf_counter() - start


def progress(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, with a bar on the terminal."""
    from rich.console import Console
    from rich.progress import track

    yield from track(items, what, console=Console(stderr=True))


def machine() -> dict[str, Any]:
    """The machine and versions; includes torch only if it was imported."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":", 1)[1].strip() for line in info.open() if line.startswith("model name")), cpu)
    versions = {"python": platform.python_version(), "samray": samray.__version__}
    description = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        **versions,
        **{name: version(name) for name in ("ray", "pyarrow")},
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
        description |= {"torch": version("torch"), "threads": torch.get_num_threads(), "gpu": gpu}
    return description


def measure(parser: argparse.ArgumentParser, commands: Any, bodies: dict[str, Callable[..., dict[str, Any]]]) -> int:
    """Run the chosen command and print its result as JSON; optionally also write it to a file."""
    for sub in commands.choices.values():
        sub.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = vars(parser.parse_args())
    command, path = arguments.pop("command"), arguments.pop("json")
    result = json.dumps({"benchmark": command, **bodies[command](**arguments), "machine": machine()}, indent=2)
    print(result)
    if path is not None:
        path.write_text(result + "\n")
    return 0
