"""Large-scale jitter, flips and colour changes: a view of an image, and the same view of its masks.

Source: SAM paper, appendix A ("large-scale jitter"); Ghiasi et al., "Simple Copy-Paste" (2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from samray.scenes.scene import Bool

RGB = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class View:
    """The visible part of an image and its scale: the same for the image and each of its masks."""

    box: tuple[float, float, float, float]
    """Left, upper, right, lower, in pixels of the original."""
    size_hw: tuple[int, int]
    """Height and width of the view in pixels; at most S x S."""
    is_flipped: bool = False

    def of_image(self, image: RGB) -> RGB:
        """(H, W, 3) -> (h, w, 3) uint8."""
        h, w = self.size_hw
        # Cut and scaled in one step, which keeps fractions of pixels at the edges.
        seen = np.array(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR, box=self.box))
        return np.ascontiguousarray(seen[:, ::-1]) if self.is_flipped else seen

    def of_mask(self, mask: Bool) -> Bool:
        """(H, W) -> (h, w): the pixels that are more than half covered."""
        h, w = self.size_hw
        picture = Image.fromarray(mask.view(np.uint8) * np.uint8(255))
        seen = np.asarray(picture.resize((w, h), Image.Resampling.BILINEAR, box=self.box)) > 127
        return seen[:, ::-1] if self.is_flipped else seen


def whole_view(height: int, width: int, size: int) -> View:
    """The whole image, scaled to a longest side of `size`."""
    scale = size / max(height, width)
    return View((0, 0, width, height), (max(1, round(height * scale)), max(1, round(width * scale))))


def draw_view(
    height: int, width: int, size: int, scale_jitter: tuple[float, float], flip_fraction: float,
    rng: np.random.Generator,
) -> View:  # fmt: skip
    """A random view. With a scale above 1 it shows a part of at most size x size; below 1 the whole, in a corner."""
    # Uniform in the logarithm: half the size is as likely as twice the size.
    factor = float(np.exp(rng.uniform(*np.log(scale_jitter))))
    scale = factor * size / max(height, width)
    # In pixels of the original: the part of each side that fits into the square at this scale.
    h, w = min(height, size / scale), min(width, size / scale)
    top, left = float(rng.uniform(0, height - h)), float(rng.uniform(0, width - w))
    seen = (min(size, max(1, round(h * scale))), min(size, max(1, round(w * scale))))
    return View((left, top, left + w, top + h), seen, bool(rng.random() < flip_fraction))


def jitter_colour(image: RGB, strength: float, rng: np.random.Generator) -> RGB:
    """Multiply brightness, contrast and saturation by factors in 1 - strength .. 1 + strength."""
    if strength == 0:
        return image
    brightness, contrast, saturation = (np.float32(f) for f in rng.uniform(1 - strength, 1 + strength, 3))
    pixels = image.astype(np.float32) * brightness
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + (pixels - grey) * saturation
    mean = pixels.mean()
    changed = mean + (pixels - mean) * contrast
    rounded: RGB = changed.round().clip(0, 255).astype(np.uint8)
    return rounded
