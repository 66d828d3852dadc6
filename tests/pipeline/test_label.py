"""The whole pipeline on a real Ray, with a stand-in for the model."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from samray import storage
from samray.config import Config
from samray.errors import ConfigError
from samray.output import failures as history
from samray.output.shards import SUCCESS, done_shards, read_metadata, shard_uri
from samray.pipeline import run as run_module
from samray.pipeline.report import LabelReport
from samray.pipeline.run import label_with
from samray.sam.checkpoints import resolve_checkpoint
from tests.support import standin
from tests.support.here import use_no_ray
from tests.support.outputs import attempts_left, check_every_image_once, rows_of
from tests.support.storages import ON_DISK, ON_S3

Label = Callable[..., LabelReport]
NAMES = [f"img_{i:03d}.png" for i in range(6)]


def _images() -> dict[str, bytes]:
    return {name: standin.make_image(i) for i, name in enumerate(NAMES)}


def _put_folder(root: str, images: dict[str, bytes]) -> str:
    for name, data in images.items():
        storage.put(storage.join(root, "in", name), data)
    return storage.join(root, "in")


def _put_glob(root: str, images: dict[str, bytes]) -> str:
    return storage.join(_put_folder(root, images), "img_*.png")


def _put_tar(root: str, images: dict[str, bytes]) -> str:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in images.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    storage.put(storage.join(root, "images.tar"), buffer.getvalue())
    return storage.join(root, "images.tar")


def _put_manifest(root: str, images: dict[str, bytes]) -> str:
    folder = _put_folder(root, images)
    text = "uri\n" + "".join(f"{storage.join(folder, name)}\n" for name in images)
    storage.put(storage.join(folder, "list.csv"), text.encode())
    return storage.join(folder, "list.csv")


def _put_parquet(root: str, images: dict[str, bytes]) -> str:
    rows = [{"image": {"bytes": data, "path": name}} for name, data in images.items()]
    sink = io.BytesIO()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([("image", kind)])), sink)
    storage.put(storage.join(root, "images.parquet"), sink.getvalue())
    return storage.join(root, "images.parquet")


def test_no_process_of_a_run_stays_where_ray_does(tmp_path: Path, label: Label) -> None:
    label(_put_folder(str(tmp_path), _images()), tmp_path / "out")
    deadline = time.monotonic() + 300
    while left := _processes_named("RunState"):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _processes_named(name: str) -> list[str]:
    """Titles of this process's living descendants that contain name."""
    titles = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            titles.append(" ".join(process.cmdline()))
    return [title for title in titles if name in title]


# Every kind, one of them on Ray, and each storage: what a kind reads is tested on both in tests/unit.
@pytest.mark.parametrize(
    ("put", "storage_root", "way"),
    [
        (_put_folder, "s3", "label_here"),
        (_put_glob, "local", "label_here"),
        (_put_tar, "s3", "label"),
        (_put_manifest, "local", "label_here"),
        (_put_parquet, "s3", "label_here"),
    ],
    indirect=["storage_root"],
)
def test_each_kind_of_input(
    put: Callable[[str, dict[str, bytes]], str], storage_root: str, way: str, request: pytest.FixtureRequest
) -> None:
    label: Label = request.getfixturevalue(way)
    images = _images()
    output = storage.join(storage_root, "out")

    report = label(put(storage_root, images), output)

    check_every_image_once(output, images)
    assert (report.exit_code, report.num_labelled, report.num_shards) == (0, 6, 2)
    assert storage.exists(storage.join(output, "_SUCCESS"))
    assert attempts_left(output) == {}


@ON_S3
def test_the_same_command_again_starts_no_ray_and_another_config_is_refused_before(
    storage_root: str, label_here: Label, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, output = _put_folder(storage_root, _images()), storage.join(storage_root, "out")
    first = label_here(source, output)
    storage.put(storage.join(source, "img_999.png"), standin.make_image(99))  # too late for this plan

    monkeypatch.setattr(run_module, "_run_on_ray", lambda run: pytest.fail("Ray was wanted"))
    again = label_here(source, output)

    assert (again.num_labelled, again.num_shards_skipped, again.exit_code) == (0, first.num_shards, 0)
    with pytest.raises(ConfigError, match=r"masks\.points_per_side"):
        label_here(source, output, "masks.points_per_side=7")
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"other weights")
    with pytest.raises(ConfigError, match="sha256"):
        label_here(source, output, f"model.checkpoint={other}")


def test_only_the_missing_shard_is_labelled(storage_root: str, label_here: Label) -> None:
    images = _images()
    source, output = _put_folder(storage_root, images), storage.join(storage_root, "out")
    label_here(source, output)
    storage.delete(shard_uri(output, 1))
    kept = storage.read_bytes(shard_uri(output, 0))

    report = label_here(source, output)

    assert (report.num_labelled, report.num_shards_skipped) == (2, 1)
    assert storage.read_bytes(shard_uri(output, 0)) == kept
    check_every_image_once(output, images)


