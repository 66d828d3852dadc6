"""The Python blocks of the README and docs/, as they are, and the notebook: a newcomer's first run must find masks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import samray
from samray.scenes.scene import make_scene
from tests.support import pages
from tests.support.here import use_no_ray
from tests.support.networks import write_hashed
from tests.support.tiny_clip import write_clip

NOTEBOOK = pages.REPOSITORY / "docs" / "notebook.ipynb"


@pytest.fixture
def block(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """block(name): run that block in a folder with photos/, and return the names it has defined."""
    (tmp_path / "photos").mkdir()
    for i, name in enumerate(("a.jpg", "b.jpg")):
        Image.fromarray(make_scene(10_000 + i, (240, 320), split="heldout").image).save(tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)

    def run(name: str) -> dict[str, Any]:
        page, text = pages.block(f"python {name}")
        names: dict[str, Any] = {}
        # Workers stay in the folder in which Ray was started, here before this one was there.
        text = text.replace('read_images("photos/")', f'read_images("{tmp_path}/photos/")')
        exec(compile(text, f"{page}, {name}", "exec"), names)
        return names

    return run


def test_label_finds_masks_and_warns_of_nothing(
    block: Callable[[str], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it wrote is exported, imported, named and loaded by the other blocks."""
    names = block("label")
    report = names["report"]
    assert (report.num_labelled, report.exit_code, report.warning) == (2, 0, None)
    assert report.num_masks >= 4
    assert names["image"].shape == (3, 240, 320)
    assert len(names["target"]["masks"]) > 0
    again = block("quickstart")
    assert (again["report"].num_labelled, again["report"].num_masks) == (0, 0)  # the same OUTPUT: all is done
    assert len(again["target"]["masks"]) >= len(names["target"]["masks"])
    assert block("exports")["report"].num_masks == report.num_masks
    write_clip(tmp_path / "clip")
    use_no_ray(monkeypatch)
    assert block("naming")["report"].num_masks == report.num_masks
    for output in ("labels-2", "labels-3"):
        assert sum(len(target["boxes"]) for _, target in samray.MaskDataset(output)) == report.num_masks


def test_generators_find_masks(block: Callable[[str], dict[str, Any]]) -> None:
    names = block("masks")
    assert [len(masks) > 0 for masks in names["masks"]] == [True, True]
    assert [len(masks) for masks in names["asked"]] == [2, 0]


def test_an_edge_map_is_in_memory(block: Callable[[str], dict[str, Any]]) -> None:
    edges = block("edges")["edges"]
    assert (edges.shape, edges.dtype) == ((240, 320), np.float32)
    assert edges.max() == 1


def test_a_data_set_of_ones_own_is_labelled(block: Callable[[str], dict[str, Any]]) -> None:
    rows = block("dataset")["ds"].take_all()
    assert [(row["status"], row["error"]) for row in rows] == [("ok", None)] * 2
    assert sum(len(row["annotations"]) for row in rows) >= 4
    write_hashed("dino", "grounding-dino")  # planned here; tests/pipeline/test_label_phrases.py runs it
    assert block("label-dataset-phrases")["ds"].columns is not None


def test_every_python_block_is_run_by_a_test() -> None:
    """Here, or as a recipe in tests/s3/test_loaders.py."""
    marks = [mark.split() for _, mark, _ in pages.blocks("python")]
    assert {kind for kind, _ in marks} == {"python", "recipe"}
    run_here = set(re.findall(r'block\("([\w-]+)"\)', Path(__file__).read_text()))
    assert {name for kind, name in marks if kind == "python"} == run_here


def test_the_notebook_runs(local_ray: None, here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It labels four photographs, looks at the masks and trains for four steps, on Ray."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells)  # none is committed
    names: dict[str, Any] = {}
    for cell in cells:
        # One thread: the other core runs other tests.
        text = "".join(cell["source"]).replace("overrides=[", 'overrides=["cluster.num_cpus_per_worker=1", ')
        exec(compile(text, f"notebook.ipynb, {cell['id']}", "exec"), names)
    plt.close("all")
    assert (names["report"].num_labelled, names["report"].num_failed) == (4, 0)
    assert names["report"].num_masks >= 8
    assert names["mask"]["area"] > 0
    assert (names["trained"].step, names["trained"].exit_code) == (4, 0)


def test_a_run_without_any_mask_says_so_and_why(here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from samray.pipeline.report import print_report

    (tmp_path / "photos").mkdir()
    Image.fromarray(np.full((64, 64, 3), 128, np.uint8)).save(tmp_path / "photos" / "grey.png")
    config = samray.Config(masks=samray.MaskConfig(points_per_side=2, pred_iou_thresh=0.99))
    with pytest.warns(UserWarning, match=r"NO MASK .* tiny: .*masks.pred_iou_thresh=0.99 \(default: 0.47\)"):
        report = samray.label(tmp_path / "photos", tmp_path / "out", config, progress=False)
    print_report(report)
    assert "NO MASK was found in the only image" in " ".join(capsys.readouterr().err.split())
