"""jobs/scale.py on small numbers: that it measures what it says, not how fast that is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import REPOSITORY

JOB = REPOSITORY / "jobs" / "scale.py"


def run(*arguments: object) -> dict[str, Any]:
    done = subprocess.run([sys.executable, JOB, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_a_resume_finds_what_was_left_and_every_failure(tmp_path: Path) -> None:
    figures = run("plan", "--images", 1000, "--left", 3, "--failed", 0.1, "--folder", tmp_path)
    assert (figures["plan"]["images"], figures["plan"]["shards"]) == (1000, 16)
    resumes = [figures["resume_with_all_footers_read"], figures["resume"]]
    assert [resume["shards_to_do"] for resume in resumes] == [3, 3]
    assert resumes[0]["failed_images"] == resumes[1]["failed_images"] > 0


def test_paper_multiplies() -> None:
    figures = run("paper", "--images", 3600, "--gpus", 2, "--efficiency", 0.5, "--seconds", 1, "--shares", 0.5)
    assert figures["1 s an image"] == {"s_per_image": 1.0, "gpu_hours": 2.0, "hours": 1.0}
    assert figures["sa1b"]["tflop_per_image"] == pytest.approx(21 * 5.9 + 3072 * 1.65e-3)
