"""What the report draws: histograms as bars of an inline SVG, and masks as a transparent PNG to lay over a photo."""

from __future__ import annotations

import base64
import colorsys
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

THUMBNAIL_SIDE = 720
"""Longest side of a photo in the report, pixels."""

MAX_DRAWN_MASKS = 400
"""Largest masks of an image that are drawn; decoding them is what a report spends its time on."""

_NUM_COLOURS = 120


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a histogram, in the units of its SVG: 100 wide, 40 high, y downwards."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A histogram ready to draw."""

    title: str
    note: str
    bars: list[Bar]
    ticks: list[tuple[float, str]]
    """(x, label) along the lower edge."""
    marker: tuple[float, str] | None
    """A vertical line, for a threshold."""


class Histogram:
    """Counts over fixed fine bins, so that values may come shard by shard and be forgotten."""

    def __init__(self, low: float, high: float, num_bins: int) -> None:
        self.low, self.high = low, high
        self.counts = np.zeros(num_bins, np.int64)
        self.num = 0
        self.total = 0.0

    def add(self, values: Any) -> None:
        """values: (N,) numbers; those outside [low, high] count in the outermost bins."""
        values = np.asarray(values, np.float64)
        places = ((values - self.low) / (self.high - self.low) * len(self.counts)).astype(np.int64)
        self.counts += np.bincount(places.clip(0, len(self.counts) - 1), minlength=len(self.counts))
        self.num += len(values)
        self.total += float(values.sum())

    @property
    def mean(self) -> float:
        """Of all values; 0 of none."""
        return self.total / self.num if self.num else 0.0

    def quantile(self, part: float) -> float:
        """The lower edge of the bin that the quantile lies in; `low` of no values."""
        return self._edge(int(np.searchsorted(self.counts.cumsum(), max(part * self.num, 1)))) if self.num else self.low

    def _edge(self, place: float) -> float:
        return self.low + (self.high - self.low) * place / len(self.counts)

    def chart(
        self,
        title: str,
        note: str,
        *,
        show: Callable[[float], str] = "{:.3g}".format,
        marker: float | None = None,
        whole_numbers: bool = False,
    ) -> Chart:
        """At most 40 bars over the bins that hold something. show: a value to its label.

        whole_numbers: a bin stands for its lower edge alone, so it is labelled in its middle.
        """
        held = np.flatnonzero(self.counts)
        if len(held) == 0:
            return Chart(title, "no values", [], [], None)
        first, last = int(held[0]), int(held[-1]) + 1
        if marker is not None:  # keep the threshold in sight, where the bars stop short of it
            place = int((marker - self.low) / (self.high - self.low) * len(self.counts))
            first, last = min(first, max(place - 1, 0)), max(last, min(place + 1, len(self.counts)))
        step = max(1, math.ceil((last - first) / 40))
        first -= first % step
        num = math.ceil((last - first) / step)
        padded = np.zeros(num * step, np.int64)
        padded[: len(self.counts[first : first + num * step])] = self.counts[first : first + num * step]
        heights = padded.reshape(num, step).sum(1)
        width = 100 / num
        bars = []
        for i, count in enumerate(heights.tolist()):
            low, high = first + i * step, first + (i + 1) * step
            span = show(self._edge(low))
            if not whole_numbers or step > 1:
                span += f" to {show(self._edge(high - whole_numbers))}"
            height = 40 * count / heights.max()
            bars.append(Bar(x=i * width, y=40 - height, width=width, height=height, title=f"{span}: {count:,}"))
        shift = 0.5 if whole_numbers and step == 1 else 0.0
        places = sorted({round(i * (num - 2 * shift) / 3) for i in range(4)})
        ticks = [((place + shift) * width, show(self._edge(first + place * step))) for place in places]
        line = None
        if marker is not None:
            at = (marker - self._edge(first)) / (self._edge(first + num * step) - self._edge(first)) * 100
            line = (at, show(marker))
        return Chart(title, note, bars, ticks, line)


def thumbnail(image: np.ndarray[Any, Any]) -> Image.Image:
    """image: (H, W, 3) uint8 RGB. A copy at most THUMBNAIL_SIDE on its longest side."""
    small = Image.fromarray(image)
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    return small


def mask_overlay(annotations: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> Image.Image:
    """The masks as a palette image with transparency, size (width, height), to be laid over the photo.

    Large masks first, so that a part is seen on its whole; each filled half transparent and edged opaque.
    """
    canvas = np.zeros((size[1], size[0]), np.uint8)
    drawn = sorted(annotations, key=lambda a: -int(a["area"]))[:MAX_DRAWN_MASKS]
    for index, annotation in enumerate(drawn):
        colour = 1 + index % _NUM_COLOURS
        full = coco_mask.decode(_as_coco(annotation["segmentation"]))
        inside = np.asarray(Image.fromarray(full * 255).resize(size, Image.Resampling.BILINEAR)) >= 128
        canvas[inside] = colour
        canvas[_edge_of(inside)] = colour + _NUM_COLOURS
    image = Image.fromarray(canvas, "P")
    image.putpalette(_palette())
    return image


def _as_coco(segmentation: Mapping[str, Any]) -> dict[str, Any]:
    return {"size": list(segmentation["size"]), "counts": segmentation["counts"].encode("ascii")}


def _edge_of(inside: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Pixels of a mask with a neighbour outside it; the border of the image is no edge."""
    padded = np.pad(inside, 1, mode="edge")
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.asarray(inside & ~core)


def _palette() -> list[int]:
    """0, then the fills, then the edges. Hues go round by the golden ratio, so that neighbours in size differ."""
    colours = [(0, 0, 0)]
    for lightness in (0.56, 0.72):
        for i in range(_NUM_COLOURS):
            red, green, blue = colorsys.hls_to_rgb(i * 0.618034 % 1, lightness + 0.06 * (i % 3 - 1), 0.85)
            colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return [channel for colour in colours for channel in colour]


def jpeg_uri(image: Image.Image) -> str:
    """The image as a data: URI."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def overlay_uri(overlay: Image.Image) -> str:
    """A mask_overlay as a data: URI with its transparency."""
    data = io.BytesIO()
    alpha = bytes([0] + [140] * _NUM_COLOURS + [255] * _NUM_COLOURS)
    overlay.save(data, "PNG", transparency=alpha, optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