@ON_S3
def test_a_failed_image_is_a_row_and_retry_failed_redoes_that_row_only(storage_root: str, label: Label) -> None:
    images = _images()
    broken = NAMES[1]
    source, output = _put_folder(storage_root, {**images, broken: images[broken][:100]}), f"{storage_root}/out"
    first = label(source, output)
    assert (first.num_labelled, first.failures) == (5, {"truncated": 1})
    before = {row["image"]["file_name"]: row for row in rows_of(output)}
    assert before[broken]["status"] == "failed"
    assert before[broken]["error"].startswith("truncated: ")
    untouched = storage.read_bytes(shard_uri(output, 1))

    storage.put(storage.join(source, broken), images[broken])
    assert label(source, output).num_labelled == 0  # not by itself
    second = label(source, output, retry_failed=True)

    assert (second.num_labelled, second.num_failed, second.failures) == (1, 0, {})
    check_every_image_once(output, images)
    assert storage.read_bytes(shard_uri(output, 1)) == untouched
    after = {row["image"]["file_name"]: row for row in rows_of(output)}
    assert {name: row for name, row in after.items() if name != broken} == {
        name: row for name, row in before.items() if name != broken
    }
    assert label(source, output, retry_failed=True).num_shards_skipped == 2


@ON_DISK
def test_a_resume_opens_no_shard_to_count_failures(
    storage_root: str, label_here: Label, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = _images()
    broken = NAMES[1]
    source, output = _put_folder(storage_root, {**images, broken: images[broken][:100]}), f"{storage_root}/out"
    label_here(source, output)
    monkeypatch.setattr(history, "_read_failures", lambda output, shard, version: pytest.fail(f"opened shard {shard}"))
    assert label_here(source, output).failures == {"truncated": 1}
    storage.put(storage.join(source, broken), images[broken])
    assert label_here(source, output, retry_failed=True).failures == {}
    storage.delete(storage.join(output, SUCCESS))
    assert label_here(source, output, retry_failed=True).num_shards_skipped == 2


def test_too_many_failed_images_fail_the_run(tmp_path: Path, label_here: Label) -> None:
    images = _images()
    images[NAMES[0]] = b"no image"
    source = _put_folder(str(tmp_path), images)

    report = label_here(source, tmp_path / "out", "output.max_failed_fraction=0.1")

    assert report.exit_code == 1
    assert report.problem is not None
    assert "max_failed_fraction" in report.problem
    again = label_here(source, tmp_path / "out", "output.max_failed_fraction=0.1")
    assert (again.exit_code, again.failures) == (1, {"not_an_image": 1})


def test_hostile_images_and_names_each_become_one_row(tmp_path: Path, label: Label) -> None:
    good = standin.make_image(1)
    names = ["a/sa_1.png", "b/sa_1.png", "with space.png", "per%20cent#?.png", "sn\u00f6w \u96ea.png"]
    for name in names:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(good)
    bad = {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"I am a text file", "not_an_image"),
        "cut.png": (good[:80], "truncated"),
        "large.png": (standin.make_image(2, (400, 300)), "too_large"),
    }
    for name, (data, _) in bad.items():
        (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "in" / "folder.jpg").mkdir()
    (tmp_path / "in" / "thin.png").write_bytes(standin.make_image(3, (1, 1)))

    report = label(tmp_path / "in", tmp_path / "out", "input.max_pixels=100_000")

    rows = {row["image"]["file_name"]: row for row in rows_of(str(tmp_path / "out"))}
    assert set(rows) == {*names, *bad, "gone.png", "thin.png"}
    assert len({row["image"]["image_id"] for row in rows.values()}) == len(rows)  # both sa_1.png are there
    assert {name: row["error"].partition(":")[0] for name, row in rows.items() if row["error"]} == {
        **{name: reason for name, (_, reason) in bad.items()},
        "gone.png": "missing",
    }
    assert report.exit_code == 0
    assert report.num_failed == 5


def test_more_shards_than_actors_and_one_cpu_for_all(tmp_path: Path, label: Label) -> None:
    """Actors that hold all CPUs must leave room for fetching and writing, or nothing would ever move."""
    images = {f"img_{i:03d}.png": standin.make_image(i) for i in range(9)}
    source = _put_folder(str(tmp_path), images)

    label(source, tmp_path / "out", "output.images_per_shard=1", "cluster.max_actors=2", "cluster.num_cpus_per_actor=1")

    check_every_image_once(str(tmp_path / "out"), images)
    assert done_shards(str(tmp_path / "out")) == set(range(9))


def test_a_model_that_cannot_be_had_ends_the_run_with_its_own_sentence(tmp_path: Path, label: Label) -> None:
    source = _put_folder(str(tmp_path), _images())
    with pytest.raises(ConfigError) as caught:
        label(source, tmp_path / "out", make_labeler=standin.make_no_labeler)
    assert str(caught.value) == "model.device: cuda is not available"


def test_actors_refuse_weights_that_are_not_those_of_the_plan(
    tmp_path: Path,
    tiny_checkpoint: Path,
    local_ray: None,
    config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(tiny_checkpoint.read_bytes())
    source, output = _put_folder(str(tmp_path), _images()), str(tmp_path / "out")
    settings = config(f"model.checkpoint={weights}", "model.device=cpu", "masks.points_per_side=2")

    def run(on_plan: Callable[..., None] = lambda *anything: None) -> LabelReport:
        return label_with(source, output, settings, progress=False, on_plan=on_plan)

    with pytest.raises(ConfigError, match="does not have this run's weights"):
        run(lambda *anything: weights.write_bytes(resolve_checkpoint().read_bytes()))
    assert done_shards(output) == set()

    weights.write_bytes(tiny_checkpoint.read_bytes())
    use_no_ray(monkeypatch)
    assert run().num_images == len(NAMES)
    for shard in done_shards(output):
        model = read_metadata(output, shard)["identity"]["model"]
        assert model["checkpoint_sha256"] == hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest()
