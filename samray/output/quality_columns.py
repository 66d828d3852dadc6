"""The columns of `samray quality` in an expression of `--where`: `quality.few_masks`, `quality.rank <= 100`.

They are joined by image_id, so they also fit an output that was compacted or corrected since.
"""

from __future__ import annotations

import hashlib
import threading
from contextlib import suppress
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

_reading: Final = threading.Lock()


def default_quality_folder(output: str) -> str:
    """Where `samray quality` writes if it is not given a DEST."""
    return storage.join(output, "_samray", "quality")


def quality_digest(folder: str) -> str:
    """A digest of the results and inputs of a finished check. Raises: ConfigError if there is none,
    StorageError."""
    try:
        # Written last: without it the check is not finished.
        content = storage.read_bytes(storage.join(folder, "quality.json"))
    except NotFoundError as error:
        raise ConfigError(
            f"where: {storage.redact(folder)} has no finished `samray quality`, whose columns are those of quality"
        ) from error
    with suppress(NotFoundError):
        # Settings and fingerprints of the shards: counts alone may be equal by chance.
        content += storage.read_bytes(storage.join(folder, "_quality", "quality.json"))
    return hashlib.sha256(content).hexdigest()


@lru_cache(4)
def quality_columns(folder: str, digest: str) -> dict[str, pa.DataType]:
    """The columns of a finished check. digest: its `quality_digest`, so that another check in its place is read again.
    Raises: StorageError."""
    uri = _files(folder)[0]
    try:
        with storage.open_read(uri) as stream:
            schema = open_parquet(stream).schema_arrow
    except (pa.ArrowException, ValueError) as error:
        raise StorageError(f"{storage.redact(uri)} is damaged: {error}") from error
    return {field.name: field.type for field in schema}


def values_of(folder: str, digest: str, column: str, image_ids: pa.Array) -> pa.Array:
    """The values of a column for these images; null for an image that was not checked. digest: as in
    `quality_columns`. Raises: StorageError."""
    with _reading:  # so that several threads read a column once
        ids, order = _ids(folder, digest)
        values = _column(folder, digest, column)
    wanted = np.asarray(image_ids.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)
    at = np.searchsorted(ids, wanted).clip(max=max(len(ids) - 1, 0))
    is_checked = ids[at] == wanted if len(ids) else np.zeros(len(wanted), bool)
    return values.take(pa.array(order[at] if len(ids) else at, mask=~is_checked))


@lru_cache(2)
def _ids(folder: str, digest: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ascending ids of all images of a check, and the row of each."""
    ids = _column(folder, digest, "image_id").to_numpy()
    order = np.argsort(ids, kind="stable")
    return ids[order], order


@lru_cache(64)
def _column(folder: str, digest: str, column: str) -> pa.Array:
    """A column of all images of a check, in the order of the files. As many are kept as an expression may name: they
    are needed again for each few rows."""
    tables = []
    for uri in _files(folder):
        try:
            tables.append(read_parquet(storage.read_bytes(uri), [column]))
        except (pa.ArrowException, ValueError) as error:
            raise StorageError(f"{storage.redact(uri)} is damaged: {error}") from error
    return pa.concat_tables(tables)[column].combine_chunks()


def _files(folder: str) -> list[str]:
    names = sorted(name for name in storage.list_names(storage.join(folder, IMAGES_FOLDER)) if not name.startswith("."))
    if not names:
        raise StorageError(
            f"{storage.redact(folder)} has no table of images any more; delete it and run samray quality again"
        )
    return [storage.join(folder, IMAGES_FOLDER, name) for name in names]
