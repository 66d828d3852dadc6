"""Read parts of an image file of any size in bounded memory. Runs in the child process of `rasters`.

TIFFs (GeoTIFF, COG, BigTIFF, pyramids of microscopes) are read in place, other formats from a temporary file with their
pixels. Values become RGB (`bands`), and are turned as EXIF says.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from contextlib import closing
from typing import IO, TYPE_CHECKING, cast

import numpy as np

from samray.errors import ImageError
from samray.inputs import decode, kinds
from samray.inputs.bands import Bands, Span, no_colours, to_rgb
from samray.inputs.gdal_files import open_tiff
from samray.inputs.raster_source import Geo, InRgb, Source, Transform, spans_of
from samray.inputs.unpacked_files import header_of, unpack

if TYPE_CHECKING:
    from samray.inputs.decode import RGBArray


class RasterFile:
    """An image file as (H, W, 3) uint8, upright. Opening reads only the header."""

    def __init__(self, file: IO[bytes], bands: tuple[int, ...] | None, stretch: Span | None, max_pixels: int) -> None:
        """Raises: ImageError."""
        self._file, self._max_pixels = file, max_pixels
        self._bands, self._stretch = bands, stretch
        self._source: Source | None = None
        head = os.pread(file.fileno(), 4096, 0)
        if not head:
            raise ImageError("empty", "the file has no bytes")
        self._is_tiff = kinds.kind_of(head) == "TIFF"
        if self._is_tiff:
            self._source = open_tiff(file, wants_bands=bands is not None)
            self._stored = self._source.width, self._source.height, self._source.orientation
        else:
            self._stored = header_of(file, head, max_pixels)
        width, height, orientation = self._stored
        self.width, self.height = (height, width) if orientation >= 5 else (width, height)
        if width * height > max_pixels:
            raise decode.too_large((self.width, self.height), max_pixels)
        self._chosen: Bands | None = None
        self._span: Span | None = None

    @property
    def crs(self) -> str | None:
        """As WKT 2."""
        return self._source.crs if self._source else None

    @property
    def transform(self) -> Transform | None:
        """From upright pixels to the CRS."""
        if self._source is None or self._source.transform is None:
            return None
        return _upright_transform(self._source.transform, *self._stored)

    @property
    def geo(self) -> Geo | None:
        """None without CRS and transform."""
        if self.crs is None and self.transform is None:
            return None
        return {"crs": self.crs, "transform": None if self.transform is None else list(self.transform)}

    def prepare(self) -> None:
        """Unpack the file if its format needs it, and measure what the scale of all pixels depends on."""
        source: Source = self._source or unpack(self._file, self._stored)
        self._source = source
        if (source.width, source.height) != self._stored[:2]:
            raise ImageError("unreadable", "the image has another size than its header says")
        if self._bands is None and self._stretch is None:
            if source.layout.colours == "other":
                raise no_colours(source.layout)
            if source.layout.colours == "grey" and source.layout.needs_span:
                self._span = spans_of(source, [0])[0]
            return
        if source.layout.palette is not None or source.layout.colours == "cmyk":
            source = InRgb(source)
            self._source = source
        self._chosen = Bands(self._bands, self._stretch, source.layout)
        if self._stretch is not None:
            self._chosen.measure(source.sample(self._chosen.indices))
        elif self._chosen.needs_span:
            self._chosen.limits = list(spans_of(source, self._chosen.indices))

    def read(self, x0: int, y0: int, x1: int, y1: int) -> RGBArray:
        """(y1 - y0, x1 - x0, 3), upright; call `prepare` before. Raises: ImageError."""
        assert self._source is not None
        width, height, orientation = self._stored
        flips_rows, flips_columns, swaps = _turns(orientation)
        rows, columns = ((x0, x1), (y0, y1)) if swaps else ((y0, y1), (x0, x1))
        if flips_rows:
            rows = height - rows[1], height - rows[0]
        if flips_columns:
            columns = width - columns[1], width - columns[0]
        window = columns[0], rows[0], columns[1], rows[1]
        if self._chosen is not None:
            rgb = self._chosen.to_rgb(self._source.read(*window, self._chosen.indices))
        else:
            rgb = to_rgb(self._source.read(*window), self._source.layout, self._span)
        rgb = rgb[:: -1 if flips_rows else 1, :: -1 if flips_columns else 1]
        return np.ascontiguousarray(rgb.transpose(1, 0, 2) if swaps else rgb)

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
        self._file.close()


def decode_image(
    data: bytes, max_pixels: int, bands: Sequence[int] | None = None, stretch: Sequence[float] | None = None
) -> RGBArray:
    """`decode.decode_image` with `input.bands` and `input.stretch`: the same pixels as reading all parts."""
    if bands is None and stretch is None:
        return decode.decode_image(data, max_pixels)
    try:
        with closing(_file_of(data, max_pixels, bands, stretch)) as file:
            decode.refuse_size((file.width, file.height), max_pixels)
            file.prepare()
            return file.read(0, 0, file.width, file.height)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("out_of_memory", "the decoded image does not fit into memory") from error
    except decode.DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ImageError(
                "out_of_memory",
                f"its pixels do not fit into a temporary file ({error.strerror}); set TMPDIR to a larger disk",
            ) from error
        raise decode.decode_error(data, error) from error


def geo_of(data: bytes) -> Geo | None:
    """Where a TIFF is; None if it does not say, or rasterio is not installed."""
    try:
        with closing(_file_of(data, 2**62)) as file:
            return file.geo
    except (ImageError, MemoryError, *decode.DECODE_ERRORS):
        return None


def _file_of(
    data: bytes, max_pixels: int, bands: Sequence[int] | None = None, stretch: Sequence[float] | None = None
) -> RasterFile:
    file = _in_memory()
    try:
        file.write(data)
        file.flush()
        chosen = None if bands is None else tuple(bands)
        return RasterFile(file, chosen, None if stretch is None else (stretch[0], stretch[1]), max_pixels)
    except BaseException:
        file.close()
        raise


def _in_memory() -> IO[bytes]:
    """A file without a name, which GDAL can open; in memory if possible, because it is a copy of what is there."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("samray-image"), "w+b")
    return tempfile.TemporaryFile()


def _turns(orientation: int) -> tuple[bool, bool, bool]:
    """How upright pixels come from stored ones: rows flipped, columns flipped, then rows and columns swapped."""
    return orientation in (3, 4, 6, 7), orientation in (2, 3, 7, 8), orientation >= 5


def _upright_transform(stored: Transform, width: int, height: int, orientation: int) -> Transform:
    flips_rows, flips_columns, swaps = _turns(orientation)
    to_crs = np.array([stored[:3], stored[3:], (0, 0, 1)], dtype=np.float64)
    swap = np.array([(0, 1, 0), (1, 0, 0), (0, 0, 1)] if swaps else np.eye(3), dtype=np.float64)
    flip = np.array(
        [
            (-1 if flips_columns else 1, 0, width if flips_columns else 0),
            (0, -1 if flips_rows else 1, height if flips_rows else 0),
            (0, 0, 1),
        ],
        dtype=np.float64,
    )
    if orientation == 1:
        return stored
    return cast(Transform, tuple((to_crs @ flip @ swap)[:2].ravel().tolist()))
