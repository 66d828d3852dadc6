"""Large images that are hostile, replaced, or labelled by others at the same time; disks that are full."""

from __future__ import annotations

import fcntl
import io
import os
import struct
import tempfile
import zlib
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from samray import storage
from samray.cluster.control import RunState
from samray.config import InputConfig, load_config
from samray.errors import ImageError, NotFoundError, StorageError, UnavailableError
from samray.inputs import local_copies, tiff
from samray.inputs.header import size_in_header
from samray.inputs.listing import list_images
from samray.inputs.rasters import open_raster
from samray.masks import seams
from samray.masks.image_tiles import make_tiling
from samray.output.schema import ImageRecord, records_to_table, samray_metadata
from samray.output.shards import read_shard
from samray.output.tile_files import TileFiles
from samray.pipeline import large_images, tiling, write
from samray.pipeline.actor import LABELLED
from samray.pipeline.large_images import MAX_PARTS, MeasureTask, parts_of, too_large_for_tiles
from samray.pipeline.report import ShardSummary
from samray.pipeline.tiling import OpenImage, Size, merge_tiles
from samray.storage.tables import to_stream
from tests.support.exported import ten_images
from tests.unit.test_image_tiles import record


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBBI", 13, b"IHDR", width, height, 8, 2, 0, 0, 0, 0) + b"\0" * 64


def test_the_size_of_a_png_needs_no_room_for_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object) -> None:
        raise AssertionError("a gigapixel of memory")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    assert size_in_header(png_header(32768, 30000)) == (30000, 32768)


@pytest.mark.parametrize("big", [False, True])
def test_the_size_of_a_tiff_with_its_directory_at_the_end_needs_no_copy(
    big: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200)).save(buffer, "TIFF", exif={274: 6}, big_tiff=big)
    data = buffer.getvalue()
    start = tiff.first_directory_at(data)
    tail = data[start : start + 400]  # only the directory: its values are elsewhere
    at = struct.pack("<Q" if big else "<I", len(data))
    moved = data[:8] + at + data[16:] if big else data[:4] + at + data[8:]
    (tmp_path / "in" / "a.tif").write_bytes(moved + tail)
    monkeypatch.setattr(large_images, "open_large", None)
    assert [size.hw for size in measured(tmp_path / "in").values()] == [(300, 200)]


