"""`labels.by=example`: find what one example shows, in the way that `labels.design` names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from samray import storage
from samray.config.labels import DESIGNS
from samray.errors import ConfigError, ImageError, NotFoundError
from samray.inputs.decode import RGBArray, decode_image
from samray.inputs.decode_apart import decode_apart
from samray.labels.ways import MakeGenerator, function_named

if TYPE_CHECKING:
    from samray.config import Config
    from samray.sam.sam import Sam


@dataclass(frozen=True, slots=True)
class Example:
    """An image, and the pixels of it that show the class."""

    pixels: RGBArray
    """(H, W, 3) uint8 RGB, upright."""
    mask: npt.NDArray[np.bool_]
    """(H, W), not empty."""


@dataclass(frozen=True, slots=True)
class ExampleFiles:
    """The example as its two encoded files."""

    image: bytes
    mask: bytes
    name: str
    max_pixels: int

    @property
    def categories(self) -> list[str]:
        return [self.name]

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "example_sha256": hashlib.sha256(self.image).hexdigest(),
            "example_mask_sha256": hashlib.sha256(self.mask).hexdigest(),
        }

    def plan_rows(self, config: Config) -> list[tuple[str, str]]:
        labels = config.labels
        return [("masks", f"named {labels.name!r}, like {labels.example} ({labels.design})")]

    def decode(self) -> Example:
        """The pixels. The files were read once by `read_example`, in a process of its own."""
        return Example(decode_image(self.image, self.max_pixels), _is_class(decode_image(self.mask, self.max_pixels)))


def _is_class(picture: RGBArray) -> npt.NDArray[np.bool_]:
    return np.asarray(picture.any(axis=2))


def read_example(config: Config) -> ExampleFiles:
    """Read and check the example's files. Raises: ConfigError that names the setting, StorageError."""
    labels = config.labels
    assert labels.example is not None
    assert labels.example_mask is not None
    assert labels.name is not None
    image, pixels = _read("labels.example", labels.example, config)
    mask, picture = _read("labels.example_mask", labels.example_mask, config)
    if pixels.shape != picture.shape:
        sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (picture, pixels)]
        raise ConfigError(f"labels.example_mask is {sizes[0]} pixels, but labels.example is {sizes[1]}")
    if not picture.any():
        raise ConfigError("labels.example_mask is black: it needs another colour where the class is")
    return ExampleFiles(image, mask, labels.name, config.input.max_pixels)


def _read(setting: str, uri: str, config: Config) -> tuple[bytes, RGBArray]:
    uri = storage.normalize(uri)
    try:
        data = storage.read_bytes(uri)
        return data, decode_apart(data, config.input.model_copy(update={"bands": None, "stretch": None}))
    except NotFoundError as error:
        raise ConfigError(f"{setting} {storage.redact(uri)} does not exist") from error
    except ImageError as error:
        raise ConfigError(f"{setting} {storage.redact(uri)} cannot be read as an image: {error}") from error


def build_generator(model: Sam, config: Config, files: ExampleFiles) -> MakeGenerator:
    """Factory of an actor's generators: the example is decoded and encoded once for all of them."""
    shared = function_named(DESIGNS[config.labels.design])(model, config, files.decode())
    return lambda points_per_batch: shared.another()
