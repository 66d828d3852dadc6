"""The plan: how it cuts an input into shards, once, and what a second driver or another command meets."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from samray import storage
from samray.config import Config
from samray.errors import ConfigError
from samray.inputs.rows import input_rows
from samray.output import plan as manifest
from samray.output.identity import refuse_differences
from samray.output.manifests import MANIFEST_SCHEMA, Generation, build_manifest, create_generation, image_ids
from samray.output.plan import Plan, load_plan, make_plan
from samray.output.schema import MAX_IMAGE_ID
from tests.support.planned import config_of, finished_output, make_input


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
    # The cluster is not part of the identity, and neither is the number of points decoded at once.
    again = make_plan(
        source, output, other := config_of("cluster.max_actors=9", "masks.points_per_batch=3"), other.identity()
    )
    assert again == plan


def test_of_long_lists_only_the_differences_are_shown() -> None:
    names = [f"thing {i}" for i in range(1000)]

    def problem(there: list[str], now: list[str]) -> str:
        with pytest.raises(ConfigError) as caught:
            refuse_differences("out", {"labels": {"categories": there}}, {"labels": {"categories": now}}, {})
        return str(caught.value).splitlines()[1].strip()

    now = ["\u732b", *names[2:]]
    assert problem(names, now) == (
        'labels.categories: 1,000 there, 999 now; only there: "thing 0", "thing 1"; only now: "\u732b"'
    )
    assert problem(names, names[::-1]).endswith("1,000 there, 1,000 now; the same in another order")
    assert problem(["caf\u00e9"], ["\udcff"]) == 'labels.categories: ["caf\u00e9"] there, ["\\udcff"] now'


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
    assert "choose another OUTPUT" in lines[-1]


@pytest.mark.parametrize("section", ["input", "masks"])
def test_a_setting_that_is_new_counts_as_its_default(section: str, tmp_path: Path) -> None:
    """An OUTPUT begun before a setting existed resumes, unless the setting is used."""
    source, output, config = make_input(str(tmp_path), 5), str(tmp_path / "out"), config_of()
    older, key = config.identity(), {"input": "max_pixels", "masks": "min_mask_area"}[section]
    del older[section][key]
    make_plan(source, output, config, older)
    assert make_plan(source, output, config.model_copy(), Config().identity() | older).num_images == 5
    used = {**older, section: {**older[section], key: 7}}
    with pytest.raises(ConfigError, match=rf"{section}\.{key}: \d+ there, 7 now"):
        make_plan(source, output, config, used)
    # The other way round: an output of a newer samray, whose settings this one does not know at other values, is not.
    newer = {**older, section: {**older[section], "of_tomorrow": 1}}
    with pytest.raises(ConfigError, match="of_tomorrow: not set there, 1 now"):
        make_plan(source, output, config, newer)


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
    with pytest.raises(ConfigError, match="not the output of a samray run"):
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
    with pytest.raises(ConfigError, match=r"has shards, but no _samray/run\.json"):
        make_plan(storage.join(storage_root, "in"), plan.output, config, config.identity())


def test_foreign_files_in_our_places_are_refused(output_root: str) -> None:
    config = config_of()
    for content in (b"not json", b"[]", b"{}"):
        storage.put(storage.join(output_root, "_samray", "run.json"), content)
        with pytest.raises(ConfigError, match="is not valid"):
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
