"""Files that GDAL reads: TIFFs block by block, JPEGs and PNGs row by row.

GDAL gets an open file instead of a name, one driver by name, and no files next to it: nothing in the file or its name
makes it open another file or an address.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import IO, Any, Final, cast

import numpy as np

from samray.errors import ImageError
from samray.inputs import decode, tiff
from samray.inputs.bands import MAX_SAMPLE, Colours, Layout, Values
from samray.inputs.raster_source import ROWS_BYTES, Transform

GDAL_OPTIONS: Final = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no .ovr, .msk, .aux.xml and world files
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_GEOREF_SOURCES": "INTERNAL",
    "GTIFF_VIRTUAL_MEM_IO": "NO",
    "GDAL_CACHEMAX": 128 << 20,
    "GDAL_NUM_THREADS": "1",  # CPU seconds are limited
    "GDAL_ERROR_ON_LIBJPEG_WARNING": "YES",  # Pillow then decides what a damaged file shows
    "GDAL_HTTP_MAX_RETRY": "0",
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".none",
}

_YCBCR, _CMYK = 6, 5
_PHOTOMETRIC, _ORIENTATION, _COMPRESSION, _EXTRA_SAMPLES = 262, 274, 259, 338
_JPEG_COMPRESSIONS: Final = (6, 7)

_BY_COUNT: Final[dict[int, Colours]] = {1: "grey", 2: "grey_alpha", 3: "rgb", 4: "rgba"}


_PART: Final = 1024
"""Pixels: parts of an image that are read at once are as wide or as a block, and at most as high."""

_Window = tuple[tuple[int, int], tuple[int, int]]
"""Rows and columns, each from first to before last."""


def _ranges(length: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, length)) for start in range(0, length, step)]


class GdalFile:
    """A dataset of GDAL."""

    def __init__(self, name: str, driver: str) -> None:
        """name: as GDAL takes it, of a file that is open. Raises: ImageError."""
        rasterio = rasterio_module()
        self._env = rasterio.Env(**GDAL_OPTIONS)
        try:
            with self._env, warnings.catch_warnings():
                warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
                self._dataset = rasterio.open(name, driver=driver, sharing=False)
        except gdal_errors() as error:
            raise ImageError("unreadable", f"the header is damaged ({_short_message(error)})") from error
        dataset = self._dataset
        self.width, self.height = dataset.width, dataset.height
        self.orientation = 1
        self.crs: str | None = None
        self.transform: Transform | None = None
        count = dataset.count
        self.layout = Layout(_BY_COUNT.get(count, "other"), count, _dtype_of(dataset.dtypes[0]))

    def read(self, x0: int, y0: int, x1: int, y1: int, bands: list[int] | None = None) -> Values:
        return self._read(((y0, y1), (x0, x1)), bands)

    def sample(self, bands: list[int] | None) -> Values:
        step = max(1, int(np.ceil(np.sqrt(self.width * self.height / MAX_SAMPLE))))
        # Every pixel is read, and most are dropped here. GDAL could leave them out, but looks for overviews then, and a
        # tag of a TIFF may say that these are in another file, at any address.
        block_height, block_width = self._dataset.block_shapes[0]
        width = max(block_width, _PART)
        num_bytes = block_height * width * self.layout.num_bands * self.layout.dtype.itemsize
        height = block_height * max(1, min(_PART // block_height, ROWS_BYTES // num_bytes))
        # Copies: a slice would keep all that it is a part of.
        parts = [
            [
                self._read((ys, xs), bands)[-ys[0] % step :: step, -xs[0] % step :: step].copy()
                for xs in _ranges(self.width, width)
            ]
            for ys in _ranges(self.height, min(height, _PART))
        ]
        return np.concatenate([np.concatenate(row, axis=1) for row in parts])

    def _read(self, window: _Window, bands: list[int] | None) -> Values:
        indices = list(range(1, self._dataset.count + 1)) if bands is None else [band + 1 for band in bands]
        try:
            with self._env:
                values = self._dataset.read(indices, window=window)
        except gdal_errors() as error:
            raise ImageError("unreadable", f"the pixels are damaged or missing ({_short_message(error)})") from error
        return np.ascontiguousarray(values.transpose(1, 2, 0))

    def close(self) -> None:
        self._dataset.close()


def _dtype_of(name: str) -> np.dtype[Any]:
    try:
        return np.dtype(name)
    except TypeError as error:  # complex integers
        raise ImageError("unsupported", f"this file has values of the type {name}, which are not decoded") from error


def _short_message(error: BaseException) -> str:
    # GDAL's own message is the cause of rasterio's; both name the file by its descriptor.
    text = str(error.__cause__ or error)
    return " ".join(text.split())[:300]


class _Tiff(GdalFile):
    def __init__(
        self, file: IO[bytes], directory: tiff.Directory, is_first: bool, overview: tiff.Directory | None = None
    ) -> None:
        """overview: a smaller picture of the same, for the sample."""
        name = f"/dev/fd/{file.fileno()}"
        self._overview = None if overview is None else f"GTIFF_DIR:off:{overview.offset}:{name}"
        if directory.value(_PHOTOMETRIC) == _CMYK:
            prefix = "GTIFF_RAW:"  # GDAL would convert it in its own way
        else:
            prefix = "" if is_first else f"GTIFF_DIR:off:{directory.offset}:"
        super().__init__(prefix + name, "GTiff")
        orientation = directory.value(_ORIENTATION, 1)
        self.orientation = orientation if orientation in range(1, 9) else 1
        self.layout = _tiff_layout(self._dataset, directory)
        self.crs, self.transform = _georeference(self._dataset)

    def read(self, x0: int, y0: int, x1: int, y1: int, bands: list[int] | None = None) -> Values:
        values = super().read(x0, y0, x1, y1, bands)
        # Pillow reads floats of 64 bits as 32.
        return values if values.dtype != np.float64 else values.astype(np.float32)

    def sample(self, bands: list[int] | None) -> Values:
        if self._overview is None:
            return super().sample(bands)
        with contextlib.closing(GdalFile(self._overview, "GTiff")) as overview:
            return overview.sample(bands)


class _Pages(_Tiff):
    """Bands that are stored as pictures of their own, one after another, as in microscopy: OME-TIFF with channels."""

    def __init__(self, file: IO[bytes], directories: Sequence[tiff.Directory]) -> None:
        super().__init__(file, directories[0], is_first=False)
        self._others = [_Tiff(file, directory, is_first=False) for directory in directories[1:]]
        if any(other.layout != self.layout for other in self._others):
            raise ImageError("unsupported", "the pictures of this TIFF have values of different types; convert it")
        self.layout = replace(self.layout, colours="other", num_bands=len(directories))

    def _read(self, window: _Window, bands: list[int] | None) -> Values:
        pages: list[GdalFile] = [self, *self._others]
        parts = []
        for number in range(len(pages)) if bands is None else bands:
            read = super()._read if number == 0 else pages[number]._read
            parts.append(read(window, [0]))
        return np.concatenate(parts, axis=2)

    def close(self) -> None:
        for other in self._others:
            other.close()
        super().close()


def open_tiff(file: IO[bytes], wants_bands: bool) -> _Tiff:
    """wants_bands: pictures of the same size and one value per pixel are bands of one image."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        data = cast(bytes, mapped)  # read by slices and struct alone
        directories = tiff.directories(data)
        if tiff.is_raw_photo(data, directories):
            raise decode.raw_photo()
        main = tiff.main_picture(directories)
        if main is None or not main.num_pixels:
            raise ImageError("unreadable", "this TIFF has no picture; copy it again from its source")
        if tiff.is_cut(data):
            raise ImageError("truncated", f"this TIFF ends after {len(mapped)} bytes, inside the picture")
    if main.value(_PHOTOMETRIC) == _YCBCR and main.value(_COMPRESSION, 1) not in _JPEG_COMPRESSIONS:
        raise ImageError("unsupported", f"this TIFF has {main.describe()}, as YCbCr; convert it to RGB")
    pages = [directory for directory in directories if directory.looks_like(main) and not directory.is_reduced]
    if wants_bands and len(pages) > 1 and main.has_one_value and main is pages[0]:
        return _Pages(file, pages)
    return _Tiff(file, main, main is directories[0], _overview_of(main, directories))


