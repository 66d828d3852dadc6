"""The README's Python blocks, as they are, with the embedded model: a newcomer's first run must find masks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import samray
from samray.scenes import make_scene

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture
def block(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """block(name): run that block of the README in a folder with photos/, and return the names it has defined."""
    (tmp_path / "photos").mkdir()
    for i, name in enumerate(("a.jpg", "b.jpg")):
        Image.fromarray(make_scene(10_000 + i, (240, 320), split="heldout").image).save(tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)

    def run(name: str) -> dict[str, Any]:
        found = re.search(rf"<!-- python {re.escape(name)} -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
        assert found, f"README.md has no Python block {name!r}"
        names: dict[str, Any] = {}
        # Workers stay in the folder in which Ray was started, here before this one was there.
        text = found[1].replace('read_images("photos/")', f'read_images("{tmp_path}/photos/")')
        exec(compile(text, f"README.md, {name}", "exec"), names)
        return names

    return run


def test_label_finds_masks_and_warns_of_nothing(block: Callable[[str], dict[str, Any]]) -> None:
    report = block("label")["report"]
    assert (report.num_labelled, report.exit_code, report.warning) == (2, 0, None)
    assert report.num_masks >= 4


def test_generators_find_masks(block: Callable[[str], dict[str, Any]]) -> None:
    names = block("masks")
    assert [len(found) > 0 for found in names["masks"]] == [True, True]
    assert [len(found) for found in names["asked"]] == [2, 0]


def test_a_data_set_of_ones_own_is_labelled(block: Callable[[str], dict[str, Any]]) -> None:
    rows = block("dataset")["ds"].take_all()
    assert [(row["status"], row["error"]) for row in rows] == [("ok", None)] * 2
    assert sum(len(row["annotations"]) for row in rows) >= 4


def test_every_python_block_is_run_by_a_test() -> None:
    """Here, or as a recipe in tests/s3/test_loaders.py; the exports' block needs a COCO file that it does not make."""
    marks = re.findall(r"^(.*)\n```python$", README.read_text(), re.MULTILINE)
    assert {mark.split()[1] for mark in marks if mark.startswith("<!--")} == {"python", "recipe"}
    assert len([mark for mark in marks if not mark.startswith("<!--")]) == 1


def test_a_run_without_any_mask_says_so_and_why(
    local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from samray.pipeline.report import print_report

    (tmp_path / "photos").mkdir()
    Image.fromarray(np.full((64, 64, 3), 128, np.uint8)).save(tmp_path / "photos" / "grey.png")
    config = samray.Config(masks=samray.MaskConfig(points_per_side=2, pred_iou_thresh=0.99))
    with pytest.warns(UserWarning, match=r"NO MASK .* tiny: .*masks.pred_iou_thresh=0.99 \(its own: 0.5\)"):
        report = samray.label(tmp_path / "photos", tmp_path / "out", config, progress=False)
    print_report(report)
    assert "NO MASK was found in the one image" in " ".join(capsys.readouterr().err.split())
