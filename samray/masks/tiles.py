"""Masks at full resolution from low-res logits, computed only where they are not known without it.

Interpolated values are between the lowest and the highest value that they are made of. Full resolution is divided into
tiles; the low-res logits that a tile is made of have known bounds. If a threshold is outside of the bounds, all pixels
of the tile are on one side of it: the tile is *closed*. Only the pixels of *open* tiles are computed, to the bit as
for the whole image (`samray.masks.bilinear`), and kept as bits.

Shapes: K masks, (TY, TX) tiles, N open tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from samray.masks.bilinear import Axis, Float32, axis, mix_rows, same_kernel

Bool = npt.NDArray[np.bool_]
Int = npt.NDArray[np.signedinteger[Any]]
Words = npt.NDArray[np.uint64]
"""64 pixels of a row, the leftmost in the lowest bit."""

Tiles = tuple[Int, Int, Int]
"""(N,) mask, row and column of each of N tiles."""

TILE: Final = 64
"""Side of a tile in pixels: the bits of a word."""

_TILES_AT_ONCE: Final = 128
"""Open tiles computed together: 2 MB."""

_MARGIN: Final = 2.0**-20
"""Rounding of an interpolated value, as a share of the largest absolute value that it is made of.

One mixture a * v + b * w of values of at most M rounds a product and the sum by at most 2^-24 M each, and a + b is 1
but for 2^-25: an error below 2.6 * 2^-24 M. Four mixtures, each of values that exceed M by the errors before, stay
below 11 of the 16 * 2^-24 M allowed here."""


@dataclass(frozen=True, slots=True)
class _Side:
    """The inputs of a row (or column) of T tiles, along one side."""

    low_first: Int
    """(T,) first and last low-res cell that a tile's pixels depend on."""
    low_last: Int
    low_start: Int
    """(T,) first cell of the stretch of `num_low` cells to read for a tile; with the former, inside of the logits."""
    num_low: int
    to_input: Axis
    """(T, I, 2) from the stretch of cells to a stretch of the model's input."""
    to_image: Axis
    """(T, TILE, 2) from there to pixels. Those beyond the image repeat its last one."""
    pixels: Words
    """(T,) bits of the pixels that are inside of the image."""
    rows: Words
    """(T, TILE) the same, with all or no bits in the word of each pixel."""
    sizes: Int
    """(T,) number of them."""
    length: int


@dataclass(frozen=True, slots=True)
class Grid:
    """The tiles of masks of one size."""

    y: _Side
    x: _Side

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.y.pixels), len(self.x.pixels)


@lru_cache(maxsize=64)
def tile_grid(low_res: int, side: int, inside_hw: tuple[int, int], hw: tuple[int, int]) -> Grid | None:
    """Tiles of images (H, W) = hw whose low-res logits are interpolated by `Frame.mask_steps`.

    None if whole images have to be interpolated, because torch does not interpolate as expected.
    """
    # An interpolation to the same size is a copy, whatever the kernel.
    if not (same_kernel(inside_hw, hw) and (side == low_res or same_kernel((low_res, low_res), (side, side)))):
        return None
    sides = [_side(low_res, side, inside, length) for inside, length in zip(inside_hw, hw, strict=True)]
    return None if sides[0] is None or sides[1] is None else Grid(sides[0], sides[1])


