"""How pixels get into a network of `transformers`: resized, scaled and normalised, as its files say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor
from torch.nn.functional import interpolate

from samray.storage.strict_json import parse_json

if TYPE_CHECKING:
    from samray.inputs.decode import RGBArray


@dataclass(frozen=True, slots=True)
class Pixels:
    """How pixels get into a network, from its `preprocessor_config.json`."""

    size: int
    """Side of the network's square input."""
    resize: int
    """Side to which a cut-out is resized; the centre of `size` is used."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: PillowImage.Resampling = PillowImage.Resampling.BICUBIC
    scale: float = 1 / 255

    @classmethod
    def from_json(cls, settings: dict[str, Any], image_size: int) -> Pixels:
        """settings: the content of preprocessor_config.json. image_size: of the network.

        Raises: ValueError, as the end of a sentence, if they do not fit together.
        """
        size, resize = _side(settings.get("crop_size", image_size)), _side(settings.get("size", image_size))
        if size != image_size or resize < size:
            raise ValueError(f"crops of {size} pixels out of {resize}, but the network takes {image_size}")
        for key in ("image_mean", "image_std"):
            if not isinstance(settings.get(key), list):
                raise ValueError(f"preprocessor_config.json has no {key}, three numbers")
        mean, std = (tuple(map(float, settings[key])) for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"image_mean {mean} and image_std {std}: expected three numbers each, std above 0")
        resample = PillowImage.Resampling(int(settings.get("resample", 3)))
        return cls(size, resize, mean, std, resample, float(settings.get("rescale_factor", 1 / 255)))

    def prepare(self, square: RGBArray) -> Tensor:
        """(3, size, size) float32, normalised, of a square cut-out (side, side, 3) uint8."""
        return self.normalise(self.resized(square))

    def resized(self, square: RGBArray) -> RGBArray:
        """(size, size, 3) uint8 of a square cut-out (side, side, 3) uint8."""
        if square.shape[0] != self.resize:
            picture = PillowImage.fromarray(square).resize((self.resize, self.resize), self.resample)
            square = np.asarray(picture)
        edge = (self.resize - self.size) // 2
        return square[edge : edge + self.size, edge : edge + self.size]

    def stretch(self, image: RGBArray) -> Tensor:
        """(3, size, size) float32, normalised, of an image (H, W, 3) uint8, both sides resized.

        By torch's antialiased bilinear filter on whole numbers, as torchvision's `resize` does on a CPU.
        """
        channels = torch.from_numpy(image).permute(2, 0, 1)[None]
        square = interpolate(channels, (self.size, self.size), mode="bilinear", antialias=True)
        return self.normalise(square[0].permute(1, 2, 0).numpy())

    def normalise(self, pixels: RGBArray) -> Tensor:
        """(..., 3, h, w) float32 of pixels (..., h, w, 3) uint8."""
        scaled = pixels.astype(np.float32) * np.float32(self.scale)
        normalised = (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(normalised).movedim(-1, -3)


def _side(value: Any) -> int:
    """The side of a size as transformers writes it: a number, or an object with height and width or shortest_edge."""
    if isinstance(value, dict):
        sides = {value[key] for key in ("shortest_edge", "height", "width") if key in value}
        if len(sides) != 1:
            raise ValueError(f"the size {value}: expected a square")
        (value,) = sides
    return int(value)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of pixels in a network's folder: a part of processor_config.json, else preprocessor_config.json.

    Raises: ValueError, as the end of a sentence, if a file is not a JSON object; OSError.
    """
    # In the order of transformers: one of its newer versions may have written the first next to the older file.
    for name, part in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        path = folder / name
        if not path.is_file():
            continue
        settings = parse_json(path.read_bytes())
        if part is not None and isinstance(settings, dict):
            if part not in settings:
                continue
            settings = settings[part]
        if not isinstance(settings, dict):
            raise ValueError(f"{name} is not a JSON object")
        return settings
    raise ValueError("preprocessor_config.json is missing, and processor_config.json has no image_processor")
