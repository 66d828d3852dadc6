"""Another process changes an output while it is read or marked: nothing mixed is marked as finished."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import samray
from samray import storage
from samray.config import load_config
from samray.errors import ConfigError, StorageError
from samray.exports import job as export_job
from samray.imports import correct as correct_module
from samray.output import compact as compact_module
from samray.output import seals, shards
from samray.output.append import join_images
from samray.output.compact import compact
from samray.output.failures import FailureCounts
from samray.output.mask_dataset import MaskDataset
from samray.output.plan import Plan, load_plan
from samray.output.schema import samray_metadata, with_stats
from samray.output.status import run_status
from samray.output.verify import verify
from samray.pipeline import run
from tests.support.labelled import label_missing, make_input, make_output


def success_of(output: str) -> dict[str, Any] | None:
    uri = storage.join(output, shards.SUCCESS)
    return json.loads(storage.read_bytes(uri)) if storage.exists(uri) else None


def replace(plan: Plan, shard: int, mark: str) -> None:
    """Write a shard again, as another process's --retry-failed would: the same rows, other bytes."""
    table = shards.read_shard(plan.output, shard)
    stats = {**samray_metadata(table.schema).get("stats", {}), "by": mark}
    shards.replace_shard(plan.output, shard, with_stats(table, stats))


def append(plan: Plan, number: int) -> Plan:
    """Add images, as another process's --append would."""
    folder = storage.parent(plan.output)
    source = make_input(storage.join(folder, "in"), number=number)
    config = load_config(None, None, ["output.images_per_shard=4"])
    plan, changes = join_images(plan, source, config, config.identity(), append=True, redo_changed=False)
    assert changes.num_new
    return plan


def once(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, act: Callable[[], Any]) -> None:
    """Call act after the first call of module.name."""
    whole, acted = getattr(module, name), []

    def patched(*args: Any, **kwargs: Any) -> Any:
        result = whole(*args, **kwargs)
        if not acted:
            acted.append(True)
            act()
        return result

    monkeypatch.setattr(module, name, patched)


# --- what _SUCCESS says ---------------------------------------------------------------------------------------------


def test_success_names_the_generation_and_every_shard(tmp_path: Path) -> None:
    plan = append(make_output(str(tmp_path)), 12)
    assert success_of(plan.output) is None
    label_missing(plan, load_config())
    success = success_of(plan.output)
    assert success is not None
    assert (success["generation"], success["num_shards"]) == (1, plan.num_shards)
    data = [storage.read_bytes(shards.shard_uri(plan.output, shard)) for shard in range(plan.num_shards)]
    assert success["shards"] == [seals.digest_in(one) for one in data]
    assert len(set(success["shards"])) == plan.num_shards
    assert verify(plan.output).ok


def test_the_marks_of_older_versions_stay_valid(tmp_path: Path) -> None:
    plan = make_output(str(tmp_path))
    storage.put(storage.join(plan.output, shards.SUCCESS), b'{"num_images": 10, "num_failed": 1, "num_shards": 3}\n')
    assert verify(plan.output).ok
    assert run_status(plan.output).state == "finished"


def test_a_mark_of_an_older_generation_is_none(tmp_path: Path) -> None:
    """As it is left by a run that was killed between its mark and its last look."""
    plan = make_output(str(tmp_path))
    old = storage.read_bytes(storage.join(plan.output, shards.SUCCESS))
    plan = append(plan, 12)
    label_missing(plan, load_config())
    false = json.dumps({**json.loads(old), "num_shards": plan.num_shards}).encode()
    storage.put(storage.join(plan.output, shards.SUCCESS), false)
    assert run_status(plan.output).state == "unmarked"
    assert any("names generation 0 of the plan, the last one is 1" in one for one in verify(plan.output).problems)


# --- label ----------------------------------------------------------------------------------------------------------


def num_missing_at_the_end(plan: Plan) -> int:
    return run._conclude(plan, FailureCounts.load(plan.output))[1]


def test_a_shard_replaced_while_a_run_ends_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_output(str(tmp_path))
    shards.unmark_success(plan.output)
    once(monkeypatch, run, "failures_of_shards", lambda: replace(plan, 1, "another"))
    assert num_missing_at_the_end(plan) == 0
    assert verify(plan.output).ok


