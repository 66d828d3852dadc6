"""`labels.by=clip` and `samray name` on a real Ray, with a small random CLIP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import samray
from samray.pipeline.report import LabelReport
from tests.support.here import use_no_ray
from tests.support.naming import COLOURS, colour_config
from tests.support.outputs import rows_of
from tests.support.standin import write_images
from tests.support.tiny_clip import write_clip


def test_an_output_is_named_resumed_and_retried(
    tmp_path: Path, label_here: Callable[..., LabelReport], local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(str(tmp_path / "in"), 5)
    assert label_here(tmp_path / "in", tmp_path / "out", "output.images_per_shard=2").exit_code == 0
    gone = tmp_path / "in" / "img_001.png"
    data = gone.read_bytes()
    gone.unlink()
    config = colour_config(write_clip(tmp_path / "clip"), "labels.score_thresh=0.0")
    monkeypatch.undo()  # on Ray
    report = samray.name(tmp_path / "out", tmp_path / "named", config, progress=False)
    assert (report.exit_code, report.num_labelled, report.failures) == (0, 4, {"missing": 1})
    assert {mask["label"] for row in rows_of(str(tmp_path / "named")) for mask in row["annotations"]} <= set(COLOURS)

    gone.write_bytes(data)
    use_no_ray(monkeypatch)
    report = samray.name(tmp_path / "out", tmp_path / "named", config, retry_failed=True, progress=False)
    assert (report.num_failed, report.num_shards_skipped) == (0, 2)
    rows = rows_of(str(tmp_path / "named"))
    for row in rows:
        for mask in row["annotations"]:
            assert mask.pop("label") in COLOURS
            assert 0 < mask.pop("label_score") <= 1
    assert rows == rows_of(str(tmp_path / "out"))
