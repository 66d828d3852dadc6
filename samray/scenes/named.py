"""Painted scenes whose objects have names: a name is one look, which comes again in other scenes.

The looks are cut-outs for `make_scene`, so each time one is scaled, stretched, turned, mirrored, hidden in part and
in new colours, among other objects without a name.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from samray.scenes.paint import Split, outline_alpha, ramp, texture, to_uint8
from samray.scenes.scene import Scene, make_scene

LOOKS = ("ash", "birch", "cedar", "elm", "fir", "larch", "oak", "yew")
"""The names; what they look like has nothing to do with them."""

_SIDE = 160


class NamedLooks:
    """A source (`samray.scenes.paint.Source`) of one cut-out per name, the same in every process."""

    def __init__(self) -> None:
        self.pictures = [_picture(number, name) for number, name in enumerate(LOOKS)]

    def cutout(self, rng: np.random.Generator, split: Split) -> Image.Image | None:
        """Any of them, RGBA, with its name in `info`."""
        return self.pictures[int(rng.integers(len(self.pictures)))]

    def photo(self, rng: np.random.Generator, split: Split) -> Image.Image | None:
        """There are none."""
        return None


def _picture(number: int, name: str) -> Image.Image:
    """A held-out outline with a texture, and a second texture on a part of it."""
    # A seed of its own for each look: they are the same in every process and at every call.
    rng = np.random.default_rng([number, 77])
    alpha = outline_alpha(rng, _SIDE, "heldout")
    h, w = alpha.shape
    # From the held-out split, which training does not use.
    first, second = (texture(rng, h, w, None, "heldout") for _ in range(2))
    rgb = np.where((ramp(rng, h, w) > 0.6)[..., None], second, first)
    pixels = np.concatenate([to_uint8(rgb), to_uint8(alpha * 255)[..., None]], axis=2)
    picture = Image.fromarray(pixels)
    picture.info["name"] = name
    return picture


def named_scene(seed: int, size: int = 384) -> Scene:
    """The scene of a seed. Objects with a name have it in `Scene.names`."""
    return make_scene(seed, size, _SOURCE, "heldout")


_SOURCE = NamedLooks()
