"""Files without random access: the first read writes their pixels to a temporary file.

libvips does that row by row for JPEGs, and GDAL for most PNGs; Pillow needs the whole image in memory for the others.
All of them give the same pixels.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Callable
from typing import IO, Final

import numpy as np
from PIL import Image

from samray.errors import ImageError
from samray.inputs import decode, kinds
from samray.inputs.bands import MAX_SAMPLE, Layout, Values
from samray.inputs.gdal_files import GdalFile
from samray.inputs.raster_source import ROWS_BYTES, Transform, row_chunks

MAX_WHOLE_PIXELS: Final = 400_000_000
"""Maximum pixels of a file that Pillow must hold whole: 1.6 GB."""

MAX_WHOLE_BYTES: Final = 2**30

_JPEG_ROWS: Final = 8
"""Rows of a JPEG at a time: few, so that they stay in the cache (measured)."""


class RowsFile:
    """Pixels in a temporary file without a name, row by row."""

    def __init__(self, width: int, height: int, layout: Layout, orientation: int) -> None:
        self.crs: str | None = None
        self.transform: Transform | None = None
        self.width, self.height, self.layout, self.orientation = width, height, layout, orientation
        self._pixel_bytes = layout.num_bands * layout.dtype.itemsize
        self._file = tempfile.TemporaryFile()  # noqa: SIM115

    def append(self, values: Values) -> None:
        self._file.write(np.ascontiguousarray(values, self.layout.dtype).data)

    def finish(self) -> None:
        self._file.flush()

    def read(self, x0: int, y0: int, x1: int, y1: int, bands: list[int] | None = None) -> Values:
        values = np.empty((y1 - y0, x1 - x0, self.layout.num_bands), self.layout.dtype)
        fd = self._file.fileno()
        # By pread instead of a mapping, whose pages would count as this process's memory.
        for number, y in enumerate(range(y0, y1)):
            os.preadv(fd, [memoryview(values[number]).cast("B")], (y * self.width + x0) * self._pixel_bytes)
        return values if bands is None else values[:, :, bands]

    def sample(self, bands: list[int] | None) -> Values:
        step = max(1, int(np.ceil(np.sqrt(self.width * self.height / MAX_SAMPLE))))
        rows = [self.read(0, y, self.width, y + 1, bands)[:, ::step].copy() for y in range(0, self.height, step)]
        return np.concatenate(rows)

    def close(self) -> None:
        self._file.close()


def header_of(file: IO[bytes], head: bytes, max_pixels: int) -> tuple[int, int, int]:
    """Stored width and height, and orientation; reads no pixels."""
    fd = file.fileno()
    if (
        kinds.kind_of(head) == "PNG"
        and len(head) >= 33
        and not png_is_turned(lambda start, number: os.pread(fd, number, start), os.fstat(fd).st_size)
    ):
        return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big"), 1
    data = _whole(file)
    try:
        with decode.open_image(data, max_pixels) as image:
            return (*image.size, decode.orientation_of(image))
    except ImageError:
        raise
    except decode.DECODE_ERRORS as error:
        raise decode.decode_error(data, error) from error


def png_is_turned(read: Callable[[int, int], bytes], size: int) -> bool:
    """Whether there is a chunk that may say how a PNG is turned. read(start, number): some of its bytes."""
    offset = 8
    while offset + 8 <= size:
        chunk = read(offset, 64)
        if chunk[4:8] in (b"eXIf", b"iTXt", b"zTXt", b"tEXt") and (
            chunk[4:8] == b"eXIf" or chunk[8:].startswith(decode.ORIENTATION_TEXT)
        ):
            return True
        offset += 12 + int.from_bytes(chunk[:4], "big")
    return False


def _whole(file: IO[bytes]) -> bytes:
    size = os.fstat(file.fileno()).st_size
    if size > MAX_WHOLE_BYTES:
        raise ImageError("too_large", f"{size} bytes in a format that is read whole; convert it to a tiled TIFF")
    return os.pread(file.fileno(), size, 0)


def unpack(file: IO[bytes], stored: tuple[int, int, int]) -> RowsFile:
    """The pixels of a file other than a TIFF."""
    is_small = stored[0] * stored[1] <= MAX_WHOLE_PIXELS
    reader = _reader_of_rows(file)
    if reader is not None:
        size = os.fstat(file.fileno()).st_size
        head, tail = os.pread(file.fileno(), 64, 0), os.pread(file.fileno(), 64, max(64, size - 64))
        if kinds.is_cut(head + tail):  # both libraries would fill what is missing
            if is_small:
                return _by_pillow(file, stored)
            raise ImageError("truncated", f"this {kinds.kind_of(head)} ends after {size} bytes, inside the picture")
        try:
            return reader(file, stored[2])
        except ImageError:
            # Damaged: Pillow decides what it shows, as for smaller images.
            if not is_small:
                raise
    return _by_pillow(file, stored)


def _reader_of_rows(file: IO[bytes]) -> Callable[[IO[bytes], int], RowsFile] | None:
    """A reader of this file row by row; None if no reader gives the same pixels as Pillow."""
    head = os.pread(file.fileno(), 33, 0)
    kind = kinds.kind_of(head)
    if kind == "PNG":
        depth, colours, interlaced = head[24], head[25], head[28]
        is_plain = depth in (8, 16) and colours in (0, 2, 4, 6) and not interlaced and not _png_has(file, b"tRNS")
        return _png_rows if is_plain and _can_import("rasterio") else None
    if kind == "JPEG" and _can_import("pyvips"):
        with contextlib.suppress(*decode.DECODE_ERRORS), Image.open(file, formats=["JPEG"]) as image:
            return _jpeg_rows if image.mode in ("L", "RGB") else None
    return None


def _can_import(module: str) -> bool:
    try:
        importlib.import_module(module)
    except (ImportError, OSError):  # OSError: pyvips without libvips
        return False
    return True


def _png_has(file: IO[bytes], name: bytes) -> bool:
    """Whether a PNG has this chunk before its pixels."""
    offset = 8
    while len(chunk := os.pread(file.fileno(), 8, offset)) == 8 and chunk[4:] != b"IDAT":
        if chunk[4:] == name:
            return True
        offset += 12 + int.from_bytes(chunk[:4], "big")
    return False


def _png_rows(file: IO[bytes], orientation: int) -> RowsFile:
    dataset = GdalFile(f"/dev/fd/{file.fileno()}", "PNG")
    try:
        rows = RowsFile(dataset.width, dataset.height, dataset.layout, orientation)
        for values in row_chunks(dataset):
            rows.append(values)
        rows.finish()
        return rows
    finally:
        dataset.close()


def _jpeg_rows(file: IO[bytes], orientation: int) -> RowsFile:
    """Baseline: some megabytes of memory; progressive: libjpeg holds the coefficients, 3 bytes per pixel."""
    os.environ["VIPS_CONCURRENCY"] = "1"  # read by the import; more threads only need more memory
    import pyvips

    pyvips.cache_set_max(0)
    try:
        # On any warning Pillow decides, which hides most of them, too.
        image = pyvips.Image.jpegload(f"/dev/fd/{file.fileno()}", access="sequential", fail_on="warning")
        layout = Layout("rgb" if image.bands == 3 else "grey", image.bands, np.dtype(np.uint8))
        rows = RowsFile(image.width, image.height, layout, orientation)
        # Not by vips' own writer: a full disk must stay an OSError, which fails no image.
        region = pyvips.Region.new(image)
        for y in range(0, image.height, _JPEG_ROWS):
            height = min(_JPEG_ROWS, image.height - y)
            pixels = np.frombuffer(region.fetch(0, y, image.width, height), np.uint8)
            rows.append(pixels.reshape(height, image.width, image.bands))
        rows.finish()
        return rows
    except pyvips.Error as error:
        reason = " ".join(str(error).split())[:200]
        raise ImageError("unreadable", f"the JPEG is damaged ({reason})") from error


def _by_pillow(file: IO[bytes], stored: tuple[int, int, int]) -> RowsFile:
    width, height, _ = stored
    if width * height > MAX_WHOLE_PIXELS:
        kinds_read_whole = "interlaced PNGs, CMYK JPEGs and formats other than TIFF, JPEG and PNG"
        advice = "convert it to a tiled TIFF"
        if kinds.kind_of(os.pread(file.fileno(), 64, 0)) == "JPEG" and not _can_import("pyvips"):
            kinds_read_whole = "without libvips JPEGs"
            advice = f"install it on every node (pip install 'samray[geo]'), or {advice}"
        raise ImageError(
            "too_large",
            f"{width}x{height} is {width * height} pixels; {kinds_read_whole} are read whole, up to "
            f"{MAX_WHOLE_PIXELS}; {advice}",
        )
    data = _whole(file)
    try:
        with decode.open_image(data, width * height) as image:
            image.load()
            rows = RowsFile(*image.size, Layout("rgb", 3, np.dtype(np.uint8)), decode.orientation_of(image))
            step = max(1, ROWS_BYTES // (4 * rows.width))
            # Deep grey may be scaled by the values of the whole image.
            step = rows.height if image.mode[:1] in "IF" else step
            for y in range(0, rows.height, step):
                rows.append(decode.to_rgb(image.crop((0, y, rows.width, min(y + step, rows.height)))))
            rows.finish()
            return rows
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("out_of_memory", "the decoded image does not fit into memory") from error
    except decode.DECODE_ERRORS as error:
        raise decode.decode_error(data, error) from error
