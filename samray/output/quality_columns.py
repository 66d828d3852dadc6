"""The columns of `samray quality` in an expression of `--where`: `quality.few_masks`, `quality.rank <= 100`.

They are joined by image_id, so they also fit an output that was compacted or corrected since.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from samray import storage
from samray.errors import ConfigError, NotFoundError, StorageError
from samray.storage.tables import open_parquet, read_parquet

IMAGES_FOLDER: Final = "images"
"""Folder of DEST with a row per image."""


def default_place(output: str) -> str:
    """Where `samray quality` writes if it is not given a DEST."""
    return storage.join(output, "_samray", "quality")


@lru_cache(4)
def quality_columns(place: str) -> dict[str, pa.DataType]:
    """The columns of a finished check. Raises: ConfigError if there is none, StorageError."""
    names = _files(place)
    with storage.open_read(storage.join(place, IMAGES_FOLDER, names[0])) as stream:
        schema = open_parquet(stream).schema_arrow
    return {field.name: field.type for field in schema}


@lru_cache(4)
def read_quality(place: str, columns: tuple[str, ...]) -> tuple[npt.NDArray[np.int64], pa.Table]:
    """Ascending ids of all images of a check, and these columns in that order. Raises: StorageError."""
    tables = []
    for name in _files(place):
        try:
            data = storage.read_bytes(storage.join(place, IMAGES_FOLDER, name))
            tables.append(read_parquet(data, ["image_id", *columns]))
        except (pa.ArrowException, ValueError) as error:
            raise StorageError(
                f"{storage.redact(storage.join(place, IMAGES_FOLDER, name))} is damaged: {error}"
            ) from error
    table = pa.concat_tables(tables).combine_chunks()
    ids = table["image_id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    return ids[order], table.select(list(columns)).take(pa.array(order)).combine_chunks()


def _files(place: str) -> list[str]:
    try:
        # Written last: without it the check is not finished.
        storage.read_bytes(storage.join(place, "quality.json"))
    except NotFoundError as error:
        raise ConfigError(
            f"where: {storage.redact(place)} has no finished `samray quality`, whose columns are those of quality"
        ) from error
    return sorted(name for name in storage.list_names(storage.join(place, IMAGES_FOLDER)) if not name.startswith("."))


def values_of(place: str, column: str, image_ids: pa.Array) -> pa.Array:
    """The values of a column for these images; null for an image that was not checked. Raises: StorageError."""
    ids, table = read_quality(place, (column,))
    wanted = np.asarray(image_ids.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)
    at = np.searchsorted(ids, wanted).clip(max=max(len(ids) - 1, 0))
    found = ids[at] == wanted if len(ids) else np.zeros(len(wanted), bool)
    return table[column].combine_chunks().take(pa.array(at, mask=~found))
