"""How far a run is, from its output alone, on disk and on S3."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from samray import storage
from samray.cli import status_view
from samray.cli.main import main
from samray.cli.status_view import line, rows, sentence, table
from samray.config import load_config
from samray.output import sample, shards, status
from samray.output.manifests import Generation, create_generation
from samray.output.plan import Plan, make_plan
from samray.output.schema import ImageRecord, records_to_table
from samray.output.status import Footers, Status, run_status
from samray.output.tile_files import TileFiles
from tests.support.handmade import annotation, blob, write_output

PER_SHARD = 2


def planned(root: str, num_images: int, *overrides: str) -> Plan:
    """A plan of images that nobody reads, two a shard."""
    uris = "".join(f"/nowhere/{i:06d}.jpg\n" for i in range(num_images))
    storage.put(storage.join(root, "images.txt"), uris.encode())
    config = load_config(None, None, [f"output.images_per_shard={PER_SHARD}", *overrides])
    return make_plan(storage.join(root, "images.txt"), storage.join(root, "out"), config, config.identity())


def commit(plan: Plan, shard: int, reason: str | None = None) -> None:
    """A shard without masks. Its first image failed if a reason is given."""
    records = [
        ImageRecord(
            image_id=row["image_id"],
            width=0 if failed else 9,
            height=0 if failed else 8,
            file_name=row["file_name"],
            uri=row["uri"],
            error=f"{reason}: it is" if failed else None,
        )
        for i, row in enumerate(plan.read_shard(shard).to_pylist())
        for failed in [reason is not None and i == 0]
    ]
    stats = {
        "failures": {reason: 1} if reason else {},
        "device_seconds": 3.0,
        "held_seconds": 4.0,
        "gpu_seconds": 36.0,
    }
    shards.commit_shard(plan.output, shard, records_to_table(records, plan.run), stats)


def written_at(plan: Plan, times: dict[int, float]) -> None:
    """Set when shards on a disk were written, as seconds before now; and long before all of them, when planned."""
    now = time.time()
    for shard, ago in times.items():
        os.utime(shards.shard_uri(plan.output, shard), (now - ago, now - ago))
    planned_at = now - max(times.values()) - 100.0
    os.utime(Path(plan.output) / "_samray" / "manifest.parquet", (planned_at, planned_at))


@pytest.fixture
def disk_plan(tmp_path: Path) -> Plan:
    return planned(str(tmp_path), 20)


# --- the states ----------------------------------------------------------------------------------------------------


def test_a_run_from_the_plan_to_the_mark(storage_root: str) -> None:
    plan = planned(storage_root, 5)
    seen = run_status(plan.output)
    assert (seen.state, seen.num_images_done, seen.num_images, seen.num_shards) == ("not begun", 0, 5, 3)
    assert "not begun" in sentence(seen)
    assert not seen.own_clock

    storage.put(storage.join(plan.output, "_samray", "attempts", "shard-000001.attempt-0001"), b"run")
    seen = run_status(plan.output)
    assert (seen.state, seen.num_shards_begun, seen.last_shard_s_ago) == ("running", 1, None)
    assert "1 shard in progress" in sentence(seen)

    commit(plan, 1, "truncated")
    seen = run_status(plan.output)
    assert (seen.state, seen.num_images_done, seen.num_shards_begun) == ("running", 2, 0)
    assert (seen.num_masks, seen.failures, seen.num_failed, seen.estimated) == (0, {"truncated": 1}, 1, False)
    assert seen.last_shard_s_ago is not None
    assert 0 <= seen.last_shard_s_ago < 600

    commit(plan, 0)
    commit(plan, 2)
    seen = run_status(plan.output)
    assert (seen.state, seen.num_images_done) == ("unmarked", 5)  # the last shard has one image
    assert "not _SUCCESS" in sentence(seen)
    shards.mark_success(plan.output)
    seen = run_status(plan.output)
    assert (seen.state, seen.eta_s) == ("finished", None)
    assert (seen.device_seconds, seen.held_seconds, seen.gpu_seconds) == (9.0, 12.0, 108.0)


def test_a_mark_that_speaks_of_fewer_shards_is_none(disk_plan: Plan) -> None:
    for shard in range(9):
        commit(disk_plan, shard)
    shards.mark_success(disk_plan.output)
    assert run_status(disk_plan.output).state == "running"
    commit(disk_plan, 9)
    assert run_status(disk_plan.output).state == "unmarked"


def test_other_files_are_no_shards(disk_plan: Plan) -> None:
    commit(disk_plan, 0)
    folder = Path(disk_plan.output) / "annotations"
    for name in (".shard-000001.parquet.tmp", "shard-1.parquet", "shard-000400.parquet", "notes.txt"):
        (folder / name).write_bytes(b"x")
    assert run_status(disk_plan.output).num_shards_done == 1


def test_no_run_there_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err.strip() == f"samray: {tmp_path} is not the output of a samray run (_samray/run.json is missing)"
    assert main(["status", str(tmp_path), "--watch", "0"]) == 2
    assert "--watch" in capsys.readouterr().err


# --- rate and time left --------------------------------------------------------------------------------------------


def test_the_rate_is_that_of_the_shards_times(disk_plan: Plan) -> None:
    for shard in range(5):
        commit(disk_plan, shard)
    written_at(disk_plan, {shard: 41.0 - 10 * shard for shard in range(5)})  # the last one a second ago

    seen = run_status(disk_plan.output)

    assert seen.state == "running"
    assert seen.images_per_s == pytest.approx(0.2, rel=0.01)  # two images every ten seconds
    assert seen.images_per_s_overall == pytest.approx(10 / 140, rel=0.01)
    assert seen.eta_s == pytest.approx(50, rel=0.01)
    assert seen.usual_gap_s == pytest.approx(10, rel=0.01)
    assert seen.last_shard_s_ago is not None
    assert 1 <= seen.last_shard_s_ago < 9


def test_a_pause_between_two_sessions_does_not_count(disk_plan: Plan) -> None:
    for shard in range(6):
        commit(disk_plan, shard)
    day = 86_400.0
    written_at(disk_plan, {0: day + 20, 1: day + 10, 2: day, 3: 21, 4: 11, 5: 1})
    seen = run_status(disk_plan.output)
    # 20 s of work in each session
    assert seen.images_per_s == pytest.approx(0.2, rel=0.01)
    assert seen.images_per_s_overall == pytest.approx(12 / (day + 119), rel=0.01)

    written_at(disk_plan, {shard: day + 10.0 * (6 - shard) for shard in range(6)})
    storage.put(storage.join(disk_plan.output, "_samray", "attempts", "shard-000007.attempt-0001"), b"run")
    seen = run_status(disk_plan.output)  # just resumed, and no new shard yet
    assert (seen.state, seen.images_per_s) == ("running", pytest.approx(0.2, rel=0.01))


def test_shards_that_come_in_bursts_are_not_taken_for_a_fast_run(disk_plan: Plan) -> None:
    """Four actors in step, a minute a shard: after the second burst and half a minute of waiting for the third."""
    for shard in range(8):
        commit(disk_plan, shard)
    written_at(disk_plan, {shard: 90.0 if shard < 4 else 30.0 + shard / 1000 for shard in range(8)})
    rate = run_status(disk_plan.output).images_per_s
    assert rate is not None
    assert 8 / 95 < rate <= 8 / 60


def test_a_shard_that_waits_for_changed_images_is_not_done(tmp_path: Path) -> None:
    plan = planned(str(tmp_path), 6)
    for shard in range(3):
        commit(plan, shard)
    changed = plan.read_shard(1).slice(0, 1)
    second = Generation(1, plan.run["identity"], 0, PER_SHARD, first_shard=3, num_changed=1)
    assert create_generation(plan.output, second, changed.slice(0, 0), changed)
    written_at(plan, {0: 50.0, 1: 40.0, 2: 30.0})

    seen = run_status(plan.output)
    assert (seen.num_shards_done, seen.num_images_done, seen.num_shards) == (2, 4, 3)
    shards.mark_success(plan.output)
    assert run_status(plan.output).state != "finished"
    os.utime(shards.shard_uri(plan.output, 1))  # labelled again
    assert run_status(plan.output).state == "finished"


def test_stalled_is_relative_to_the_usual_pace(disk_plan: Plan) -> None:
    for shard in range(4):
        commit(disk_plan, shard)
    written_at(disk_plan, {shard: 3000.0 - 10 * shard for shard in range(4)})
    seen = run_status(disk_plan.output)
    assert (seen.state, seen.eta_s) == ("stalled", None)
    assert "No activity for 49 min" in sentence(seen)
    assert "one shard every 10.0 s" in sentence(seen)

    written_at(disk_plan, {shard: 6600.0 - 1200 * shard for shard in range(4)})  # every 20 minutes: 50 are no wonder
    assert run_status(disk_plan.output).state == "running"

    written_at(disk_plan, {shard: 3000.0 - 10 * shard for shard in range(4)})
    storage.put(storage.join(disk_plan.output, "_samray", "attempts", "shard-000007.attempt-0001"), b"run")
    assert run_status(disk_plan.output).state == "running"  # somebody has just begun a shard


def test_tiles_of_a_large_image_are_shown_and_are_a_sign_of_life(storage_root: str) -> None:
    """A run that labelled one large image for more than half an hour counted as stalled."""
    plan = planned(storage_root, 4)
    commit(plan, 0)
    assert run_status(plan.output).num_tiles_done == 0
    row = {"image_id": 3, "uri": "a.png", "size": 10, "etag": None}
    for number in (0, 2):
        TileFiles(plan.output, 1, row, 0).put(number, [], {})
    TileFiles(plan.output, 0, row, 0).put(0, [], {})  # left by a kill: its shard is done
    status = run_status(plan.output)
    assert status.num_tiles_done == 2
    assert ("tiles", "2 of large images in shards that are not done") in rows(status)
    if storage.is_local(plan.output):
        for entry in storage.list_files(plan.output):
            os.utime(entry.uri, (1e9, 1e9))
        assert run_status(plan.output).state == "stalled"
        TileFiles(plan.output, 1, row, 0).put(3, [], {})
        assert run_status(plan.output).state == "running"


def test_a_clock_that_is_behind_sees_no_future(disk_plan: Plan) -> None:
    commit(disk_plan, 0)
    commit(disk_plan, 1)
    written_at(disk_plan, {0: -4000.0, 1: -5000.0})
    seen = run_status(disk_plan.output)
    assert (seen.last_shard_s_ago, seen.quiet_s, seen.state) == (0.0, 0.0, "running")


def test_a_storage_without_clock_or_times(disk_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(disk_plan, 0)
    commit(disk_plan, 1)
    monkeypatch.setattr(storage, "clock", lambda uri: None)
    seen = run_status(disk_plan.output)
    assert seen.own_clock
    assert "this machine's clock" in status_view.plain(seen)
    monkeypatch.setattr(storage, "list_times", lambda folder: dict.fromkeys(storage.list_names(folder)))
    seen = run_status(disk_plan.output)
    assert (seen.state, seen.num_shards_done, seen.images_per_s) == ("running", 2, None)
    assert "at an unknown time" in sentence(seen)


# --- many shards ---------------------------------------------------------------------------------------------------


def test_of_many_shards_a_sample_is_read_once_and_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "MAX_FOOTERS", 8)
    read: list[int] = []
    real: Callable[..., Any] = sample.read_footers

    def counting(output: str, wanted: list[int], **options: Any) -> Any:
        read.extend(wanted)
        return real(output, wanted, **options)

    monkeypatch.setattr(status, "read_footers", counting)
    plan = planned(str(tmp_path), 60)
    for shard in range(20):
        commit(plan, shard, "empty" if shard % 4 == 0 else None)
    footers: Footers = {}

    seen = run_status(plan.output, footers)

    assert len(read) == len(set(read)) <= 8
    assert (seen.num_shards_read, seen.num_shards_done, seen.estimated) == (len(read), 20, True)
    assert sum(seen.failures.values()) > 0
    assert seen.gpu_seconds == pytest.approx(20 * 36)
    assert "about" in status_view.plain(seen)
    assert f"{len(read)} shards of 20" in status_view.plain(seen)
    run_status(plan.output, footers)
    before = len(read)
    for shard in range(20, 30):
        commit(plan, shard)
    run_status(plan.output, footers)
    assert len(read) <= before + 3  # most of the sample is that of the look before
    assert not set(read[:before]) & set(read[before:])


# --- what is printed -----------------------------------------------------------------------------------------------


def test_the_command_on_disk_and_s3(storage_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(storage_root, 4, "cluster.gpu_price_per_hour=2")
    commit(plan, 0, "empty")

    assert main(["status", plan.output]) == 0
    text = capsys.readouterr().out
    assert "images: 2 of 4 (50%)" in text
    assert "failed images: 1: 1 empty" in text
    assert "busy 75% of the actors' time" in text
    # 36 GPU seconds at 2 an hour are 0.02, for one labelled image
    assert "cost: 0.02, 20,000.00 per million images at 2.00 per GPU hour" in text
    assert main(["status", plan.output, "--gpu-price", "4", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["cost"] == pytest.approx(0.04)
    assert (seen["state"], seen["num_images_done"], seen["estimated"]) == ("running", 2, False)


def test_no_labelled_image_has_no_price() -> None:
    status = Status(
        output="x", state="running", num_shards=2, num_shards_done=1, num_shards_begun=0, num_images=4,
        num_images_done=2, num_shards_read=1, failures={"empty": 2}, gpu_seconds=36.0, gpu_price_per_hour=2.0,
    )  # fmt: skip
    assert "cost" not in dict(status_view.rows(status))


def test_watch_ends_with_the_run(
    disk_plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish_meanwhile(seconds: float) -> None:
        assert seconds == 7.0
        for shard in range(10):
            commit(disk_plan, shard)
        shards.mark_success(disk_plan.output)

    monkeypatch.setattr(status_view.time, "sleep", finish_meanwhile)
    assert main(["status", disk_plan.output, "--watch", "7"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("not begun, 0/20 images (0%)")
    assert second.startswith("finished, 20/20 images (100%)")


def test_ctrl_c_leaves_a_watch_quietly(
    disk_plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(status_view.time, "sleep", interrupted)
    assert main(["status", disk_plan.output, "--watch", "7"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert len(said.out.splitlines()) == 1


def test_a_terminal_gets_a_table_and_a_bar(tmp_path: Path) -> None:
    plan = planned(str(tmp_path / "[bold]"), 4)  # a name that is no markup
    commit(plan, 0)
    file = io.StringIO()
    Console(file=file, force_terminal=True, color_system=None, width=200).print(table(run_status(plan.output)))
    assert "2 of 4 (50%)" in file.getvalue()
    (bar,) = (line for line in file.getvalue().splitlines() if "━━━" in line)
    assert bar.strip(" ━╸╺") == ""  # a line of its own
    assert "[bold]/out" in file.getvalue()


def test_never_100_percent_before_the_end(disk_plan: Plan) -> None:
    seen = dataclasses.replace(run_status(disk_plan.output), num_images=1_000_000, num_images_done=999_999)
    assert isinstance(seen, Status)
    assert "(99.9%)" in line(seen)


# --- names ------------------------------------------------------------------------------------------------------------


def test_masks_are_counted_by_name(tmp_path: Path) -> None:
    labels: list[str | None] = ["cat", "cat", "dog", None]

    def masks(index: int) -> list[dict[str, Any]]:
        annotations = [annotation(blob(index)) for _ in labels[index:]]
        scores = [None if label is None else 0.5 for label in labels[index:]]
        return [
            {**m, "label": n, "label_score": s} for m, n, s in zip(annotations, labels[index:], scores, strict=True)
        ]

    names = ("dog", "cat", "fox\x1b[2J")
    plan = write_output(str(tmp_path), [f"{i}.png" for i in range(4)], masks=masks, categories=names)
    seen = run_status(plan.output)
    assert seen.labels == {"dog": 3, "cat": 3, "fox\x1b[2J": 0}
    assert seen.num_masks == 10
    assert dict(status_view.rows(seen))["names"] == "3 dog, 3 cat, 0 fox?[2J, 4 without a name"
    many = dataclasses.replace(seen, labels={str(i): 100 - i for i in range(25)}, num_masks=2200)
    assert dict(status_view.rows(many))["names"].endswith("81 19, 390 of 5 other names")


def test_an_output_without_names_has_no_counts_of_names(disk_plan: Plan) -> None:
    commit(disk_plan, 0)
    seen = run_status(disk_plan.output)
    assert seen.labels is None
    assert "names" not in dict(status_view.rows(seen))
