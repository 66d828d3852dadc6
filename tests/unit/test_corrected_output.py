"""A corrected output is one like any other: loaders read it, commands take it, verify sees what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import samray
from samray.cli.main import main
from samray.errors import ConfigError
from samray.output.schema import CORRECTED_SCHEMA, samray_metadata
from samray.output.shards import read_shard, replace_shard
from samray.output.verify import verify
from tests.support.reviewed import a_person, export, five_images, import_, rows_of, write


@pytest.fixture
def corrected(tmp_path: Path) -> str:
    """Five images, exported, corrected by a person and imported."""
    plan = five_images(str(tmp_path))
    content = a_person(export(plan, tmp_path / "there", confident=0.9))
    import_(write(tmp_path / "x.json", content), tmp_path / "new", plan, confident=0.9)
    return str(tmp_path / "new")


@pytest.mark.slow
def test_every_loader_reads_a_corrected_output(corrected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import duckdb
    import pandas
    import polars
    import pyarrow.dataset as pads

    rows = list(rows_of(corrected).values())
    files = f"{corrected}/annotations/*.parquet"
    assert pads.dataset(f"{corrected}/annotations").to_table().schema.equals(CORRECTED_SCHEMA)
    assert list(json.loads(json.dumps(rows[0])))[:2] == ["image", "annotations"]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    declared = json.loads(read_shard(corrected, 0).schema.metadata[b"huggingface"])["info"]["features"]
    for streaming in (False, True):
        loaded = datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
        assert list(loaded) == rows
        assert loaded.features == datasets.Features.from_dict(declared)
    assert duckdb.sql(f"SELECT corrections FROM '{files}'").fetchall() == [(row["corrections"],) for row in rows]
    assert polars.scan_parquet(files).collect().to_dicts() == rows
    assert len(pandas.read_parquet(f"{corrected}/annotations")) == len(rows)
    dataset = samray.MaskDataset(corrected, min_predicted_iou=0.99)  # a person's masks pass every bound
    assert len(dataset) == 4
    assert len(dataset[0][1]["masks"]) == sum(mask["predicted_iou"] >= 0.99 for mask in rows[0]["annotations"]) == 2
    assert samray.read_image(corrected, 2) == rows[2]


def test_a_corrected_output_goes_on_like_any_other(corrected: str, tmp_path: Path) -> None:
    assert main(["compact", corrected, str(tmp_path / "compact"), "--file-size", "1"]) == 0
    assert verify(str(tmp_path / "compact"), deep=True).ok
    assert rows_of(tmp_path / "compact") == rows_of(corrected)
    assert main(["report", corrected]) == 0
    for format in ("sa1b", "yolo", "flat", "label-map"):
        samray.export(corrected, tmp_path / format, format=format, progress=False)
    first = json.loads((tmp_path / "sa1b" / "a" / "0.json").read_text())
    assert [mask["id"] for mask in first["annotations"]] == [0, 2, 3, 5]
    with pytest.raises(ConfigError, match=r"corrects\.confident: 0\.9 there, not set now"):
        samray.label(tmp_path / "in", corrected, samray.load_config("default", overrides=["model.name=tiny"]))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda row: row["annotations"].reverse(), "ids do not increase from image_id"),
        (lambda row: row["annotations"][0].update(id=65536), "ids do not increase from image_id"),
        (
            lambda row: row["corrections"].append({"id": 0, "change": "removed"}),
            "annotation 0 was removed, but it is there",
        ),
        (
            lambda row: row["corrections"].append({"id": 9, "change": "added"}),
            "annotation 9 was added, but it is not there",
        ),
        (
            lambda row: row["corrections"].append({"id": 9, "change": "lost"}),
            "annotation 9 was lost, but it is not there",
        ),
    ],
)
def test_verify_sees_through_wrong_ids_and_marks(corrected: str, change: Callable[[Any], None], problem: str) -> None:
    table = read_shard(corrected, 0)
    rows = table.to_pylist()
    change(rows[0])
    broken = pa.Table.from_pylist(rows, CORRECTED_SCHEMA).replace_schema_metadata(table.schema.metadata)
    replace_shard(corrected, 0, broken, samray_metadata(table.schema)["stats"])
    assert problem in " ".join(verify(corrected, deep=True).problems)
