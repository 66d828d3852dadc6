"""The environment of the other tools: built once below build/, and again when its list of packages changes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.support import REPOSITORY

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
SCRIPT = Path(__file__).with_name("read_exports.py")
CACHE = REPOSITORY / "build" / "other_tools"
TIMEOUT_S = 900
"""Two cores take one to two minutes."""


def python_of_the_tools() -> Path:
    """The interpreter of an environment that has the packages of requirements.txt. Skips the test if pip fails."""
    key = hashlib.sha256(REQUIREMENTS.read_bytes() + sysconfig.get_platform().encode() + sys.version.encode())
    folder = CACHE / key.hexdigest()[:16]
    python, done = folder / "bin" / "python", folder / "done"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        if done.exists():
            return python
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=False)
        command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-compile"]
        pip = subprocess.run(
            [*command, "--disable-pip-version-check", "-r", str(REQUIREMENTS)],
            capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        if pip.returncode:
            errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or [pip.stderr[-500:]]
            pytest.skip(f"NO export is read by datumaro or FiftyOne, because pip cannot install them: {errors[0]}")
        done.touch()
    return python


def read_by(python: Path, reader: str, folder: Path, *arguments: object, **environment: str) -> dict[str, Any]:
    """What that reader of read_exports.py makes of an export. folder: for its files.

    Raises: AssertionError with the tool's own words if it cannot read it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{reader}.json"
    ended = subprocess.run(
        [python, SCRIPT, reader, out, *map(str, arguments)],
        # FiftyOne keeps its settings in HOME, and would report its use. The tools find no samray.
        env={**os.environ, "HOME": str(folder), "FIFTYONE_DO_NOT_TRACK": "1", "PYTHONPATH": "", **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    images: dict[str, Any] = json.loads(out.read_text())["images"]
    return images
