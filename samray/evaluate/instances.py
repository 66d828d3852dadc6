"""Masks with names against known regions with names: COCO's mask AP by pycocotools' COCOeval, and a confusion matrix.

AP is the area under the precision-recall curve of the masks, averaged over the IoU thresholds 0.50, 0.55, ... 0.95;
AP50 and AP75 are those at one threshold. Per name, only masks and regions of that name count; class-agnostic, all do,
whatever their names. Masks are ranked by label_score, or by predicted_iou if they have none.

An image that several annotators marked counts once per annotator, with the same masks, as in
`samray.evaluate.proposals`.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from samray.config import Config
from samray.errors import ConfigError, ImageError
from samray.evaluate.coco_index import coco_index
from samray.evaluate.confusion import Confusion
from samray.evaluate.failures import Failures
from samray.evaluate.proposals import MaskSource
from samray.evaluate.regions import RegionData, RegionImage, black, with_large_regions
from samray.labels.ways import generator_maker, read_inputs
from samray.masks.generator import MaskGenerator
from samray.rle.records import Rle
from samray.sam.sam import Sam

MAX_MASKS: Final = 100
"""Most masks per image and name, the best ranked first, as in COCO."""

_AP: Final = {"ap": slice(None), "ap_50": slice(0, 1), "ap_75": slice(5, 6)}
"""Key -> the IoU thresholds that it averages over."""


@dataclass(frozen=True, slots=True)
class Masks:
    """The masks of an image, with their names (None: no name) and the scores that rank them."""

    rles: list[Rle]
    names: list[str | None]
    scores: list[float]


@dataclass(frozen=True, slots=True)
class Judged:
    """One annotator's regions of an image, and its masks."""

    regions: list[Rle]
    names: list[str | None]
    masks: Masks


Pair = tuple[RegionImage, Masks]


def generator_of(model: Sam | torch.device, config: Config) -> MaskSource:
    """The generator that `samray label` would use: with names if labels.by is set. model: the device, if it needs no
    SAM. Raises: ConfigError."""
    inputs = read_inputs(config)
    if inputs is None:
        assert isinstance(model, Sam)
        return MaskGenerator(model, config.masks)
    generator: MaskSource = generator_maker(model, config, inputs)(None)
    return generator


def labelled(
    generator: MaskSource,
    images: Iterable[RegionImage | ImageError],
    on_image: Callable[[Failures], None] = lambda failures: None,
) -> tuple[list[Pair], Failures]:
    """Label the images. on_image is called after each one."""
    failures, pairs = Failures(), []
    for image in images:
        if isinstance(image, ImageError):
            failures.add(image)
        else:
            with failures.out_of_memory():
                (records,) = generator.generate([image.pixels])
                scores = [record.get("label_score") for record in records]
                masks = Masks(
                    [record["segmentation"] for record in records],
                    [record.get("label") for record in records],
                    # Not `or`: a score may be 0.
                    [r["predicted_iou"] if s is None else s for r, s in zip(records, scores, strict=True)],
                )
                pairs.append((_without_pixels(image), masks))
        on_image(failures)
    return pairs, failures


def matched(
    images: Iterable[RegionImage | ImageError],
    output: RegionData,
    on_image: Callable[[Failures], None] = lambda failures: None,
) -> tuple[list[Pair], Failures]:
    """Take the masks of the images from an output, by file_name.

    An image that the output does not have, or has failed on, counts as failed. on_image is called for each image of
    DATA. Raises: ConfigError if a file_name comes twice, or if no image is in the output.
    """
    if output.layout != "sa1b":
        raise ConfigError(f"--masks {output.where} is not in samray's layout, but in {output.layout}'s; give an OUTPUT")
    failures, wanted = Failures(), dict[str, RegionImage]()
    for image in images:
        if isinstance(image, ImageError):
            failures.add(image)
        elif image.file_name in wanted:
            raise ConfigError(f"DATA has two images with the file_name {image.file_name!r}: --masks cannot be matched")
        else:
            wanted[image.file_name] = _without_pixels(image)
        on_image(failures)
    masks_of: dict[str, Masks] = {}
    for image in output:
        # A failed row of the output has no name to match: its image stays without masks below.
        if isinstance(image, RegionImage) and (known := wanted.get(image.file_name)):
            if image.file_name in masks_of:
                raise ConfigError(f"{output.where} has two images with the file_name {image.file_name!r}")
            masks_of[image.file_name] = _checked(image, known)
    if wanted and not masks_of:
        first_name = next(iter(wanted))
        raise ConfigError(
            f"{output.where} has none of the images of DATA, of which the first is {first_name!r} (file_name)"
        )
    for name in [name for name in wanted if name not in masks_of]:
        failures.add(ImageError("missing", f"{output.where} has no masks for {name}"))
    return [(image, masks_of[name]) for name, image in wanted.items() if name in masks_of], failures


