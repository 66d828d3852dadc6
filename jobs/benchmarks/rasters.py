"""Memory and seconds of reading a large image in windows, as GeoTIFF, JPEG and PNG."""

from __future__ import annotations

import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import psutil

_WINDOW = 1024


def measure_rasters(side: int, kinds: list[str]) -> dict[str, Any]:
    """Write an image of side x side pixels in each format, and read windows of 1,024 pixels of it."""
    with tempfile.TemporaryDirectory() as folder:
        tiff = Path(folder) / "image.tif"
        _write_tiff(tiff, side)
        return {"side": side, **{kind: _measure(_as(tiff, kind)) for kind in kinds}}


def _write_tiff(path: Path, side: int) -> None:
    import rasterio
    from rasterio.windows import Window

    warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
    rng = np.random.default_rng(0)
    rows = np.add.outer(np.arange(_WINDOW), np.arange(side)) // 8 + rng.integers(0, 8, (_WINDOW, side))
    profile = {"driver": "GTiff", "height": side, "width": side, "count": 3, "dtype": "uint8", "tiled": True}
    with rasterio.open(path, "w", blockxsize=512, blockysize=512, compress="deflate", zlevel=1, **profile) as file:
        for y in range(0, side, _WINDOW):
            part = (rows[: side - y] + y).astype(np.uint8)
            file.write(np.stack([part, part // 2, 255 - part]), window=Window(0, y, side, len(part)))


def _as(tiff: Path, kind: str) -> Path:
    import rasterio.shutil

    path = tiff.with_suffix(f".{kind}")
    if kind != "tif":
        options = {"quality": 90} if kind == "jpg" else {"zlevel": 1}
        rasterio.shutil.copy(tiff, path, driver={"jpg": "JPEG", "png": "PNG"}[kind], **options)
    return path


def _measure(path: Path) -> dict[str, Any]:
    from samray.config import InputConfig
    from samray.inputs.rasters import open_raster

    peaks: dict[int, int] = {}
    done = threading.Event()

    def watch() -> None:
        children = psutil.Process().children(recursive=True)
        while not done.wait(0.02):
            children = psutil.Process().children(recursive=True) or children
            for process in children:
                try:
                    peaks[process.pid] = max(peaks.get(process.pid, 0), process.memory_info().rss)
                except psutil.Error:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    with open_raster(path, InputConfig()) as raster:
        raster.read(0, 0, _WINDOW, _WINDOW)
        first_s = time.monotonic() - started
        corners = [(x, y) for y in range(0, raster.height - _WINDOW, 4096) for x in range(0, raster.width, 2048)]
        started = time.monotonic()
        for x, y in corners:
            raster.read(x, y, min(x + _WINDOW, raster.width), y + _WINDOW)
        each_s = (time.monotonic() - started) / len(corners)
    done.set()
    watcher.join()
    return {
        "file_mb": round(path.stat().st_size / 1e6),
        "first_window_s": round(first_s, 1),
        "other_windows_s": round(each_s, 3),
        "peak_mb_of_the_reading_process": round(max(peaks.values()) / 1e6),
    }
