"""Masks of whole images as object proposals: average recall (AR), class-agnostic, by pycocotools' COCOeval.

AR@k is the fraction of the known regions that the top k masks of their image cover, averaged over the IoU thresholds
0.50, 0.55, ... 0.95; a mask covers at most one region. Masks are ranked by predicted_iou, or as in the SAM paper
(appendix D.3) by the mean of predicted_iou and stability_score.

An image that several annotators marked counts once per annotator, with the same masks: the regions of every annotator
must be covered, but an object that five of them outlined does not need five masks. (If all regions were pooled, four of
five outlines of an object found exactly would count as missed.)
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from samray.errors import ImageError
from samray.evaluate.coco_index import coco_index
from samray.evaluate.failures import Failures
from samray.evaluate.regions import RegionImage, with_large_regions
from samray.inputs.decode import RGBArray
from samray.rle.records import MaskRecord, Rle

MAX_MASKS: Final = (10, 100, 1000)
"""Maximum number of masks per image, the best ranked first."""
PAPER_MASKS: Final = {"points_per_side": 64, "box_nms_thresh": 0.9, "crop_n_layers": 0}
"""Mask settings of the SAM paper's evaluation of proposals (appendix D.3)."""
FREQUENCIES: Final = {"frequent": "f", "common": "c", "rare": "r"}
"""LVIS's groups of classes, by the number of its training images that show one: over 100, 11 to 100, up to 10."""
_CATEGORY: Final = "object"  # the same for all, because the evaluation is class-agnostic


class MaskSource(Protocol):
    """The part of samray.MaskGenerator that is needed here."""

    def generate(self, images: list[RGBArray]) -> list[list[MaskRecord]]: ...


def by_predicted_iou(mask: MaskRecord) -> float:
    """The rank of a mask as `samray label` sees it."""
    return mask["predicted_iou"]


def by_confidence_and_stability(mask: MaskRecord) -> float:
    """The rank of a mask in the SAM paper (appendix D.3): the mean of predicted IoU and stability score."""
    return (mask["predicted_iou"] + mask["stability_score"]) / 2


@dataclass(frozen=True, slots=True)
class Marked:
    """One annotator's regions on an image, and the masks generated for it."""

    regions: list[Rle]
    masks: list[Rle]
    scores: list[float]
    names: list[str | None] = field(default_factory=list)
    """The class of each region; empty if DATA has none."""


def evaluate_proposals(
    generator: MaskSource,
    images: Iterable[RegionImage | ImageError],
    *,
    min_area: int = 0,
    rank: Callable[[MaskRecord], float] = by_predicted_iou,
    frequencies: Mapping[str, str] | None = None,
    on_image: Callable[[Failures], None] = lambda failures: None,
    on_masks: Callable[[RegionImage, list[MaskRecord]], None] = lambda image, masks: None,
) -> dict[str, Any]:
    """`average_recall` and `largest_found` of the regions of at least min_area pixels, num_masks, num_images,
    num_failed, failures.

    rank: of more than 1,000 masks of an image, the 1,000 with the highest values count. frequencies: also
    `recall_by_frequency`.
    num_images: images that could be used; failures: reason -> number of the others. on_image is called after each
    image, on_masks for each usable one, with only its regions that count, and its records (`MaskGenerator.generate`).
    """
    failures = Failures()
    marked: list[Marked] = []
    num_images = num_masks = 0
    for image in images:
        if isinstance(image, ImageError):
            failures.add(image)
        else:
            # An image that does not fit into memory fails alone; all others stay counted.
            with failures.out_of_memory():
                (masks,) = generator.generate([image.pixels])
                num_images += 1
                masks = sorted(masks, key=rank, reverse=True)[: MAX_MASKS[-1]]
                num_masks += len(masks)
                rles = [mask["segmentation"] for mask in masks]
                scores = [rank(mask) for mask in masks]
                counted = with_large_regions(image, min_area)
                names = counted.names or [[] for _ in counted.annotators]
                marked += [
                    Marked(regions, rles, scores, region_names)
                    for regions, region_names in zip(counted.annotators, names, strict=True)
                ]
                on_masks(counted, masks)
        on_image(failures)
    by_frequency = {} if frequencies is None else recall_by_frequency(marked, frequencies)
    return {
        **average_recall(marked),
        **largest_found(marked),
        **by_frequency,
        "num_masks": num_masks,
        "num_images": num_images,
        **failures.figures(),
    }


