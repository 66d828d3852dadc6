"""The images of a shard that are labelled in tiles: which they are, and which of them get rows of their own."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from samray import storage
from samray.errors import FileError, ImageError, StorageError, UnavailableError
from samray.inputs.header import HEADS, MAX_PIXELS, is_turned_behind, size_behind, size_in_header
from samray.inputs.listing import fetch_images
from samray.output.credentials import reveal
from samray.pipeline.fetch import indices_to_redo, sample_files
from samray.pipeline.tiling import TILES_PER_PART, Size, open_large, tiling_of
from samray.rle.runs import MAX_SIDE

if TYPE_CHECKING:
    from samray.config import Config, InputConfig
    from samray.output.plan import Plan

MAX_TILES: Final = 2**16
"""Maximum tiles of an image: each of them is a file."""

MAX_PARTS: Final = 256
"""Maximum parts of an image, each a row of the pipeline."""

_AT_ONCE: Final = 16
"""Images measured at a time."""


@dataclass(frozen=True, slots=True)
class MeasureTask:
    """Finds the sizes of a shard's images; runs anywhere."""

    plan: Plan
    config: Config
    retry_failed: bool

    def __call__(self, item: tuple[int, bool, Mapping[str, str]]) -> tuple[int, dict[int, Size]]:
        """item: shard, whether only some of it is redone, its credentials. Returns it, and the index of each image in
        it that is to be labelled in tiles, with its size."""
        shard, retry, credentials = item
        storage.configure(self.config.storage)
        table = reveal(self.plan.read_shard(shard), credentials)
        indices = indices_to_redo(self.plan, shard, self.retry_failed) if retry else range(table.num_rows)
        tile = self.config.masks.tile
        assert tile is not None
        sample = functools.partial(sample_files, self.plan, credentials)
        sizes: dict[int, Size] = {}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for start in range(0, len(indices), _AT_ONCE):
                rows = table.take(list(indices[start : start + _AT_ONCE]))
                sizes_hw = _sizes_of(rows, self.config.input, tile, sample, pool)
                for index, hw, row in zip(indices[start : start + _AT_ONCE], sizes_hw, rows.to_pylist(), strict=True):
                    if hw is not None and max(hw) > tile:
                        sizes[index] = Size(*hw, _version_of(row))
        return shard, sizes


def _sizes_of(
    rows: pa.Table, config: InputConfig, tile: int, sample: Callable[[], list[str]], pool: ThreadPoolExecutor
) -> list[tuple[int, int] | None]:
    """Height and width of each image; None if it cannot be read: the labelling actor then says why."""
    items = rows.to_pylist()
    from_bytes = [i for i, item in enumerate(items) if item["container"] is not None or storage.is_web(item["uri"])]
    # All at once: for each row by itself, a Parquet file would be read again up to that row.
    data = dict(zip(from_bytes, fetch_images(rows.take(from_bytes), config, sample) if from_bytes else [], strict=True))

    def size_of(i: int) -> tuple[int, int] | None:
        try:
            return _size_of(rows.slice(i, 1), items[i], data.get(i), config, tile, sample)
        except UnavailableError:
            # Raises, too, unless it is this image alone.
            (again,) = fetch_images(rows.slice(i, 1), config, sample)
            return size_in_header(again) if isinstance(again, bytes) else None

    return list(pool.map(size_of, range(len(items))))


def _size_of(
    row: pa.Table,
    item: Mapping[str, Any],
    data: bytes | ImageError | None,
    config: InputConfig,
    tile: int,
    sample: Callable[[], list[str]],
) -> tuple[int, int] | None:
    """data: of an image that is only read whole. Raises: StorageError."""
    if item["problem"] or isinstance(data, ImageError):
        return None
    try:
        for number in HEADS if data is None else ():
            head = storage.read_bytes(item["uri"], 0, number)
            read = functools.partial(storage.read_bytes, item["uri"])
            if (size := size_in_header(head)) is not None:
                if max(size) > tile and is_turned_behind(head, item["size"], read):
                    break
                return size
            if len(head) < number:
                break
            if (size := size_behind(head, item["size"], read)) is not None:
                return size
        if data is not None and (size := size_in_header(data)) is not None:
            return size
        with open_large(row, config, f"{os.getpid()}", sample) as raster:
            return raster.height, raster.width
    except (ImageError, FileError):
        return None


def _version_of(item: Mapping[str, Any]) -> str | None:
    with contextlib.suppress(StorageError):
        return storage.file_version(item["container"] or item["uri"])
    return None


def too_large_for_tiles(size: Size, config: Config) -> ImageError | None:
    """Why an image cannot be labelled in tiles; None if it can."""
    width_x_height = f"{size.width}x{size.height}"
    if max(size.hw) > MAX_SIDE or size.height * size.width > MAX_PIXELS:
        return ImageError(
            "too_large",
            f"{width_x_height}: masks may have {MAX_SIDE} pixels per side, and {MAX_PIXELS} in all; cut it into "
            "smaller images",
        )
    if (number := len(tiling_of(size, config))) > MAX_TILES:
        tile = config.masks.tile
        return ImageError(
            "too_large",
            f"{width_x_height} has {number} tiles of masks.tile={tile}, more than {MAX_TILES}; use larger tiles in "
            "another OUTPUT",
        )
    return None


def parts_of(sizes: Mapping[int, Size], config: Config) -> list[tuple[int, int, int]]:
    """Index, first and last tile (exclusive) of each part of a shard that has a row of its own."""
    parts = []
    for index, size in sizes.items():
        if too_large_for_tiles(size, config) is not None:
            continue
        number = len(tiling_of(size, config))
        if number > TILES_PER_PART:
            step = max(TILES_PER_PART, -(-number // MAX_PARTS))
            parts += [(index, start, min(start + step, number)) for start in range(0, number, step)]
    return parts
