"""For jobs/benchmark.py: the time until a private Ray has labelled its first image, each time in a fresh process."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]

LABEL_CODE = """
import contextlib, sys
from samray.cluster import session
if sys.argv[3] != "without":
    session.without_agents = contextlib.nullcontext
    session._IDLE_MS = "1000"
if sys.argv[3] == "with agents and helpers":
    session.without_helpers = contextlib.nullcontext
import samray
from samray.config import load_config
samray.label(*sys.argv[1:3], load_config(None, None, ["masks.points_per_side=1"]), progress=False)
"""


def start(rounds: int) -> dict[str, Any]:
    """Wall and CPU seconds of `samray.label` on one image and one point, in three ways.

    With Ray's agents and Ray Data's helper actors, with agents alone, and without both, as samray starts a private Ray.
    Only in the last way do idle workers stay, for the next stage to use.

    CPU time is that of the process and all that it starts, as last seen: what a process uses in its last 50 ms is
    missing.
    """
    seconds_of_way: dict[str, dict[str, list[float]]] = {
        way: {"wall_s": [], "cpu_s": []} for way in ("with agents and helpers", "with agents", "without")
    }
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        (Path(folder) / "in").mkdir()
        Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(Path(folder) / "in" / "grey.png")
        for i in range(rounds):
            # In turn, so that all ways see the same load.
            for way, figures in seconds_of_way.items():
                wall, cpu = _run([f"{folder}/in", f"{folder}/{i} {way}", way])
                figures["wall_s"].append(wall)
                figures["cpu_s"].append(cpu)
    medians = {
        way: {name: statistics.median(values) for name, values in of.items()} for way, of in seconds_of_way.items()
    }
    return {"rounds": rounds, "medians": medians}


def _run(arguments: list[str]) -> tuple[float, float]:
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", LABEL_CODE, *arguments], cwd=ROOT) as process:
        cpu: dict[int, float] = {}
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                for each in (driver, *driver.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        cpu[each.pid] = sum(each.cpu_times()[:2])
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"samray.label ended with {process.returncode}")
    return time.perf_counter() - started, sum(cpu.values())