def average_recall(marked: Sequence[Marked]) -> dict[str, Any]:
    """ar_10, ar_100, ar_1000 and num_regions; ar_1000_small, _medium and _large over regions of COCO's sizes.

    Sizes: small up to 32 x 32 pixels, medium up to 96 x 96, large above. NaN without regions. Masks with
    equal scores are ranked in their order.
    """
    wanted = [image for image in marked if image.regions]  # images without regions do not affect recall
    num_regions = sum(len(image.regions) for image in wanted)
    sizes = [image.regions[0]["size"] for image in wanted]
    truth = coco_index(
        [(image.regions, [_CATEGORY] * len(image.regions), None) for image in wanted], sizes, [_CATEGORY]
    )
    predicted = coco_index(
        [(image.masks, [_CATEGORY] * len(image.masks), image.scores) for image in wanted], sizes, [_CATEGORY]
    )
    recall = _recall(truth, predicted) if wanted else np.full((1, 4, len(MAX_MASKS)), -1.0)
    mean = np.where(recall[0] < 0, np.nan, recall.mean(axis=0))  # (sizes, numbers of masks); -1 without regions
    return {
        **{f"ar_{number}": float(mean[0, i]) for i, number in enumerate(MAX_MASKS)},
        **{f"ar_{MAX_MASKS[-1]}_{size}": float(mean[i, -1]) for i, size in enumerate(("small", "medium", "large"), 1)},
        "num_regions": num_regions,
    }


def largest_found(marked: Sequence[Marked]) -> dict[str, float]:
    """largest_found_50, _70: fraction of the images whose largest region has a mask with at least this IoU (percent).

    It says whether the masks show the subject of a photograph. NaN without regions.
    """
    best = []
    for image in marked:
        if image.regions:
            areas = coco_mask.area(image.regions)
            best.append(float(best_ious([image.regions[int(areas.argmax())]], image.masks)[0]))
    shares = {percent: np.mean(np.array(best) >= percent / 100) if best else np.nan for percent in (50, 70)}
    return {f"largest_found_{percent}": float(share) for percent, share in shares.items()}


def recall_by_frequency(marked: Sequence[Marked], frequencies: Mapping[str, str]) -> dict[str, Any]:
    """ar_1000_frequent, _common and _rare, and num_regions_ of each: over the regions of LVIS's groups of classes.

    frequencies: class name -> "f", "c" or "r". A mask may cover one region of each group: COCOeval, too, leaves the
    regions of other groups out of the matching. Regions without a name, or of another class, count in no group.
    """
    figures: dict[str, Any] = {}
    for group, letter in FREQUENCIES.items():
        of_group = [
            replace(
                image,
                regions=[
                    region
                    # Without names in DATA no region is in a group.
                    for region, name in zip(image.regions, image.names, strict=False)
                    if name is not None and frequencies.get(name) == letter
                ],
            )
            for image in marked
        ]
        recall = average_recall(of_group)
        figures[f"ar_{MAX_MASKS[-1]}_{group}"] = recall[f"ar_{MAX_MASKS[-1]}"]
        figures[f"num_regions_{group}"] = recall["num_regions"]
    return figures


def _recall(truth: COCO, predicted: COCO) -> npt.NDArray[np.float64]:
    """(IoU thresholds, sizes: all, small, medium, large; numbers of masks), -1 without regions."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        evaluation = COCOeval(truth, predicted, "segm")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = list(MAX_MASKS)
        evaluation.evaluate()
        evaluation.accumulate()
    assert evaluation.params.areaRngLbl == ["all", "small", "medium", "large"]
    # (thresholds, categories, sizes, numbers of masks), with one category.
    return np.asarray(evaluation.eval["recall"][:, 0], np.float64)


def best_ious(truth: Sequence[Rle], predicted: Sequence[Rle]) -> npt.NDArray[np.float64]:
    """For each known mask the IoU of the best predicted mask. Returns (N,), 0 if there is none."""
    if not truth or not predicted:
        return np.zeros(len(truth))
    iou = coco_mask.iou(list(predicted), list(truth), [0] * len(truth))
    best: npt.NDArray[np.float64] = np.asarray(iou, np.float64).max(axis=0)
    return best
