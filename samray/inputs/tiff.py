"""Read the directories of a TIFF without decoding its pictures.

A TIFF is a chain of directories (IFDs), each with the tags of one picture; a directory may have sub-directories
(SubIFDs). Raw camera files are TIFFs whose first picture is a thumbnail, and some scanners also put a thumbnail first.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

MAX_DIRECTORIES: Final = 64
"""Maximum directories to read: a file may chain any number of them, or chain them in a circle."""

_MAX_VALUES: Final = 1024
"""Maximum values to read per tag."""

_NEW_SUBFILE_TYPE: Final = 254
_OLD_SUBFILE_TYPE: Final = 255
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_SAMPLES: Final = 277
_PLANAR: Final = 284
_STRIP_OFFSETS, _STRIP_SIZES, _TILE_OFFSETS, _TILE_SIZES = 273, 279, 324, 325
_SUB_IFDS: Final = 330
_SAMPLE_FORMAT: Final = 339
_GEO_KEYS: Final = 34735
_DNG_VERSION: Final = 50706

_SIZES: Final = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
"""Tag types that are unsigned integers."""

_RAW_PHOTOMETRIC: Final = (32803, 34892)
"""Colour filter array and LinearRaw: sensor values, which need developing to become an image."""

_RAW_COMPRESSION: Final = (32767, 32769, 32770, 34713, 65000, 65535)
"""Raw tags of Sony, Epson, Samsung, Nikon, Kodak and Pentax."""

_SAMPLE_FORMATS: Final = {
    1: "unsigned integers",
    2: "signed integers",
    3: "floats",
    5: "complex integers",
    6: "complex",
}


@dataclass(frozen=True, slots=True)
class Directory:
    """The unsigned-integer tags of one picture: tag -> values."""

    offset: int
    next: int
    tags: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def value(self, tag: int, default: int = 0) -> int:
        values = self.tags.get(tag)
        return values[0] if values else default

    @property
    def num_pixels(self) -> int:
        return self.value(_WIDTH) * self.value(_HEIGHT)

    @property
    def is_reduced(self) -> bool:
        """Whether it is marked as a thumbnail or a mask of another picture."""
        return bool(self.value(_NEW_SUBFILE_TYPE) & 0b101) or self.value(_OLD_SUBFILE_TYPE) == 2

    @property
    def is_raw(self) -> bool:
        return (
            _DNG_VERSION in self.tags
            or self.value(_PHOTOMETRIC) in _RAW_PHOTOMETRIC
            or self.value(_COMPRESSION) in _RAW_COMPRESSION
        )

    @property
    def is_white_is_zero(self) -> bool:
        return self.tags.get(_PHOTOMETRIC) == (0,)

    @property
    def sample_format(self) -> int:
        """1: unsigned integers, 2: signed integers, 3: floats."""
        return self.value(_SAMPLE_FORMAT, 1)

    @property
    def bits(self) -> int:
        return self.value(_BITS, 1)

    @property
    def is_planar(self) -> bool:
        """Whether the channels are stored one after the other."""
        return self.value(_PLANAR, 1) == 2 and self.value(_SAMPLES, 1) > 1

    @property
    def has_one_value(self) -> bool:
        """Whether a pixel has one value, that is not an index into a palette."""
        return self.value(_SAMPLES, 1) == 1 and self.value(_PHOTOMETRIC) in (0, 1)

    def looks_like(self, other: Directory, tags: tuple[int, ...] = (_WIDTH, _HEIGHT)) -> bool:
        """Whether the picture has the size and the layout of another one."""
        tags = (*tags, _BITS, _SAMPLES, _PHOTOMETRIC, _SAMPLE_FORMAT)
        return all(self.tags.get(tag) == other.tags.get(tag) for tag in tags)

    def is_overview_of(self, other: Directory) -> bool:
        """Whether this is another picture at a lower resolution."""
        is_reduced = self.value(_NEW_SUBFILE_TYPE) & 0b101 == 1  # and not a mask
        width, height = self.value(_WIDTH), self.value(_HEIGHT)
        # Sides are rounded.
        scale = max(1.0, other.value(_WIDTH) / max(1, width))
        has_shape = abs(other.value(_HEIGHT) / scale - height) < 2
        return is_reduced and self.num_pixels < other.num_pixels and has_shape and self.looks_like(other, ())

    def is_misread(self, is_big_endian: bool) -> bool:
        """Whether Pillow (13.0) decodes it without an error, but to wrong pixels; a test checks which."""
        is_compressed = self.value(_COMPRESSION, 1) != 1
        if self.is_planar:
            # 16-bit samples are read as two of 8 bits; in grey with alpha, alpha is read as grey.
            return (self.bits > 8 and not is_compressed) or (self.value(_SAMPLES, 1) == 2 and is_compressed)
        # libtiff has already swapped the bytes, and Pillow swaps them again.
        return is_big_endian and is_compressed and self.bits > 8 and (self.sample_format != 1 or self.bits > 16)

    def describe(self) -> str:
        """The layout of its samples in words."""
        samples = self.value(_SAMPLES, 1)
        kind = _SAMPLE_FORMATS.get(self.sample_format, "samples of an unknown kind")
        values = "value" if samples == 1 else "values"
        planes = ", channels stored one after the other" if self.is_planar else ""
        compression = self.value(_COMPRESSION, 1)
        return f"{samples} {values} per pixel, {self.bits}-bit {kind}, compression {compression}{planes}"


def is_tiff(data: bytes) -> bool:
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def directories(data: bytes) -> list[Directory]:
    """The directories of a TIFF and their SubIFDs, in file order, up to the first damaged one."""
    in_order: list[Directory] = []
    todo, seen = [_first_offset(data)], {0}
    while todo and len(in_order) < MAX_DIRECTORIES:
        offset = todo.pop(0)
        # Directories may point back at each other.
        if offset in seen:
            continue
        seen.add(offset)
        directory = _read(data, offset)
        if directory is None:
            continue
        in_order.append(directory)
        # SubIFDs come before the next directory of the chain.
        todo = [*directory.tags.get(_SUB_IFDS, ())[:MAX_DIRECTORIES], directory.next, *todo]
    return in_order


def is_big_endian(data: bytes) -> bool:
    return data[:2] == b"MM"


def is_raw_photo(data: bytes, of_file: list[Directory]) -> bool:
    """Whether this is a raw camera file: DNG, NEF, CR2, ARW and similar."""
    is_cr2 = data[8:11] == b"CR\x02" and _first_offset(data) == 16
    return is_cr2 or any(directory.is_raw for directory in of_file)


def has_geo(data: bytes) -> bool:
    """Whether this is a GeoTIFF."""
    main = main_picture(directories(data))
    return main is not None and _GEO_KEYS in main.tags


def main_picture(pictures: list[Directory]) -> Directory | None:
    """The first directory or, if that is a thumbnail, the largest one that is not."""
    if not pictures or not pictures[0].is_reduced:
        return pictures[0] if pictures else None
    # Without a full picture the thumbnail has to do.
    full = [directory for directory in pictures if not directory.is_reduced and directory.num_pixels]
    return max(full, key=lambda directory: directory.num_pixels, default=pictures[0])


def starting_at(data: bytes, directory: Directory) -> bytes:
    """The TIFF with this directory as its first one."""
    order, is_big = _layout(data)
    if is_big:
        return data[:8] + struct.pack(order + "Q", directory.offset) + data[16:]
    return data[:4] + struct.pack(order + "I", directory.offset) + data[8:]


def first_directory_at(head: bytes) -> int:
    """Where the first directory is. head: the first 16 bytes."""
    return _first_offset(head)


def with_directory(head: bytes, directory: bytes) -> bytes:
    """A TIFF with only these bytes of another one, which begin with its first directory. head: the other's first 16."""
    order, is_big = _layout(head)
    start = head[:8] + struct.pack(order + "Q", 16) if is_big else head[:4] + struct.pack(order + "I", 16) + bytes(8)
    return start + directory


