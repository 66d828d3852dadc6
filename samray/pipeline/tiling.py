"""Large images in tiles: the tiles that an actor labels, and the row that they become. Which images they are is found
by `samray.pipeline.large_images`.

The row of a shard stays the unit that commits images. For an image of many tiles, rows of their own come before it, so
that other actors label some of its tiles: a tile is a file in OUTPUT (`samray.output.tile_files`), written whole or not
at all, and is not labelled again by an actor that sees it. The actor that has the row of the shard labels what is still
missing then; the task that writes the shard merges the files.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pyarrow as pa

from samray import storage
from samray.errors import ImageError, NotFoundError, StorageError
from samray.inputs.base import too_large
from samray.inputs.child import ChildNotStarted
from samray.inputs.header import MAX_PIXELS
from samray.inputs.listing import fetch_images
from samray.inputs.local_copies import local_copy
from samray.inputs.rasters import Raster, open_raster
from samray.masks.image_tiles import Tiling, make_tiling
from samray.masks.seams import Piece, merge, pieces_of
from samray.masks.tiling_generator import TILE
from samray.output.credentials import reveal
from samray.output.schema import ANNOTATIONS_PER_IMAGE, ImageRecord, records_to_table
from samray.output.shards import shard_uri
from samray.output.tile_files import TileFiles
from samray.pipeline.faults import DeviceFault
from samray.pipeline.fetch import sample_files
from samray.pipeline.labeler import EncodedImage

if TYPE_CHECKING:
    from samray.config import Config, InputConfig
    from samray.output.plan import Plan
    from samray.pipeline.report import Labelled


TILES_PER_PART: Final = 16
"""Tiles that an actor takes at a time, and the fewest of a part. An image with no more has no parts: the row of its
shard labels it."""

LEASE_S: Final = 120.0
"""Seconds after the last sign of an actor after which another one may take its tiles. Both may then label them: one
file stays."""

WAIT_S: Final = 1.0

STAGE: Final = "stage."
"""Prefix of the seconds of a stage among the costs of a tile; the others are `schema.STATS_SECONDS`."""

_AT_ONCE: Final = 16
"""Tiles read at a time."""
_COPY_BYTES: Final = 16 * 2**20


class Size(NamedTuple):
    """Size of a large image when a run begins."""

    height: int
    width: int
    version: str | None = None
    """Version of the image's file (`storage.file_version`): a replaced file gets no tiles of an earlier run."""

    @property
    def hw(self) -> tuple[int, int]:
        return self.height, self.width


def sizes_from(text: str | None) -> dict[int, Size]:
    """The column `tiles` of `samray.pipeline.fetch.SOURCE`."""
    return {int(index): Size(*values) for index, values in json.loads(text or "{}").items()}


def tiling_of(size: Size, config: Config) -> Tiling:
    assert config.masks.tile is not None
    return make_tiling(size.hw, config.masks.tile, config.masks.tile_overlap)


# --- reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def open_large(row: pa.Table, config: InputConfig, run: str, sample: Callable[[], list[str]]) -> Iterator[Raster]:
    """The image of a row of the plan, to read parts of it: a local file in place, any other from a copy on this
    machine's disk.

    run: copies are shared by processes of the same run. Raises: ImageError, StorageError.
    """
    (item,) = row.to_pylist()
    uri = item["uri"]
    with contextlib.ExitStack() as stack:
        if item["container"] is None and storage.is_local(uri) and os.path.isfile(uri):
            path = Path(uri)
            if path.stat().st_size > config.max_bytes:
                raise too_large(path.stat().st_size, config)
        else:
            key = json.dumps([run, uri, item["container"], item["size"], item["etag"]])
            path = stack.enter_context(local_copy(key, lambda path: _fetch_to(path, row, item, config, sample)))
        yield stack.enter_context(open_raster(path, config, max_pixels=MAX_PIXELS))


