"""Readers of the values of an open image file, as they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Protocol

import numpy as np

from samray.inputs import decode
from samray.inputs.bands import Layout, Span, Values, to_rgb

Transform = tuple[float, float, float, float, float, float]
"""(a, b, c, d, e, f) in the order of the package affine: x = a * column + b * row + c, y = d * column + e * row + f,
where (0, 0) is the outer corner of the first pixel."""

Geo = dict[str, Any]
"""Where an image is: `crs` (WKT 2 or None) and `transform` (list of `Transform`, or None), as in the column `geo`."""

ROWS_BYTES: Final = 16 << 20


class Source(Protocol):
    """An open image file: values as stored, not upright."""

    width: int
    height: int
    orientation: int
    """EXIF's, 1 to 8."""
    layout: Layout
    crs: str | None
    transform: Transform | None

    def read(self, x0: int, y0: int, x1: int, y1: int, bands: list[int] | None = None) -> Values:
        """(H, W, C) of this window; bands: indices, None for all."""

    def sample(self, bands: list[int] | None) -> Values:
        """(N, M, C): a regular sample of at most about MAX_SAMPLE pixels, always the same one."""

    def close(self) -> None: ...


def row_chunks(source: Source, bands: list[int] | None = None) -> Iterator[Values]:
    """The whole image in bands of rows of at most some megabytes."""
    row_bytes = source.width * source.layout.num_bands * source.layout.dtype.itemsize
    step = max(1, ROWS_BYTES // max(1, row_bytes))
    for y in range(0, source.height, step):
        yield source.read(0, y, source.width, min(y + step, source.height), bands)


def spans_of(source: Source, bands: list[int]) -> list[Span]:
    """Minimum and maximum of each of these bands."""
    lows, highs = [], []
    for values in row_chunks(source, bands):
        spans = [decode.span_of(values[:, :, number]) for number in range(len(bands))]
        lows.append([low for low, _ in spans])
        highs.append([high for _, high in spans])
    return list(zip(np.min(lows, axis=0).tolist(), np.max(highs, axis=0).tolist(), strict=True))


class InRgb:
    """A palette or CMYK image with three bands, for `input.bands` and `input.stretch`."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.width, self.height, self.orientation = source.width, source.height, source.orientation
        self.crs, self.transform = source.crs, source.transform
        self.layout = Layout("rgb", 3, np.dtype(np.uint8))

    def read(self, x0: int, y0: int, x1: int, y1: int, bands: list[int] | None = None) -> Values:
        rgb = to_rgb(self._source.read(x0, y0, x1, y1), self._source.layout, None)
        return rgb if bands is None else rgb[:, :, bands]

    def sample(self, bands: list[int] | None) -> Values:
        rgb = to_rgb(self._source.sample(None), self._source.layout, None)
        return rgb if bands is None else rgb[:, :, bands]

    def close(self) -> None:
        self._source.close()
