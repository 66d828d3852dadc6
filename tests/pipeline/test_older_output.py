"""An OUTPUT that an earlier samray made stays readable, resumable, verifiable and exportable.

`tests/older_output` was written by samray 0.1 (b3dec13) to s3://samray-before: five painted scenes and a broken
file in generation 0 (`in`), one more scene added with --append (`late`), labelled by the stand-in of `standin.py`.
It is put back in the same place, so that the URIs in it hold.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import samray
from jobs.benchmarks.s3_server import S3Server, make_bucket
from samray import storage
from samray.errors import ConfigError
from samray.output.compact import compact
from samray.output.shards import SUCCESS, shard_uri
from samray.output.status import run_status
from samray.pipeline.report import LabelReport
from tests.support.outputs import rows_of

BEFORE = Path(__file__).resolve().parents[1] / "older_output"
ROOT = "s3://samray-before"
SETTINGS = ("output.images_per_shard=2", "output.max_failed_fraction=1.0")


@pytest.fixture(scope="module", autouse=True)
def older_output(s3_server: S3Server) -> None:
    make_bucket("samray-before")
    for file in BEFORE.rglob("*"):
        if file.is_file():
            storage.put(f"{ROOT}/{file.relative_to(BEFORE).as_posix()}", file.read_bytes())


def test_it_reads_verifies_exports_and_compacts(tmp_path: Path) -> None:
    rows = rows_of(f"{ROOT}/out")
    assert [row["status"] for row in rows] == ["ok"] * 5 + ["failed", "ok"]
    assert samray.read_image(f"{ROOT}/out", 4) == next(row for row in rows if row["image"]["image_id"] == 4)
    assert run_status(f"{ROOT}/out").num_images == 7
    assert len(samray.MaskDataset(f"{ROOT}/out")) == 6
    samray.export(f"{ROOT}/out", tmp_path / "coco", format="coco")
    assert (tmp_path / "coco" / "instances.json").exists()
    compact(f"{ROOT}/out", str(tmp_path / "compacted"), 2**20)
    assert rows_of(str(tmp_path / "compacted")) == rows


def test_it_resumes(label_here: Callable[..., LabelReport]) -> None:
    """The missing shard is labelled again as it was: settings that are new since then count as their defaults."""
    rows = rows_of(f"{ROOT}/out")
    storage.delete(shard_uri(f"{ROOT}/out", 1))
    storage.delete(f"{ROOT}/out/{SUCCESS}")
    report = label_here(f"{ROOT}/in", f"{ROOT}/out", *SETTINGS)
    assert (report.exit_code, report.num_labelled, report.num_missing_shards) == (0, 2, 0)
    assert rows_of(f"{ROOT}/out") == rows
    assert label_here(f"{ROOT}/in", f"{ROOT}/out", *SETTINGS, retry_failed=True).num_labelled == 0
    with pytest.raises(ConfigError, match=r"masks\.points_per_side: 24 there, 5 now"):
        label_here(f"{ROOT}/in", f"{ROOT}/out", *SETTINGS, "masks.points_per_side=5")
