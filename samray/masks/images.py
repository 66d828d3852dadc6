"""Check the images passed to a generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def check_images(images: Sequence[Any]) -> None:
    """Raises: ValueError that says what to pass if images is not a sequence of uint8 RGB arrays (H, W, 3)."""
    wanted = "generate takes a list of RGB uint8 arrays (H, W, 3)"
    if not isinstance(images, Sequence):
        shape = getattr(images, "shape", ())
        # A stack of images of one size is as good as a list.
        if isinstance(images, np.ndarray) and len(shape) == 4:
            return check_images(list(images))
        got = f"one array of shape {tuple(shape)}" if shape else f"a {type(images).__name__}"
        raise ValueError(f"{wanted}; got {got}: for one image write generate([image])")
    for index, image in enumerate(images):
        if not isinstance(image, np.ndarray):
            how = 'numpy.asarray(image.convert("RGB"))' if hasattr(image, "convert") else "a numpy array"
            if isinstance(image, str):
                how = 'numpy.asarray(PIL.Image.open(path).convert("RGB"))'
            raise ValueError(f"{wanted}; images[{index}] is a {_name(image)}: pass {how}")
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"{wanted}; images[{index}] is {image.dtype} {image.shape}: {_advice(image)}")


def _name(image: Any) -> str:
    return f"{type(image).__module__.partition('.')[0]} {type(image).__name__}".removeprefix("builtins ")


def _advice(image: np.ndarray) -> str:
    if not image.size:
        return "it is empty"
    if image.ndim == 2:
        return "repeat grey, as in numpy.stack([image] * 3, axis=-1)"
    if image.ndim == 3 and image.shape[2] == 4:
        return "leave the alpha channel out, as in image[..., :3]"
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
        return "channels come last, as in image.transpose(1, 2, 0)"
    if image.dtype != np.uint8:
        return "values are 0 to 255, as in (255 * image).astype(numpy.uint8) for an image from 0 to 1"
    return "its last axis must be R, G and B"
