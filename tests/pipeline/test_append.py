"""Images join an output, and changed ones are done again: all stages, with a stand-in model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from samray import storage
from samray.cli.plan_view import print_plan
from samray.config import Config
from samray.output.append import join_images
from samray.output.plan import load_plan
from samray.output.shards import SUCCESS, done_shards, read_shard, replace_shard, shard_uri, unmark_success
from samray.pipeline.plan_run import RunPlan, plan_run, run_identity
from samray.pipeline.report import LabelReport
from tests.support import standin
from tests.support.outputs import check_every_image_once, rows_of
from tests.support.storages import ON_DISK, ON_S3

Label = Callable[..., LabelReport]


def put(root: str, images: dict[str, bytes]) -> str:
    for name, data in images.items():
        storage.put(storage.join(root, "in", name), data)
    return storage.join(root, "in")


def test_images_join_and_changed_ones_are_done_again(label_here: Label, storage_root: str, output_root: str) -> None:
    images = {f"{i}.png": standin.make_image(i) for i in range(6)}
    input_uri = put(storage_root, images)
    assert label_here(input_uri, output_root).exit_code == 0
    old = {shard: storage.read_bytes(shard_uri(output_root, shard)) for shard in done_shards(output_root)}

    images |= {"6.png": standin.make_image(6), "7.png": standin.make_image(7)}
    put(storage_root, {"6.png": images["6.png"], "7.png": images["7.png"]})
    assert label_here(input_uri, output_root).num_labelled == 0  # without being asked, nothing joins
    report = label_here(input_uri, output_root, append=True)
    assert (report.exit_code, report.num_labelled, report.num_images) == (0, 2, 8)
    assert old == {shard: storage.read_bytes(shard_uri(output_root, shard)) for shard in old}
    check_every_image_once(output_root, images)
    assert label_here(input_uri, output_root, append=True).num_labelled == 0

    images["1.png"] = standin.make_image(101, size=(30, 20))
    put(storage_root, {"1.png": images["1.png"]})
    assert label_here(input_uri, output_root, append=True).num_labelled == 0  # reported, but not redone
    untouched = storage.read_bytes(shard_uri(output_root, 1))
    report = label_here(input_uri, output_root, redo_changed=True)
    assert (report.exit_code, report.num_labelled) == (0, 1)
    assert storage.read_bytes(shard_uri(output_root, 1)) == untouched
    check_every_image_once(output_root, images)
    assert label_here(input_uri, output_root, redo_changed=True).num_labelled == 0


def test_tiffs_that_join_an_output_without_the_column_geo_are_pointed_out(
    label_here: Label, config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The column would be in some of the shards only; where those images are was dropped without a word."""
    input_uri = put(str(tmp_path), {"0.png": standin.make_image(0)})
    output = str(tmp_path / "out")
    assert label_here(input_uri, output).exit_code == 0
    for name, is_told in (("1.png", False), ("2.TIF", True)):
        put(str(tmp_path), {name: standin.make_image(2)})
        for append in (True, False):  # without, they are left out
            print_plan(plan_run(input_uri, output, config(), append=append, redo_changed=True, dry_run=True))
            shown = " ".join(capsys.readouterr().err.split())
            assert ("OUTPUT has no column geo" in shown) == (is_told and append)


@ON_S3
def test_a_change_that_was_planned_is_finished_by_the_plain_command(
    label_here: Label, storage_root: str, output_root: str
) -> None:
    images = {f"{i}.png": standin.make_image(i) for i in range(6)}
    input_uri = put(storage_root, images)
    label_here(input_uri, output_root)
    before = {shard: read_shard(output_root, shard) for shard in (0, 1)}
    images["5.png"] = standin.make_image(105)
    images["6.png"] = standin.make_image(6)
    put(storage_root, {name: images[name] for name in ("5.png", "6.png")})
    label_here(input_uri, output_root, append=True, redo_changed=True)
    # As if the run had died when it had planned, and done nothing: the old shard is back, the new one is gone.
    replace_shard(output_root, 1, before[1])
    storage.delete(shard_uri(output_root, 2))
    unmark_success(output_root)
    report = label_here(input_uri, output_root)
    assert (report.exit_code, report.num_labelled) == (0, 2)
    assert storage.exists(storage.join(output_root, SUCCESS))
    check_every_image_once(output_root, images)


@ON_DISK
def test_failures_and_changes_are_redone_in_one_go(label_here: Label, storage_root: str, output_root: str) -> None:
    images = {f"{i}.png": standin.make_image(i) for i in range(4)}
    input_uri = put(storage_root, images | {"2.png": b"no image"})
    assert label_here(input_uri, output_root).num_failed == 1
    put(storage_root, {"2.png": images["2.png"]})  # repaired, so it has changed
    report = label_here(input_uri, output_root, redo_changed=True)
    assert (report.exit_code, report.num_labelled, report.num_failed) == (0, 1, 0)
    check_every_image_once(output_root, images)
    assert len(rows_of(output_root)) == load_plan(output_root).num_images == 4


@ON_S3
def test_what_failed_next_to_a_changed_image_still_counts(
    label_here: Label, storage_root: str, output_root: str
) -> None:
    images = {f"{i}.png": standin.make_image(i) for i in range(4)}
    input_uri = put(storage_root, images | {"1.png": b"no image"})
    assert label_here(input_uri, output_root).num_failed == 1
    images["3.png"] = standin.make_image(103, size=(30, 20))
    put(storage_root, {"3.png": images["3.png"]})
    report = label_here(input_uri, output_root, redo_changed=True)
    assert (report.num_labelled, report.num_failed, report.failures) == (1, 1, {"not_an_image": 1})
    put(storage_root, {"1.png": images["1.png"]})
    report = label_here(input_uri, output_root, retry_failed=True)
    assert (report.num_labelled, report.num_failed) == (1, 0)
    check_every_image_once(output_root, images)


@ON_DISK
def test_success_is_left_to_the_run_that_added_last(
    label_here: Label, config: Callable[..., Config], storage_root: str, output_root: str
) -> None:
    images = {f"{i}.png": standin.make_image(i) for i in range(6)}
    input_uri = put(storage_root, images)

    def another_run_adds(planned: RunPlan) -> None:
        """Plans four more images, in a shard that the run under way knows nothing of, and is killed."""
        more = {f"{i}.png": standin.make_image(i) for i in range(6, 10)}
        images.update(more)
        put(storage_root, more)
        identity = run_identity(config())
        join_images(planned.plan, input_uri, config(), identity, append=True, redo_changed=False)

    report = label_here(input_uri, output_root, on_plan=another_run_adds)
    assert (report.exit_code, report.num_labelled) == (0, 6)
    assert not storage.exists(storage.join(output_root, SUCCESS))
    assert (label_here(input_uri, output_root).num_labelled, len(images)) == (4, 10)
    assert storage.exists(storage.join(output_root, SUCCESS))
    check_every_image_once(output_root, images)
