"""What the demo makes and how it judges; the run itself is tested with the pipeline."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samray.cli.demo import NOTICE, compare, draw_photographs, make_scenes, next_command, write_images
from samray.cli.demo import _encode as encode
from samray.cli.main import main
from samray.config import load_config
from samray.errors import ConfigError
from samray.evaluate.proposals import best_ious
from samray.output.plan import make_plan
from samray.output.schema import ImageRecord, records_to_table
from samray.output.shards import commit_shard
from samray.scenes.photographs import PHOTOGRAPHS, photograph_files


def test_images_are_written_once_and_stay_the_same(tmp_path: Path) -> None:
    scenes, photographs = make_scenes(3), photograph_files()
    write_images(tmp_path, scenes, photographs)
    files = sorted((tmp_path / "images" / "scenes").iterdir())
    assert [file.name for file in files] == ["scene-000.jpg", "scene-001.jpg", "scene-002.jpg"]
    copies = sorted((tmp_path / "images" / "photographs").iterdir())
    assert [copy.read_bytes() for copy in copies] == [file.read_bytes() for _, file in photographs]
    before = [file.stat().st_mtime_ns for file in [*files, *copies]]
    (tmp_path / "images" / ".DS_Store").touch()  # a file manager's own
    write_images(tmp_path, make_scenes(3), photographs)
    assert [file.stat().st_mtime_ns for file in [*files, *copies]] == before
    known = json.loads((tmp_path / "known_masks.json").read_text())
    for file, scene in zip(files, scenes, strict=True):
        assert Image.open(file).size == scene.image.shape[1::-1]
        assert len(known[file.name]) == len(scene.masks)
        assert known[file.name][0]["size"] == list(scene.image.shape[:2])


def test_photographs_are_those_of_scikit_image_with_their_credits(tmp_path: Path) -> None:
    photographs = photograph_files()
    assert [photograph for photograph, _ in photographs] == list(PHOTOGRAPHS)
    assert [file.name for _, file in photographs] == sorted(file.name for _, file in photographs)
    assert {photograph.licence for photograph in PHOTOGRAPHS} == {"CC0", "public domain"}
    write_images(tmp_path, make_scenes(1), photographs)
    credits = (tmp_path / NOTICE).read_text()
    assert "chelsea.png: a cat, by Stefan van der Walt, CC0\n" in credits
    for _, file in photographs:
        assert f"\n{file.name}: " in credits


def test_without_scikit_image_there_are_only_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert photograph_files() == []
    write_images(tmp_path, make_scenes(1), [])
    assert [file.name for file in (tmp_path / "images").iterdir()] == ["scenes"]
    assert not (tmp_path / NOTICE).exists()


def test_another_demos_directory_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, make_scenes(2))
    with pytest.raises(ConfigError, match="different demo"):
        write_images(tmp_path, make_scenes(3))
    (tmp_path / "other" / "images").mkdir(parents=True)
    with pytest.raises(ConfigError, match="choose another directory"):
        write_images(tmp_path / "other", make_scenes(2))


def test_an_older_demos_directory_ends_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Made by a samray whose demo had the same scenes, without photographs and without folders for each."""
    scenes = make_scenes(2)
    write_images(tmp_path, scenes)
    for file in (tmp_path / "images" / "scenes").iterdir():
        file.rename(tmp_path / "images" / file.name)
    (tmp_path / "images" / "scenes").rmdir()
    assert main(["demo", str(tmp_path), "--scenes=2", "--no-open"]) == 2
    assert "or of an older samray's; choose another directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("called_as", "on_path", "program"),
    [
        ("/opt/bin/samray", True, "samray"),
        (".venv/bin/samray", False, ".venv/bin/samray"),
        ("/opt/samray/__main__.py", True, f"{shlex.quote(sys.executable)} -m samray"),
    ],
)
def test_the_next_command_labels_the_same_images(
    called_as: str, on_path: bool, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [called_as, "demo"])
    monkeypatch.setattr("shutil.which", lambda name: "/opt/bin/samray" if on_path else None)
    begun: list[Any] = []

    def run_demo(directory: Path, config: Any, num_scenes: int, *, show: bool, options: list[str]) -> int:
        begun.append((directory, config.model.name, config.masks.points_per_side, config.masks.pred_iou_thresh))
        begun.append((num_scenes, show, options))
        return 0

    monkeypatch.setattr("samray.cli.demo.run_demo", run_demo)
    folder = Path("a demo")
    words = ["--scenes=3", "--no-open", "model.device=cpu", "masks.points_per_side=8", "masks.pred_iou_thresh=0.3"]
    line = next_command(folder, words)
    assert line.startswith(f"{program} demo 'a demo' ")
    assert main(shlex.split(line.removeprefix(program))) == 0
    assert begun == [
        (folder, "vit_t", 16, 0.3),
        (3, False, ["--scenes=3", "--no-open", "masks.pred_iou_thresh=0.3", "model.name=vit_t",
                    "masks.points_per_side=16"]),
    ]  # fmt: skip
    assert next_command(Path("samray-demo")) == f"{program} demo samray-demo model.name=vit_t masks.points_per_side=16"


