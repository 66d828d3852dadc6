"""Edge maps as grey PNG files of 8 or 16 bits per pixel."""

from __future__ import annotations

import io
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from samray.errors import ImageError

_WHITE: Final = {"1": 1, "L": 255, "I;16": 65535, "I;16B": 65535, "I": 65535}
"""Pillow's mode -> value of an edge of strength 1."""


def encode_edges(edges: npt.NDArray[np.floating[Any]], bits: int) -> bytes:
    """PNG of an edge map. edges: (H, W), in 0..1. bits: 8 or 16."""
    white = 2**bits - 1
    pixels = np.rint(edges * white).astype(np.uint8 if bits == 8 else np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_edges(data: bytes, hw: tuple[int, int], name: str) -> npt.NDArray[np.float64]:
    """(H, W) float64 in 0..1 from a grey PNG of 8 or 16 bits, of this size. name: for messages. Raises: ImageError."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.mode not in _WHITE:
                raise ImageError("unsupported", f"the edge map of {name} is not grey (mode {image.mode})")
            if image.size != hw[::-1]:  # before decoding: the size bounds the memory
                is_now = f"{image.width}x{image.height}"
                raise ImageError("unreadable", f"the edge map of {name} is {is_now} pixels, not {hw[1]}x{hw[0]}")
            return np.asarray(image, np.float64) / _WHITE[image.mode]
    except Image.DecompressionBombError:
        raise ImageError("too_large", f"the edge map of {name} has more pixels than Pillow opens") from None
    except (OSError, ValueError, SyntaxError) as error:  # SyntaxError: Pillow's, for a broken PNG
        raise ImageError("unreadable", f"the edge map of {name} is not a readable PNG: {error}") from error
