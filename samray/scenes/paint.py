"""Building blocks of scenes: random outlines, textures and patches of photographs.

Lengths are in pixels, colours in 0..255, masks and mixtures in 0..1; all randomness comes from the given generator.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Split = Literal["train", "heldout"]
Float = npt.NDArray[np.floating[Any]]
"""float32, for speed."""


class Source(Protocol):
    """A source of photographic material (samray.train.cutouts.CutoutSource)."""

    def cutout(self, rng: np.random.Generator, split: Split) -> Image.Image | None:
        """A random object as an RGBA image, or None if this split has none."""

    def photo(self, rng: np.random.Generator, split: Split) -> Image.Image | None:
        """A random photographic background as an RGB image, or None if this split has none."""


# --- shapes ----------------------------------------------------------------------------------------------------------


def _turn(n: int) -> npt.NDArray[np.float64]:
    return np.linspace(0, 2 * np.pi, n, endpoint=False)


def _polar(radius: npt.ArrayLike, theta: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1)


def _blob(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    theta, radius = _turn(72), np.ones(72)
    for k in range(2, 7):
        # Higher frequencies are weaker, so that outlines stay smooth.
        radius += rng.normal(0, 0.35 / k) * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
    return _polar(np.maximum(radius, 0.2), theta)


def _polygon(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    n = int(rng.integers(3, 9))
    return _polar(rng.uniform(0.6, 1, n), _turn(n) + rng.uniform(-0.8, 0.8, n) * np.pi / n)


def _superellipse(power: float) -> npt.NDArray[np.float64]:
    c, s = np.cos(_turn(72)), np.sin(_turn(72))
    return np.stack([np.sign(c) * np.abs(c) ** (2 / power), np.sign(s) * np.abs(s) ** (2 / power)], axis=1)


def _star(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    spikes = int(rng.integers(4, 10))
    return _polar(np.tile([1, rng.uniform(0.35, 0.75)], spikes), _turn(2 * spikes))


def _crescent(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    outer, inner = _polar(1, np.linspace(-2, 2, 40)), _polar(rng.uniform(0.5, 0.85), np.linspace(1.9, -1.9, 40))
    return np.concatenate([outer, inner])


def _heart(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    t = _turn(72)
    y = 13 * np.cos(t) - rng.uniform(4, 6) * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([np.sin(t) ** 3, -y / 16], axis=1)


def _cross(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    a, b = rng.uniform(0.2, 0.5, 2)
    corner = np.array([[a, 1], [a, b], [1, b], [1, -b], [a, -b], [a, -1]])
    return np.concatenate([corner, -corner])


def _gear(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    teeth, depth = int(rng.integers(6, 13)), rng.uniform(0.65, 0.85)
    return _polar(np.tile([1, 1, depth, depth], teeth), _turn(4 * teeth))


_SHAPES: dict[str, Callable[[np.random.Generator], npt.NDArray[np.float64]]] = {
    "blob": _blob,
    "polygon": _polygon,
    "ellipse": lambda rng: _superellipse(2),
    "rounded_rect": lambda rng: _superellipse(rng.uniform(4, 30)),
    "star": _star,
    "crescent": _crescent,
}
_HELDOUT_SHAPES = {"heart": _heart, "cross": _cross, "gear": _gear}


def outline_alpha(rng: np.random.Generator, diameter: float, split: Split) -> Float:
    """A random outline as an antialiased (h, w) alpha; its longest side is about the diameter."""
    unseen = split == "heldout" and rng.random() < 0.5
    shapes = _HELDOUT_SHAPES if unseen else _SHAPES
    outline = shapes[list(shapes)[int(rng.integers(len(shapes)))]](rng)
    # Stretch, turn, then scale to the diameter, and shift into the positive quadrant.
    outline = outline * [1, np.exp(-abs(rng.normal(0, 0.45)))]
    angle = rng.uniform(0, 2 * np.pi)
    outline = outline @ [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    low, high = outline.min(axis=0), outline.max(axis=0)
    outline = (outline - low) * (diameter / (high - low).max())
    w, h = np.ceil(outline.max(axis=0)).astype(int) + 3  # room for the soft edge
    ring = rng.random() < 0.12
    image = Image.new("L", (2 * w, 2 * h))  # drawn at twice the size and averaged, for soft edges
    draw = ImageDraw.Draw(image)
    draw.polygon([(x, y) for x, y in (outline * 2 + 2).tolist()], fill=255)
    if ring:
        centre = outline.mean(axis=0)
        hole = (outline - centre) * rng.uniform(0.35, 0.75) + centre
        draw.polygon([(x, y) for x, y in (hole * 2 + 2).tolist()], fill=0)
    return np.asarray(image.reduce(2), np.float32) / 255


# --- looks -----------------------------------------------------------------------------------------------------------


def to_uint8(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    rounded: npt.NDArray[np.uint8] = np.clip(values + 0.5, 0, 255).astype(np.uint8)
    return rounded


def ramp(rng: np.random.Generator, h: int, w: int) -> Float:
    """(h, w) rising from 0 to 1 in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-0.5, 0.5, w) * np.cos(angle) + np.linspace(-0.5, 0.5, h)[:, None] * np.sin(angle)
    rising: Float = ((ramp - ramp.min()) / max(float(np.ptp(ramp)), 1e-6)).astype(np.float32)
    return rising


