"""`samray label` as a user types it, with a real model, a Ray of its own and a quiet terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.support import REPOSITORY
from tests.support.outputs import rows_of


def test_label_then_label_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from jobs.benchmarks.weights import blobs  # images on which the random weights find masks

    (tmp_path / "in").mkdir()
    for i in range(4):
        Image.fromarray(blobs(i, (96, 128))).save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")

    def run() -> subprocess.CompletedProcess[str]:
        settings = [f"model.checkpoint={tiny_checkpoint}", "masks.points_per_side=4", "output.max_failed_fraction=0.5"]
        settings += ["masks.pred_iou_thresh=0", "masks.stability_score_thresh=0"]  # the weights are random
        command = [sys.executable, "-m", "samray", "label", "in", "out", *settings]
        path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        environment.pop("RAY_ADDRESS", None)
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
        )

    first = run()
    assert first.returncode == 0, first.stderr
    rows = rows_of(str(tmp_path / "out"))
    assert [row["status"] for row in rows] == ["ok"] * 4 + ["failed"]
    assert sum(len(row["annotations"]) for row in rows) > 0
    said = first.stdout + first.stderr
    assert "labelled now" in said
    assert "1 truncated" in said
    for noise in ("WARNING", "ERROR", "(raylet)", "core_worker", "Traceback", "Warning:"):
        assert noise not in said, said

    again = run()
    assert again.returncode == 0, again.stderr
    assert "labelled now" not in again.stdout + again.stderr