def test_a_png_that_is_turned_by_what_follows_its_pixels(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[274] = 6
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = buffer.getvalue()
    (tmp_path / "in" / "a.png").write_bytes(data[:-12] + chunk + data[-12:])
    assert [size.hw for size in measured(tmp_path / "in").values()] == [(300, 200)]


def test_images_that_no_mask_or_too_many_tiles_would_fit_are_refused() -> None:
    config = load_config(None, None, ["masks.tile=64", "masks.tile_overlap=0.5"])
    for size, words in [
        (Size(1, 10**9), "1000000000x1: masks may have 1048576 pixels per side"),
        (Size(40_000, 40_000), "and 1073741824 in all"),
        (Size(20_000, 20_000), "has 389377 tiles of masks.tile=64, more than 65536"),
    ]:
        error = too_large_for_tiles(size, config)
        assert error is not None
        assert error.reason == "too_large"
        assert words in error.message
        assert parts_of({0: size}, config) == []
    assert too_large_for_tiles(Size(8000, 8000), config) is None


def test_parts_have_every_tile_once_and_are_not_too_many() -> None:
    config = load_config(None, None, ["masks.tile=64"])
    size = Size(10_000, 11_000)
    parts = parts_of({3: size}, config)
    assert len(parts) <= MAX_PARTS
    numbers = [number for index, start, end in parts for number in range(start, end)]
    assert numbers == list(range(len(make_tiling(size.hw, 64, 0.25))))


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return local_copies.folder()


def test_what_a_killed_process_left_while_it_removed_a_copy_is_removed(copies: Path) -> None:
    for name in ("a", f"b{local_copies._REMOVED}"):
        (copies / name).mkdir()
        (copies / name / "image").write_bytes(b"pixels")  # without its lock
    local_copies.remove_unused()
    assert not list(copies.iterdir())


def test_a_copy_goes_in_one_step_and_never_that_of_another(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_folder = copies / "a"
    (copy_folder).mkdir()
    (copy_folder / "in-use").touch()
    real, removed = fcntl.flock, []

    def flock(lock: int, how: int) -> None:
        real(lock, how)
        if how & fcntl.LOCK_NB and not removed:  # others removed the folder, and one made it again
            removed.append(os.rename(copy_folder, copies / f"x{local_copies._REMOVED}"))
            copy_folder.mkdir()
            (copy_folder / "in-use").touch()
            (copy_folder / "image").write_bytes(b"new")

    monkeypatch.setattr(fcntl, "flock", flock)
    local_copies.remove_unused()
    assert (copy_folder / "image").read_bytes() == b"new"

    def rmtree(path: Path, ignore_errors: bool) -> None:
        assert path.name.endswith(local_copies._REMOVED)

    monkeypatch.setattr(local_copies.shutil, "rmtree", rmtree)
    local_copies.remove_unused()
    assert not copy_folder.exists()


def test_a_full_disk_is_no_fault_of_an_image(copies: Path, tmp_path: Path) -> None:
    def fetch(path: Path) -> None:
        raise OSError(28, "No space left on device")

    words = "No space left on device; make room there, or set TMPDIR"
    with pytest.raises(StorageError, match=words), local_copies.local_copy("a", fetch):
        pass
    path = tmp_path / "a.png"
    Image.new("RGB", (20, 10)).save(path)
    with open_raster(path, InputConfig()) as raster:
        raster._end_child()
        stub: Any = SimpleNamespace(close=lambda: 0, ask=lambda *_, **__: (b'["storage", "No space left"]', None))
        raster._child = stub
        with pytest.raises(StorageError, match="No space left"):
            raster.read(0, 0, 5, 5)
    with pytest.raises(ValueError, match="closed"):
        raster.read(0, 0, 5, 5)  # and no process is started again


def test_an_image_stays_open_until_another_is_read() -> None:
    log: list[str] = []

    @contextmanager
    def opened(name: str) -> Any:
        log.append(f"open {name}")
        yield name
        log.append(f"close {name}")

    image = OpenImage()
    for name in ("a", "a", "b"):
        assert image.get(name, lambda name=name: opened(name)) == name
    image.close()
    image.close()
    assert log == ["open a", "close a", "open b", "close b"]


# --- sizes -----------------------------------------------------------------------------------------------------------


def measured(source: Path, *settings: str) -> dict[int, Size]:
    config = load_config(None, None, ["masks.tile=64", *settings])
    table = list_images(str(source), config.input).images
    plan: Any = SimpleNamespace(read_shard=lambda shard: table)
    return MeasureTask(plan, config, False)((0, False, {}))[1]


def test_a_replaced_image_gets_no_tiles_of_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.png"
    Image.new("RGB", (100, 80)).save(path)
    (before,) = measured(tmp_path / "in").values()
    assert before.hw == (80, 100)
    os.utime(path, ns=(1, 1))
    (after,) = measured(tmp_path / "in").values()
    assert before.version != after.version
    row = {"image_id": 3, "uri": str(path), "size": 10, "etag": "x"}
    TileFiles(str(tmp_path / "out"), 0, row, 0, before.version).put(0, [], {})
    assert TileFiles(str(tmp_path / "out"), 0, row, 0, before.version).done() == {0}
    assert TileFiles(str(tmp_path / "out"), 0, row, 0, after.version).done() == set()


def test_rows_of_parquet_are_measured_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    Image.new("RGB", (60, 64)).save(tmp_path / "b.png")
    images = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    pq.write_table(pa.table({"image": images * 10}), tmp_path / "in.parquet")
    calls: list[int] = []
    fetch_images = large_images.fetch_images

    def fetch(rows: pa.Table, config: InputConfig, sample: Any) -> Any:
        calls.append(rows.num_rows)
        return fetch_images(rows, config, sample)

    monkeypatch.setattr(large_images, "fetch_images", fetch)
    sizes = measured(tmp_path / "in.parquet")
    assert {index: size.hw for index, size in sizes.items()} == dict.fromkeys(range(0, 20, 2), (80, 100))
    assert calls == [16, 4]


def test_a_storage_that_fails_ends_the_run_before_a_large_image_is_labelled_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (100, 80)).save(tmp_path / "in" / "a.png")

    def fail(*_: object) -> bytes:
        raise UnavailableError("the storage does not answer")

    monkeypatch.setattr(storage, "read_bytes", fail)
    monkeypatch.setattr(large_images, "fetch_images", fail)
    with pytest.raises(UnavailableError):
        measured(tmp_path / "in")
    monkeypatch.setattr(large_images, "fetch_images", lambda *_: [ImageError("unreadable", "only this one")])
    assert measured(tmp_path / "in") == {}


# --- others at the same time -----------------------------------------------------------------------------------------


def test_only_the_last_claim_of_an_actor_is_renewed() -> None:
    state = RunState()
    assert state.claim("image", [0, 1], "a", 60, 1) == [0]
    assert state.claim("image", [1], "a", 60, 1) == [1]
    state.renew("a", -1)
    assert state.claim("image", [0, 1], "b", 60, 2) == [1]
    assert not state.has_free("image", [0, 1])
    assert state.has_free("image", [1, 2])
    state.fail("3-0")
    assert state.has_failed("3-0")
    assert not state.has_failed("3-1")


def test_rows_whose_tiles_another_driver_has_used_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, None, ["masks.tile=64"])
    plan: Any = SimpleNamespace(run={"identity": config.identity()})
    rows = [ImageRecord(image_id=i, width=100, height=80, file_name=f"{i}", uri=f"{i}") for i in range(3)]
    table = records_to_table(rows, plan.run)

    def gone(*_: object) -> Any:
        raise NotFoundError("no tile")

    monkeypatch.setattr(tiling, "merged_row", gone)
    sizes = {1: Size(80, 100)}
    merged, indices, costs = merge_tiles(table, [0, 1, 2], sizes, plan, config, 0, True)
    assert (merged["uri"].to_pylist(), indices, costs) == (["0", "2"], [0, 2], {})
    with pytest.raises(NotFoundError):
        merge_tiles(table, [0, 1, 2], sizes, plan, config, 0, False)
    # Another driver has labelled all failed images since this one looked.
    assert merge_tiles(table.slice(0, 0), [], sizes, plan, config, 0, True)[0].num_rows == 0


