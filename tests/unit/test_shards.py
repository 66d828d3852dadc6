"""Schema and shards: the bytes of a shard, who can read them, and how it is committed, on both kinds of storage."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco_mask

from samray import storage
from samray.errors import StorageError
from samray.output import shards
from samray.output.schema import SCHEMA, ImageRecord, records_to_table, samray_metadata, with_stats
from tests.support.planned import mask_of

RUN: dict[str, Any] = {"samray_version": "1", "identity": {"masks": {"bbox_convention": "coco"}, "seed": 1}}


# --- schema -----------------------------------------------------------------------------------------------------------


def test_the_first_two_columns_are_an_sa1b_file() -> None:
    record = ImageRecord(
        image_id=7, width=9, height=8, file_name="a/b.jpg", uri="s3://x/a/b.jpg", annotations=[mask_of(8, 9)] * 2
    )
    row = records_to_table([record], RUN).to_pylist()[0]
    sa1b = json.loads(json.dumps({"image": row["image"], "annotations": row["annotations"]}))
    assert sa1b["image"] == {"image_id": 7, "width": 9, "height": 8, "file_name": "a/b.jpg"}
    assert [mask["id"] for mask in sa1b["annotations"]] == [7 * 65536, 7 * 65536 + 1]
    assert {k: v for k, v in sa1b["annotations"][0].items() if k != "id"} == mask_of(8, 9)
    assert coco_mask.decode(sa1b["annotations"][0]["segmentation"]).sum() == sa1b["annotations"][0]["area"]
    assert (row["uri"], row["status"], row["error"]) == ("s3://x/a/b.jpg", "ok", None)


def test_failed_empty_and_no_records_keep_the_types() -> None:
    failed = ImageRecord(image_id=1, width=0, height=0, file_name="a", uri="a", error="empty: no bytes")
    table = records_to_table([failed], RUN)
    assert table.schema.equals(SCHEMA)
    row = table.to_pylist()[0]
    assert (row["status"], row["error"], row["annotations"]) == ("failed", "empty: no bytes", [])
    for records in ([], [failed]):
        data = shards.shard_bytes(records_to_table(records, RUN))
        assert pq.ParquetFile(pa.BufferReader(data)).read().schema.equals(SCHEMA)
    assert (
        records_to_table([ImageRecord(image_id=2, width=5, height=5, file_name="a", uri="a")], RUN)["status"][0].as_py()
        == "ok"
    )


def test_metadata_of_samray_and_hugging_face() -> None:
    metadata = records_to_table([], RUN).schema.metadata
    assert json.loads(metadata[b"samray"]) == {
        "version": "1",
        "identity": RUN["identity"],
        "generation": 0,
        "bbox_convention": "coco",
    }
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
    assert list(features) == SCHEMA.names
    assert features["image"]["width"] == {"dtype": "int32", "_type": "Value"}
    (annotation,) = features["annotations"]
    assert annotation["segmentation"]["size"] == [{"dtype": "int32", "_type": "Value"}]
    assert annotation["point_coords"] == [[{"dtype": "float64", "_type": "Value"}]]


def test_hugging_face_datasets_takes_the_features(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is NOT tested: pip install 'samray[test]'")
    record = ImageRecord(image_id=7, width=9, height=8, file_name="a", uri="a", annotations=[mask_of(8, 9)])
    (tmp_path / "x.parquet").write_bytes(shards.shard_bytes(records_to_table([record], RUN)))
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "x.parquet"), cache_dir=str(tmp_path / "cache"))
    assert loaded[0]["annotations"][0]["segmentation"] == mask_of(8, 9)["segmentation"]
    assert loaded.features["image"]["width"].dtype == "int32"


def test_duckdb_reads_the_nested_columns(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb", reason="DuckDB is NOT tested: pip install 'samray[test]'")
    record = ImageRecord(image_id=7, width=9, height=8, file_name="a", uri="a", annotations=[mask_of(8, 9)] * 3)
    (tmp_path / "x.parquet").write_bytes(shards.shard_bytes(records_to_table([record], RUN)))
    query = f"select image.width, len(annotations), annotations[1].bbox from '{tmp_path}/x.parquet'"
    assert duckdb.sql(query).fetchall() == [(9, 3, mask_of(8, 9)["bbox"])]


# --- shards -----------------------------------------------------------------------------------------------------------


def test_the_same_rows_give_the_same_bytes_with_row_groups_and_page_index() -> None:
    records = [
        ImageRecord(
            image_id=i, width=20, height=20, file_name=f"{i}", uri=f"{i}", annotations=[mask_of(20, 20, i)] * 60
        )
        for i in range(150)
    ]
    table = records_to_table(records, RUN)
    data = shards.shard_bytes(table)
    assert data == shards.shard_bytes(records_to_table(records, copy.deepcopy(RUN)))
    assert data == shards.shard_bytes(pa.Table.from_batches(table.to_batches(max_chunksize=7)))
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    size = shards.rows_per_group(table)
    assert 3 <= len(groups) <= 5
    assert [group.num_rows for group in groups] == [size] * (len(groups) - 1) + [150 - size * (len(groups) - 1)]
    columns = {(column := groups[1].column(i)).path_in_schema: column for i in range(groups[1].num_columns)}
    assert all(column.compression == "ZSTD" and column.has_offset_index for column in columns.values())
    looked_up = {"image.image_id", "image.file_name", "status"}
    assert {name for name, column in columns.items() if column.statistics is not None} == looked_up
    assert {name for name, column in columns.items() if column.has_column_index} == looked_up
    statistics = columns["image.image_id"].statistics
    assert (statistics.min, statistics.max) == (size, 2 * size - 1)


def test_footer_and_row_groups_grow_together() -> None:
    """A file a hundred times as large has about ten times the groups, each about ten times as large."""
    one = records_to_table(
        [ImageRecord(image_id=1, width=9, height=8, file_name="a", uri="a", annotations=[mask_of(8, 9)] * 100)], RUN
    )
    thousand = pa.concat_tables([one] * 1000).combine_chunks()
    small, large = pa.concat_tables([thousand] * 3), pa.concat_tables([thousand] * 300)
    assert shards.rows_per_group(large) == pytest.approx(10 * shards.rows_per_group(small), rel=0.1)
    table = pa.concat_tables([one] * 10)
    assert shards.rows_per_group(table) >= 10
    assert shards.rows_per_group(one.slice(0, 0)) == 1


def test_a_shard_is_committed_once_and_replaced_on_purpose(output_root: str) -> None:
    first = records_to_table([ImageRecord(image_id=1, width=1, height=1, file_name="first", uri="u")], RUN)
    second = records_to_table([ImageRecord(image_id=1, width=1, height=1, file_name="second", uri="u")], RUN)
    assert shards.done_shards(output_root) == set()
    assert shards.commit_shard(output_root, 3, first, {"stage_seconds": {"encode": 1.5}})
    assert not shards.commit_shard(output_root, 3, second)
    assert shards.read_shard(output_root, 3)["image"][0]["file_name"].as_py() == "first"
    metadata = samray_metadata(shards.read_shard(output_root, 3).schema)
    assert metadata["stats"] == {"stage_seconds": {"encode": 1.5}}
    assert metadata["identity"] == RUN["identity"]
    shards.replace_shard(output_root, 3, second)
    assert shards.read_shard(output_root, 3)["image"][0]["file_name"].as_py() == "second"
    assert shards.done_shards(output_root) == {3}


def test_only_shards_count_as_done(output_root: str) -> None:
    table = records_to_table([], RUN)
    for shard in (0, 12, 1_234_567):
        shards.commit_shard(output_root, shard, table)
    for name in (
        "shard-1.parquet",
        "shard-0000012.parquet",
        "x.parquet",
        ".shard-000001.parquet",
        "shard-000002.parquet.tmp",
    ):
        storage.put(storage.join(output_root, "annotations", name), b"")
    assert shards.done_shards(output_root) == {0, 12, 1_234_567}


def test_a_damaged_shard_is_reported(output_root: str) -> None:
    storage.put(shards.shard_uri(output_root, 0), b"PAR1 torn")
    with pytest.raises(StorageError, match=r"shard-000000\.parquet is damaged"):
        shards.read_shard(output_root, 0)


def test_stats_are_added_to_what_is_there() -> None:
    table = with_stats(records_to_table([], RUN), {"a": 1})
    assert samray_metadata(table.schema) == {**samray_metadata(records_to_table([], RUN).schema), "stats": {"a": 1}}
