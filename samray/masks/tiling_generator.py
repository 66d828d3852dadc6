"""Masks of whole images and of tiles of larger ones, by one model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, Protocol

from samray.rle.records import MaskRecord

TILE: Final = "tile"
"""The only prompt of a tile, which tells it from a whole image."""


class Generator(Protocol):
    """`samray.masks.generator.MaskGenerator`."""

    stage_seconds: dict[str, float]

    def generate(self, images: list[Any]) -> list[list[MaskRecord]]: ...


class TilingGenerator:
    """Generates masks of whole images with all settings, and those of tiles without limits of the whole image."""

    def __init__(self, whole: Generator, tile: Generator) -> None:
        self._whole, self._tile = whole, tile

    @property
    def stage_seconds(self) -> dict[str, float]:
        return dict(Counter(self._whole.stage_seconds) + Counter(self._tile.stage_seconds))

    def generate(self, images: Sequence[Any], prompts: Sequence[list[Any]] = ()) -> list[list[MaskRecord]]:
        """prompts: `TILE` for each tile; tiles and whole images come in different calls."""
        return list((self._tile if any(prompts) else self._whole).generate(list(images)))
