"""The size of an image from the first bytes of its file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from samray.errors import ImageError
from samray.inputs import kinds, tiff
from samray.inputs.decode import DECODE_ERRORS, ORIENTATION_TEXT, open_image, orientation_of
from samray.inputs.unpacked_files import png_is_turned

HEADS: Final = (2**16, 2**20)
"""How much of a file to read for its header, and how much if that was not enough: some JPEGs have long profiles and
thumbnails in front of their size."""

MAX_PIXELS: Final = 2**30
"""Maximum pixels of an image that has masks: no reader takes run lengths of larger ones."""

_ORIENTATION, _WIDTH, _HEIGHT = 274, 256, 257


def size_in_header(head: bytes) -> tuple[int, int] | None:
    """Height and width, upright; None if these first bytes of a file do not say, or the file is damaged."""
    try:
        if tiff.is_tiff(head):
            return _size_of_tiff(head)
        if kinds.kind_of(head) == "PNG":
            return _size_of_png(head)
        with open_image(head, MAX_PIXELS) as image:
            width, height = image.size
            return (width, height) if orientation_of(image) >= 5 else (height, width)
    except (ImageError, MemoryError, *DECODE_ERRORS):
        return None


def size_behind(head: bytes, num_bytes: int | None, read: Callable[[int, int], bytes]) -> tuple[int, int] | None:
    """Height and width of a TIFF whose first directory is behind these first bytes, as many programs write it; else
    None. num_bytes: of the whole file, of which read(start, number) reads a part."""
    if len(head) < 16 or not tiff.is_tiff(head):
        return None
    start = tiff.first_directory_at(head)
    if num_bytes is None or not len(head) - HEADS[0] < start < num_bytes - 16:
        return None
    return size_in_header(tiff.with_directory(head, read(start, HEADS[0])))


def is_turned_behind(head: bytes, num_bytes: int | None, read: Callable[[int, int], bytes]) -> bool:
    """Whether a PNG seems to say behind its pixels, which end beyond these first bytes, how it is turned: as
    `size_behind`."""
    if kinds.kind_of(head) != "PNG" or num_bytes is None or num_bytes <= len(head):
        return False
    start = max(len(head), num_bytes - HEADS[0])
    tail = read(start, num_bytes - start)
    return any(mark in tail for mark in (b"eXIf", *ORIENTATION_TEXT))


def _size_of_png(head: bytes) -> tuple[int, int] | None:
    # Pillow makes room for all pixels, and decodes them, to look for an orientation behind them.
    if len(head) < 33 or png_is_turned(lambda start, number: head[start : start + number], len(head)):
        return None
    return int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big")


def _size_of_tiff(head: bytes) -> tuple[int, int] | None:
    directories = tiff.directories(head)
    # A thumbnail says nothing: the full picture's directory may be beyond these bytes.
    main = directories[0] if directories else None
    if main is None or main.is_reduced or not main.num_pixels or tiff.is_raw_photo(head, directories):
        return None
    width, height = main.value(_WIDTH), main.value(_HEIGHT)
    return (width, height) if main.value(_ORIENTATION, 1) in range(5, 9) else (height, width)
