"""The course of an export: pieces, an end in the middle and the way on, refusals, and how much is read at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO

from samray import storage
from samray.cli.main import main
from samray.errors import ConfigError, StorageError
from samray.exports import images, pieces
from samray.exports import job as export_job
from samray.exports.images import Rows
from samray.output.plan import Plan
from samray.output.shards import read_shard
from tests.support.exported import NAMES, export, ten_images
from tests.support.handmade import write_output


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return ten_images(str(tmp_path))


# --- pieces and resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("per_piece", "per_file"), [(4, None), (4, 6), (100, 7), (3, 3), (100, None), (1, 2)])
def test_pieces_hold_every_image_once_and_keep_to_files(per_piece: int, per_file: int | None) -> None:
    shards = [Rows(0, 0, 5, 5), Rows(3, 0, 1, 1), Rows(4, 0, 9, 9)]
    cut = list(pieces.cut(shards, per_piece, per_file))
    places = [(part.shard, i) for piece in cut for part in piece.rows for i in range(part.start, part.stop)]
    assert places == [(rows.shard, i) for rows in shards for i in range(rows.stop)]
    assert [piece.number for piece in cut] == list(range(len(cut)))
    assert max(piece.num_images for piece in cut) <= per_piece
    by_file: dict[int, int] = {}
    for piece in cut:
        by_file[piece.file] = by_file.get(piece.file, 0) + piece.num_images
    assert list(by_file) == list(range(len(by_file)))
    if per_file:
        assert all(number == per_file for number in list(by_file.values())[:-1])


CASES = [
    ("coco", {}),
    ("coco", {"images_per_file": 4}),
    ("coco", {"confident": 0.5}),
    ("sa1b", {}),
    ("yolo", {}),
    ("flat", {}),
    ("label-map", {}),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(("format", "options"), CASES)
def test_an_export_that_died_goes_on_and_redoes_nothing(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(export_job, "sizes_of", lambda fmt, options: (2, getattr(options, "images_per_file", None)))
    export(plan, tmp_path / "whole", format, **options)
    real, done = export_job.run_piece, []

    def dies_after_two(job: Any, piece: Any) -> Any:
        if len(done) == 2:
            raise StorageError("the power went")
        done.append(piece.number)
        return real(job, piece)

    def counts(job: Any, piece: Any) -> Any:
        done.append(piece.number)
        return real(job, piece)

    monkeypatch.setattr("samray.exports.export.run_piece", dies_after_two)
    with pytest.raises(StorageError, match="the power went"):
        export(plan, tmp_path / "half", format, **options)
    before = {name: (tmp_path / "half" / name).stat().st_mtime_ns for name in contents(tmp_path / "half")}
    monkeypatch.setattr("samray.exports.export.run_piece", counts)
    report = export(plan, tmp_path / "half", format, **options)
    assert sorted(done) == list(range(5))  # each piece once, over both runs
    assert report.num_pieces_skipped == 2
    assert contents(tmp_path / "half") == contents(tmp_path / "whole")
    after = {name: (tmp_path / "half" / name).stat().st_mtime_ns for name in contents(tmp_path / "half")}
    assert all(after[name] == time for name, time in before.items() if name in after)
    done.clear()
    again = export(plan, tmp_path / "half", format, **options)
    assert done == []
    assert (again.num_images, again.num_masks, again.num_failed) == (9, report.num_masks, 1)


@pytest.mark.parametrize(("format", "options"), CASES)
def test_deleted_files_come_back(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(export_job, "sizes_of", lambda fmt, options: (2, getattr(options, "images_per_file", None)))
    export(plan, tmp_path / "x", format, **options)
    whole = contents(tmp_path / "x")
    victims = [name for name in sorted(whole) if not name.startswith("_export")][::3]
    for name in victims:
        (tmp_path / "x" / name).unlink()
    report = export(plan, tmp_path / "x", format, **options)
    assert contents(tmp_path / "x") == whole
    assert report.num_pieces_skipped < report.num_pieces


def test_a_deleted_file_of_fragments_comes_back_also_where_marks_are_believed(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_job, "MAX_LISTED", 1)
    export(plan, tmp_path / "coco", "coco")
    assert export(plan, tmp_path / "coco", "coco").num_pieces_skipped == 1
    (tmp_path / "coco" / "instances.json").unlink()
    export(plan, tmp_path / "coco", "coco")
    assert len(COCO(tmp_path / "coco" / "instances.json").getImgIds()) == 9


def test_no_fragment_stays_and_a_torn_assembly_leaves_no_file(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pieces.read_fragments

    def torn(*args: Any) -> Any:
        yield next(real(*args))
        raise StorageError("the power went")

    monkeypatch.setattr(pieces, "read_fragments", torn)
    with pytest.raises(StorageError, match="the power went"):
        export(plan, tmp_path / "coco", "coco")
    assert [f.name for f in (tmp_path / "coco").iterdir()] == ["_export"]
    monkeypatch.undo()
    export(plan, tmp_path / "coco", "coco")
    assert not list((tmp_path / "coco" / "_export" / "pieces").iterdir())
    assert sorted(f.name for f in (tmp_path / "coco").iterdir()) == ["_export", "instances.json"]


# --- refusals and faults ----------------------------------------------------------------------------------------------


def test_wrong_exports_are_one_sentence(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*arguments: str) -> str:
        assert main(["export", plan.output, *arguments]) == 2
        return " ".join(capsys.readouterr().err.split())

    dest = str(tmp_path / "dest")
    assert "unknown format 'coc'; did you mean coco?" in refusal(dest, "--format", "coc")
    assert "--polygons is an option of coco, not of yolo" in refusal(dest, "--format", "yolo", "--polygons")
    assert "--images-per-file needs --tar" in refusal(dest, "--format", "sa1b", "--images-per-file", "3")
    assert "--simplify=-1.0 is not allowed" in refusal(dest, "--format", "yolo", "--simplify", "-1")
    assert "--simplify=0.0 is not allowed" in refusal(dest, "--format", "yolo", "--simplify", "0")
    with pytest.raises(ConfigError, match="--images-per-file=0 is not allowed"):
        export(plan, dest, "coco", images_per_file=0)
    assert not Path(dest).exists()
    assert main(["export", plan.output, dest, "--format", "coco", "--no-progress"]) == 0
    capsys.readouterr()
    assert "has a different export (format: coco there, yolo now)" in refusal(dest, "--format", "yolo")
    assert "has a different export (options: {} there" in refusal(dest, "--format", "coco", "--polygons")
    other = write_output(str(tmp_path / "other"), NAMES[:2])
    with pytest.raises(ConfigError, match="has an export of another run"):
        export(other, dest, "coco")
    assert "is not empty" in refusal(str(tmp_path / "in"), "--format", "coco")
    assert main(["export", str(tmp_path / "in"), dest, "--format", "coco"]) == 2
    assert "is not the output of a samray run" in capsys.readouterr().err


def test_an_output_that_changed_is_refused(plan: Plan, tmp_path: Path) -> None:
    export(plan, tmp_path / "coco", "coco")
    shard = Path(plan.output) / "annotations" / "shard-000001.parquet"
    shard.write_bytes(shard.read_bytes() + b"x")
    with pytest.raises(ConfigError, match="has changed since the export"):
        export(plan, tmp_path / "coco", "coco")


def test_an_unfinished_output_is_refused_unless_what_is_there_is_asked_for(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), NAMES, missing_shards=(1,))
    with pytest.raises(ConfigError, match=r"1 of 4 shards .* are missing.*--partial"):
        export(plan, tmp_path / "coco", "coco")
    assert export(plan, tmp_path / "coco", "coco", partial=True).num_images == 7
    nothing = write_output(str(tmp_path / "nothing"), NAMES, missing_shards=(0, 1, 2, 3))
    with pytest.raises(ConfigError, match="has no finished shards yet"):
        export(nothing, tmp_path / "none", "coco", partial=True)


def test_images_that_are_gone_are_counted(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "in" / NAMES[3]).unlink()
    report = export(plan, tmp_path / "yolo", "yolo", with_images=True)
    assert report.num_unreadable == 1
    assert not (tmp_path / "yolo" / "images" / NAMES[3]).exists()
    assert NAMES[3] not in (tmp_path / "yolo" / "train.txt").read_text()


def test_a_damaged_shard_is_one_sentence(plan: Plan, tmp_path: Path) -> None:
    (Path(plan.output) / "annotations" / "shard-000002.parquet").write_bytes(b"PAR1 is all that is left PAR1")
    with pytest.raises(StorageError, match=r"shard-000002\.parquet is damaged"):
        export(plan, tmp_path / "coco", "coco")


# --- what is read and written at once ---------------------------------------------------------------------------------


def test_large_shards_are_read_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a shard of many row groups, a piece reads those it needs and no more rows at once than a batch."""
    plan = write_output(str(tmp_path), [f"{i:03d}.png" for i in range(150)], images_per_shard=150)
    images.pq.write_table(read_shard(plan.output, 0), images.shard_uri(plan.output, 0), row_group_size=64)
    groups: list[int] = []
    real = images.pq.ParquetFile.iter_batches

    def spy(self: Any, *args: Any, row_groups: list[int], **options: Any) -> Any:
        groups.extend(row_groups)
        return real(self, *args, row_groups=row_groups, **options)

    monkeypatch.setattr(images.pq.ParquetFile, "iter_batches", spy)
    tables = list(images.read_rows(plan.output, [Rows(0, 70, 150, 150)]))
    assert groups == [1, 2]
    assert [table.num_rows for table in tables] == [58, 22]
    ids = [row["image"]["image_id"] for table in tables for row in table.to_pylist()]
    assert ids == list(range(70, 150))


def test_storage_writes_chunks_whole_or_not_at_all(storage_root: str) -> None:
    uri = storage.join(storage_root, "folder", "file")

    def torn() -> Any:
        yield b"half"
        raise ValueError("torn")

    with pytest.raises(ValueError, match="torn"):
        storage.put_chunks(uri, torn())
    assert not storage.exists(uri)
    storage.put_chunks(uri, (bytes([i]) * 1000 for i in range(100)))
    storage.put_chunks(uri, (bytes([i]) * 3 for i in range(3)))  # replaces
    assert storage.read_bytes(uri) == b"\0\0\0\1\1\1\2\2\2"
    assert list(storage.list_names(storage.join(storage_root, "folder"))) == ["file"]
