"""Pictures of masks on photographs as one JPEG, in the colours of the report's page: for the demo and the README."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from samray.inputs.decode import RGBArray
from samray.rle.records import Rle

MIN_SHARE: Final = 0.002
"""Smallest mask that is drawn, as a fraction of its image: specks hide the large masks below them."""
MAX_DRAWN: Final = 40

_FILL: Final = 0.5
_GAP, _LINE = 10, 26
_PAPER, _INK = (255, 255, 255), (52, 58, 70)


def masks_to_draw(annotations: Sequence[Mapping[str, Any]], max_masks: int = MAX_DRAWN) -> list[Rle]:
    """The masks of an image for `draw_masks`, largest first; without specks. annotations: records."""
    largest = sorted(annotations, key=lambda mask: -int(mask["area"]))[:max_masks]
    return [
        mask["segmentation"]
        for mask in largest
        if mask["area"] >= MIN_SHARE * mask["segmentation"]["size"][0] * mask["segmentation"]["size"][1]
    ]


def draw_masks(pixels: RGBArray, masks: Sequence[Rle], height: int) -> Image.Image:
    """The image at this height, each mask filled and outlined in its colour; later masks cover earlier ones.

    pixels: (H, W, 3). masks: in the frame (H, W), largest first, as from `masks_to_draw`.
    """
    photo = _resized(pixels, height)
    canvas = np.asarray(photo, np.float32).copy()
    # The mask that is seen at each pixel, as on the report's page: an outline is where it changes.
    seen = np.zeros(canvas.shape[:2], np.int32)
    for number, rle in enumerate(masks, start=1):
        mask = Image.fromarray(coco_mask.decode(rle) * np.uint8(255))
        # Averaged, then cut at one half, for outlines without steps.
        seen[np.asarray(mask.resize(photo.size, Image.Resampling.BOX)) > 127] = number
    edge = np.zeros(seen.shape, bool)
    for axis in (0, 1):
        changes = np.diff(seen, axis=axis) != 0
        edge |= np.insert(changes, 0, False, axis=axis) | np.insert(changes, seen.shape[axis] - 1, False, axis=axis)
    colours = mask_colours(len(masks))
    fill, line = (seen > 0) & ~edge, (seen > 0) & edge
    canvas[fill] += _FILL * (colours[seen[fill] - 1] - canvas[fill])
    canvas[line] = colours[seen[line] - 1] + 0.35 * (255 - colours[seen[line] - 1])
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def picture(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> bytes:
    """Rows of images, each with a title above it ("" for none), as JPEG.

    The images of a column have the same size; those of a row have the same height.
    """
    first = rows[0][1]
    width = sum(image.width for image in first) + _GAP * (len(first) - 1)
    heights = [images[0].height + (_LINE if title else 0) for title, images in rows]
    canvas = Image.new("RGB", (width, sum(heights) + _GAP * (len(rows) - 1)), _PAPER)
    top = 0
    for (title, images), height in zip(rows, heights, strict=True):
        if title:
            ImageDraw.Draw(canvas).text((0, top), title, fill=_INK, font=_font())
        left = 0
        for image in images:
            canvas.paste(image, (left, top + (_LINE if title else 0)))
            left += image.width + _GAP
        top += height + _GAP
    data = io.BytesIO()
    canvas.save(data, "JPEG", quality=88, optimize=True, progressive=True)
    return data.getvalue()


def plain(pixels: RGBArray, height: int) -> Image.Image:
    """The image at this height, without masks."""
    return _resized(pixels, height)


def mask_colours(number: int) -> npt.NDArray[np.float32]:
    """(number, 3) in 0..255: the colours of the report's page, whose hues go round by the golden ratio.

    Source: OKLCH, https://bottosson.github.io/posts/oklab/.
    """
    index = np.arange(number)
    lightness = np.array([0.76, 0.66, 0.84])[index % 3]
    turn = 2 * np.pi * ((0.06 + index * 0.618034) % 1)
    a, b = 0.17 * np.cos(turn), 0.17 * np.sin(turn)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.707614701],
        ]
    )
    linear = np.stack([long, medium, short], axis=1) @ to_rgb.T
    gamma = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055)
    return np.asarray(np.clip(255 * gamma, 0, 255).round(), np.float32)


def _resized(pixels: RGBArray, height: int) -> Image.Image:
    width = round(height * pixels.shape[1] / pixels.shape[0])
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(17)