def _fetch_to(
    path: Path, row: pa.Table, item: Mapping[str, Any], config: InputConfig, sample: Callable[[], list[str]]
) -> None:
    """Write the bytes of an image to a file. Raises: ImageError, StorageError."""
    if item["container"] is None and not storage.is_web(item["uri"]) and not item["problem"]:
        # What goes wrong here is tried again below, where it is found out whose fault it is.
        with contextlib.suppress(StorageError):
            version, size = storage.file_version(item["uri"]), storage.file_size(item["uri"])
            if size is not None and size > config.max_bytes:
                raise too_large(size, config)
            if size is not None:
                with path.open("wb") as file:
                    for start in range(0, size, _COPY_BYTES):
                        file.write(storage.read_bytes(item["uri"], start, min(_COPY_BYTES, size - start)))
                if storage.file_version(item["uri"]) == version:  # else it was replaced between two parts
                    return
    (data,) = fetch_images(row, config, sample)
    if isinstance(data, ImageError):
        raise data
    path.write_bytes(data)


class OpenImage:
    """The large image that a process reads: kept open from one part of it to the next, because it may have been copied
    and unpacked for that."""

    def __init__(self) -> None:
        self._key: object = None
        self._stack = contextlib.ExitStack()
        self._raster: Raster | None = None

    def get(self, key: object, opened: Callable[[], contextlib.AbstractContextManager[Raster]]) -> Raster:
        """The image of this key, from opened() if it is not open yet. Raises: as `open_large`."""
        if self._raster is None or key != self._key:
            self.close()
            self._raster, self._key = self._stack.enter_context(opened()), key
        return self._raster

    def close(self) -> None:
        self._raster = None
        self._stack.close()


# --- labelling, in an actor ------------------------------------------------------------------------------------------


Label = Callable[[list[EncodedImage], "Callable[[Labelled], None]"], object]
"""Labels images and calls back with each batch, in order."""

Claim = Callable[[str, list[int]], list[int]]
"""Which of these tiles of an image to label now: at most TILES_PER_PART, none that another actor is at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LargeImage:
    """A large image of a shard."""

    plan: Plan
    config: Config
    run_id: str
    shard: int
    index: int
    size: Size
    credentials: Mapping[str, str]
    retry: bool
    """Whether its shard exists, and is replaced."""

    @property
    def name(self) -> str:
        return f"{self.shard}-{self.index}"

    def left(self) -> tuple[str, list[int]]:
        """The folder of its tiles, and the numbers of those that are not there. Raises: StorageError."""
        files = _files_of(self.plan, self.shard, self.plan.read_shard(self.shard).slice(self.index, 1), self.size)
        done = files.done()
        return files.folder, [number for number in range(len(tiling_of(self.size, self.config))) if number not in done]

    def label(
        self,
        label: Label,
        claim: Claim,
        costs: Callable[[Labelled], Mapping[str, float]],
        opened: OpenImage,
        numbers: Iterable[int] | None = None,
    ) -> ImageError | None:
        """Label the tiles with these numbers that no other actor labels; without numbers, until all are there.

        costs: the costs of each tile of a batch. opened: where the image stays open. Returns why a tile cannot be
        labelled. Raises: what label and claim raise, DeviceFault, StorageError.
        """
        stored = self.plan.read_shard(self.shard).slice(self.index, 1)
        row = reveal(stored, self.credentials)
        tiling = tiling_of(self.size, self.config)
        files = _files_of(self.plan, self.shard, stored, self.size)
        wanted = list(range(len(tiling)) if numbers is None else numbers)
        errors: list[ImageError] = []
        while True:
            done = files.done()
            left = [number for number in wanted if number not in done]
            # Committed by another driver, or before this part was run again: its tiles are gone, and not needed.
            if not left or (not self.retry and storage.exists(shard_uri(self.plan.output, self.shard))):
                return None
            claimed = claim(files.folder, left)
            if not claimed and numbers is not None:
                return None
            if not claimed:
                time.sleep(WAIT_S)  # others are at the rest
                continue
            try:
                raster = opened.get(self.name, functools.partial(self._open, row))
            except ImageError as error:
                return error
            waiting = list(claimed)
            geo = raster.geo

            def keep(batch: Labelled, waiting: list[int] = waiting, geo: Any = geo) -> None:
                tile_costs = costs(batch)
                for record in batch.records:
                    number = waiting.pop(0)
                    if record.error is not None:
                        error = ImageError.parse(record.error)
                        x0, y0, x1, y1 = tiling.box(number)
                        errors.append(ImageError(error.reason, f"{error.message} (in the tile {x0},{y0} to {x1},{y1})"))
                    else:
                        files.put(number, record.annotations, tile_costs, geo)

            label([self._tile(stored, tiling, raster, number) for number in claimed], keep)
            if errors:
                return errors[0]

    @contextmanager
    def _open(self, row: pa.Table) -> Iterator[Raster]:
        sample = functools.partial(sample_files, self.plan, self.credentials)
        with contextlib.ExitStack() as stack:
            try:
                raster = stack.enter_context(open_large(row, self.config.input, self.run_id, sample))
            except ChildNotStarted as error:  # the machine cannot start processes, for no image
                raise DeviceFault(f"cannot start a process that reads a large image: {error}") from error
            if (raster.height, raster.width) != self.size.hw:
                sizes = f"{raster.width}x{raster.height}, not {self.size.width}x{self.size.height}"
                raise ImageError("unreadable", f"the image is {sizes} as its header said: it was replaced")
            yield raster

    def _tile(self, row: pa.Table, tiling: Tiling, raster: Raster, number: int) -> EncodedImage:
        (item,) = row.to_pylist()
        # Read by a thread that decodes, when it is this tile's turn.
        pixels: Any = functools.partial(tiling.read, raster, number)
        return EncodedImage(item["image_id"], item["file_name"], item["uri"], pixels, [TILE], self.shard)


def _files_of(plan: Plan, shard: int, stored: pa.Table, size: Size) -> TileFiles:
    """stored: the image's row of the plan, as it is there, without credentials."""
    return TileFiles(plan.output, shard, stored.to_pylist()[0], plan.last_generation, size.version)