def test_best_iou_is_the_best_over_the_masks_found() -> None:
    known = np.zeros((2, 20, 20), bool)
    known[0, :10], known[1, 15:] = True, True
    half = np.zeros((20, 20), bool)
    half[:5] = True
    truth = [encode(mask) for mask in known]
    assert best_ious(truth, []).tolist() == [0, 0]
    assert best_ious(truth, [encode(half)]).tolist() == [0.5, 0]
    assert best_ious(truth, [encode(half), encode(known[0]), encode(known[1])]).tolist() == [1, 1]
    assert best_ious([], [encode(half)]).tolist() == []


def test_labels_are_compared_with_the_scenes_they_belong_to(tmp_path: Path) -> None:
    """The known masks themselves, but for one scene none: as good as the other scenes' share."""
    scenes = make_scenes(3)
    write_images(tmp_path, scenes, photograph_files())
    config = load_config("default")
    plan = make_plan(str(tmp_path / "images"), str(tmp_path / "labels"), config, config.identity())
    known = json.loads((tmp_path / "known_masks.json").read_text())
    records = [
        ImageRecord(
            image_id=row["image_id"],
            width=1,
            height=1,
            file_name=row["file_name"],
            uri=row["uri"],
            annotations=[{"segmentation": rle, "predicted_iou": 0.9} for rle in known[name] if name != "scene-001.jpg"]
            if name in known
            else [{"segmentation": encode(corner), "area": int(corner.sum()), "predicted_iou": 0.9}],
        )
        for row in plan.read_shard(0).to_pylist()
        for name in [row["file_name"].rpartition("/")[2]]
        for corner in [np.arange(64 * 48).reshape(64, 48) % 48 < 24]
    ]
    commit_shard(plan.output, 0, records_to_table(records, plan.run))
    counts = [len(scene.masks) for scene in scenes]
    quality = compare(tmp_path, plan.output)
    assert (quality.num_objects, quality.num_masks) == (sum(counts), counts[0] + counts[2])
    assert quality.mean_best_iou == pytest.approx((counts[0] + counts[2]) / sum(counts))
    assert quality.average_recall == pytest.approx(quality.mean_best_iou)


def test_photographs_are_drawn_without_and_with_their_masks(tmp_path: Path) -> None:
    """The left half of each is a mask: it is tinted, and the right half is as it is above."""
    photographs = photograph_files()
    write_images(tmp_path, make_scenes(1), photographs)
    config = load_config("default")
    plan = make_plan(str(tmp_path / "images"), str(tmp_path / "labels"), config, config.identity())
    records = []
    for row in plan.read_shard(0).to_pylist():
        width, height = Image.open(tmp_path / "images" / row["file_name"]).size
        half = np.zeros((height, width), bool)
        half[:, : width // 2] = True
        mask = {"segmentation": encode(half), "area": int(half.sum()), "predicted_iou": 0.9}
        columns = {name: row[name] for name in ("image_id", "file_name", "uri")}
        records.append(ImageRecord(width=width, height=height, annotations=[mask], **columns))
    commit_shard(plan.output, 0, records_to_table(records, plan.run))
    assert draw_photographs(plan.output, photographs, tmp_path / "photographs.jpg") == len(photographs)
    picture = np.asarray(Image.open(tmp_path / "photographs.jpg"), np.float32)
    first = Image.open(photographs[0][1])
    height = (picture.shape[0] - 10) // 2
    width = round(height * first.width / first.height)
    changed = np.abs(picture[:height] - picture[-height:])[:, :width].mean(axis=2)
    assert changed[:, : width // 2 - 4].mean() > 30
    assert changed[:, width // 2 + 4 :].mean() < 6  # JPEG's own noise
    assert draw_photographs(plan.output, [], tmp_path / "none.jpg") == 0
    assert not (tmp_path / "none.jpg").exists()


def test_train_runs_the_small_world_in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun: list[Any] = []

    def train_demo(directory: Path, config: Any, rounds: Any) -> int:
        begun.append((directory, config.masks.points_per_side, config.masks.min_mask_area, rounds.num_heldout > 0))
        return 130

    monkeypatch.setattr("samray.cli.demo_train.train_demo", train_demo)
    assert main(["demo", "--train", str(tmp_path), "masks.min_mask_area=7"]) == 130
    assert main(["demo", str(tmp_path), "--train", "masks.points_per_side=9"]) == 130
    assert begun == [(tmp_path / "train", 12, 7, True), (tmp_path / "train", 9, 100, True)]


def test_train_refuses_an_adapter_before_it_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--train", str(tmp_path), "model.adapter=adapter.safetensors"]) == 2
    assert "model.adapter does not go with --train" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