def is_cut(data: bytes) -> bool:
    """Whether the first picture's directory or pixels extend beyond the end of the file."""
    offset = _first_offset(data)
    first = _read(data, offset)
    if first is None:
        return offset == 0 or offset + 2 > len(data) or _ends_inside(data, offset)
    for offsets, sizes in ((_STRIP_OFFSETS, _STRIP_SIZES), (_TILE_OFFSETS, _TILE_SIZES)):
        # Damaged tags may have offsets without sizes, which are ignored.
        pairs = zip(first.tags.get(offsets, ()), first.tags.get(sizes, ()), strict=False)
        if any(start + size > len(data) for start, size in pairs):
            return True
    return False


def _layout(data: bytes) -> tuple[str, bool]:
    """The byte order for struct, and whether offsets have 64 bits."""
    return "<" if data[:2] == b"II" else ">", data[2:4] in (b"+\0", b"\0+")


def _first_offset(data: bytes) -> int:
    order, is_big = _layout(data)
    offset, kind = (8, "Q") if is_big else (4, "I")
    return int(_unpack(data, offset, order + kind, (0,))[0])


def _unpack(data: bytes, offset: int, layout: str, default: tuple[int, ...]) -> tuple[int, ...]:
    if offset + struct.calcsize(layout) > len(data):
        return default
    return struct.unpack_from(layout, data, offset)


def _ends_inside(data: bytes, offset: int) -> bool:
    order, is_big = _layout(data)
    head, entry = ("Q", 20) if is_big else ("H", 12)
    (number,) = _unpack(data, offset, order + head, (0,))
    return offset + struct.calcsize(order + head) + number * entry > len(data)


def _read(data: bytes, offset: int) -> Directory | None:
    """The directory at offset; None if it is not inside the file."""
    order, is_big = _layout(data)
    head = order + ("Q" if is_big else "H")
    (number,) = _unpack(data, offset, head, (0,))
    # The number of entries comes from the file: it must fit into the file before it is used.
    if not 0 < number <= 65535 or _ends_inside(data, offset):
        return None
    entries_at = offset + struct.calcsize(head)
    tags = dict(_entries(data, entries_at, number, order, is_big))
    end = entries_at + number * (20 if is_big else 12)
    return Directory(offset, _unpack(data, end, order + ("Q" if is_big else "I"), (0,))[0], tags)


def _entries(data: bytes, offset: int, number: int, order: str, is_big: bool) -> Iterator[tuple[int, tuple[int, ...]]]:
    entry, inline = ("HHQ", 8) if is_big else ("HHI", 4)
    step = struct.calcsize(order + entry) + inline
    for at in range(offset, offset + number * step, step):
        tag, kind, count = struct.unpack_from(order + entry, data, at)
        # Other types (text, fractions) are not needed.
        if kind not in _SIZES or not count:
            continue
        values = order + str(min(count, _MAX_VALUES)) + _SIZES[kind]
        value_at = at + step - inline
        # Values that do not fit into the entry are stored elsewhere, at the offset given in the entry.
        if count * struct.calcsize(order + _SIZES[kind]) > inline:
            (value_at,) = struct.unpack_from(order + ("Q" if is_big else "I"), data, value_at)
        yield tag, _unpack(data, value_at, values, ())
