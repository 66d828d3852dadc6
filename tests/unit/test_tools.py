"""The tools that hold the code: lint, format, types. CI runs them as tests; `pre-commit` runs the quick ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_it_finds_nothing(command: str, tmp_path: Path) -> None:
    name, *arguments = command.split()
    if name == "mypy":
        arguments += ["--cache-dir", str(tmp_path)]
    program = str(Path(sys.executable).with_name(name))
    done = subprocess.run([program, *arguments], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