def clouds(rng: np.random.Generator, h: int, w: int) -> Float:
    """(h, w) noise of several octaves, about 0..1."""
    total, amplitude, cells = np.zeros((h, w), np.float32), 1.0, int(rng.integers(2, 12))
    decay = rng.uniform(0.4, 0.9)
    for _ in range(int(rng.integers(1, 5))):
        # Random cells, enlarged smoothly; each octave has twice as many, and less weight.
        grid = rng.integers(0, 256, (min(cells, h) + 1, min(cells, w) + 1), dtype=np.uint8)
        total += amplitude * np.asarray(Image.fromarray(grid).resize((w, h), Image.Resampling.BICUBIC), np.float32)
        amplitude *= decay
        cells *= 2
    noise: Float = (total - total.min()) / max(float(np.ptp(total)), 1e-6)
    return noise


def _pattern(rng: np.random.Generator, h: int, w: int, split: Split) -> Float:
    """(h, w) in 0..1: the mixture of two colours."""
    kinds = ["flat", "ramp", "clouds", "clouds", "radial", "stripes", "checks", "dots"]
    kind = kinds[int(rng.integers(len(kinds)))]
    if split == "heldout" and rng.random() < 0.2:
        kind = ("bricks", "ripples")[int(rng.integers(2))]
    if kind == "flat":
        return np.zeros((h, w), np.float32)
    if kind == "ramp":
        return ramp(rng, h, w)
    if kind == "clouds":
        return clouds(rng, h, w)
    period = rng.uniform(4, max(8.0, max(h, w) / 2))
    angle = rng.uniform(0, np.pi)
    # u along the pattern's direction and v across it, in periods. 6.28 is a full turn.
    xs, ys = np.arange(w, dtype=np.float32) / period, np.arange(h, dtype=np.float32)[:, None] / period
    u, v = xs * np.float32(np.cos(angle)) + ys * np.float32(np.sin(angle)), ys * np.float32(np.cos(angle))
    v = v - xs * np.float32(np.sin(angle))
    mixed: Float
    if kind in ("radial", "ripples"):
        cy, cx = rng.uniform(0, h) / period, rng.uniform(0, w) / period
        distance = np.hypot(xs - np.float32(cx), ys - np.float32(cy))
        mixed = distance / distance.max() if kind == "radial" else (np.sin(distance * 6.28) * 0.5 + 0.5)
    elif kind == "stripes":
        wave = np.sin(u * 6.28)
        mixed = np.clip(wave * np.float32(rng.choice([0.5, 4.0])) + 0.5, 0, 1)
    elif kind == "checks":
        mixed = ((np.floor(u) + np.floor(v)) % 2).astype(np.float32)
    elif kind == "dots":
        mixed = np.clip((np.sin(u * 6.28) * np.sin(v * 6.28) - 0.3) * 4, 0, 1)
    else:
        # Bricks: every second row is shifted by half a brick.
        row = np.floor(v * 2)
        mixed = (((u + 0.5 * (row % 2)) % 1 < 0.1) | (v * 2 - row < 0.2)).astype(np.float32)
    return mixed


def _colour(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """(3,) in 0..255, mostly with less than full saturation, as in photographs."""
    colour = rng.uniform(0, 255, 3)
    dulled: npt.NDArray[np.float64] = colour.mean() + (colour - colour.mean()) * rng.uniform(0, 1)
    return dulled


def texture(rng: np.random.Generator, h: int, w: int, source: Source | None, split: Split) -> Float:
    """(h, w, 3) in 0..255: a texture of two colours, or a patch of a photograph."""
    if source is not None and rng.random() < 0.25:
        photo = source.photo(rng, split)
        if photo is not None:
            return photo_crop(rng, photo, h, w)
    first = _colour(rng)
    second = _colour(rng) if rng.random() < 0.5 else first + rng.normal(0, 30, 3)
    rgb = _pattern(rng, h, w, split)[..., None] * (second - first).astype(np.float32) + first.astype(np.float32)
    if rng.random() < 0.5:
        rgb += (clouds(rng, h, w)[..., None] - 0.5) * np.float32(rng.uniform(5, 60))
    return rgb


def photo_crop(rng: np.random.Generator, photo: Image.Image, h: int, w: int) -> Float:
    """A random crop of the photograph, resized to (h, w, 3)."""
    # The largest crop of this shape that fits, and down to a third of it.
    fit = min(photo.width / w, photo.height / h)
    scale = fit * rng.uniform(0.3, 1.0)
    x, y = rng.uniform(0, photo.width - scale * w), rng.uniform(0, photo.height - scale * h)
    box = (x, y, x + scale * w, y + scale * h)
    # Cut and resized in one step; reducing_gap shrinks large photos cheaply first.
    crop = photo.resize((w, h), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(crop, np.float32)
