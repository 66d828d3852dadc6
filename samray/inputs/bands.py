"""From the values that a file stores, in any number of bands and any type, to RGB (`input.bands`, `input.stretch`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from samray.errors import ImageError
from samray.inputs.decode import USE_BANDS, RGBArray, grey_to_byte, over_white

Values = npt.NDArray[Any]
"""(H, W, C) as stored."""

Span = tuple[float, float]

MAX_SAMPLE: Final = 4_000_000
"""Pixels from which percentiles are taken; those of a larger image are a regular sample of them."""

Colours = Literal["grey", "grey_alpha", "rgb", "rgba", "rgba_premultiplied", "cmyk", "palette", "other"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Meanings of the bands of a file."""

    colours: Colours
    num_bands: int
    dtype: np.dtype[Any]
    bits: int = 16
    """12 if integers have 12 bits, 1 to 8 for small ones, else 16."""
    is_inverted: bool = False
    """Whether 0 is white in grey of more than 8 bits."""
    palette: npt.NDArray[np.uint8] | None = None
    """(256, 3)."""
    nodata: float | None = None
    """The value of pixels that have none."""

    @property
    def needs_span(self) -> bool:
        """Whether grey is scaled by the values of the whole image."""
        return self.dtype.kind in "fi" or self.dtype.itemsize > 2

    def describe(self) -> str:
        bands = "1 band" if self.num_bands == 1 else f"{self.num_bands} bands"
        return f"{bands} of {self.dtype.name}"


def to_rgb(values: Values, layout: Layout, span: Span | None) -> RGBArray:
    """(H, W, 3) as `decode_image` would give. span: of the whole image, if `needs_span`.

    Raises: ImageError for bands whose colours are unknown.
    """
    is_byte = layout.dtype == np.uint8
    if layout.palette is not None:
        return layout.palette[values[:, :, 0]]
    if layout.colours == "grey" and not is_byte:
        grey = grey_to_byte(values[:, :, 0], layout.bits, layout.is_inverted, span)
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if layout.colours == "grey":
        return np.repeat(values[:, :, :1], 3, axis=2)
    if layout.colours == "other" or not (is_byte or layout.dtype == np.uint16) or layout.bits == 12:
        raise no_colours(layout)
    # As Pillow does with colours of 16 bits.
    values = values if is_byte else (values >> 8).astype(np.uint8)
    values = np.ascontiguousarray(values)
    if layout.colours == "rgb":
        return np.ascontiguousarray(values[:, :, :3])
    if layout.colours == "cmyk":
        return np.array(Image.fromarray(values, "CMYK").convert("RGB"))
    if layout.colours == "grey_alpha":
        return over_white(Image.fromarray(values, "LA").convert("RGBA"))
    if layout.colours == "rgba_premultiplied":
        return over_white(Image.frombytes("RGBa", values.shape[1::-1], values.tobytes()).convert("RGBA"))
    return over_white(Image.fromarray(values, "RGBA"))


def no_colours(layout: Layout) -> ImageError:
    return ImageError(
        "unsupported",
        f"this image has {layout.describe()}, which are not grey, RGB or CMYK of 8 or 16 bits; {USE_BANDS}",
    )


class Bands:
    """`input.bands` and `input.stretch` for one image."""

    def __init__(self, bands: Sequence[int] | None, stretch: Span | None, layout: Layout) -> None:
        """bands: from 1 on; None: the first three or the only one. Raises: ImageError for a band that is not there."""
        if bands is None:
            bands = (1, 2, 3) if layout.num_bands >= 3 else (1,)
        if max(bands) > layout.num_bands:
            raise ImageError(
                "unsupported", f"input.bands names band {max(bands)}, but this image has {layout.describe()}"
            )
        self.indices = [band - 1 for band in bands]
        self.stretch = stretch
        self.layout = layout
        self.limits: list[Span | None] = [None] * len(self.indices)

    @property
    def needs_span(self) -> bool:
        return self.stretch is None and self.layout.needs_span

    def measure(self, sample: Values) -> None:
        """Take the percentiles of each band from a sample of the image, without pixels that have no value."""
        assert self.stretch is not None
        for number in range(len(self.indices)):
            values = sample[..., number]
            values = values[self._has_value(values)]
            if values.size:
                low, high = np.percentile(values.astype(np.float64), self.stretch)
                self.limits[number] = float(low), float(high)
            else:
                self.limits[number] = 0.0, 0.0

    def to_rgb(self, values: Values) -> RGBArray:
        """(H, W, 3) from (H, W, len(self.indices)); pixels without a value are black."""
        planes = [self._to_byte(values[:, :, number], limits) for number, limits in enumerate(self.limits)]
        return np.stack(planes * 3 if len(planes) == 1 else planes, axis=2)

    def _to_byte(self, values: Values, limits: Span | None) -> npt.NDArray[np.uint8]:
        if self.stretch is None:
            if values.dtype == np.uint8:
                return values.copy()
            return grey_to_byte(values, self.layout.bits, span=limits).astype(np.uint8)
        assert limits is not None
        low, high = limits
        scaled = np.zeros(values.shape) if high <= low else (values.astype(np.float64) - low) * (255 / (high - low))
        scaled[~self._has_value(values)] = 0
        byte: npt.NDArray[np.uint8] = scaled.round().clip(0, 255).astype(np.uint8)
        return byte

    def _has_value(self, values: Values) -> npt.NDArray[np.bool_]:
        has = np.isfinite(values) if values.dtype.kind == "f" else np.ones(values.shape, bool)
        return has if self.layout.nodata is None else has & (values != self.layout.nodata)
