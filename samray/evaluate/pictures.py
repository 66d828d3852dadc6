"""Pictures of the results of `samray evaluate`: contact sheets of examples, from worst to best, and a confusion matrix.

The examples are a random sample, so the sheet is representative; the same data and answers give the same sheet.
"""

from __future__ import annotations

import colorsys
import io
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from samray.errors import ConfigError
from samray.evaluate.confusion import Confusion
from samray.evaluate.points import Answers
from samray.evaluate.proposals import best_ious
from samray.evaluate.regions import Bool, RegionImage, RleMasks, areas
from samray.inputs.decode import RGBArray
from samray.rle.records import MaskRecord, Rle

FORMATS: Final = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
"""File formats of a sheet, by extension."""

_NUM_CLICKS, _NUM_IMAGES = 28, 8
_CLICK_COLUMNS, _IMAGE_COLUMNS = 7, 2
_CLICK_SIDE, _PHOTO_SIDE = 190, 300
_SHOWN_MASKS = 40  # per image: more would hide it
_GAP, _LINE = 6, 18
_BACKGROUND, _INK = (24, 24, 27), (228, 228, 231)
_REGION, _MASK = (255, 214, 10), (56, 135, 255)
_EMPTY = (39, 39, 42)
_CELL, _MATRIX_NAMES, _LONGEST_NAME = 34, 40, 24

Float = npt.NDArray[np.float32]


def picture_format(name: str) -> str:
    """Pillow's name of the format. Raises: ConfigError for an extension that is not in FORMATS."""
    for ending, kind in FORMATS.items():
        if name.lower().endswith(ending):
            return kind
    raise ConfigError(f"--picture {name} must end in {', '.join(FORMATS)}")


