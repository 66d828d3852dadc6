"""Segmentation from one example: how well each design of `labels.by=example` finds a class, by class IoU.

For each class and seed a random image is the example, with all its regions of the class as the mask; the others are
searched. Intersections and unions are summed over the images, as usual for few-shot segmentation. Only images that
have the class are searched: it is known that the class is there, but not its place.

A colour histogram is the baseline: a pixel belongs to the class if its colour is more frequent inside of the example's
mask than outside.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask

from samray.config import Config
from samray.config.labels import DESIGNS
from samray.errors import ConfigError, ImageError
from samray.evaluate.failures import Failures
from samray.evaluate.regions import Bool, RegionImage
from samray.inputs.decode import RGBArray
from samray.labels.example import Example
from samray.labels.ways import function_named
from samray.rle.records import Rle
from samray.sam.sam import Sam

HISTOGRAM: Final = "histogram"
METHODS: Final = (*DESIGNS, HISTOGRAM)
"""The rows of the table."""

_BINS: Final = 8
"""Bins of each channel of the CIELAB histogram."""


@dataclass(frozen=True, slots=True)
class ClassImage:
    """An image, and the pixels of one class in it."""

    pixels: RGBArray
    counts: Rle

    @property
    def mask(self) -> Bool:
        """(H, W) bool."""
        return np.asarray(coco_mask.decode(self.counts), bool)


class Method(Protocol):
    """Finds a class in an image after it has seen one example."""

    def __call__(self, pixels: RGBArray) -> Bool: ...


def sample_classes(
    images: Iterable[RegionImage | ImageError],
    *,
    num_classes: int,
    images_per_class: int,
    min_fraction: float,
    on_image: Callable[[Failures], None] = lambda failures: None,
) -> tuple[dict[str, list[ClassImage]], Failures]:
    """The most frequent classes, each with a random sample of images in which it covers at least min_fraction.

    A class needs two images. Raises: ConfigError if DATA names no regions.
    """
    failures, rng = Failures(), random.Random(0)
    sample: dict[str, list[ClassImage]] = {}
    frequency: dict[str, int] = {}
    for image in images:
        if isinstance(image, ImageError):
            failures.add(image)
        else:
            for name, counts in _regions_by_name(image).items():
                if coco_mask.area(counts) < min_fraction * image.pixels.shape[0] * image.pixels.shape[1]:
                    continue
                frequency[name] = frequency.get(name, 0) + 1
                kept = sample.setdefault(name, [])
                # Reservoir sampling: each image of a class is equally likely to stay.
                slot = len(kept) if len(kept) < images_per_class else rng.randrange(frequency[name])
                if slot < images_per_class:
                    kept[slot : slot + 1] = [ClassImage(image.pixels, counts)]
        on_image(failures)
    if not sample:
        raise ConfigError("DATA has no regions with a class name: expected `names` or `label`, see the guide")
    chosen = sorted((name for name in sample if len(sample[name]) > 1), key=lambda name: (-frequency[name], name))
    return {name: sample[name] for name in chosen[:num_classes]}, failures


def _regions_by_name(image: RegionImage) -> dict[str, Rle]:
    """All regions of each name of the first annotator as one."""
    by_name: dict[str, list[Rle]] = {}
    if image.names:
        for region, name in zip(image.annotators[0], image.names[0], strict=False):
            if name is not None:
                by_name.setdefault(name, []).append(region)
    return {name: coco_mask.merge(regions) for name, regions in by_name.items()}


def evaluate_oneshot(
    model: Sam,
    config: Config,
    classes: Mapping[str, Sequence[ClassImage]],
    *,
    methods: Sequence[str] = METHODS,
    num_seeds: int = 2,
    on_search: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Class IoU of each method. config: `labels` of any example; its design is replaced by each method's.

    Returns `methods`: method -> mean (over classes, then seeds), std (over seeds) and classes (name -> mean over
    seeds); and num_searches. on_search is called after each example has been used by a method.
    """
    scores: dict[str, npt.NDArray[np.float64]] = {method: np.zeros((num_seeds, len(classes))) for method in methods}
    num_searches = 0
    for seed in range(num_seeds):
        for column, (name, images) in enumerate(classes.items()):
            key = random.Random(f"{seed} {name}").randrange(len(images))
            others = [image for i, image in enumerate(images) if i != key]
            example = Example(images[key].pixels, images[key].mask)
            num_searches += len(others)
            for method in methods:
                find = _method(method, model, config, example)
                scores[method][seed, column] = class_iou([(find(other.pixels), other.mask) for other in others])
                on_search()
    return {
        "methods": {
            method: {
                "mean": float(of_seeds.mean()),
                "std": float(of_seeds.mean(axis=1).std()),
                "classes": dict(zip(classes, of_seeds.mean(axis=0).tolist(), strict=True)),
            }
            for method, of_seeds in scores.items()
        },
        "num_searches": num_searches,
    }


def class_iou(pairs: Iterable[tuple[Bool, Bool]]) -> float:
    """Sum of intersections over sum of unions of predicted and true masks; 0 if all are empty."""
    intersections = unions = 0
    for predicted, true in pairs:
        intersections += int(np.count_nonzero(predicted & true))
        unions += int(np.count_nonzero(predicted | true))
    return intersections / max(unions, 1)


def _method(method: str, model: Sam, config: Config, example: Example) -> Method:
    if method == HISTOGRAM:
        return Histogram(example)
    labels = config.labels.model_copy(update={"design": method})
    generator = function_named(DESIGNS[method])(model, config.model_copy(update={"labels": labels}), example)

    def find(pixels: RGBArray) -> Bool:
        (masks,) = generator.generate([pixels])
        if not masks:
            return np.zeros(pixels.shape[:2], bool)
        return np.asarray(coco_mask.decode(coco_mask.merge([mask["segmentation"] for mask in masks])), bool)

    return find


class Histogram:
    """The baseline: colours more frequent inside of the example's mask than outside, in CIELAB."""

    def __init__(self, example: Example) -> None:
        bins, size = _bins_of(example.pixels), _BINS**3
        inside, outside = (np.bincount(bins[mask], minlength=size) for mask in (example.mask, ~example.mask))
        self.is_inside = inside / max(inside.sum(), 1) > outside / max(outside.sum(), 1)

    def __call__(self, pixels: RGBArray) -> Bool:
        return np.asarray(self.is_inside[_bins_of(pixels)])


def _bins_of(pixels: RGBArray) -> npt.NDArray[np.int64]:
    lab = np.asarray(Image.fromarray(pixels).convert("LAB")).astype(np.int64) * _BINS // 256
    return lab[..., 0] * _BINS**2 + lab[..., 1] * _BINS + lab[..., 2]
