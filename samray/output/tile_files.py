"""The masks of single tiles of large images, from when they are found until their image's shard is there.

OUTPUT/_samray/tiles/shard-000000/IMAGE_ID-KEY/tile-000000.parquet: a file appears whole or not at all, and its
existence is the only mark that the tile is done. KEY changes with the image's file. Files are removed once their shard
is committed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from samray import storage
from samray.errors import NotFoundError, StorageError
from samray.output.schema import ANNOTATION
from samray.output.shards import FOLDER as SHARDS
from samray.output.shards import reraise_damaged, shard_name, shard_number
from samray.rle.records import MaskRecord
from samray.storage.strict_json import parse_json
from samray.storage.tables import open_parquet

_FOLDER: Final = ("_samray", "tiles")
_NAME: Final = re.compile(r"tile-(\d{6,})\.parquet")
_SCHEMA: Final = pa.schema([field for field in ANNOTATION if field.name != "id"])
_COSTS: Final = b"samray_costs"
_GEO: Final = b"samray_geo"
_DELETED_AT_ONCE: Final = 16


class TileFiles:
    """The tiles of one image."""

    def __init__(
        self, output: str, shard: int, row: Mapping[str, Any], generation: int, version: str | None = None
    ) -> None:
        """row: of the plan, with image_id, uri, size and etag. generation: the last one of the plan. version: of the
        image's file when the run began, which may have changed since it was listed."""
        # A changed image must not get tiles of its earlier version, not even those that a killed run left.
        version_key = json.dumps([row["uri"], row["size"], row["etag"], generation, version])
        key = hashlib.sha256(version_key.encode()).hexdigest()[:12]
        self.folder = storage.join(_shard_folder(output, shard), f"{row['image_id']}-{key}")

    def done(self) -> set[int]:
        """The tiles that are there: one LIST. Raises: StorageError."""
        names = storage.list_names(self.folder)
        return {int(match[1]) for name in names if (match := _NAME.fullmatch(name))}

    def put(
        self, number: int, masks: Sequence[MaskRecord], costs: Mapping[str, float], geo: Mapping[str, Any] | None = None
    ) -> None:
        """Write a tile. One that is there stays: another attempt has finished it. geo: of the image, as in the column
        `geo`. Raises: StorageError."""
        table = pa.Table.from_pylist([dict(mask) for mask in masks], schema=_SCHEMA)
        sink = pa.BufferOutputStream()
        metadata = {_COSTS: json.dumps(dict(costs)).encode(), _GEO: json.dumps(geo).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd", write_statistics=False)
        storage.put_new(self._uri(number), sink.getvalue().to_pybytes())

    def read(self, number: int) -> tuple[list[MaskRecord], dict[str, float], dict[str, Any] | None]:
        """The masks of a tile, in its own frame, what they cost, and where the image is. Raises: NotFoundError,
        StorageError."""
        uri = self._uri(number)
        data = storage.read_bytes(uri)
        with reraise_damaged(uri):
            table = open_parquet(data).read()
            if not table.schema.equals(_SCHEMA) or not {_COSTS, _GEO} <= set(table.schema.metadata or ()):
                raise StorageError(f"{storage.redact(uri)} is not a tile; delete it and run again")
            costs, geo = (parse_json(table.schema.metadata[key]) for key in (_COSTS, _GEO))
            return table.to_pylist(), {key: float(value) for key, value in costs.items()}, geo

    def _uri(self, number: int) -> str:
        return storage.join(self.folder, f"tile-{number:06d}.parquet")


def remove_tiles(output: str, shard: int) -> None:
    """Delete the tiles of a shard that is committed. Raises: StorageError."""
    folder = _shard_folder(output, shard)
    if storage.is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: tiles of other shards
            os.rmdir(os.path.dirname(folder))
        return
    with contextlib.suppress(NotFoundError), ThreadPoolExecutor(_DELETED_AT_ONCE) as pool:
        list(pool.map(storage.delete, [entry.uri for entry in storage.list_files(folder)]))


class TilesOfShard(NamedTuple):
    """The tiles of a shard that are there."""

    num_tiles: int
    written_at: float | None
    """Time of the newest one, by the storage's clock; None if the storage does not report it."""


def list_tiles(output: str) -> dict[int, TilesOfShard]:
    """The tiles of each shard of OUTPUT that has some. Raises: StorageError."""
    root = storage.join(storage.normalize(output), *_FOLDER)
    folders: set[str] = set()
    with contextlib.suppress(NotFoundError):
        for entry in storage.list_files(root):
            folder, _, name = entry.uri.rpartition("/")
            if _NAME.fullmatch(name):
                folders.add(folder)
    times: defaultdict[int, list[float | None]] = defaultdict(list)
    with ThreadPoolExecutor(_DELETED_AT_ONCE) as pool:
        for folder, names in zip(folders, pool.map(storage.list_times, folders), strict=True):
            shard = shard_number(folder.split("/")[-2] + ".parquet")
            if shard is not None:
                times[shard] += names.values()
    return {
        shard: TilesOfShard(len(of_shard), max(filter(None, of_shard), default=None))
        for shard, of_shard in times.items()
    }


def remove_left_tiles(output: str) -> None:
    """Delete the tiles that a run left behind when it was killed right after it committed their shard.

    Tiles newer than their shard stay: a run with --retry-failed is writing them. Raises: StorageError.
    """
    tiles = list_tiles(output)
    times = storage.list_times(storage.join(storage.normalize(output), SHARDS)) if tiles else {}
    for shard, (_, written_at) in tiles.items():
        committed_at = times.get(shard_name(shard))
        if written_at is not None and committed_at is not None and committed_at >= written_at:
            remove_tiles(output, shard)


def _shard_folder(output: str, shard: int) -> str:
    return storage.join(storage.normalize(output), *_FOLDER, shard_name(shard).removesuffix(".parquet"))
