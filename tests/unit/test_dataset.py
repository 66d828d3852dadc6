"""Schema, plan, shards and verify: the contract of what lies on disk, on both kinds of storage."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco_mask

from samray import storage
from samray.config import Config, load_config
from samray.dataset import manifest, shards
from samray.dataset.generations import MANIFEST_SCHEMA, Generation, build_manifest, create_generation, image_ids
from samray.dataset.manifest import Plan, load_plan, make_plan
from samray.dataset.rows import input_rows
from samray.dataset.schema import (
    MAX_IMAGE_ID,
    SCHEMA,
    ImageRecord,
    records_to_table,
    samray_metadata,
    with_stats,
)
from samray.dataset.verify import check_mask, run_lengths, verify
from samray.errors import ConfigError, StorageError

RUN: dict[str, Any] = {"samray_version": "1", "identity": {"masks": {"bbox_convention": "coco"}, "seed": 1}}


def config_of(*overrides: str) -> Config:
    return load_config(None, None, ["output.images_per_shard=4", *overrides])


def mask_of(height: int, width: int, seed: int = 0, convention: str = "coco") -> dict[str, Any]:
    """One annotation, right in every field."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width), np.uint8, order="F")
    y, x = rng.integers(0, height - 1), rng.integers(0, width - 1)
    pixels[y : y + rng.integers(1, height), x : x + rng.integers(1, width)] = 1
    rle = coco_mask.encode(pixels)
    x, y, w, h = coco_mask.toBbox(rle).tolist()
    return {
        "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
        "bbox": [x, y, w, h] if convention == "coco" else [x, y, w - 1, h - 1],
        "area": int(pixels.sum()),
        "predicted_iou": 0.9,
        "stability_score": 0.97,
        "point_coords": [[x + 0.5, y + 0.5]],
        "crop_box": [0.0, 0.0, float(width), float(height)],
    }


def records_for(plan: Plan, shard: int, num_masks: int = 2) -> list[ImageRecord]:
    return [
        ImageRecord(
            image_id=row["image_id"],
            width=20,
            height=12 + row["image_id"] % 5,
            file_name=row["file_name"],
            uri=row["uri"],
            annotations=[mask_of(12 + row["image_id"] % 5, 20, row["image_id"] + i) for i in range(num_masks)],
        )
        for row in plan.read_shard(shard).to_pylist()
    ]


def make_input(root: str, number: int = 10) -> str:
    for i in range(number):
        storage.put(storage.join(root, "in", f"{i:03d}.jpg"), b"x")
    return storage.join(root, "in")


def finished_output(root: str) -> Plan:
    """Ten images in three shards, all there."""
    config = config_of()
    plan = make_plan(make_input(root), storage.join(root, "out"), config, config.identity())
    for shard in range(plan.num_shards):
        assert shards.commit_shard(plan.output, shard, records_to_table(records_for(plan, shard), plan.run))
    shards.mark_success(plan.output)
    return plan


# --- schema --------------------------------------------------------------------------------------------------------


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
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    record = ImageRecord(image_id=7, width=9, height=8, file_name="a", uri="a", annotations=[mask_of(8, 9)])
    (tmp_path / "x.parquet").write_bytes(shards.shard_bytes(records_to_table([record], RUN)))
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "x.parquet"), cache_dir=str(tmp_path / "cache"))
    assert loaded[0]["annotations"][0]["segmentation"] == mask_of(8, 9)["segmentation"]
    assert loaded.features["image"]["width"].dtype == "int32"


