"""Expanded sizes of the values of a Parquet page, from its bytes, if its header does not say them.

Source: the Parquet format, Encodings.md.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from samray.storage.page_headers import Column, Page
from samray.storage.thrift import read_signed, read_unsigned

_MAX_MINIBLOCK: Final = 2**16
"""Numbers that are packed together; writers have 32 to 256."""

_UNCOMPRESSED, _LZ4_OF_HADOOP = 0, 5
_CODECS: Final = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
"""Parquet's codec numbers -> Arrow's names."""


def content_of(data: memoryview, page: Page, column: Column) -> bytes:
    """The uncompressed bytes of a page; with version 2 without its levels. Raises: pa.ArrowInvalid."""
    skipped = page.level_bytes or 0
    raw = bytes(data[page.body + skipped : page.end])
    if not page.is_compressed or (codec := column.codec()) == _UNCOMPRESSED:
        return raw
    try:
        if codec == _LZ4_OF_HADOOP:
            return _lz4_of_hadoop(raw, page.size - skipped)
        return _decompressed(raw, page.size - skipped, _CODECS.get(codec, f"codec {codec}"))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise pa.ArrowInvalid(f"a page cannot be decompressed: {error}") from error


def _decompressed(raw: bytes, size: int, codec: str) -> bytes:
    return bytes(pa.decompress(raw, size, codec=codec))


def _lz4_of_hadoop(raw: bytes, size: int) -> bytes:
    """Blocks with two numbers in front, their uncompressed and compressed bytes; some writers have a plain block.

    Raises: pa.ArrowInvalid, also if it can be read as both, with values that are then ambiguous.
    """
    readings = []
    for decompressed in (_blocks_of_hadoop, _block):
        try:
            readings.append(decompressed(raw, size))
        except (pa.ArrowException, OSError, ValueError, struct.error):
            continue
    if len(readings) != 1:
        raise pa.ArrowInvalid("its LZ4 data is damaged")
    return readings[0]


def _block(raw: bytes, size: int) -> bytes:
    return _decompressed(raw, size, "lz4_raw")


def _blocks_of_hadoop(raw: bytes, size: int) -> bytes:
    blocks, position = [], 0
    while position < len(raw):
        expanded, compressed = struct.unpack_from(">II", raw, position)
        position += 8
        size -= expanded
        if size < 0 or compressed > len(raw) - position:
            raise ValueError("this is not a block")
        blocks.append(_block(raw[position : position + compressed], expanded))
        position += compressed
    return b"".join(blocks)


def longest_value(dictionary: bytes) -> int:
    """The length of the longest value of a dictionary: each has its length in front, in four bytes."""
    position = longest = 0
    while position + 4 <= len(dictionary):
        length = int.from_bytes(dictionary[position : position + 4], "little")
        longest, position = max(longest, length), position + 4 + length
    return longest


def values_of(data: memoryview, page: Page, column: Column) -> bytes:
    """The encoded values of a data page, without levels."""
    content = content_of(data, page, column)
    if page.level_bytes is None:
        for has in column.has_levels:
            if has:
                content = content[4 + int.from_bytes(content[:4], "little") :]
    return content


def shared_prefixes(values: bytes, num_values: int) -> int:
    """Bytes that values share with the one before (DELTA_BYTE_ARRAY): the sum of the numbers that come first.

    They are in DELTA_BINARY_PACKED: blocks of differences, each in miniblocks with a bit width of their own.
    """
    data = memoryview(values)
    try:
        block, position = read_unsigned(data, 0)
        per_block, position = read_unsigned(data, position)
        count, position = read_unsigned(data, position)
        first, position = read_signed(data, position)
        size = block // per_block
        # These numbers bound what is allocated here.
        if count > num_values or not 0 < size <= _MAX_MINIBLOCK or abs(first) >> 32:
            raise ValueError("a number that is too large")
        parts: list[npt.NDArray[np.int64]] = [np.array([first], np.int64)]
        num = 1
        while num < count:
            lowest, position = read_signed(data, position)
            widths = bytes(data[position : position + per_block])
            position += per_block
            if not widths or max(widths) > 32 or abs(lowest) >> 32:
                raise ValueError("a difference that is too large")
            for width in widths:
                if num >= count:
                    break
                bits = np.unpackbits(
                    np.frombuffer(data[position : position + size * width // 8], np.uint8), bitorder="little"
                )
                position += size * width // 8
                powers = (1 << np.arange(width, dtype=np.int64)) if width else np.zeros(0, np.int64)
                parts.append(bits.reshape(size, width).astype(np.int64) @ powers + lowest)
                num += size
        lengths = np.concatenate(parts)[:count].cumsum()
        if lengths.size and lengths.min() < 0:
            raise ValueError("a negative length")
        return int(lengths.sum())
    except (IndexError, ZeroDivisionError, ValueError, OverflowError) as error:
        raise pa.ArrowInvalid(f"a page with shared prefixes is damaged ({error})") from error