def test_a_shard_replaced_between_the_look_and_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_output(str(tmp_path))
    shards.unmark_success(plan.output)
    once(monkeypatch, shards, "_look", lambda: replace(plan, 1, "another"))
    assert not shards.mark_success(plan.output)
    assert success_of(plan.output) is None


def test_images_appended_while_a_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_output(str(tmp_path))
    shards.unmark_success(plan.output)
    once(monkeypatch, run, "failures_of_shards", lambda: append(plan, 12))
    assert num_missing_at_the_end(plan) == 0
    assert success_of(plan.output) is None


@pytest.mark.parametrize("call", ["shard_versions", "read_digest"])
def test_images_appended_while_the_mark_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    plan = make_output(str(tmp_path))
    shards.unmark_success(plan.output)
    once(monkeypatch, shards, call, lambda: append(plan, 12))
    assert not shards.mark_success(plan.output, generation=plan.last_generation)
    assert success_of(plan.output) is None


def test_the_mark_of_another_run_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_output(str(tmp_path))
    shards.unmark_success(plan.output)
    theirs = b'{"num_shards": 3, "by": "another"}'

    def act() -> None:
        replace(plan, 1, "another")
        whole(storage.join(plan.output, shards.SUCCESS), theirs)

    whole = storage.put
    once(monkeypatch, storage, "put", act)
    assert not shards.mark_success(plan.output)
    assert storage.read_bytes(storage.join(plan.output, shards.SUCCESS)) == theirs


# --- what reads an output -------------------------------------------------------------------------------------------


def test_compact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_output(str(tmp_path))
    once(monkeypatch, compact_module, "rows_at", lambda: replace(plan, 0, "another"))
    dest = str(tmp_path / "dest")
    with pytest.raises(StorageError, match="were replaced while they were read"):
        compact(plan.output, dest, 1000)
    assert success_of(dest) is None
    with pytest.raises(ConfigError, match="have been replaced since"):
        compact(plan.output, dest, 1000)
    compact(plan.output, str(tmp_path / "other"), 1000)


def test_compact_of_an_output_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_output(str(tmp_path))
    once(monkeypatch, compact_module, "rows_at", lambda: append(plan, 12))
    report = compact(plan.output, str(tmp_path / "dest"), 10**6)
    assert report.num_images == 10
    assert verify(str(tmp_path / "dest")).ok


@pytest.mark.parametrize("format", ["sa1b", "flat"])
def test_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    plan = make_output(str(tmp_path))
    once(monkeypatch, export_job, "read_rows", lambda: replace(plan, 0, "another"))
    dest = tmp_path / "dest"
    options: dict[str, Any] = {"format": format, "progress": False}
    with pytest.raises(StorageError, match="were replaced during the export"):
        samray.export(plan.output, dest, **options)
    assert not (dest / "_export" / "_SUCCESS").exists()
    with pytest.raises(ConfigError, match="has changed since"):
        samray.export(plan.output, dest, **options)
    samray.export(plan.output, tmp_path / "other", **options)
    assert (tmp_path / "other" / "_export" / "_SUCCESS").exists()


def test_import_corrects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_output(str(tmp_path))
    image = {"id": 1, "width": 24, "height": 16, "file_name": "img_000.png"}
    person = tmp_path / "person.json"
    person.write_text(json.dumps({"images": [image], "annotations": []}))
    once(monkeypatch, correct_module, "rows_between", lambda: replace(plan, 0, "another"))
    options: dict[str, Any] = {"corrects": plan.output, "progress": False}
    with pytest.raises(StorageError, match="were replaced while they were read"):
        samray.import_(person, tmp_path / "dest", **options)
    assert success_of(str(tmp_path / "dest")) is None


def test_mask_dataset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = make_output(str(tmp_path))
    dataset = MaskDataset(plan.output, images=False)
    dataset[0]
    replace(plan, 1, "another")
    at = int((dataset._index.shards == 1).argmax())
    with pytest.raises(StorageError, match="replaced"):
        dataset[at]
    with caplog.at_level(logging.WARNING):
        MaskDataset(plan.output, images=False)[at]
    assert "1 of 3 shards were replaced since _SUCCESS was written" in caplog.text
    assert load_plan(plan.output).num_shards == 3