def _checked(image: RegionImage, known: RegionImage) -> Masks:
    """Raises: ConfigError if the image has another size in DATA."""
    if image.pixels.shape != known.pixels.shape:
        size_in_output, size_in_data = (
            f"{of_side.pixels.shape[1]}x{of_side.pixels.shape[0]}" for of_side in (image, known)
        )
        raise ConfigError(f"{image.file_name!r} is {size_in_output} pixels in --masks, but {size_in_data} in DATA")
    (rles,) = image.annotators  # samray's layout
    return Masks(rles, _names_of(image, 0), image.scores)


def _names_of(image: RegionImage, annotator: int) -> list[str | None]:
    """One name per region, also if DATA has none."""
    names = image.names[annotator] if annotator < len(image.names) else []
    missing = [None] * (len(image.annotators[annotator]) - len(names))
    return [None if name is None else str(name) for name in [*names, *missing]]


def _without_pixels(image: RegionImage) -> RegionImage:
    height, width = image.pixels.shape[:2]
    return replace(image, pixels=black((height, width)))


def evaluate_instances(pairs: Iterable[Pair], *, max_masks: int = MAX_MASKS) -> tuple[dict[str, Any], Confusion]:
    """Average precision per name and class-agnostic, and the confusion matrix.

    max_masks: most masks per image and name (class-agnostic: per image).
    Returns ap, ap_50 and ap_75, the means over the names that have a region; ap_agnostic, ap_50_agnostic and
    ap_75_agnostic; `names`: name -> its ap, ap_50, ap_75, num_regions and num_masks, most regions first; num_regions,
    num_masks and num_images. NaN without regions.
    """
    judged: list[Judged] = []
    num_images = num_masks = 0
    for image, masks in pairs:
        num_images += 1
        num_masks += len(masks.rles)
        counted = with_large_regions(image, min_area=1)
        judged += [Judged(regions, _names_of(counted, i), masks) for i, regions in enumerate(counted.annotators)]
    num_regions = Counter(name for of_image in judged for name in of_image.names)
    mask_names = Counter(name for of_image in judged for name in of_image.masks.names)
    names = sorted((num_regions.keys() | mask_names.keys()) - {None}, key=lambda name: (-num_regions[name], str(name)))
    known = [str(name) for name in names]
    by_name, agnostic = _precisions(judged, known, max_masks)
    confusion = Confusion(known)
    for of_image in judged:
        confusion.add(of_image.regions, of_image.names, of_image.masks.rles, of_image.masks.names)
    return {
        **{key: _mean(by_name[thresholds]) for key, thresholds in _AP.items()},
        **{f"{key}_agnostic": _mean(agnostic[thresholds]) for key, thresholds in _AP.items()},
        "names": {
            name: {
                **{key: _mean(by_name[thresholds, :, index]) for key, thresholds in _AP.items()},
                "num_regions": num_regions[name],
                "num_masks": mask_names[name],
            }
            for index, name in enumerate(known)
        },
        "num_regions": num_regions.total(),
        "num_masks": num_masks,
        "num_images": num_images,
    }, confusion


def _precisions(
    judged: Sequence[Judged], names: Sequence[str], max_masks: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(IoU thresholds, recalls, names) and (IoU thresholds, recalls, 1); -1 for a name without regions."""
    # Images without regions and masks change nothing.
    judged = [of_image for of_image in judged if of_image.regions or of_image.masks.rles]
    if not judged:
        return np.full((10, 101, len(names)), -1.0), np.full((10, 101, 1), -1.0)
    sizes = [(of_image.regions or of_image.masks.rles)[0]["size"] for of_image in judged]
    truth = coco_index([(of_image.regions, of_image.names, None) for of_image in judged], sizes, names)
    predicted = coco_index(
        [(of_image.masks.rles, of_image.masks.names, of_image.masks.scores) for of_image in judged], sizes, names
    )
    by_name, agnostic = (_precision(truth, predicted, use_names, max_masks) for use_names in (True, False))
    return by_name, agnostic


def _precision(truth: COCO, predicted: COCO, use_names: bool, max_masks: int) -> npt.NDArray[np.float64]:
    """(IoU thresholds, recalls, categories)."""
    if use_names and not truth.dataset["categories"]:
        return np.full((10, 101, 0), -1.0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        evaluation = COCOeval(truth, predicted, "segm")
        evaluation.params.useCats = int(use_names)
        if not use_names:  # then it still leaves out masks of other than these
            evaluation.params.catIds = [*evaluation.params.catIds, len(evaluation.params.catIds) + 1]
        evaluation.params.maxDets = [max_masks]
        # Regions of all sizes only, in a quarter of the time.
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    # (thresholds, recalls, categories, sizes, numbers of masks)
    return np.asarray(evaluation.eval["precision"][:, :, :, 0, 0], np.float64)


def _mean(precision: npt.NDArray[np.float64]) -> float:
    """Mean over what has regions; NaN if nothing has."""
    counted = precision[precision > -1]
    return float(counted.mean()) if counted.size else math.nan
