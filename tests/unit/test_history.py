"""Counts of failed images: kept for the files they were read from, read again for all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from samray import storage
from samray.output import failures as history
from samray.output.failures import FailureCounts, failures_of_shards
from samray.output.plan import Plan
from samray.output.schema import with_stats
from samray.output.shards import read_shard, replace_shard, shard_versions, unmark_success
from tests.support.labelled import make_output

EXPECTED = {0: {"not_an_image": 1}, 1: {}, 2: {}}


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards whose own metadata were read."""
    shards: list[int] = []
    look_at = history._read_failures

    def watched(output: str, shard: int, version: str | None) -> Any:
        shards.append(shard)
        return look_at(output, shard, version)

    monkeypatch.setattr(history, "_read_failures", watched)
    return shards


def failures(plan: Plan) -> dict[int, dict[str, int]]:
    return failures_of_shards(plan.output, shard_versions(plan.output))


def replaced(plan: Plan, shard: int, counts: dict[str, int]) -> None:
    """The shard as --retry-failed would leave it."""
    table = read_shard(plan.output, shard)
    replace_shard(plan.output, shard, with_stats(table, {"failures": counts, "device_seconds": 1.25}))


def test_a_shard_is_read_once_until_it_is_replaced(storage_root: str, looked_at: list[int]) -> None:
    plan = make_output(storage_root)
    unmark_success(plan.output)
    assert failures(plan) == EXPECTED
    assert sorted(looked_at) == [0, 1, 2]
    assert failures(plan) == EXPECTED
    assert len(looked_at) == 3

    replaced(plan, 1, {"truncated": 2})
    assert failures(plan) == {**EXPECTED, 1: {"truncated": 2}}
    assert looked_at[3:] == [1]
    replaced(plan, 0, {})
    assert failures(plan) == {0: {}, 1: {"truncated": 2}, 2: {}}
    assert looked_at[4:] == [0]


def test_counts_come_from_the_end_of_a_shard_and_from_its_footer_alike(
    storage_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_output(storage_root)
    for shard, counts in ((0, EXPECTED[0]), (1, {"truncated": 2}), (2, {})):
        replaced(plan, shard, counts)
    versions = dict(sorted(shard_versions(plan.output).items()))
    # Without a version there is no size, and with a wrong one no end of a file: both parse the footer.
    parsed = [history._read_failures(plan.output, shard, None) for shard in versions]
    assert [history._read_failures(plan.output, shard, "1000000 x") for shard in versions] == parsed
    assert [counts for counts, _ in parsed] == [EXPECTED[0], {"truncated": 2}, {}]
    assert all(digest for _, digest in parsed)
    monkeypatch.setattr(history, "open_shard", lambda output, shard: pytest.fail(f"parsed the footer of {shard}"))
    assert [history._read_failures(plan.output, shard, version) for shard, version in versions.items()] == parsed


@pytest.mark.parametrize("content", [b"", b"PAR1 but no more", None])
def test_counts_that_are_lost_or_damaged_are_read_again(
    tmp_path: Path, looked_at: list[int], content: bytes | None
) -> None:
    plan = make_output(str(tmp_path))
    unmark_success(plan.output)
    assert failures(plan) == EXPECTED
    uri = FailureCounts(plan.output).uri
    storage.delete(uri)
    if content is not None:
        storage.put(uri, content)
    assert failures(plan) == EXPECTED
    assert sorted(looked_at) == [0, 0, 1, 1, 2, 2]
    assert failures(plan) == EXPECTED
    assert len(looked_at) == 6


def test_of_two_drivers_the_one_that_saves_last_may_forget_but_never_mistake(
    tmp_path: Path, looked_at: list[int]
) -> None:
    plan = make_output(str(tmp_path))
    unmark_success(plan.output)
    ours, theirs = FailureCounts.load(plan.output), FailureCounts.load(plan.output)
    old = shard_versions(plan.output)
    ours.set(0, old[0], EXPECTED[0])
    ours.save()
    replaced(plan, 1, {"truncated": 2})
    theirs.set(1, old[1], {})  # of a file that is no longer there
    theirs.save()
    assert failures(plan) == {**EXPECTED, 1: {"truncated": 2}}
    assert sorted(looked_at) == [0, 1, 2]


def test_storage_without_versions_keeps_nothing(tmp_path: Path) -> None:
    counts = FailureCounts(str(tmp_path))
    counts.set(0, None, {"truncated": 1})
    assert counts.get(0, None) is None


def test_counts_are_saved_now_and_then_and_a_failure_to_do_so_ends_no_run(tmp_path: Path) -> None:
    counts = FailureCounts(str(tmp_path))
    counts.set(0, "9 a", {})
    counts.save(every_s=1000.0)
    assert not storage.exists(counts.uri)
    (tmp_path / "_samray").write_text("a file in the way")
    counts.save()
    (tmp_path / "_samray").unlink()
    counts.save()
    assert FailureCounts.load(str(tmp_path)).get(0, "9 a") == {}
