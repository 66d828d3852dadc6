"""TIFFs made by hand, with layouts that Pillow does not write: several directories, odd samples."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tags = dict[int, Any]


def tiff(*pictures: tuple[NDArray[Any], Tags], subs: tuple[tuple[NDArray[Any], Tags], ...] = ()) -> bytes:
    """Uncompressed pictures, little-endian, as a chain of directories; tags are added to each picture's own.

    subs: pictures in the SubIFDs of the first.
    """
    data = bytearray(b"II*\0" + bytes(4))
    sub_offsets = [_directory(data, pixels, tags) for pixels, tags in subs]
    link = 4
    for i, (pixels, tags) in enumerate(pictures):
        page_tags = tags | ({330: tuple(sub_offsets)} if sub_offsets and i == 0 else {})
        offset = _directory(data, pixels, page_tags)
        struct.pack_into("<I", data, link, offset)
        link = len(data) - 4
    return bytes(data)


def _directory(data: bytearray, pixels: NDArray[Any], tags: Tags) -> int:
    """Append pixels and their directory, whose last four bytes are the offset of the next. Returns its offset."""
    bands = pixels.shape[2] if pixels.ndim == 3 else 1
    sample_format = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    pixels_at = len(data)
    data += pixels.tobytes()
    every: Tags = {
        256: pixels.shape[1],
        257: pixels.shape[0],
        258: (pixels.itemsize * 8,) * bands,
        259: 1,
        262: 2 if bands >= 3 else 1,
        273: pixels_at,
        277: bands,
        278: pixels.shape[0],
        279: pixels.nbytes,
        339: (sample_format,) * bands,
    } | tags
    entries = []
    for tag, value in sorted(every.items()):
        values = value if isinstance(value, tuple) else (value,)
        if len(values) == 1:
            entries.append(struct.pack("<HHII", tag, 4, 1, values[0]))
        else:
            data += bytes(len(data) % 2)
            entries.append(struct.pack("<HHII", tag, 4, len(values), len(data)))
            data += struct.pack(f"<{len(values)}I", *values)
    data += bytes(len(data) % 2)
    offset = len(data)
    data += struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return offset


def colour(rgb: tuple[int, int, int], width: int, height: int) -> NDArray[np.uint8]:
    return np.broadcast_to(np.array(rgb, np.uint8), (height, width, 3)).copy()
