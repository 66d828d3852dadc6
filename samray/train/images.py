"""Unlabelled training images: whatever `samray label` takes as INPUT, and synthetic scenes, as random square crops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from samray import storage
from samray.config import InputConfig
from samray.errors import ConfigError, ImageError, StorageError
from samray.inputs.decode_apart import decode_apart
from samray.inputs.listing import check_readable, fetch_images, list_images
from samray.inputs.repeats import mark_duplicates
from samray.scenes.paint import Source
from samray.scenes.scene import Scene, make_scene
from samray.train.augment import RGB, View
from samray.train.cutouts import CutoutSource
from samray.train.data import SCENES, check_names
from samray.train.examples import Arrays, Frame, held_out
from samray.train.mixture import Examples, Mixture
from samray.train.order import EpochOrder
from samray.train.settings import DataConfig, TrainSettings

CROP_AREA = (0.2, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
"""Area of a crop as a fraction of the image, and its ratio of width to height (MAE's RandomResizedCrop)."""
_TRIES = 8
"""Unreadable images in a row before an example fails."""


def open_images(data: Sequence[str], settings: TrainSettings) -> Mixture:
    """All DATA, mixed. Raises: ConfigError if one has no image, StorageError."""
    config, seed = settings.data, settings.train.seed
    check_names(data, "an INPUT of `samray label`")
    parts: list[Examples] = []
    for index, uri in enumerate(data):
        if uri == SCENES:
            source = CutoutSource(config.sources, Path(config.cache)) if config.sources else None
            parts.append(SceneImages(source, config, seed))
        else:
            parts.append(ImageExamples(uri, settings.input, config, seed, index))
    return Mixture(parts, config.shares, seed)


def draw_crop(height: int, width: int, size: int, flip_fraction: float, rng: np.random.Generator) -> View:
    """A random crop, stretched to size x size. Source: MAE, appendix A.1; torchvision's RandomResizedCrop."""
    is_flipped = bool(rng.random() < flip_fraction)
    # As in torchvision: ten tries, then the middle.
    for _ in range(10):
        area = height * width * rng.uniform(*CROP_AREA)
        # Uniform in the logarithm: wide is as likely as tall.
        ratio = math.exp(rng.uniform(*np.log(CROP_RATIO)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = float(rng.uniform(0, width - w)), float(rng.uniform(0, height - h))
            return View((left, top, left + w, top + h), (size, size), is_flipped)
    return View(centre_square(height, width), (size, size), is_flipped)


def centre_square(height: int, width: int) -> tuple[float, float, float, float]:
    """Left, upper, right, lower of the largest square in the middle."""
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)


class ImageExamples:
    """The images of an INPUT, without the held-out ones; each epoch has its own order. Picklable.

    An example is {"image": (S, S, 3) uint8}. An unreadable image is replaced by the next one.
    Raises: ConfigError if there is nothing to train on, StorageError.
    """

    def __init__(self, uri: str, limits: InputConfig, config: DataConfig, seed: int, index: int = 0) -> None:
        if config.where is not None:
            raise ConfigError(
                "data.where selects labelled images and masks, but these images have no labels; leave it out"
            )
        self.where, self.limits, self.config = storage.redact(uri), limits, config
        self.seed, self.index = seed, index
        self.rows = list_images(uri, limits).images
        if limits.skip_duplicates:
            self.rows = mark_duplicates(self.rows, limits)
        check_readable(self.rows, uri)
        is_held_out = held_out(self.rows["uri"].to_pylist(), config.validation_fraction)
        self.train, self.heldout = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
        if len(self.train) == 0:
            raise ConfigError(
                f"all {len(is_held_out)} images of {self.where} are held out; lower data.validation_fraction"
            )
        self.order = EpochOrder(self.train, [seed, index])

    @property
    def num_images(self) -> int:
        return len(self.train)

    def example(self, draw: int, frame: Frame) -> Arrays:
        rng = np.random.default_rng([self.seed, self.index, draw])
        size, last = frame.image_size, None
        num_tries = min(_TRIES, len(self.train))
        for attempt in range(num_tries):
            try:
                image = self._image(self.order[draw + attempt])
            except ImageError as error:
                last = error
                continue
            view = draw_crop(image.shape[0], image.shape[1], size, self.config.flip_fraction, rng)
            return {"image": view.of_image(image)}
        raise StorageError(
            f"{num_tries} of {len(self.train)} training images of {self.where} in a row cannot be used, the last:"
            f" {last}"
        )

    def _image(self, index: int) -> RGB:
        """(H, W, 3). Raises: ImageError, StorageError."""
        [data] = fetch_images(self.rows.slice(index, 1), self.limits)
        if isinstance(data, ImageError):
            raise data
        # In a child process with limits, because these images may be damaged or hostile.
        return decode_apart(data, self.limits)

    def validation(self, limit: int, frame: Frame) -> Iterator[Scene]:
        """The square in the middle of held-out images, S x S, without masks."""
        num_seen = 0
        for index in self.heldout[np.random.default_rng(0).permutation(len(self.heldout))]:
            if num_seen == limit:
                return
            try:
                image = self._image(int(index))
            except ImageError:
                continue
            num_seen += 1
            size = frame.image_size
            yield unlabelled(View(centre_square(image.shape[0], image.shape[1]), (size, size)).of_image(image))


class SceneImages:
    """Synthetic scenes as unlabelled images: draw i is a crop of scene i."""

    num_images: int | None = None

    def __init__(self, source: Source | None, config: DataConfig, seed: int) -> None:
        self.source, self.config, self.first_seed = source, config, seed * 2**40

    def example(self, draw: int, frame: Frame) -> Arrays:
        seed, size = self.first_seed + draw, frame.image_size
        image = make_scene(seed, size, self.source).image
        return {
            "image": draw_crop(size, size, size, self.config.flip_fraction, np.random.default_rng(seed)).of_image(image)
        }

    def validation(self, limit: int, frame: Frame) -> Iterator[Scene]:
        for seed in range(limit):
            yield unlabelled(make_scene(seed, frame.image_size, self.source, "heldout").image)


def unlabelled(image: RGB) -> Scene:
    """An image without masks."""
    return Scene(image=np.ascontiguousarray(image), masks=np.zeros((0, *image.shape[:2]), bool), kinds=[])


def to_png_rows(rows: Sequence[Sequence[RGB]], gap: int = 4) -> Image.Image:
    """Images of one size, in rows, with a white gap between them."""
    h, w = rows[0][0].shape[:2]
    sheet = Image.new("RGB", (len(rows[0]) * (w + gap) - gap, len(rows) * (h + gap) - gap), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet.paste(Image.fromarray(image), (j * (w + gap), i * (h + gap)))
    return sheet
