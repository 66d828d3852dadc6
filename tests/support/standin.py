"""A labeler without a model, for tests of what is around the model: its masks are a function of the pixels alone."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from samray import storage
from samray.config import Config
from samray.errors import ConfigError
from samray.pipeline.labeler import ShardLabeler

POISON = (66, 6, 6)
"""First pixel of an image at which `PoisonedGenerator` ends its process."""


def make_image(seed: int, size: tuple[int, int] = (24, 16), first_pixel: tuple[int, int, int] | None = None) -> bytes:
    """A small PNG, (width, height), of noise."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if first_pixel is not None:
        pixels[0, 0] = first_pixel
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_images(root: str, count: int, name: str = "img_{:03d}.png") -> list[str]:
    """`count` images under root, on any storage. Returns their URIs, in order."""
    uris = [storage.join(root, name.format(i)) for i in range(count)]
    for i, uri in enumerate(uris):
        storage.put(uri, make_image(i))
    return uris


@dataclass(frozen=True)
class Pace:
    """How fast a stand-in works: so many seconds an image, and from `num_before_hold` images on not at all while the
    file `hold` is there. What is to be killed in the middle is held, not slowed down: a slow machine takes longer to
    see that the moment has come than a stand-in takes for the rest.

    A stand-in that stands still says so with the file `hold`.held. Each run needs a file of its own: actors outlive a
    killed driver for a moment, and what they write then must not be taken for the work of the next run.
    """

    seconds: float = 0.0
    hold: str = ""
    num_before_hold: int = 4

    @classmethod
    def parse(cls, text: str) -> Pace:
        """Parse an argument: seconds, the path of the file, or a folder with a file per operation (see `of`)."""
        try:
            return cls(seconds=float(text))
        except ValueError:
            return cls(hold=text)

    def of(self, name: str) -> Pace:
        """For one of several operations, each held by a file of its own."""
        return replace(self, hold=f"{self.hold}/{name}") if self.hold else self

    def take(self, num_images: int, num_before: int) -> None:
        """The time for so many images, after num_before others."""
        time.sleep(self.seconds * num_images)
        if self.hold and num_before + num_images > self.num_before_hold:
            while Path(self.hold).exists():
                held_mark(self.hold).touch()
                time.sleep(0.05)


def held_mark(hold: str | Path) -> Path:
    """The file that is there once a stand-in stands still because of the file `hold`."""
    return Path(f"{hold}.held")


class StandIn:
    """Three masks per image: where red, green and blue are bright."""

    def __init__(self, pace: Pace = Pace()) -> None:
        self.pace = pace
        self.num_images = 0
        self.stage_seconds = {"decode": 0.0}

    def generate(self, images: list[NDArray[np.uint8]]) -> list[list[dict[str, Any]]]:
        self.pace.take(len(images), self.num_images)
        self.num_images += len(images)
        self.stage_seconds["decode"] += self.pace.seconds * len(images)
        return [masks_of(image) for image in images]


class PoisonedGenerator(StandIn):
    """Crashes, as by a fault in native code, at an image that starts with POISON, or at every one."""

    def __init__(self, at_every_image: bool = False) -> None:
        super().__init__()
        self.at_every_image = at_every_image

    def generate(self, images: list[NDArray[np.uint8]]) -> list[list[dict[str, Any]]]:
        if self.at_every_image or any(tuple(image[0, 0]) == POISON for image in images):
            os.abort()
        return super().generate(images)


def masks_of(image: NDArray[np.uint8]) -> list[dict[str, Any]]:
    """The masks that StandIn finds, as MaskGenerator would write them."""
    height, width = image.shape[:2]
    masks = []
    for channel in range(3):
        mask = np.asfortranarray(image[..., channel] > 127)
        if not mask.any():
            continue
        rle = coco_mask.encode(mask.astype(np.uint8, order="F"))
        masks.append(
            {
                "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
                "bbox": [float(v) for v in coco_mask.toBbox(rle)],
                "area": int(mask.sum()),
                "predicted_iou": 0.9,
                "stability_score": 0.95,
                "point_coords": [[width / 2, height / 2]],
                "crop_box": [0.0, 0.0, float(width), float(height)],
            }
        )
    return masks


def _labeler(config: Config, num_threads: int, generator: Callable[[], StandIn]) -> ShardLabeler:
    return ShardLabeler(
        lambda _: generator(),
        max_pixels=config.input.max_pixels,
        decode_timeout_s=config.input.decode_timeout_s,
        num_threads=num_threads,
    )


def make_labeler(config: Config, num_threads: int, pace: Pace = Pace()) -> ShardLabeler:
    """For `label_with`; bind pace with functools.partial."""
    return _labeler(config, num_threads, lambda: StandIn(pace))


def make_crashing_labeler(config: Config, num_threads: int) -> ShardLabeler:
    """For `label_with`: crashes at a poisonous image."""
    return _labeler(config, num_threads, lambda: PoisonedGenerator())


def make_sick_labeler(config: Config, num_threads: int) -> ShardLabeler:
    """For `label_with`: crashes at every image."""
    return _labeler(config, num_threads, lambda: PoisonedGenerator(at_every_image=True))


def make_no_labeler(config: Config, num_threads: int) -> ShardLabeler:
    """For `label_with`: a model that cannot be had."""
    raise ConfigError("model.device: cuda is not available")
