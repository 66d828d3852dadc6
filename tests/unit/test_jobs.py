"""Jobs start from a checkout, where samray is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support import REPOSITORY

JOBS = REPOSITORY / "jobs"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autolabel", "data_engine", "evaluate", "pseudo_label", "train", "unpack_regions"])
def test_a_job_starts_from_a_checkout(name: str, tmp_path: Path) -> None:
    # -S: what is installed in place (pip install -e) is found by a .pth file, which is not read then.
    packages = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages)}
    argv = [sys.executable, "-S", str(JOBS / f"{name}.py"), "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