def test_duckdb_reads_the_nested_columns(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    record = ImageRecord(image_id=7, width=9, height=8, file_name="a", uri="a", annotations=[mask_of(8, 9)] * 3)
    (tmp_path / "x.parquet").write_bytes(shards.shard_bytes(records_to_table([record], RUN)))
    query = f"select image.width, len(annotations), annotations[1].bbox from '{tmp_path}/x.parquet'"
    assert duckdb.sql(query).fetchall() == [(9, 3, mask_of(8, 9)["bbox"])]


# --- shards --------------------------------------------------------------------------------------------------------


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
    few = pa.concat_tables([one] * 10)
    assert shards.rows_per_group(few) >= 10
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


def test_a_damaged_shard_is_told(output_root: str) -> None:
    storage.put(shards.shard_uri(output_root, 0), b"PAR1 torn")
    with pytest.raises(StorageError, match=r"shard-000000\.parquet is damaged"):
        shards.read_shard(output_root, 0)


def test_stats_are_added_to_what_is_there() -> None:
    table = with_stats(records_to_table([], RUN), {"a": 1})
    assert samray_metadata(table.schema) == {**samray_metadata(records_to_table([], RUN).schema), "stats": {"a": 1}}


# --- plan ----------------------------------------------------------------------------------------------------------


def test_a_plan_cuts_the_input_into_shards(storage_root: str) -> None:
    source = make_input(storage_root, 10)
    config = config_of()
    plan = make_plan(source, storage.join(storage_root, "out"), config, config.identity())
    assert (plan.num_images, plan.num_shards) == (10, 3)
    assert [plan.num_images_of(i) for i in range(3)] == [4, 4, 2]
    rows = pa.concat_tables(plan.read_shard(i) for i in (2, 0, 1)).to_pylist()
    assert [row["image_id"] for row in rows] == [8, 9, 0, 1, 2, 3, 4, 5, 6, 7]
    assert rows[0]["uri"] == storage.join(source, "008.jpg")
    assert rows[0]["size"] == 1
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert load_plan(plan.output) == plan
    assert plan.run["config"]["output"]["images_per_shard"] == 4
    assert plan.run["input"] == source


def test_resuming_does_not_list_again(storage_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_input(storage_root, 5)
    output = storage.join(storage_root, "out")
    config = config_of()
    plan = make_plan(source, output, config, config.identity())
    storage.put(storage.join(source, "late.jpg"), b"x")

    def forbidden(*args: Any) -> Any:
        raise AssertionError("listed again")

    monkeypatch.setattr(manifest, "list_images", forbidden)
    # The cluster is no part of the identity, and neither is the number of points decoded at once.
    again = make_plan(
        source, output, other := config_of("cluster.max_actors=9", "masks.points_per_batch=3"), other.identity()
    )
    assert again == plan


def test_another_run_is_refused_with_the_differences(storage_root: str) -> None:
    source = make_input(storage_root, 5)
    output = storage.join(storage_root, "out")
    config = config_of("masks.points_per_side=8")
    make_plan(source, output, config, {**config.identity(), "model": {"checkpoint_sha256": "abc"}})
    other = config_of("masks.points_per_side=16", "output.images_per_shard=5")
    with pytest.raises(ConfigError) as caught:
        make_plan(source + "2", output, other, {**other.identity(), "model": {"checkpoint_sha256": "def"}})
    lines = str(caught.value).splitlines()
    assert [line.strip().partition(":")[0] for line in lines[1:-1]] == [
        "input_uri",
        "masks.points_per_side",
        "model.checkpoint_sha256",
        "output.images_per_shard",
    ]
    assert "masks.points_per_side: 8 there, 16 now" in str(caught.value)
    assert "give another OUTPUT" in lines[-1]


class DriverDied(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


def test_a_plan_half_made_is_finished_by_the_same_command_only(
    storage_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_input(storage_root, 10)
    output = storage.join(storage_root, "out")
    config = config_of()
    real = storage.put_new

    def die_before_run_json(uri: str, data: bytes) -> bool:
        if uri.endswith("run.json"):
            raise DriverDied
        return real(uri, data)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "put_new", die_before_run_json)
        with pytest.raises(DriverDied):
            make_plan(source, output, config, config.identity())
    with pytest.raises(ConfigError, match="no samray run"):
        load_plan(output)
    storage.put(storage.join(source, "late.jpg"), b"x")
    other = config_of("output.images_per_shard=3")
    with pytest.raises(ConfigError, match="images_per_shard: 4 there, 3 now"):
        make_plan(source, output, other, other.identity())
    plan = make_plan(source, output, config, config.identity())
    assert plan.num_images == 10  # fixed with the manifest, before the late one came
    assert plan.read_shard(2).num_rows == 2


def test_drivers_that_plan_at_once_agree(storage_root: str) -> None:
    source = make_input(storage_root, 20)
    output = storage.join(storage_root, "out")
    configs = [config_of(), config_of(), config_of("output.images_per_shard=3")]
    barrier = threading.Barrier(len(configs))
    plans: list[Plan] = []
    refusals: list[str] = []

    def drive(config: Config) -> None:
        barrier.wait()
        try:
            plans.append(make_plan(source, output, config, config.identity()))
        except ConfigError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=drive, args=(config,)) for config in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plans) + len(refusals) == 3
    assert len(plans) in (1, 2)  # those of one configuration, whichever came first
    assert all(plan == plans[0] for plan in plans)
    assert plans[0] == load_plan(output)
    read = pa.concat_tables(plans[0].read_shard(i) for i in range(plans[0].num_shards))
    assert read["image_id"].to_pylist() == list(range(20))


def test_shards_without_a_plan_are_not_taken_over(storage_root: str) -> None:
    plan = finished_output(storage_root)
    for name in ("run.json", "manifest.parquet"):
        storage.delete(storage.join(plan.output, "_samray", name))
    config = config_of()
    with pytest.raises(ConfigError, match=r"holds shards, but no _samray/run\.json"):
        make_plan(storage.join(storage_root, "in"), plan.output, config, config.identity())


def test_foreign_files_in_our_places_are_refused(output_root: str) -> None:
    config = config_of()
    for content in (b"not json", b"[]", b"{}"):
        storage.put(storage.join(output_root, "_samray", "run.json"), content)
        with pytest.raises(ConfigError, match="cannot be understood"):
            make_plan("in", output_root, config, config.identity())


def test_run_json_holds_no_credentials(tmp_path: Path) -> None:
    source = make_input(str(tmp_path))
    config = config_of("model.checkpoint=https://me:pass1@h/x.pth?sig=pass2")
    plan = make_plan(source, str(tmp_path / "out"), config, {"checkpoint": config.model.checkpoint})
    written = (tmp_path / "out" / "_samray" / "run.json").read_text()
    assert "pass1" not in written
    assert "pass2" not in written
    assert make_plan(source, str(tmp_path / "out"), config, {"checkpoint": config.model.checkpoint}) == plan


def ids_of(*names: str) -> list[int]:
    return image_ids(pa.chunked_array([list(names)])).to_pylist()


def test_image_ids_are_the_numbers_in_sa1b_names_else_places() -> None:
    assert ids_of("sa_10.jpg", "x/sa_0003.jpg", "sa_000000.png") == [10, 3, 0]
    assert ids_of("a.jpg", "b.jpg") == [0, 1]
    assert ids_of("sa_10.jpg", "b.jpg") == [10, 1]
    assert ids_of("a.jpg", "sa_0.jpg") == [0, 1]  # sa_0 would be 0 again: places for all
    assert ids_of("x/sa_5.jpg", "y/sa_5.jpg", "sa_9.jpg") == [0, 1, 2]
    assert ids_of("visa_5.jpg", "sa_5x.jpg", "sa_.jpg", "sa_5") == [0, 1, 2, 3]
    assert ids_of(f"sa_{MAX_IMAGE_ID}.jpg", f"sa_{MAX_IMAGE_ID + 1}.jpg", "sa_99999999999999999999.jpg") == [
        MAX_IMAGE_ID,
        1,
        2,
    ]
    assert (MAX_IMAGE_ID + 1) * 65536 - 1 < 2**63


def test_a_large_plan_reads_one_row_group_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = 100_000
    names = pa.array([f"{i}.jpg" for i in range(number)])
    table = build_manifest(input_rows(names, names), 64)
    assert table.schema.equals(MANIFEST_SCHEMA)
    output = str(tmp_path)
    generation = Generation(0, {}, number, 64)
    assert create_generation(output, generation, table)
    plan = Plan(output, [generation], {})
    num_reads = 0
    original = manifest.read_group

    def counting(output: str, generation: Generation, group: int) -> pa.Table:
        nonlocal num_reads
        num_reads += 1
        group_table = original(output, generation, group)
        assert group_table.num_rows <= 16384
        return group_table

    monkeypatch.setattr(manifest, "read_group", counting)
    for shard in (0, 1, 2, plan.num_shards - 1):
        rows = plan.read_shard(shard)
        assert rows["image_id"][0].as_py() == shard * 64
        assert rows.num_rows == plan.num_images_of(shard)
    assert num_reads == 2
    assert len(pickle.dumps(plan)) < 1000


# --- verify --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_output(storage_root: str, deep: bool) -> None:
    plan = finished_output(storage_root)
    report = verify(plan.output, deep)
    assert (report.ok, report.problems) == (True, [])
    assert (report.num_images, report.num_masks, report.num_failed, report.num_shards) == (10, 20, 0, 3)


def rewritten(plan: Plan, shard: int, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Write a shard again with its rows changed."""
    table = shards.read_shard(plan.output, shard)
    rows = table.to_pylist()
    change(rows)
    changed = pa.Table.from_pylist(rows, schema=SCHEMA).replace_schema_metadata(table.schema.metadata)
    shards.replace_shard(plan.output, shard, changed)


def first_mask(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return rows[1]["annotations"][0]


SHALLOW: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "row lost": (lambda rows: rows.pop(2), "shard-000001.parquet: image 6 is missing"),
    "row twice": (lambda rows: rows.append(rows[0]), "image 4 is there more than once"),
    "foreign row": (lambda rows: rows[3]["image"].update(image_id=99), "image 99 is not in the plan"),
    "order": (lambda rows: rows.reverse(), "not in the order of the plan"),
    "uri": (lambda rows: rows[0].update(uri="/other"), "image 4 has uri '/other', planned was"),
    "name": (lambda rows: rows[0]["image"].update(file_name="z"), "image 4 has file_name 'z'"),
    "status": (lambda rows: rows[0].update(status="done"), "unknown status 'done'"),
    "no reason": (lambda rows: rows[0].update(status="failed", annotations=[]), "failed, but does not say why"),
    "failed with masks": (lambda rows: rows[0].update(status="failed", error="x: y"), "'failed' and 2 masks"),
    "ok with error": (lambda rows: rows[0].update(error="x: y"), "is ok, but has an error"),
    "no width": (lambda rows: rows[0]["image"].update(width=0), "is ok, but 0x"),
    "annotation id": (lambda rows: first_mask(rows).update(id=5), "image 5, annotation 0 has the id 5"),
    "mask size": (lambda rows: rows[1]["image"].update(height=99), "is a mask of size"),
    "score": (lambda rows: first_mask(rows).update(predicted_iou=float("nan")), "a score that is no number"),
}

DEEP: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "area": (lambda rows: first_mask(rows).update(area=1234), "has the area 1234, but"),
    "box": (lambda rows: first_mask(rows).update(bbox=[0.0, 0.0, 1.0, 1.0]), "has the box"),
    "counts": (lambda rows: first_mask(rows)["segmentation"].update(counts="no counts"), "cannot be decoded"),
    "too many": (
        lambda rows: first_mask(rows)["segmentation"].update(counts="ooooo0" * 3),
        "has run lengths|cannot be",
    ),
}


@pytest.mark.parametrize("fault", [*SHALLOW, *DEEP])
def test_each_fault_is_found_and_named(tmp_path: Path, fault: str) -> None:
    plan = finished_output(str(tmp_path))
    change, message = (SHALLOW | DEEP)[fault]
    rewritten(plan, 1, change)
    if fault in DEEP:
        assert verify(plan.output).ok
    report = verify(plan.output, deep=True)
    assert not report.ok
    assert any(pc.match_substring_regex([problem], message)[0].as_py() for problem in report.problems), report.problems
    assert all("shard-000001.parquet" in problem for problem in report.problems)


def test_missing_foreign_and_torn_shards(storage_root: str) -> None:
    plan = finished_output(storage_root)
    storage.delete(shards.shard_uri(plan.output, 0))
    storage.put(shards.shard_uri(plan.output, 1), b"PAR1 torn")
    storage.put(shards.shard_uri(plan.output, 7), b"")
    storage.put(storage.join(plan.output, "annotations", "notes.txt"), b"")
    problems = verify(plan.output).problems
    assert len(problems) == 5, problems
    for part in (
        "shard-000000.parquet is missing",
        "shard-000001.parquet is no Parquet file",
        "_SUCCESS is there, but only 2 of 3",
        "annotations/shard-000007.parquet is not in the plan",
        "annotations/notes.txt is not in the plan",
    ):
        assert any(part in problem for problem in problems), part


def test_success_agrees(tmp_path: Path) -> None:
    plan = finished_output(str(tmp_path))
    storage.put(storage.join(plan.output, "_SUCCESS"), b'{"num_shards": 2}')
    assert verify(plan.output).problems == ["_SUCCESS speaks of 2 shards, the plan has 3"]
    storage.delete(storage.join(plan.output, "_SUCCESS"))
    assert len(verify(plan.output).problems) == 1
    storage.delete(shards.shard_uri(plan.output, 2))
    assert verify(plan.output).problems == ["annotations/shard-000002.parquet is missing"]


def test_shards_of_another_run_are_noticed(tmp_path: Path) -> None:
    plan = finished_output(str(tmp_path))
    other = records_to_table(records_for(plan, 1), {**plan.run, "identity": {"masks": {}}})
    shards.replace_shard(plan.output, 1, other)
    assert verify(plan.output).problems == ["shard-000001.parquet was written by a run with other settings"]


def test_failed_rows_are_counted_and_no_problem(tmp_path: Path) -> None:
    plan = finished_output(str(tmp_path))
    row = plan.read_shard(2).to_pylist()[0]
    records = records_for(plan, 2)
    records[0] = ImageRecord(
        image_id=row["image_id"], width=0, height=0, file_name=row["file_name"], uri=row["uri"], error="empty: no bytes"
    )
    shards.replace_shard(plan.output, 2, records_to_table(records, plan.run))
    report = verify(plan.output, deep=True)
    assert (report.ok, report.num_failed, report.num_masks) == (True, 1, 18)


def test_problems_are_bounded_a_shard(tmp_path: Path) -> None:
    plan = finished_output(str(tmp_path))

    def break_all(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["annotations"] = [{**row["annotations"][0], "id": -1} for _ in range(100)]

    rewritten(plan, 0, break_all)
    problems = verify(plan.output).problems
    assert len(problems) == 21
    assert problems[-1] == "shard-000000.parquet: 380 more problems"


def test_verify_needs_a_plan(output_root: str) -> None:
    with pytest.raises(ConfigError, match="no samray run"):
        verify(output_root)


@pytest.mark.parametrize("convention", ["coco", "sam"])
def test_check_mask_knows_both_box_conventions(convention: str) -> None:
    other = {"coco": "sam", "sam": "coco"}[convention]
    for seed in range(20):
        mask = mask_of(17, 23, seed, convention)
        assert check_mask(mask, convention) is None
        assert "has the box" in (check_mask(mask, other) or "")


def test_run_lengths_agree_with_pycocotools_and_reject_nonsense() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = rng.integers(1, 90, 2)
        pixels = np.asfortranarray(rng.random((height, width)) < rng.random()).astype(np.uint8)
        counts = coco_mask.encode(pixels)["counts"].decode()
        runs = run_lengths(counts)
        assert runs is not None
        values = np.arange(len(runs)) % 2
        np.testing.assert_array_equal(np.repeat(values, runs), pixels.flatten(order="F"))
    for bad in ("", "o", "oooooooooooooooooooo", "é", " ", "0\n"):
        assert run_lengths(bad) is None
    hostile = random_strings(500)
    assert all(runs is None or runs.dtype == np.int64 for runs in map(run_lengths, hostile))
    for counts in hostile:  # must not crash, and cannot be sound
        mask = {**mask_of(9, 9), "segmentation": {"size": [9, 9], "counts": counts}}
        assert check_mask(mask, "coco") is not None


def random_strings(number: int) -> list[str]:
    rng = np.random.default_rng(1)
    return [base64.b85encode(rng.bytes(int(rng.integers(1, 40)))).decode() for _ in range(number)]
