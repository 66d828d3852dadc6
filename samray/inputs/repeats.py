"""Find images of an input that are the same file as another one, byte by byte (`input.skip_duplicates`).

Only files of equal size can be equal. Of these the last bytes are read, which differ between nearly all images, and
only where they agree is the whole file read. An image inside a tar or a Parquet file is read whole, and so is one whose
size the listing does not know (web servers, Parquet), which is compared only with others of unknown size.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.errors import ImageError, StorageError
from samray.inputs.fetch import fetch_images

if TYPE_CHECKING:
    from samray.config import InputConfig

REASON: Final = "duplicate"
_END_BYTES: Final = 4096
_THREADS: Final = 32
_IMAGES_AT_ONCE: Final = 64

Ints = npt.NDArray[np.int64]


def mark_duplicates(images: pa.Table, config: InputConfig, order: Ints | None = None) -> pa.Table:
    """Give each repetition of an earlier image a problem, with which it becomes a failed row that names the other one.

    images: `INPUT_SCHEMA`. order: (N,), of equal images the one with the smallest number stays; None: the first row.
    Raises: StorageError if storage as a whole fails.
    """
    rows = _with_equal_sizes(images)
    digests = _digests(images, _with_equal_ends(images, rows), config)
    first: dict[bytes, int] = {}
    order = np.zeros(images.num_rows, np.int64) if order is None else order
    problems: dict[int, str] = {}
    for row in sorted(digests, key=lambda row: (order[row], row)):
        original = first.setdefault(digests[row], row)
        if original != row:
            uri = storage.redact(images["uri"][original].as_py())
            problems[row] = str(ImageError(REASON, f"the same bytes as {uri} (input.skip_duplicates)"))
    if not problems:
        return images
    column = images["problem"].to_pylist()
    for row, problem in problems.items():
        column[row] = problem
    index = images.schema.get_field_index("problem")
    return images.set_column(index, images.schema.field("problem"), pa.array(column, pa.string()))


def _with_equal_sizes(images: pa.Table) -> Ints:
    """Rows that share their size with another; unknown sizes count as one."""
    sizes = pc.fill_null(images["size"], -1).to_numpy()
    # What the listing refuses already is a failed row in any case.
    rows = np.flatnonzero(pc.is_null(images["problem"]).to_numpy())
    _, inverse, counts = np.unique(sizes[rows], return_inverse=True, return_counts=True)
    return np.asarray(rows[counts[inverse] > 1], np.int64)


def _with_equal_ends(images: pa.Table, rows: Ints) -> Ints:
    """The rows whose last bytes equal those of another row of the same size, or that must be read whole."""
    items = images.select(["uri", "size", "container"]).take(pa.array(rows)).to_pylist()
    with ThreadPoolExecutor(_THREADS) as pool:
        ends = list(pool.map(_end_of, items))
    # Files of the size of an image that must be read whole are read whole, too.
    whole_sizes = {item["size"] for item, end in zip(items, ends, strict=True) if end is None}
    keys = [(item["size"], end) for item, end in zip(items, ends, strict=True)]
    counts = Counter(keys)
    wanted: Ints = rows[np.array([counts[key] > 1 or key[0] in whole_sizes for key in keys], bool)]
    return wanted


def _end_of(row: dict[str, Any]) -> bytes | None:
    """A digest of a file's last bytes; None if it is not a file of its own, or cannot be read like that."""
    if row["container"] is not None or row["size"] is None or row["size"] <= _END_BYTES:
        return None
    try:
        end = storage.read_bytes(row["uri"], row["size"] - _END_BYTES, _END_BYTES)
    except StorageError:  # `fetch_images` finds out whether it is this file's fault
        return None
    return hashlib.blake2b(end, digest_size=16).digest()


def _digests(images: pa.Table, rows: Ints, config: InputConfig) -> dict[int, bytes]:
    """Row -> digest of the whole image, without images that cannot be read, which labelling will say of them."""
    digests: dict[int, bytes] = {}
    for start in range(0, len(rows), _IMAGES_AT_ONCE):
        batch = rows[start : start + _IMAGES_AT_ONCE]
        for row, data in zip(batch.tolist(), fetch_images(images.take(pa.array(batch)), config), strict=True):
            if not isinstance(data, ImageError):
                digests[row] = hashlib.blake2b(data, digest_size=32).digest()
    return digests