# --- merging, in the task that writes --------------------------------------------------------------------------------


def merged_row(plan: Plan, config: Config, shard: int, index: int, size: Size) -> tuple[pa.Table, dict[str, float]]:
    """The row of a large image whose tiles are all there, and the sums of what they cost. Raises: NotFoundError if one
    is gone, StorageError."""
    stored = plan.read_shard(shard).slice(index, 1)
    (item,) = stored.to_pylist()
    files, tiling = _files_of(plan, shard, stored, size), tiling_of(size, config)
    costs: Counter[str] = Counter()
    by_tile: dict[int, list[Piece]] = {}
    geo: dict[str, Any] | None = None
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for start in range(0, len(tiling), _AT_ONCE):
            numbers = range(start, min(start + _AT_ONCE, len(tiling)))
            for number, (tile_masks, tile_costs, tile_geo) in zip(numbers, pool.map(files.read, numbers), strict=True):
                costs.update(tile_costs)
                geo = tile_geo
                try:
                    by_tile[number] = pieces_of(tile_masks, tiling, number)
                except ValueError as error:
                    raise StorageError(
                        f"a tile in {storage.redact(files.folder)} is damaged: it has {error}"
                    ) from error
    masks, boxes = merge(by_tile, tiling, config.masks, ANNOTATIONS_PER_IMAGE)
    first = item["image_id"] * ANNOTATIONS_PER_IMAGE
    tiles = [
        {"id": first + i, "boxes": [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes_xyxy]}
        for i, boxes_xyxy in enumerate(boxes)
    ]
    record = ImageRecord(
        image_id=item["image_id"],
        width=size.width,
        height=size.height,
        file_name=item["file_name"],
        uri=item["uri"],
        annotations=masks,
        tiles=tiles,
        geo=geo,
    )
    return records_to_table([record], plan.run), dict(costs)


def merge_tiles(
    table: pa.Table,
    indices: Sequence[int],
    sizes: Mapping[int, Size],
    plan: Plan,
    config: Config,
    shard: int,
    retry: bool,
) -> tuple[pa.Table, list[int], dict[str, float]]:
    """The rows of a shard with those of large images put together, their indices in the shard, and the costs of tiles.

    table: a row for each of indices; large images that failed have an error there. retry: the shard exists: an image is
    left out if its tiles are gone, because another attempt or driver has put its row there. Raises: as `merged_row`.
    """
    costs: Counter[str] = Counter()
    rows, kept = [table.slice(0, 0)], []
    for number, index in enumerate(indices):
        row = table.slice(number, 1)
        if index in sizes and row["error"][0].as_py() is None:
            try:
                row, image_costs = merged_row(plan, config, shard, index, sizes[index])
            except NotFoundError:
                if not retry:
                    raise
                continue
            costs.update(image_costs)
        kept.append(index)
        rows.append(row.replace_schema_metadata(table.schema.metadata))
    return pa.concat_tables(rows), kept, dict(costs)
