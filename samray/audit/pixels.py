"""Measure the pixels of images: hashes for duplicates, and whether an image is dark, blank or blurred.

Perceptual hashes are those of imagehash (extra `quality`). The other three are sums over a small grey copy:
CleanVision, which has them too, reads only local files and brings pandas and datasets along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from samray.errors import ConfigError, ImageError
from samray.inputs.decode_apart import decode_apart
from samray.inputs.fetch import fetch_images
from samray.output.mask_dataset import input_config_of
from samray.output.plan import Plan

SIDE: Final = 512
"""Longest side of the grey copy in pixels."""
MAX_DARK: Final = 48
"""An image is dark if 99% of its pixels are darker than this, of 255."""
MIN_CONTRAST: Final = 2.0
"""An image is blank if the standard deviation of its pixels is below this, of 255."""
MIN_SHARPNESS: Final = 0.004
"""An image is blurred if its Laplacian's variance, without that of rounding, is below this fraction of its pixels'
variance. Photographs have 0.03 to 3, and 0.003 or less after a Gaussian blur by 1% of their side."""
_ROUNDING: Final = 20 / 12
"""Variance of the Laplacian of values that were rounded to whole numbers and are otherwise constant."""

_IMAGES_AT_ONCE: Final = 32
_THREADS: Final = 4

MEASURED_PIXELS: Final = pa.schema(
    [
        ("content_hash", pa.uint64()),  # of the encoded bytes
        ("perceptual_hash", pa.uint64()),
        ("brightness", pa.float32()),  # mean, of 255
        ("contrast", pa.float32()),  # standard deviation, of 255
        ("sharpness", pa.float32()),
        ("is_dark", pa.bool_()),
        ("is_blank", pa.bool_()),
        ("is_blurred", pa.bool_()),
    ]
)
"""More columns of `MEASURED`; null for an image that cannot be read any more."""


def check_extra() -> None:
    """Raises: ConfigError if imagehash is not installed."""
    try:
        import imagehash  # noqa: F401
    except ImportError as error:
        raise ConfigError("--images needs imagehash: pip install 'samray[quality]'") from error


def measure_pixels(plan: Plan, shards: Sequence[int], images: pa.Table) -> pa.Table:
    """Add `MEASURED_PIXELS` to the rows of these shards. Raises: StorageError if storage as a whole fails."""
    config = input_config_of(plan)
    rows: list[dict[str, Any]] = []

    def measure(data: bytes | ImageError) -> dict[str, Any]:
        if isinstance(data, ImageError):
            return {}
        values: dict[str, Any] = {"content_hash": content_hash(data)}
        try:
            return values | pixels_of(decode_apart(data, config))
        except ImageError:
            return values

    with ThreadPoolExecutor(_THREADS) as pool:
        for shard in shards:
            planned = plan.read_shard(shard)
            for start in range(0, planned.num_rows, _IMAGES_AT_ONCE):
                rows += pool.map(measure, fetch_images(planned.slice(start, _IMAGES_AT_ONCE), config))
    more = pa.Table.from_pylist(rows, schema=MEASURED_PIXELS)
    for field in MEASURED_PIXELS:
        images = images.append_column(field, more[field.name])
    return images


def content_hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def pixels_of(image: npt.NDArray[np.uint8]) -> dict[str, Any]:
    """image: (H, W, 3) RGB. Returns the columns of `MEASURED_PIXELS` except content_hash."""
    import imagehash

    grey = Image.fromarray(image).convert("L")
    grey.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    values = np.asarray(grey, np.float32)
    variance = float(values.var())
    # Second differences along both axes; of an image thinner than three pixels there are none.
    inner = values[1:-1, 1:-1]
    laplacian = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:] - 4 * inner
    details = max(float(laplacian.var()) - _ROUNDING, 0.0) if laplacian.size else 0.0
    sharpness = details / variance if variance > 0 else 0.0
    bits = np.packbits(imagehash.phash(grey).hash.ravel())
    is_blank = variance < MIN_CONTRAST**2
    return {
        "perceptual_hash": int.from_bytes(bits.tobytes(), "big"),
        "brightness": float(values.mean()),
        "contrast": variance**0.5,
        "sharpness": sharpness,
        "is_dark": bool(np.quantile(values, 0.99) < MAX_DARK) and not is_blank,
        "is_blank": is_blank,
        "is_blurred": sharpness < MIN_SHARPNESS and not is_blank,
    }
