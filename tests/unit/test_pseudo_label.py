"""The job that labels photographs without a model: what it takes, how it numbers them, and that it redoes nothing."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import samray
from samray.output.verify import verify
from tests.support import REPOSITORY
from tests.support.handmade import read_rows

JOBS = REPOSITORY / "jobs"


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(JOBS))
    module = importlib.import_module("pseudo_label")
    monkeypatch.setattr(module, "ProcessPoolExecutor", ThreadPoolExecutor)  # a fork of pytest's own threads may hang
    yield module
    sys.modules.pop("pseudo_label")


def photograph(path: Path, seed: int, size: tuple[int, int] = (260, 250)) -> Path:
    """A picture of many soft colours."""
    width, height = size
    small = np.random.default_rng(seed).uniform(0, 255, (height // 20 + 2, width // 20 + 2, 3))
    zoom = height / small.shape[0], width / small.shape[1], 1
    pixels = ndimage.zoom(small, zoom, order=1)[:height, :width]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


def written(output: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()}


def test_pictures_that_come_later_are_added_and_none_is_redone(job: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    b = photograph(tmp_path / "photos" / "b.png", 1)
    assert job.main([str(out), str(tmp_path / "photos"), "--workers", "1"]) == 0
    first = written(out)
    assert {Path(name).suffix for name in first} == {".jpg", ".json"}
    assert len(first) == 2

    photograph(tmp_path / "photos" / "a.png", 2)  # before b.png by its name
    shutil.copy(b, tmp_path / "photos" / "copy of b.png")
    photograph(tmp_path / "more" / "c.png", 3)
    assert job.main([str(out), str(tmp_path / "more"), str(tmp_path / "photos"), "--workers", "1"]) == 0
    second = written(out)
    assert len(second) == 6
    assert {name: second[name] for name in first} == first
    pixels = {Image.open(out / name).tobytes() for name in second if name.endswith(".jpg")}
    assert len(pixels) == 3, "each picture once"

    assert job.main([str(out), str(tmp_path / "more"), "--workers", "1"]) == 0
    assert written(out) == second


def test_what_is_written_is_imported_with_its_numbers(job: ModuleType, tmp_path: Path) -> None:
    photograph(tmp_path / "photos" / "a.png", 4)
    assert job.main([str(tmp_path / "pictures"), str(tmp_path / "photos"), "--workers", "1"]) == 0
    (text,) = (path.read_text() for path in (tmp_path / "pictures").glob("*.json"))
    samray.import_(tmp_path / "pictures", tmp_path / "labels", progress=False)
    assert verify(str(tmp_path / "labels"), deep=True).ok
    (row,) = read_rows(tmp_path / "labels")
    made = json.loads(text)
    number = made["image"]["image_id"]
    assert row["image"] == made["image"]
    assert row["image"]["file_name"] == f"sa_{number}.jpg"
    assert [mask["id"] for mask in row["annotations"]] == [mask["id"] for mask in made["annotations"]]
    assert len(row["annotations"]) > 5
    assert max(mask["id"] for mask in row["annotations"]) < 2**53


def test_a_number_is_of_the_content_and_leaves_room_for_the_tile(job: ModuleType) -> None:
    numbers = [job.number_of(f"picture {i}".encode()) for i in range(1000)]
    assert len(set(numbers)) == 1000
    assert all(number % 2 == 0 and 0 <= number < 2**37 for number in numbers)
    assert job.number_of(b"picture 7") == numbers[7]


@pytest.mark.parametrize(("side", "num_views"), [(500, 1), (959, 1), (960, 2), (1100, 2), (1300, 2)])
def test_a_picture_of_twice_the_side_gives_a_tile_too(
    job: ModuleType, tmp_path: Path, side: int, num_views: int
) -> None:
    views = job._views(photograph(tmp_path / "a.png", 5, (side, side // 2)))
    assert len(views) == num_views
    assert max(views[0].size) == 480
    assert all(max(view.size) <= 480 for view in views)


def test_what_is_no_photograph_is_left_out(job: ModuleType, tmp_path: Path) -> None:
    folder, out = tmp_path / "photos", tmp_path / "pictures"
    photograph(folder / "small.png", 6, (260, 239))
    photograph(folder / "long.png", 7, (700, 300))
    good = Image.open(photograph(tmp_path / "good.png", 8))
    good.convert("RGBA").save(folder / "transparent.png")
    good.convert("L").convert("RGB").save(folder / "grey.png")
    Image.new("RGB", (300, 300), (200, 30, 60)).save(folder / "flat.png")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("x")
    (folder / "link.png").symlink_to(tmp_path / "good.png")
    assert job.main([str(out), str(folder), "--workers", "1"]) == 0
    assert written(out) == {}