def _overview_of(main: tiff.Directory, directories: Sequence[tiff.Directory]) -> tiff.Directory | None:
    """The smallest overview of a large picture that has enough pixels for a sample."""
    enough = [
        directory for directory in directories if directory.is_overview_of(main) and directory.num_pixels >= MAX_SAMPLE
    ]
    return min(enough, key=lambda directory: directory.num_pixels, default=None)


def _tiff_layout(dataset: Any, directory: tiff.Directory) -> Layout:
    dtypes = {_dtype_of(name) for name in dataset.dtypes}
    dtype = dtypes.pop()
    if dtypes or dtype.kind not in "uif":
        raise ImageError("unsupported", f"this TIFF has {directory.describe()}, which is not decoded")
    if dtype == np.float64:
        dtype = np.dtype(np.float32)
    names = [colour.name for colour in dataset.colorinterp]
    count = len(names)
    bits = int(dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 0)) or 16
    is_inverted = dataset.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
    palette = None
    if names == ["palette"] and dtype == np.uint8:
        table = dataset.colormap(1)
        palette = np.zeros((256, 3), np.uint8)
        palette[[*table]] = [colour[:3] for colour in table.values()]
    elif names == ["gray"] and dtype == np.uint8 and bits < 8:
        palette = np.repeat(np.minimum(np.arange(256) * 255 // (2**bits - 1), 255).astype(np.uint8)[:, None], 3, axis=1)
    colours = _colours(names, dataset, directory)
    return Layout(colours, count, dtype, bits, is_inverted, palette, dataset.nodata)


def _colours(names: list[str], dataset: Any, directory: tiff.Directory) -> Colours:
    if names == ["cyan", "magenta", "yellow", "black"]:
        return "cmyk"
    if names == ["palette"] and dataset.dtypes[0] == "uint8":
        return "palette"
    if len(names) == 1:  # also grey of more than 8 bits whose 0 is white
        return "grey"
    if names == ["gray", "alpha"]:
        return "grey_alpha"
    if names[:3] == ["red", "green", "blue"]:
        if len(names) == 3:
            return "rgb"
        if names[3:] == ["alpha"]:
            is_premultiplied = directory.value(_EXTRA_SAMPLES) == 1
            return "rgba_premultiplied" if is_premultiplied else "rgba"
        if len(names) == 4:  # a fourth value of unknown meaning, which Pillow ignores
            return "rgb"
    return "other"


def _georeference(dataset: Any) -> tuple[str | None, Transform | None]:
    """CRS as WKT 2 and transform; None without, or if they are damaged: the image is readable all the same."""
    crs = transform = None
    with contextlib.suppress(ValueError, *gdal_errors()):
        crs = dataset.crs.to_wkt(version="WKT2_2019") if dataset.crs else None
    numbers = tuple(dataset.transform)[:6]
    if all(map(math.isfinite, numbers)) and not dataset.transform.is_identity:
        transform = numbers
    return crs or None, transform


def rasterio_module() -> Any:
    try:
        import rasterio
        import rasterio.errors
    except ImportError as error:
        raise ImageError("unsupported", needs_extra("reading this image in parts")) from error
    return rasterio


def gdal_errors() -> tuple[type[Exception], ...]:
    """The exceptions of rasterio."""
    from rasterio import errors
    from rasterio._err import CPLE_BaseError

    return errors.RasterioError, errors.CRSError, CPLE_BaseError


def needs_extra(what: str) -> str:
    return f"{what} needs rasterio: pip install 'samray[geo]'"
