"""Large images in tiles: where the tiles are, and how masks are joined across their seams."""

from __future__ import annotations

import base64
import io
import itertools
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from samray import storage
from samray.cluster.control import RunState
from samray.config import InputConfig, MaskConfig, load_config
from samray.errors import ConfigError, ImageError
from samray.inputs import local_copies
from samray.inputs.header import size_in_header
from samray.inputs.rows import input_rows
from samray.masks.image_tiles import OVERVIEW, Tiling, make_tiling, scaled
from samray.masks.seams import merge, pieces_of
from samray.output.shards import put_shard, shard_uri
from samray.output.tile_files import TileFiles, list_tiles, remove_left_tiles, remove_tiles
from samray.report import output
from samray.report.overlays import Overlay
from samray.rle import encode as rle
from samray.rle.records import MaskRecord

Bool = np.ndarray


class Pixels:
    """An image in memory."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]

    def read(self, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        return self.pixels[y0:y1, x0:x1]


def record(mask: Bool, predicted_iou: float = 0.9) -> MaskRecord:
    hw = mask.shape
    return {
        "segmentation": rle.compress(rle.encode_array(mask), hw),
        "bbox": [],
        "area": int(mask.sum()),
        "predicted_iou": predicted_iou,
        "stability_score": 0.9,
        "point_coords": [[1.0, 2.0]],
        "crop_box": [0.0, 0.0, float(hw[1]), float(hw[0])],
    }


def windows_of(masks: list[Bool], tiling: Tiling) -> dict[int, list[MaskRecord]]:
    """What a perfect model finds in each window, and nothing in the overview."""
    by_tile: dict[int, list[MaskRecord]] = {OVERVIEW: []}
    for number in range(1, len(tiling)):
        x0, y0, x1, y1 = tiling.box(number)
        parts = [mask[y0:y1, x0:x1] for mask in masks]
        by_tile[number] = [record(part) for part in parts if part.any()]
    return by_tile


def merged(by_tile: dict[int, list[MaskRecord]], tiling: Tiling, **config: object) -> tuple[list[Bool], list[list]]:
    pieces = {number: pieces_of(masks, tiling, number) for number, masks in by_tile.items()}
    records, tiles = merge(pieces, tiling, MaskConfig(**config), 65536)
    return [decoded(one["segmentation"]) for one in records], tiles


def decoded(segmentation: dict) -> Bool:
    from samray.rle.runs import checked_runs, pixels

    hw = tuple(segmentation["size"])
    return pixels(checked_runs(segmentation["counts"], hw), hw)


def test_windows_cover_the_image_and_overlap() -> None:
    for hw, tile, overlap in [((1000, 700), 256, 0.25), ((257, 100), 256, 0.25), ((20_000, 20_000), 1024, 0.25)]:
        tiling = make_tiling(hw, tile, overlap)
        for starts, length in ((tiling.xs, hw[1]), (tiling.ys, hw[0])):
            assert starts[0] == 0
            assert starts[-1] + tile == length or length <= tile
            assert all(a + tile - b >= overlap * tile for a, b in itertools.pairwise(starts))
        boxes = [tiling.box(number) for number in range(1, len(tiling))]
        assert all(tiling.tile_hw(n) == (b[3] - b[1], b[2] - b[0]) for n, b in enumerate(boxes, 1))
    assert len(make_tiling((256, 256), 256, 0.25)) == 1
    assert len(make_tiling((20_000, 20_000), 1024, 0.25)) == 26 * 26 + 1


def test_the_overview_is_the_mean_of_what_each_pixel_covers() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (96, 64, 3), dtype=np.uint8)
    small = scaled(Pixels(pixels), (24, 16))
    means = pixels.reshape(24, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - means).max() <= 1


def blob(rng: np.random.Generator, hw: tuple[int, int]) -> Bool:
    """An ellipse anywhere in the image."""
    y, x = np.ogrid[: hw[0], : hw[1]]
    centre, radii = rng.uniform(0, hw, 2), rng.uniform(6, 70, 2)
    return ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tile=st.sampled_from([64, 80]), overlap=st.sampled_from([0.25, 0.5]))
def test_masks_split_over_windows_come_back(seed: int, tile: int, overlap: float) -> None:
    """Disjoint masks cut by windows and joined are the masks again, each once, with the windows that they touch."""
    rng = np.random.default_rng(seed)
    hw = (int(rng.integers(150, 260)), int(rng.integers(150, 260)))
    masks: list[Bool] = []
    for _ in range(6):
        mask = blob(rng, hw)
        if mask.sum() > 60 and not any((mask & other).any() for other in masks):
            masks.append(mask)
    tiling = make_tiling(hw, tile, overlap)
    joined, tiles = merged(windows_of(masks, tiling), tiling)
    for mask in masks:
        agree = [i for i, other in enumerate(joined) if np.array_equal(mask, other)]
        assert len(agree) == 1
        touched = {tiling.box(n) for n in range(1, len(tiling)) if mask[box_of(tiling.box(n))].any()}
        assert set(tiles[agree[0]]) <= touched
        xs, ys = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        boxes = np.array(tiles[agree[0]])
        assert boxes[:, 0].min() <= xs[0]
        assert boxes[:, 2].max() > xs[-1]
        assert boxes[:, 1].min() <= ys[0]
        assert boxes[:, 3].max() > ys[-1]
    assert len(joined) == len(masks)


def box_of(box: tuple[int, int, int, int]) -> tuple[slice, slice]:
    return slice(box[1], box[3]), slice(box[0], box[2])


def test_a_cut_mask_without_a_partner_is_dropped_and_the_overview_fills_in() -> None:
    hw = (200, 200)
    mask = np.zeros(hw, dtype=bool)
    mask[20:180, 20:180] = True
    tiling = make_tiling(hw, 100, 0.25)
    by_tile = windows_of([mask], tiling)
    del by_tile[1][0]  # one window does not see it
    joined, _ = merged(by_tile, tiling)
    assert joined == []
    small = mask[::2, ::2]
    joined, tiles = merged({**by_tile, OVERVIEW: [record(small)]}, tiling)
    assert len(joined) == 1
    assert np.array_equal(joined[0], mask)
    assert tiles == [[(0, 0, 200, 200)]]


def test_the_windows_mask_replaces_that_of_the_overview() -> None:
    hw = (200, 200)
    mask = np.zeros(hw, dtype=bool)
    mask[31:60, 31:60] = True
    tiling = make_tiling(hw, 100, 0.25)
    joined, _ = merged({**windows_of([mask], tiling), OVERVIEW: [record(mask[::2, ::2], 0.99)]}, tiling)
    assert len(joined) == 1
    assert np.array_equal(joined[0], mask)


def test_limits_apply_to_joined_masks() -> None:
    hw = (150, 150)
    large, small = np.zeros(hw, dtype=bool), np.zeros(hw, dtype=bool)
    large[10:140, 10:60] = True
    small[20:40, 100:120] = True
    tiling = make_tiling(hw, 64, 0.25)
    by_tile = windows_of([large, small], tiling)
    assert len(merged(by_tile, tiling)[0]) == 2
    assert len(merged(by_tile, tiling, min_mask_area=1000)[0]) == 1
    assert len(merged(by_tile, tiling, max_mask_area_fraction=0.2)[0]) == 1
    assert len(merged(by_tile, tiling, max_masks=1)[0]) == 1


def test_masks_of_one_tile_settings_have_no_limits() -> None:
    from samray.masks.seams import of_one_tile

    config = of_one_tile(MaskConfig(min_mask_area=5, max_masks=3, non_overlapping=True, max_mask_area_fraction=0.5))
    assert (config.min_mask_area, config.max_masks, config.non_overlapping) == (0, None, False)
    assert config.max_mask_area_fraction is None


@pytest.mark.parametrize("part", [2**24, 1000])
def test_disjoint_masks_in_parts_of_the_image(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rle, "_PIXELS_AT_ONCE", part)
    rng = np.random.default_rng(3)
    hw = (90, 70)
    masks = [blob(rng, hw) for _ in range(5)]
    disjoint = rle.make_disjoint([rle.encode_array(mask) for mask in masks], hw)
    taken = np.zeros(hw, dtype=bool)
    for mask, counts in zip(masks, disjoint, strict=True):
        assert np.array_equal(decoded(rle.compress(counts, hw)), mask & ~taken)
        taken |= mask


# --- files, sizes and who labels what --------------------------------------------------------------------------------


def test_a_copy_is_fetched_once_and_gone_when_nobody_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fetched: list[Path] = []

    def fetch(path: Path) -> None:
        fetched.append(path)
        path.write_bytes(b"pixels")

    with local_copies.local_copy("a", fetch) as first:
        with local_copies.local_copy("a", fetch) as second:
            assert first == second
            assert second.read_bytes() == b"pixels"
        local_copies.remove_unused()
        assert first.exists(), "somebody still reads it"
    assert len(fetched) == 1
    assert not list(local_copies.folder().iterdir())

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise ImageError("missing", "it is gone")

    with pytest.raises(ImageError), local_copies.local_copy("a", fail):
        pass
    with local_copies.local_copy("a", fetch) as again:
        assert again.read_bytes() == b"pixels"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_sizes_come_from_the_first_bytes_upright(form: str) -> None:
    image, exif, buffer = Image.new("RGB", (600, 400)), Image.Exif(), io.BytesIO()
    if form != "PNG":
        exif[274] = 6
    image.save(buffer, form, exif=exif, **({"compression": "tiff_deflate"} if form == "TIFF" else {}))
    data = buffer.getvalue()
    assert size_in_header(data) == ((400, 600) if form == "PNG" else (600, 400))
    if form in ("JPEG", "PNG"):
        assert size_in_header(data[: len(data) // 2]) == size_in_header(data), "the pixels are not needed"
    assert size_in_header(data[:4]) is None


def test_tiles_of_a_changed_image_are_not_taken(tmp_path: Path) -> None:
    row = {"image_id": 3, "uri": "a.png", "size": 10, "etag": "x"}
    files = TileFiles(str(tmp_path), 0, row, 0)
    masks = [record(np.eye(8, dtype=bool))]
    masks[0]["bbox"] = [0.0, 0.0, 8.0, 8.0]
    files.put(2, masks, {"device_seconds": 1.5}, {"crs": None, "transform": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]})
    files.put(2, [], {})  # the first one stays
    assert files.done() == {2}
    assert files.read(2) == (masks, {"device_seconds": 1.5}, {"crs": None, "transform": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]})
    assert TileFiles(str(tmp_path), 0, {**row, "etag": "y"}, 0).done() == set()
    assert TileFiles(str(tmp_path), 0, row, 1).done() == set()
    remove_tiles(str(tmp_path), 0)
    assert files.done() == set()


def test_tiles_left_by_a_kill_after_the_commit_are_removed(storage_root: str) -> None:
    row = {"image_id": 3, "uri": "a.png", "size": 10, "etag": "x"}
    for shard in (0, 1, 12):
        TileFiles(storage_root, shard, row, 0).put(0, [], {})
    assert {shard: of.num_tiles for shard, of in list_tiles(storage_root).items()} == {0: 1, 1: 1, 12: 1}
    put_shard(storage_root, 0, b"a shard")
    put_shard(storage_root, 12, b"a shard")
    if storage.is_local(storage_root):
        # A run with --retry-failed has written a tile after the shard.
        os.utime(shard_uri(storage_root, 12), (1e9, 1e9))
    remove_left_tiles(storage_root)
    assert list_tiles(storage_root).keys() == ({1, 12} if storage.is_local(storage_root) else {1})
    remove_left_tiles(storage_root + "/none")


def test_a_tile_is_claimed_by_one_actor_until_its_lease_ends() -> None:
    state = RunState()
    assert state.claim("image", [0, 1, 2], "a", 60, 2) == [0, 1]
    assert state.claim("image", [0, 1, 2], "b", 60, 2) == [2]
    assert state.claim("other", [0], "b", 60, 2) == [0]
    assert state.claim("image", [0, 1, 2], "a", 60, 3) == [0, 1]
    state.release("b")
    assert state.claim("image", [0, 1, 2], "c", 60, 3) == [2]
    state.release("c")
    state.renew("a", -1)
    assert state.claim("image", [0, 1, 2], "b", 60, 3) == [0, 1, 2]


def test_what_does_not_go_with_tiles_is_refused() -> None:
    for other in (["input.prompts=a.jsonl"], ["output.embeddings=int8"]):
        with pytest.raises(ConfigError, match=f"masks.tile does not work with {other[0].partition('=')[0]}"):
            load_config(None, None, ["masks.tile=512", *other])
    assert "tile" not in load_config(None, None, ["masks.tile_overlap=0.5"]).identity()["masks"]
    config = load_config(None, None, ["masks.tile=512"])
    assert config.identity()["masks"]["tile"] == 512
    assert config.default_identity()["masks"]["tile"] is None


def test_the_report_shows_an_image_above_max_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.full((300, 420, 3), (200, 30, 30), dtype=np.uint8)).save(path)
    planned = input_rows(pa.array([str(path)]), pa.array(["a.png"]))
    overlay = Overlay("a.png", str(path), (300, 420), 150, 210, 0)
    photo = output._photo(planned, overlay, InputConfig(max_pixels=1000))
    shown = Image.open(io.BytesIO(base64.b64decode(photo.partition(",")[2])))
    assert shown.size == (210, 150)
    assert np.abs(np.asarray(shown).astype(int) - (200, 30, 30)).max() < 8
    with pytest.raises(ImageError, match="its size has changed to 420 x 300"):
        output._photo(planned, replace(overlay, original_hw=(301, 420)), InputConfig(max_pixels=1000))
