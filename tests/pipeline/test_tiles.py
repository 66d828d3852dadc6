"""masks.tile on a real Ray: a large image is one row, from tiles of which one that fails is the image's fault."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from PIL import Image

from samray import storage
from samray.inputs.local_copies import folder
from samray.output.verify import verify
from samray.pipeline import run as run_module
from samray.pipeline.report import LabelReport
from tests.chaos.test_kill_tiles import SIZE, large_image
from tests.support import standin
from tests.support.outputs import attempts_left, rows_of
from tests.support.tile_operation import make_labeler

TILE = 96
TRANSFORM = [0.5, 0.0, 500_000.0, 0.0, -0.5, 4_500_000.0]


def test_a_large_image_is_one_row_and_a_damaged_one_fails(
    storage_root: str,
    tmp_path: Path,
    label: Callable[..., LabelReport],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run_module, "MEASURED_HERE", 0)  # on Ray, as of many shards
    source, output = storage.join(storage_root, "in"), storage.join(storage_root, "out")
    pixels = large_image(tmp_path / "large.png")
    whole = (tmp_path / "large.png").read_bytes()
    storage.put(storage.join(source, "a.tif"), _geotiff(tmp_path / "a.tif", pixels))
    storage.put(storage.join(source, "b.png"), whole[: len(whole) * 2 // 3])
    storage.put(storage.join(source, "c.png"), standin.make_image(1))
    run = functools.partial(label, source, output, f"masks.tile={TILE}", "input.max_pixels=10000")
    labeler = functools.partial(make_labeler, pace=standin.Pace(), log=tmp_path / "labelled")

    capsys.readouterr()
    assert run(make_labeler=labeler, progress=True).num_failed == 1
    shown = re.findall(r"([\d,]+) of ([\d,]+) tiles", capsys.readouterr().err)
    assert shown
    assert len({total for _, total in shown}) == 1
    rows = rows_of(output)
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert rows[1]["error"].startswith("truncated: ")
    assert (rows[0]["image"]["width"], rows[0]["image"]["height"]) == SIZE
    id_of = {mask["segmentation"]["counts"]: mask["id"] for mask in rows[0]["annotations"]}
    wanted = [mask["segmentation"]["counts"] for mask in standin.masks_of(pixels)]
    assert id_of.keys() >= set(wanted)
    tiles = {one["id"]: one["boxes"] for one in rows[0]["tiles"]}
    assert tiles.keys() == set(id_of.values())
    assert all(len(tiles[id_of[counts]]) > 1 for counts in wanted), "joined from several windows"
    assert rows[0]["geo"]["transform"] == TRANSFORM
    assert rows[2]["tiles"] == []
    assert len(rows[2]["annotations"]) == 3
    assert verify(output, deep=True).ok

    storage.put(storage.join(source, "b.png"), _png(np.ascontiguousarray(pixels[:, ::-1])))
    assert run(make_labeler=labeler, retry_failed=True).num_failed == 0
    again = rows_of(output)
    assert again[0] == rows[0]
    mirrored = {mask["segmentation"]["counts"] for mask in again[1]["annotations"]}
    assert mirrored >= {mask["segmentation"]["counts"] for mask in standin.masks_of(pixels[:, ::-1])}
    assert not attempts_left(output)
    assert not [entry for entry in storage.list_files(output) if "/tiles/" in entry.uri]
    assert not list(folder().iterdir()), "nothing is left on this machine's disk"


def _geotiff(path: Path, pixels: np.ndarray) -> bytes:
    rows = pixels.transpose(2, 0, 1)
    options = {"count": 3, "dtype": "uint8", "height": rows.shape[1], "width": rows.shape[2], "crs": "EPSG:32633"}
    with rasterio.open(path, "w", driver="GTiff", transform=Affine(*TRANSFORM), **options) as file:
        file.write(rows)
    return path.read_bytes()


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
