"""Images that join an output, images that have changed, and outputs that are compacted: the plan's side of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest

from samray import storage
from samray.config import Config, load_config
from samray.errors import ConfigError, StorageError
from samray.output.append import InputChanges, join_images
from samray.output.compact import compact
from samray.output.manifests import Generation, create_generation, image_ids, manifest_uri
from samray.output.plan import Plan, load_plan, make_plan
from samray.output.schema import ImageRecord, records_to_table
from samray.output.shards import (
    SUCCESS,
    commit_shard,
    done_shards,
    mark_success,
    read_metadata,
    read_shard,
    replace_shard,
    shard_uri,
)
from samray.output.verify import verify


def config_of(images_per_shard: int = 4) -> Config:
    return load_config(None, None, [f"output.images_per_shard={images_per_shard}"])


def put_images(root: str, names: Sequence[str], data: bytes = b"x") -> str:
    for name in names:
        storage.put(storage.join(root, "in", name), data)
    return storage.join(root, "in")


def plan_of(root: str, input_uri: str, **options: Any) -> Plan:
    config = config_of()
    return make_plan(input_uri, storage.join(root, "out"), config, config.identity(), **options)


def join(
    plan: Plan, input_uri: str, append: bool = False, redo: bool = False, **options: Any
) -> tuple[Plan, InputChanges]:
    config = config_of(options.pop("images_per_shard", 4))
    return join_images(plan, input_uri, config, config.identity(), append=append, redo_changed=redo, **options)


def label(plan: Plan, shard: int) -> None:
    """Commit a shard whose second image has failed."""
    records = [
        ImageRecord(
            image_id=row["image_id"],
            width=0 if index == 1 else 8,
            height=0 if index == 1 else 6,
            file_name=row["file_name"],
            uri=row["uri"],
            error="empty: no bytes" if index == 1 else None,
        )
        for index, row in enumerate(plan.read_shard(shard).to_pylist())
    ]
    failures = {"empty": 1} if len(records) > 1 else {}
    stats = {"num_images": len(records), "num_masks": 0, "failures": failures, "stage_seconds": {"decode": 2.0}}
    commit_shard(plan.output, shard, records_to_table(records, plan.run), {**stats, "device_seconds": 1.0})


def label_all(plan: Plan) -> None:
    for shard in set(range(plan.num_shards)) - done_shards(plan.output):
        label(plan, shard)
    mark_success(plan.output, num_images=plan.num_images, num_failed=plan.num_shards)


def test_new_images_get_shards_and_ids_after_the_old_ones(storage_root: str) -> None:
    names = [f"b{i}.jpg" for i in range(6)]
    input_uri = put_images(storage_root, names)
    plan = plan_of(storage_root, input_uri)
    label_all(plan)
    put_images(storage_root, ["a.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"])
    before = {shard: read_shard(plan.output, shard) for shard in range(2)}
    plan, changes = join(plan, input_uri, append=True)
    assert (changes.num_new, changes.num_changed) == (5, 0)
    assert (plan.num_images, plan.num_shards, plan.last_generation) == (11, 4, 1)
    assert [plan.num_images_of(shard) for shard in range(4)] == [4, 2, 4, 1]
    rows = [row for shard in range(4) for row in plan.read_shard(shard).to_pylist()]
    assert [row["image_id"] for row in rows] == list(range(11))
    assert [row["file_name"] for row in rows] == [*names, "a.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"]
    assert [row["shard"] for row in rows] == [0] * 4 + [1] * 2 + [2] * 4 + [3]
    assert not storage.exists(storage.join(plan.output, SUCCESS))  # not every shard is there any more
    assert not verify(plan.output).ok
    assert plan.read_images(["uri"])["uri"].to_pylist() == [row["uri"] for row in rows]
    label_all(plan)
    assert verify(plan.output).ok
    assert all(read_shard(plan.output, shard).equals(table, check_metadata=True) for shard, table in before.items())
    assert load_plan(plan.output).generations == plan.generations

    again, changes = join(load_plan(plan.output), input_uri, append=True)
    assert (changes.num_new, again.last_generation) == (0, 1)
    assert storage.exists(storage.join(plan.output, SUCCESS))  # nothing joined, so nothing is missing


def test_another_input_may_join_and_resumes_afterwards(storage_root: str) -> None:
    plan = plan_of(storage_root, put_images(storage_root, ["a.jpg"]))
    second = storage.parent(put_images(storage.join(storage_root, "more"), ["a.jpg", "b.jpg"]))
    with pytest.raises(ConfigError, match=r"input_uri: .*/in\" there, .*/more/in\" now"):
        plan_of(storage_root, storage.join(second, "in"))
    plan = plan_of(storage_root, storage.join(second, "in"), joining=True)
    plan, changes = join(plan, storage.join(second, "in"), append=True)
    assert changes.num_new == 2  # another file of the same name is another image
    assert plan_of(storage_root, storage.join(second, "in")).num_images == 3
    assert plan_of(storage_root, storage.join(storage_root, "in")).num_images == 3


def test_other_masks_may_not_join(storage_root: str) -> None:
    input_uri = put_images(storage_root, ["a.jpg"])
    plan = plan_of(storage_root, input_uri)
    config = load_config(None, None, ["output.images_per_shard=4", "masks.points_per_side=3"])
    with pytest.raises(ConfigError, match=r"masks\.points_per_side"):
        make_plan(input_uri, plan.output, config, config.identity(), joining=True)


def test_changed_images_are_told_and_marked_only_on_request(storage_root: str) -> None:
    input_uri = put_images(storage_root, [f"{i}.jpg" for i in range(6)])
    plan = plan_of(storage_root, input_uri)
    label_all(plan)
    put_images(storage_root, ["5.jpg"], b"another")
    put_images(storage_root, ["6.jpg"])
    same, changes = join(plan, input_uri)
    assert (changes.num_new, changes.num_changed, same.last_generation) == (1, 1, 0)
    assert changes.examples[0].endswith("/in/5.jpg")
    plan, changes = join(plan, input_uri, redo=True)
    assert (plan.num_images, plan.num_shards, plan.last_generation) == (6, 2, 1)  # the new one was left out
    assert plan.changed_shards() == {1: 1}
    assert plan.changed_images(1, after=0) == {5}
    assert plan.changed_images(1, after=1) == plan.changed_images(0, after=0) == set()
    assert [row["size"] for row in plan.read_shard(1).to_pylist()] == [1, 7]
    assert [row["size"] for row in plan.read_images(["size"]).to_pylist()] == [1, 1, 1, 1, 1, 7]
    problems = verify(plan.output).problems
    assert any("shard-000001.parquet has an image that changed since" in problem for problem in problems)
    assert join(plan, input_uri, redo=True)[1].num_changed == 0  # the plan knows by now

    put_images(storage_root, ["5.jpg", "0.jpg"], b"and another")
    plan, changes = join(plan, input_uri, append=True, redo=True)
    assert (changes.num_new, changes.num_changed, plan.last_generation) == (1, 2, 2)
    assert plan.changed_shards() == {0: 2, 1: 2}
    assert plan.changed_images(1, after=1) == {5}
    assert [plan.read_shard(shard)["size"].to_pylist() for shard in range(3)] == [[11, 1, 1, 1], [1, 11], [1]]


def test_a_touched_file_of_the_same_size_has_changed(tmp_path: Any) -> None:
    input_uri = put_images(str(tmp_path), ["a.jpg", "b.jpg"])
    plan = plan_of(str(tmp_path), input_uri)
    os.utime(f"{input_uri}/b.jpg", ns=(1, 1))
    assert join(plan, input_uri)[1].examples == [f"{input_uri}/b.jpg"]


def test_dry_run_writes_nothing(tmp_path: Any) -> None:
    input_uri = put_images(str(tmp_path), ["a.jpg"])
    plan = plan_of(str(tmp_path), input_uri)
    put_images(str(tmp_path), ["b.jpg"])
    _, changes = join(plan, input_uri, append=True, dry_run=True)
    assert changes.num_new == 1
    assert load_plan(plan.output).num_images == 1


def test_two_drivers_that_add_at_once_add_each_image_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    input_uri = put_images(str(tmp_path), ["a.jpg"])
    plan = plan_of(str(tmp_path), input_uri)
    put_images(str(tmp_path), ["b.jpg"])
    faster, _ = join(load_plan(plan.output), input_uri, append=True)
    put_images(str(tmp_path), ["c.jpg"])
    slower, _ = join(plan, input_uri, append=True)  # still holds the old plan, and finds generation 1 taken
    assert faster.num_images == 2
    assert slower.read_images(["file_name"])["file_name"].to_pylist() == ["a.jpg", "b.jpg", "c.jpg"]


def test_ids_that_are_taken_are_not_given_again() -> None:
    existing = pa.chunked_array([pa.array([7, 12], pa.int64())])
    assert image_ids(pa.chunked_array([["sa_5.jpg", "x.jpg"]]), existing).to_pylist() == [5, 14]
    assert image_ids(pa.chunked_array([["sa_12.jpg", "x.jpg"]]), existing).to_pylist() == [13, 14]
    with pytest.raises(ConfigError, match="the maximum is"):
        image_ids(pa.chunked_array([["x.jpg"]]), pa.chunked_array([pa.array([2**47 - 1], pa.int64())]))


def test_a_lost_generation_is_said(tmp_path: Any) -> None:
    input_uri = put_images(str(tmp_path), ["a.jpg"])
    plan = plan_of(str(tmp_path), input_uri)
    for name in ("b.jpg", "c.jpg"):
        put_images(str(tmp_path), [name])
        plan, _ = join(plan, input_uri, append=True)
    storage.delete(manifest_uri(plan.output, 1))
    with pytest.raises(StorageError, match=r"manifest-000002.parquet is missing or does not continue"):
        load_plan(plan.output)


def test_compact_is_the_same_rows_in_larger_shards(storage_root: str) -> None:
    input_uri = put_images(storage_root, [f"{i}.jpg" for i in range(10)])
    plan = plan_of(storage_root, input_uri)
    label_all(plan)
    put_images(storage_root, ["x.jpg", "y.jpg"])
    put_images(storage_root, ["0.jpg"], b"changed")
    plan, _ = join(plan, input_uri, append=True, redo=True)
    dest = storage.join(storage_root, "compact")
    with pytest.raises(ConfigError, match="1 of 4 shards are missing"):
        compact(plan.output, dest, 10**6)
    label(plan, 3)
    with pytest.raises(ConfigError, match="shard 0 must be labelled again"):
        compact(plan.output, dest, 10**6)
    storage.delete(shard_uri(plan.output, 0))
    label_all(plan)

    sizes = storage.list_names(storage.join(plan.output, "annotations")).values()
    seen: list[tuple[int, int]] = []
    report = compact(plan.output, dest, -(-sum(sizes) * 5 // 12), lambda done, total: seen.append((done, total)))
    assert (report.num_images, report.num_files_before, report.num_files) == (12, 4, 3)
    assert seen == [(5, 12), (10, 12), (12, 12)]
    old = pa.concat_tables(read_shard(plan.output, shard).replace_schema_metadata() for shard in range(4))
    new = pa.concat_tables(read_shard(dest, shard).replace_schema_metadata() for shard in range(3))
    assert new.equals(old)
    checked = verify(dest)
    assert checked.ok, checked.problems
    assert (checked.num_images, checked.num_failed) == (12, 4)
    assert load_plan(dest).read_images(["size"])["size"][0].as_py() == 7  # as the images are now

    storage.delete(shard_uri(dest, 1))
    report = compact(plan.output, dest, 1)  # the size was fixed when DEST was begun
    assert (report.num_files, report.num_files_skipped) == (3, 2)
    assert verify(dest).ok
    put_images(storage_root, ["z.jpg"])
    grown = make_plan(input_uri, dest, config_of(), config_of().identity(), joining=True)
    grown, changes = join(grown, input_uri, append=True)
    assert (changes.num_new, grown.num_images_of(3), grown.num_shards) == (1, 1, 4)
    assert grown.generations[1].images_per_shard == 4


def test_compact_keeps_the_figures(tmp_path: Any) -> None:
    plan = plan_of(str(tmp_path), put_images(str(tmp_path), [f"{i}.jpg" for i in range(6)]))
    label_all(plan)
    compact(plan.output, f"{tmp_path}/all", 10**9)
    stats = read_metadata(f"{tmp_path}/all", 0)["stats"]
    assert stats["failures"] == {"empty": 2}
    assert stats["stage_seconds"] == {"decode": pytest.approx(4.0)}
    assert stats["device_seconds"] == pytest.approx(2.0)
    assert stats["shard"] == 0


def test_compact_refuses_wrong_places(tmp_path: Any) -> None:
    plan = plan_of(str(tmp_path), put_images(str(tmp_path), ["a.jpg"]))
    label_all(plan)
    with pytest.raises(ConfigError, match="must be different folders"):
        compact(plan.output, plan.output + "/", 1)
    with pytest.raises(ConfigError, match="must not be inside"):
        compact(plan.output, f"{plan.output}/annotations/big", 1)
    create_generation(f"{tmp_path}/taken", Generation(0, {"seed": 2}, 0, 4), plan.read_shard(0).slice(0, 0))
    with pytest.raises(ConfigError, match="belongs to a run with other settings"):
        compact(plan.output, f"{tmp_path}/taken", 1)
    make_plan(f"{tmp_path}/in", f"{tmp_path}/other", config_of(), config_of().identity())
    with pytest.raises(ConfigError, match="not a compacted"):
        compact(plan.output, f"{tmp_path}/other", 1)


def test_compact_mixes_no_old_rows_with_new_ones(tmp_path: Any) -> None:
    plan = plan_of(str(tmp_path), put_images(str(tmp_path), [f"{i}.jpg" for i in range(6)]))
    label_all(plan)
    compact(plan.output, f"{tmp_path}/all", 10**9)
    table = read_shard(plan.output, 0)
    replace_shard(plan.output, 0, table.take(list(range(table.num_rows))))
    os.utime(shard_uri(plan.output, 0), ns=(1, 1))  # the very same bytes: only their time tells
    with pytest.raises(ConfigError, match=r"shards of .* have been replaced since .*all was begun.*another DEST"):
        compact(plan.output, f"{tmp_path}/all", 10**9)
