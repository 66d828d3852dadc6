"""Ordinary JPEGs by libjpeg-turbo's own interface, in about half of Pillow's time, with the same pixels.

Pillow keeps four bytes per pixel and copies them twice on the way to an array; here the decoder writes into the array.
Whatever is unusual or damaged is left to Pillow, whose errors say what is wrong.
"""

from __future__ import annotations

import io
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

RGBArray = npt.NDArray[np.uint8]

_SUBSAMPLINGS: Final = ("444", "422", "420", "440", "411")
"""Those for which the tests compare the pixels with Pillow's."""
_ORDINARY_FRAMES: Final = (0xC0, 0xC1, 0xC2)
"""Markers of baseline, extended and progressive frames with Huffman codes."""
_FRAMES: Final = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))


def decode_plain_jpeg(data: bytes, image: Image.Image) -> RGBArray | None:
    """The pixels (H, W, 3) of a JPEG, writable; None if Pillow is to decode it.

    image: the opened file, not loaded, whose size is known to be allowed.
    """
    if (
        image.format not in ("JPEG", "MPO")
        or image.mode != "RGB"
        or not _is_ordinary(data)
        or not _agrees_with_pillow()
    ):
        return None
    try:
        height, width, colorspace, subsampling = simplejpeg.decode_jpeg_header(data)
        # Each decoder has its own reader of headers: only what was checked against the limit is decoded.
        if (width, height) != image.size or colorspace != "YCbCr" or subsampling not in _SUBSAMPLINGS:
            return None
        # Strict: a file that Pillow would call damaged is not decoded here.
        pixels: RGBArray = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except (ValueError, KeyError):  # KeyError: libjpeg-turbo has more subsamplings than simplejpeg has names for
        return None
    return pixels


def _is_ordinary(data: bytes) -> bool:
    """Whether the first frame of a JPEG is of an ordinary kind, and no other begins before its first scan."""
    frames: list[int] = []
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:
            return len(frames) == 1 and frames[0] in _ORDINARY_FRAMES
        if marker in _FRAMES:
            frames.append(marker)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


@cache
def _agrees_with_pillow() -> bool:
    """Whether both decode alike in this environment: their copies of libjpeg-turbo may have different versions."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    for subsampling in (0, 1, 2):
        for progressive in (False, True):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=85, subsampling=subsampling, progressive=progressive)
            with Image.open(file) as image:
                expected = np.asarray(image)
            if not np.array_equal(simplejpeg.decode_jpeg(file.getvalue(), "RGB"), expected):
                return False
    return True
