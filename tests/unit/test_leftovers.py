"""What a killed process leaves: the next one of the same kind removes it, and nothing that is still being written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import samray
from samray import storage
from samray.imports import coco
from samray.output.compact import compact
from samray.output.verify import verify
from samray.report.output import write_report
from samray.storage import writing
from tests.support import REPOSITORY
from tests.support.exported import ten_images


def export(format: str, **options: Any) -> Callable[[Path], Any]:
    return lambda root: samray.export(str(root / "out"), str(root / "there"), format=format, progress=False, **options)


CASES: dict[str, Callable[[Path], Any]] = {
    "label-map": export("label-map"),
    "sa1b": export("sa1b"),
    "coco": export("coco"),
    "yolo": export("yolo", with_images=True),
    "flat": export("flat"),
    "compact": lambda root: compact(str(root / "out"), str(root / "there"), 10_000),
    "import": lambda root: samray.import_(
        str(root / "coco"), str(root / "there"), images=str(root / "in"), progress=False
    ),
    "report": lambda root: write_report(str(root / "out"), str(root / "there" / "report.html"), num_images=1),
}

_KILLED = """
import json, os, signal, sys
from pathlib import Path
from tests.unit.test_leftovers import CASES
for name, case in CASES.items():
    pid = os.fork()
    if pid == 0:
        def die(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)
        root = Path(sys.argv[1]) / name
        os.replace = die
        if name in ("import", "compact"):  # these begin with a plan; their shards are linked
            link, os.replace = os.link, os.rename
            os.link = lambda old, new: die() if "shard-" in new else link(old, new)
        case(root)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, name
"""


def temporary(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in root.rglob(".samray-*")]


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.mark.slow
def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    for name in CASES:
        ten_images(str(tmp_path / name))
    samray.export(str(tmp_path / "import/out"), str(tmp_path / "import/coco"), format="coco", progress=False)
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for name, case in CASES.items():
        root = tmp_path / name
        assert temporary(root), name
        case(root)
        assert not temporary(root), name
        left = files(root / "there")
        case(root)
        assert files(root / "there") == left, name
    for name in ("import", "compact"):
        assert verify(str(tmp_path / name / "there"), deep=True).ok


def test_a_file_that_is_being_written_stays(tmp_path: Path) -> None:
    handle, path = writing._temporary_file(str(tmp_path))
    assert storage.remove_leftovers(str(tmp_path)) == 0
    os.close(handle)
    (tmp_path / ".samray-other.png").write_text("an image's own name")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / ".samray-x.tmp").write_text("left")
    (tmp_path / ".samray-link.tmp").symlink_to(tmp_path / ".samray-other.png")
    os.mkfifo(tmp_path / ".samray-fifo.tmp")
    assert storage.remove_leftovers(str(tmp_path), recursive=False) >= 1
    assert storage.remove_leftovers(str(tmp_path)) == 1
    assert not Path(path).exists()
    assert (tmp_path / ".samray-other.png").exists()
    assert storage.remove_leftovers(str(tmp_path / "not there")) == 0


def test_spooled_files_for_object_stores_are_removed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing.tempfile, "tempdir", str(tmp_path))
    handle, path = writing._temporary_file(None)
    os.close(handle)
    assert storage.remove_leftovers("s3://bucket/labels") == 1
    assert not Path(path).exists()


def test_annotations_that_are_sorted_have_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing.tempfile, "tempdir", str(tmp_path))
    image = {"id": 1, "width": 4, "height": 3, "file_name": "a.png"}
    source = tmp_path / "in" / "instances.json"
    source.parent.mkdir()
    source.write_text(json.dumps({"images": [image], "annotations": [{"image_id": 1, "segmentation": []}] * 5}))
    from samray.imports.source import open_source

    opened = open_source(str(source), None)
    in_coco = coco.read_images(opened)
    with coco.sorted_annotations(opened, in_coco, [1], [0]) as (shards, _):
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
        assert [(shard, first, len(annotations[0])) for shard, first, annotations in shards] == [(0, 0, 5)]