def test_masks_are_compared_only_where_their_boxes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    hw, number = (400, 200), 40
    tiled = make_tiling(hw, 128, 0.5)
    masks = []
    for i in range(number):
        mask = np.zeros(hw, dtype=bool)
        mask[i * 3 : i * 3 + 2, 10:190] = True
        masks.append(mask)
    x0, y0, x1, y1 = tiled.box(1)
    by_tile = {}
    for tile in (1, 2):
        x0, y0, x1, y1 = tiled.box(tile)
        by_tile[tile] = seams.pieces_of([record(mask[y0:y1, x0:x1]) for mask in masks], tiled, tile)
    calls, iou = [], seams._iou
    monkeypatch.setattr(seams, "_iou", lambda a, b: calls.append(0) or iou(a, b))
    pieces = [*by_tile[1], *by_tile[2]]
    matches = seams._matches(pieces, range(number), range(number, 2 * number), tiled, 1, 2, 0)
    assert matches == [(i, number + i) for i in range(number)]
    assert len(calls) == number


def test_a_retry_keeps_rows_whose_tiles_are_gone_and_the_shard_one_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ten_images(str(tmp_path))
    before = read_shard(plan.output, 0)
    rows = before.to_pylist()
    monkeypatch.setattr(tiling, "merged_row", lambda *_: (_ for _ in ()).throw(NotFoundError("no tile")))
    monkeypatch.setattr(write, "end_with_ray", lambda: None)
    later = replace(plan, run={**plan.run, "generation": 5})
    config = load_config()

    def put(indices: list[int]) -> dict[str, Any]:
        records = [
            ImageRecord(image_id=rows[i]["image"]["image_id"], width=7, height=5, file_name=f"{i}", uri=f"new {i}")
            for i in indices
        ]
        labelled = {
            "shard": 0,
            "retry": True,
            "attempt": 1,
            "indices": indices,
            "tiles": '{"1": [800, 900, null]}',
            "rows": to_stream(records_to_table(records, later.run)),
            "summary": ShardSummary(0).to_json(),
        }
        batch = pa.Table.from_pylist([labelled], schema=LABELLED)
        (row,) = write.write_shard(batch, plan=later, config=config, run_id="a").to_pylist()
        return row

    assert put([1])["version"] is None
    assert read_shard(plan.output, 0).to_pylist() == rows
    assert put([0, 1])["version"] is not None
    after = read_shard(plan.output, 0)
    assert after["uri"].to_pylist()[:2] == ["new 0", rows[1]["uri"]]
    assert samray_metadata(after.schema)["generation"] == samray_metadata(before.schema)["generation"] != 5