def _side(low_res: int, side: int, inside: int, length: int) -> _Side | None:
    to_input, to_image = axis(low_res, side), axis(inside, length)
    if to_input is None or to_image is None:
        return None
    num_tiles = -(-length // TILE)
    pixel = np.minimum(np.arange(num_tiles * TILE), length - 1).reshape(num_tiles, TILE)
    start, pixels_from = _stretches(Axis(to_image.index[pixel], to_image.weights[pixel]), inside)
    num_input = int(pixels_from.index.max()) + 1
    cell = start[:, None] + np.arange(num_input)
    cells = Axis(to_input.index[cell], to_input.weights[cell])
    low_start, cells_from = _stretches(cells, low_res)
    # What is read for a tile may exceed what its pixels depend on: bounds are tighter without it.
    tile = np.arange(num_tiles)
    is_inside = np.arange(num_tiles * TILE).reshape(num_tiles, TILE) < length
    return _Side(
        low_first=cells.index[tile, pixels_from.index[:, 0, 1], 1].astype(np.int64),
        low_last=cells.index[tile, pixels_from.index[:, -1, 0], 0].astype(np.int64),
        low_start=low_start,
        num_low=int(cells_from.index.max()) + 1,
        to_input=cells_from,
        to_image=pixels_from,
        pixels=pack(is_inside)[:, 0],
        rows=np.where(is_inside, ~np.uint64(0), np.uint64(0)),
        sizes=is_inside.sum(axis=1),
        length=length,
    )


def _stretches(by_tile: Axis, length: int) -> tuple[Int, Axis]:
    """Cut what tiles read out of `length` inputs into stretches of equal length: (T,) their starts, and the axis
    relative to them."""
    first, last = by_tile.index.min(axis=(1, 2)), by_tile.index.max(axis=(1, 2))
    start = np.minimum(first, length - int((last - first + 1).max()))
    return start.astype(np.int64), Axis(by_tile.index - start[:, None, None], by_tile.weights)


@dataclass(frozen=True, slots=True)
class TiledMasks:
    """K masks cut at one threshold: open tiles as bits, the others as one bit each."""

    grid: Grid
    filled: Bool
    """(K, TY, TX) closed tiles all of whose pixels belong to the mask."""
    tiles: Tiles
    """The open tiles."""
    words: Words
    """(N, TILE) a word per row; bits and rows beyond the image are 0."""

    def areas(self) -> Int:
        """(K,) pixels of each mask."""
        counts = np.bitwise_count(self.words).sum(axis=1, dtype=np.int64)
        return _areas(self.grid, self.filled, self.tiles[0], counts)

    def boxes(self) -> Int:
        """(K, 4) xyxy, first and last pixel (inclusive); zeros for an empty mask."""
        # Which columns, and which rows, of each tile have any pixel: first as bits, then along the whole side.
        columns = self._spread(self.grid.x.pixels[None, :], np.bitwise_or.reduce(self.words, axis=1))
        rows = self._spread(self.grid.y.pixels[:, None], pack(self.words != 0)[:, 0])
        x0, x1 = _first_and_last(np.bitwise_or.reduce(columns, axis=1))
        y0, y1 = _first_and_last(np.bitwise_or.reduce(rows, axis=2))
        return np.stack([x0, y0, x1, y1], axis=1)

    def changes(self) -> tuple[Int, Int, Int]:
        """Mask, column and row of each pixel that differs from the one above it in its column.

        Above and below the image everything is 0: a change below its last row has the row H.
        """
        grid, (mask, ty, tx) = self.grid, self.tiles
        at_top = self._spread(grid.x.pixels[None, :], self.words[:, 0])
        at_bottom = self._spread(grid.x.pixels[None, :], self.words[np.arange(len(ty)), grid.y.sizes[ty] - 1])
        between = np.zeros((len(self.filled), grid.shape[0] + 1, grid.shape[1]), dtype=np.uint64)
        between[:, :-1] = at_top
        between[:, 1:] ^= at_bottom
        within = self.words[:, 1:] ^ self.words[:, :-1]
        within[np.arange(1, TILE) >= grid.y.sizes[ty, None]] = 0  # from the last row to what is beyond
        tile, row = _nonzero(within)
        k, t, column = _nonzero(between)
        words = np.concatenate([within[tile, row], between[k, t, column]])
        word, bit = _nonzero(unpack(words[:, None]))
        masks = np.concatenate([mask[tile], k])
        x = np.concatenate([tx[tile], column]) * TILE
        y = np.concatenate([ty[tile] * TILE + row + 1, np.minimum(t * TILE, grid.y.length)])
        return masks[word], x[word] + bit, y[word]

    def _spread(self, if_filled: Words, of_open: Words) -> Words:
        """(K, TY, TX) one word per tile: `if_filled` of filled ones, `of_open` (N,) of open ones, else 0."""
        words = np.where(self.filled, if_filled, np.uint64(0))
        words[self.tiles] = of_open
        return words


def cut(grid: Grid, logits: Float32, threshold: float) -> TiledMasks:
    """Masks of the pixels above the threshold. logits: (K, 4h, 4w) low-res."""
    is_open, filled = _closed(*_bounds(grid, logits), [threshold])
    mask, ty, tx = _nonzero(is_open)
    tiles = mask, ty, tx
    words = np.empty((len(tiles[0]), TILE), dtype=np.uint64)
    for rows, values, inside in _open_pixels(grid, logits, tiles):
        words[rows] = pack(np.greater(values, threshold))[..., 0] & inside
    return TiledMasks(grid, filled[0], tiles, words)


def measure(grid: Grid, logits: Float32, threshold: float, offset: float) -> tuple[Int, TiledMasks, Int]:
    """Masks cut at the threshold, and the areas (K,) cut at threshold + offset and threshold - offset.

    logits: (K, 4h, 4w) low-res. Returns the area above the upper cut, the masks, and the area above the lower cut.
    """
    cuts = [threshold + offset, threshold, threshold - offset]
    is_open, filled = _closed(*_bounds(grid, logits), cuts)
    mask, ty, tx = _nonzero(is_open)
    tiles = mask, ty, tx
    words = np.empty((len(tiles[0]), TILE), dtype=np.uint64)
    counts = np.empty((3, len(words)), dtype=np.int64)
    for rows, values, inside in _open_pixels(grid, logits, tiles):
        for at, cut in enumerate(cuts):
            of_cut = pack(np.greater(values, cut))[..., 0] & inside
            counts[at, rows] = np.bitwise_count(of_cut).sum(axis=1, dtype=np.int64)
            if at == 1:
                words[rows] = of_cut
    upper, _, lower = (_areas(grid, of_cut, tiles[0], num) for of_cut, num in zip(filled, counts, strict=True))
    return upper, TiledMasks(grid, filled[1], tiles, words), lower


def open_share(grid: Grid, logits: Float32, threshold: float, offset: float) -> float:
    """Share of tiles that `measure` has to compute. logits: (K, 4h, 4w) low-res."""
    is_open, _ = _closed(*_bounds(grid, logits), [threshold + offset, threshold, threshold - offset])
    return float(is_open.mean())


def _bounds(grid: Grid, logits: Float32) -> tuple[Float32, Float32]:
    """(K, TY, TX) the lowest and the highest low-res logit that a tile's pixels depend on."""
    lowest_and_highest = []
    for extreme in (np.minimum, np.maximum):
        extremes = logits
        for side, at in ((grid.y, 1), (grid.x, 2)):
            # Stretches have different lengths: the last cell is taken again in shorter ones.
            steps = range(1, int((side.low_last - side.low_first).max()) + 1)
            along = extremes.take(side.low_first, axis=at)
            for step in steps:
                extreme(along, extremes.take(np.minimum(side.low_first + step, side.low_last), axis=at), out=along)
            extremes = along
        lowest_and_highest.append(extremes)
    return lowest_and_highest[0], lowest_and_highest[1]


def _closed(lowest: Float32, highest: Float32, cuts: list[float]) -> tuple[Bool, list[Bool]]:
    """Which tiles are open, because their bounds leave any of the cuts open; and the filled ones at each cut."""
    low, high = lowest.astype(np.float64), highest.astype(np.float64)
    margin = _MARGIN * np.maximum(np.abs(low), np.abs(high)) + np.finfo(np.float32).tiny
    is_open = np.zeros(low.shape, dtype=bool)
    filled = []
    for cut in cuts:
        rounded = float(np.float32(cut))  # pixels are compared with this
        above, below = low - margin > rounded, high + margin < rounded
        # A comparison with NaN is false: such tiles are open.
        is_open |= ~(above | below)
        filled.append(above)
    return is_open, [above & ~is_open for above in filled]


def _open_pixels(grid: Grid, logits: Float32, tiles: Tiles) -> Iterator[tuple[slice, Float32, Words]]:
    """Yield slices of the open tiles, their logits at full resolution (n, TILE, TILE), and as words (n, TILE) which
    pixels are inside of the image."""
    # Columns first, so that rows of both steps can be read as they are interpolated: first horizontally.
    by_column = np.ascontiguousarray(logits.transpose(0, 2, 1))
    stretches = np.lib.stride_tricks.sliding_window_view(by_column, grid.y.num_low, axis=2)
    cells = np.arange(grid.x.num_low)
    for start in range(0, len(tiles[0]), _TILES_AT_ONCE):
        rows = slice(start, start + _TILES_AT_ONCE)
        mask, ty, tx = (index[rows] for index in tiles)
        values = stretches[mask[:, None], grid.x.low_start[tx][:, None] + cells, grid.y.low_start[ty][:, None]]
        for across, down in ((grid.x.to_input, grid.y.to_input), (grid.x.to_image, grid.y.to_image)):
            values = _mix(_mix(values, across, tx).transpose(0, 2, 1), down, ty).transpose(0, 2, 1)
        yield rows, values.transpose(0, 2, 1), grid.y.rows.take(ty, axis=0) & grid.x.pixels[tx, None]


def _mix(values: Float32, sides: Axis, tile: Int) -> Float32:
    """values: (n, R, D). tile: (n,) which of a side's tiles each is. Returns (n, R', D): mixtures of two rows each."""
    num, rows, width = values.shape
    index = sides.index.take(tile, axis=0)
    index += (rows * np.arange(num, dtype=np.int32))[:, None, None]
    table = torch.from_numpy(np.ascontiguousarray(values)).view(-1, width)
    mixed: Float32 = mix_rows(table, index, sides.weights.take(tile, axis=0)).numpy().reshape(num, -1, width)
    return mixed


def _areas(grid: Grid, filled: Bool, mask: Int, counts: Int) -> Int:
    """(K,) pixels of the filled tiles, and of the open ones: counts (N,) of each, which belong to `mask` (N,)."""
    of_filled = (filled @ grid.x.sizes) @ grid.y.sizes
    return of_filled + np.bincount(mask, weights=counts, minlength=len(filled)).astype(np.int64)


def pack(bits: Bool) -> Words:
    """(..., 64 * n) bool to (..., n) words, the first in the lowest bit."""
    packed = np.packbits(np.ascontiguousarray(bits).reshape(-1), bitorder="little").view("<u8")
    return packed.astype(np.uint64, copy=False).reshape(*bits.shape[:-1], bits.shape[-1] // TILE)


def unpack(words: Words) -> Bool:
    """(..., n) words to (..., 64 * n) bool."""
    as_bytes = np.ascontiguousarray(words.astype("<u8", copy=False)).view(np.uint8)
    return np.unpackbits(as_bytes, axis=-1, bitorder="little").view(bool)


def _nonzero(values: npt.NDArray[Any]) -> tuple[Int, ...]:
    """As values.nonzero(), faster."""
    return np.unravel_index(np.flatnonzero(values != 0), values.shape)


def _first_and_last(words: Words) -> tuple[Int, Int]:
    """words: (K, T). Returns the positions of each row's first and last bit, both 0 if there is none."""
    bits = unpack(words)
    last = bits.shape[1] - 1 - bits[:, ::-1].argmax(axis=1)
    return bits.argmax(axis=1), np.where(bits.any(axis=1), last, 0)
