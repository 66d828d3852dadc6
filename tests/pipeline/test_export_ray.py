"""Exports and imports fanned out as Ray Data tasks: the same files, byte for byte, as made in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import samray
from samray import storage
from samray.audit import job as audit_job
from samray.cluster.tasks import RAY_FROM_IMAGES, wants_ray
from samray.errors import StorageError
from samray.exports import job as export_job
from samray.output.verify import verify
from tests.support.handmade import write_output

NAMES = [f"photo {i:02d}.png" for i in range(10)]


def contents(folder: str) -> dict[str, bytes]:
    start = len(storage.join(folder, ""))
    return {entry.uri[start:]: storage.read_bytes(entry.uri) for entry in storage.list_files(folder)}


@pytest.mark.parametrize(
    ("format", "options"),
    [("coco", {"images_per_file": 4}), ("sa1b", {"tar": True, "images_per_file": 4}), ("yolo", {"with_images": True})],
)
def test_ray_makes_the_same_files(
    local_ray: None, storage_root: str, monkeypatch: pytest.MonkeyPatch, format: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(export_job, "sizes_of", lambda fmt, options: (2, getattr(options, "images_per_file", None)))
    plan = write_output(storage_root, NAMES, failed=(3,))
    reports = []
    for name, ray in (("here", False), ("ray", True)):
        dest = storage.join(storage_root, name)
        reports.append(samray.export(plan.output, dest, format=format, ray=ray, progress=False, **options))
    here, fanned = (contents(storage.join(storage_root, name)) for name in ("here", "ray"))
    assert here == fanned
    assert (reports[0].num_images, reports[0].num_masks) == (reports[1].num_images, reports[1].num_masks)


def test_ray_imports_the_same_shards(local_ray: None, tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), NAMES)
    samray.export(plan.output, tmp_path / "sa1b", format="sa1b", progress=False)
    for name, ray in (("here", False), ("ray", True)):
        samray.import_(tmp_path / "sa1b", tmp_path / name, images_per_shard=3, ray=ray, progress=False)
        assert verify(str(tmp_path / name), deep=True).ok
    here, fanned = (contents(str(tmp_path / name / "annotations")) for name in ("here", "ray"))
    assert here == fanned


def test_ray_checks_quality_with_the_same_result(
    local_ray: None, storage_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_job, "IMAGES_PER_PIECE_READ", 3)
    plan = write_output(storage_root, NAMES, failed=(3,))
    for name, ray in (("here", False), ("ray", True)):
        dest = storage.join(storage_root, name)
        report = samray.quality(plan.output, dest, images=True, ray=ray, progress=False)
        assert (report.num_pieces, report.counts["failed"]) == (4, 1)
    here, fanned = (contents(storage.join(storage_root, name)) for name in ("here", "ray"))
    # The page has the time at which it was made.
    assert here.keys() == fanned.keys()
    assert all(here[name] == fanned[name] for name in here if not name.endswith(".html"))


def test_an_error_in_a_task_is_the_same_sentence(local_ray: None, tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), NAMES)
    (Path(plan.output) / "annotations" / "shard-000002.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(StorageError, match=r"shard-000002\.parquet is damaged.*run again$"):
        samray.export(plan.output, tmp_path / "coco", format="coco", ray=True, progress=False)


def test_who_goes_to_ray() -> None:
    assert not wants_ray(None, None, RAY_FROM_IMAGES - 1)
    assert wants_ray(None, None, RAY_FROM_IMAGES)
    assert wants_ray(None, "auto", 1)
    assert wants_ray(True, None, 1)
    assert not wants_ray(False, None, 10**9)