class Sheet:
    """A random sample of the tiles that are offered, arranged by their score."""

    def __init__(self, title: str, number: int, columns: int) -> None:
        self.title, self.number, self.columns = title, number, columns
        self.num_offered = 0
        self._kept: list[tuple[float, int, Image.Image]] = []
        self._draw = random.Random(0)

    def offer(self, score: float, draw: Callable[[], Image.Image]) -> None:
        """draw is called only if the tile is kept, at least for now. All tiles have the same size."""
        # Reservoir sampling: every tile offered so far is kept with the same chance, however many follow.
        index = len(self._kept) if self.num_offered < self.number else self._draw.randrange(self.num_offered + 1)
        if index < self.number:
            self._kept[index : index + 1] = [(score, self.num_offered, draw())]
        self.num_offered += 1

    def caption(self) -> str:
        """The text above the tiles."""
        return f"{self.title}; {len(self._kept)} a random sample of {self.num_offered:,}, worst to best"

    def encode(self, kind: str) -> bytes:
        """The sheet as PNG or JPEG. Raises ValueError if no tile was offered."""
        if not self._kept:
            raise ValueError("a sheet needs a tile")
        tiles = [tile for _, _, tile in sorted(self._kept, key=lambda kept: kept[:2])]
        width, height = tiles[0].size
        columns = min(self.columns, len(tiles))
        rows = -(-len(tiles) // columns)
        top = _LINE + 2 * _GAP
        text = self.caption()
        size = columns * (width + _GAP) + _GAP, top + rows * (height + _GAP)
        canvas = Image.new("RGB", (max(size[0], int(_font().getlength(text)) + 2 * _GAP), size[1]), _BACKGROUND)
        _write(canvas, (_GAP, _GAP), text)
        for i, tile in enumerate(tiles):
            row, column = divmod(i, columns)
            canvas.paste(tile, (_GAP + column * (width + _GAP), top + row * (height + _GAP)))
        data = io.BytesIO()
        canvas.save(data, kind, quality=90)
        return data.getvalue()


# --- single clicks ---------------------------------------------------------------------------------------------------


def click_sheet() -> Sheet:
    """The sheet for `offer_clicks`."""
    return Sheet(
        "single clicks: dot = click, yellow = region, blue = mask with the highest predicted IoU",
        _NUM_CLICKS,
        _CLICK_COLUMNS,
    )


def offer_clicks(sheet: Sheet, image: RegionImage, answers: Answers) -> None:
    """Offer a tile for each click, scored by the IoU of the mask with the highest predicted IoU."""
    for i, (iou, _) in enumerate(answers.pairs):
        sheet.offer(iou, partial(_click_tile, image.pixels, answers, i))


def _click_tile(pixels: RGBArray, answers: Answers, i: int) -> Image.Image:
    """The part of the image around region and mask, with both drawn on it."""
    region = answers.regions[i]
    best = int(answers.best[i])
    mask = answers.masks[i, best].cpu().numpy()
    window = _window(region | mask)
    hw = region[window].shape
    scale = _CLICK_SIDE / max(hw)
    small_hw = max(1, round(hw[0] * scale)), max(1, round(hw[1] * scale))
    canvas = _resized(pixels[window], small_hw)
    _fill(canvas, _resized_mask(mask[window], small_hw), _MASK, 0.35)
    _fill(canvas, _resized_mask(region[window], small_hw), _REGION, 0.0)
    tile = Image.new("RGB", (_CLICK_SIDE, _CLICK_SIDE + _LINE), _BACKGROUND)
    tile.paste(_to_image(canvas), (0, 0))
    # The centre of the clicked pixel, in the tile.
    x, y = ((answers.clicks[i] - [window[1].start, window[0].start] + 0.5) * scale).tolist()
    ImageDraw.Draw(tile).ellipse((x - 4, y - 4, x + 4, y + 4), fill=(255, 255, 255), outline=(0, 0, 0), width=2)
    iou = answers.iou[i, best]
    _write(tile, (0, small_hw[0] + 2), f"IoU {iou:.2f}, predicted {answers.predicted_iou[i, best]:.2f}")
    return tile


def _window(mask: Bool) -> tuple[slice, slice]:
    """Rows and columns of a mask's box, with some margin."""
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    margin = max(4, max(side.stop - side.start for side in box) // 6)
    rows, columns = (
        slice(max(0, side.start - margin), min(length, side.stop + margin))
        for side, length in zip(box, mask.shape, strict=True)
    )
    return rows, columns


# --- proposals -------------------------------------------------------------------------------------------------------


def proposal_sheet() -> Sheet:
    """The sheet for `offer_masks`."""
    shown = f"left: the {_SHOWN_MASKS} masks with the highest predicted IoU"
    title = f"{shown}; right: one annotator's regions, from red to green by the IoU of the best matching mask"
    return Sheet(title, _NUM_IMAGES, _IMAGE_COLUMNS)


def offer_masks(sheet: Sheet, image: RegionImage, masks: list[MaskRecord]) -> None:
    """Offer a tile for each image with regions, scored by the mean IoU of its regions' best masks.

    image: with only the regions that count (`evaluate_proposals`).
    """
    regions = next((regions for regions in image.annotators if regions), [])
    if regions:
        rles = [mask["segmentation"] for mask in sorted(masks, key=lambda mask: -float(mask["predicted_iou"]))]
        ious = best_ious(regions, rles)
        sheet.offer(float(ious.mean()), lambda: _image_tile(image.pixels, rles, regions, ious))


def _image_tile(pixels: RGBArray, masks: list[Rle], regions: list[Rle], ious: npt.NDArray[np.float64]) -> Image.Image:
    """masks: highest predicted IoU first. ious: each region's IoU with its best matching mask."""
    hw = pixels.shape[:2]
    scale = _PHOTO_SIDE / max(hw)
    small_hw = max(1, round(hw[0] * scale)), max(1, round(hw[1] * scale))
    left = _resized(pixels, small_hw)
    right = 0.4 * left + 0.6 * left.mean(axis=2, keepdims=True)  # to make the tints visible
    hues = random.Random(0)
    for _, mask in _largest_first(masks[:_SHOWN_MASKS], small_hw):
        _fill(left, mask, [255 * part for part in colorsys.hsv_to_rgb(hues.random(), 0.8, 1.0)], 0.3)
    for i, region in _largest_first(regions, small_hw):
        _fill(right, region, [255 * min(1.0, 2 - 2 * ious[i]), 200 * min(1.0, 2 * ious[i]), 40], 0.5)
    tile = Image.new("RGB", (2 * _PHOTO_SIDE + _GAP, _PHOTO_SIDE + _LINE), _BACKGROUND)
    tile.paste(_to_image(left), (0, 0))
    tile.paste(_to_image(right), (_PHOTO_SIDE + _GAP, 0))
    text = f"{len(masks)} masks, {len(regions)} regions, mean IoU of the best matches {ious.mean():.2f}"
    _write(tile, (0, small_hw[0] + 2), text)
    return tile


def _largest_first(masks: list[Rle], hw: tuple[int, int]) -> Iterator[tuple[int, Bool]]:
    """Index and pixels of each mask at the tile's size (h, w), largest first: small ones are drawn on top."""
    for i in np.argsort([-area for area in areas(masks)], kind="stable").tolist():
        yield i, _resized_mask(RleMasks([masks[i]])[:][0], hw)


# --- names -----------------------------------------------------------------------------------------------------------


def confusion_picture(confusion: Confusion, kind: str) -> bytes:
    """The matrix as PNG or JPEG: rows are regions, columns masks; a cell's blue is its share of the row."""
    confusion = confusion.merged(_MATRIX_NAMES)
    words = confusion.words
    counts = confusion.matrix(words)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    texts = [word if len(word) <= _LONGEST_NAME else f"{word[: _LONGEST_NAME - 1]}…" for word in words]
    side = max(_CELL, 2 * _GAP + int(_font().getlength(f"{counts.max():,}")))
    margin = 3 * _GAP + max(int(_font().getlength(text)) for text in texts)
    title = "rows: known regions; columns: masks that cover them (IoU 0.5)"
    top = _LINE + _GAP + margin
    size = max(margin + len(words) * side, int(_font().getlength(title))) + 2 * _GAP, top + len(words) * side + _GAP
    canvas = Image.new("RGB", size, _BACKGROUND)
    _write(canvas, (_GAP, _GAP), title)
    draw = ImageDraw.Draw(canvas)
    for row, text in enumerate(texts):
        _write(canvas, (_GAP, top + row * side + (side - _LINE) // 2), text)
        label = Image.new("RGB", (margin, _LINE), _BACKGROUND)
        _write(label, (_GAP, 0), text)
        canvas.paste(label.rotate(90, expand=True), (margin + row * side + (side - _LINE) // 2, top - margin))
        for column, count in enumerate(counts[row].tolist()):
            x, y = margin + column * side, top + row * side
            shade = np.asarray(_EMPTY) + shares[row, column] * (np.asarray(_MASK) - _EMPTY)
            draw.rectangle((x, y, x + side - 2, y + side - 2), fill=tuple(int(part) for part in shade))
            if count:
                draw.text((x + side / 2 - 1, y + side / 2 - 1), f"{count:,}", fill=_INK, font=_font(), anchor="mm")
    data = io.BytesIO()
    canvas.save(data, kind, quality=90)
    return data.getvalue()


# --- drawing ---------------------------------------------------------------------------------------------------------


def _resized(pixels: RGBArray, hw: tuple[int, int]) -> Float:
    """(h, w, 3), 0 to 255."""
    return np.asarray(Image.fromarray(pixels).resize(hw[::-1], Image.Resampling.BICUBIC), np.float32).copy()


def _resized_mask(mask: Bool, hw: tuple[int, int]) -> Bool:
    return np.asarray(Image.fromarray(mask).resize(hw[::-1], Image.Resampling.NEAREST), bool)


def _fill(canvas: Float, mask: Bool, colour: Sequence[float], alpha: float) -> None:
    """Tint the mask's pixels of a canvas (h, w, 3) in place, with a two-pixel border in full colour."""
    canvas[mask] += alpha * (np.asarray(colour, np.float32) - canvas[mask])
    canvas[mask & ~ndimage.binary_erosion(mask, iterations=2)] = colour


def _to_image(canvas: Float) -> Image.Image:
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(13)


def _write(image: Image.Image, xy: tuple[int, int], text: str) -> None:
    ImageDraw.Draw(image).text(xy, text, fill=_INK, font=_font())
