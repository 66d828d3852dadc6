"""The figures of `samray evaluate` against values worked out by hand."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from samray.errors import ImageError
from samray.evaluate import points as points_module
from samray.evaluate.points import answer_clicks, evaluate_points
from samray.evaluate.proposals import (
    Marked,
    average_recall,
    by_confidence_and_stability,
    evaluate_proposals,
    largest_found,
    recall_by_frequency,
)
from samray.evaluate.regions import RegionData, Rle
from tests.support import labelled, standin
from tests.support.handmade import annotation
from tests.support.marked import (
    HEIGHT,
    SMALL,
    TALL,
    WIDE,
    WIDTH,
    known_sam,
    region_image,
    rle,
)

# --- single clicks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [1, 2**25])
def test_points_are_the_means_over_regions_worked_out_by_hand(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(points_module, "_CPU_CHUNK_BYTES", chunk_bytes)
    model = known_sam()
    image = region_image([[TALL, SMALL], [WIDE]])
    figures = evaluate_points(model, [image], min_area=500)  # type: ignore[arg-type]
    assert figures == {
        "miou": pytest.approx(0.5),
        "miou_oracle": pytest.approx(0.75),
        "num_regions": 2,
        "num_images": 1,
        "num_failed": 0,
        "failures": {},
    }
    assert model.num_encoded == 1
    # The centres are (10, 19 or 20) and (x, 20); in the frame of the model each pixel is two wide.
    assert model.clicks[0][0] == 2 * (10 + 0.5) - 0.5
    assert model.clicks[1][1] == 2 * (20 + 0.5) - 0.5


def test_a_click_lies_at_the_centre_and_the_best_scored_mask_is_said() -> None:
    (answers,) = answer_clicks(known_sam(), np.zeros((HEIGHT, WIDTH, 3), np.uint8), np.stack([TALL, WIDE]))  # type: ignore[arg-type]
    assert answers.clicks[0][0] == 10
    assert answers.clicks[1][1] == 20
    assert answers.best.tolist() == [1, 2]
    np.testing.assert_allclose(answers.iou, [[1, 0.5, 0], [0, 0, 0.5]])
    assert answers.pairs == [(0.5, 1.0), (0.5, 0.5)]


def test_failed_images_are_counted_and_the_others_go_on() -> None:
    calls = []
    broken = [ImageError("missing", "a.jpg is gone"), ImageError("missing", "b.jpg"), ImageError("empty", "c.jpg")]
    images = [broken[0], region_image([[TALL, WIDE]]), *broken[1:]]
    figures = evaluate_points(known_sam(), images, on_image=lambda failures: calls.append(len(failures)))  # type: ignore[arg-type]
    assert (figures["num_images"], figures["num_regions"], figures["num_failed"]) == (1, 2, 3)
    assert figures["failures"] == {"missing": 2, "empty": 1}
    assert calls == [1, 1, 2, 3]


def test_points_without_a_region_are_no_number() -> None:
    figures = evaluate_points(known_sam(), [region_image([[SMALL]])])  # type: ignore[arg-type]
    assert (figures["num_regions"], figures["num_images"]) == (0, 1)
    assert math.isnan(figures["miou"])
    assert math.isnan(figures["miou_oracle"])


def test_an_image_that_does_not_fit_into_memory_fails_alone_and_counts_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(points_module, "_CPU_CHUNK_BYTES", 1)
    model = known_sam()
    decode, num_calls = model.decode_points, 0

    def short_of_memory(*args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:  # the second region of the first image
            model.clicks.clear()
            raise MemoryError
        return decode(*args)

    monkeypatch.setattr(model, "decode_points", short_of_memory)
    image = region_image([[TALL, WIDE]])
    figures = evaluate_points(model, [image, image])  # type: ignore[arg-type]
    assert (figures["num_images"], figures["num_regions"]) == (1, 2)
    assert figures["failures"] == {"out_of_memory": 1}
    model.answers = []
    with pytest.raises(IndexError):  # anything else is a fault of ours, and raised
        evaluate_points(model, [image])  # type: ignore[arg-type]


# --- proposals -------------------------------------------------------------------------------------------------------


def square(row: int, column: int, side: int = 10, pixels: int | None = None) -> Rle:
    """A square of an image of 200 x 200, or its first `pixels`, row by row."""
    mask = np.zeros((200, 200), bool)
    inside = np.arange(side * side).reshape(side, side) < (side * side if pixels is None else pixels)
    mask[row : row + side, column : column + side] = inside
    return rle(mask)


def test_average_recall_is_the_one_worked_out_by_hand() -> None:
    """One of two regions is found exactly, by the best-scored mask; the other at IoU 0.62 by the eleventh of eleven."""
    wrong = [square(150, 10 * i) for i in range(9)]
    masks = [square(0, 0), *wrong, square(50, 50, pixels=62)]
    scores = [0.99, *(0.9 - 0.01 * i for i in range(9)), 0.3]
    order = random.Random(3).sample(range(len(masks)), len(masks))  # scores rank them, not their order
    figures = average_recall(
        [Marked([square(0, 0), square(50, 50)], [masks[i] for i in order], [scores[i] for i in order])]
    )
    assert figures["ar_10"] == pytest.approx(0.5)
    assert figures["ar_100"] == figures["ar_1000"] == pytest.approx((1 + 3 / 10) / 2)  # at 0.50, 0.55 and 0.60
    assert figures["num_regions"] == 2
    assert figures["ar_1000_small"] == pytest.approx(figures["ar_1000"])
    assert math.isnan(figures["ar_1000_medium"])
    assert math.isnan(figures["ar_1000_large"])


def test_average_recall_by_size() -> None:
    regions = [square(0, 0, 20), square(0, 40, 40), square(60, 60, 120), square(100, 0, 50)]
    figures = average_recall([Marked(regions, [regions[1], square(60, 60, 120, pixels=120 * 90)], [0.5, 0.6])])
    assert figures["ar_1000_small"] == 0
    assert figures["ar_1000_medium"] == pytest.approx(0.5)
    assert figures["ar_1000_large"] == pytest.approx(0.6)  # IoU 0.75: at 0.50 to 0.75
    assert figures["ar_1000"] == pytest.approx((0 + 1 + 0.6 + 0) / 4)


def test_the_largest_region_of_each_image_is_found_or_not() -> None:
    small, large = square(0, 0), square(60, 60, 120)
    images = [
        Marked([small, large], [small, square(60, 60, 120, pixels=120 * 90)], [0.9, 0.1]),  # IoU 0.75
        Marked([large, small], [small, square(60, 60, 120, pixels=120 * 72)], [0.9, 0.1]),  # IoU 0.6
        Marked([small, large], [small], [0.9]),
        Marked([small], [], []),
        Marked([], [small], [0.9]),
    ]
    assert largest_found(images) == {"largest_found_50": 0.5, "largest_found_70": 0.25}
    assert all(map(math.isnan, largest_found(images[4:]).values()))


def test_average_recall_of_more_than_a_thousand_masks_takes_the_best_thousand() -> None:
    wrong, right = square(150, 0), square(0, 0)
    masks = [wrong] * 1000 + [right]
    below, above = [0.5] * 1000 + [0.4], [0.5] * 1000 + [0.6]
    assert average_recall([Marked([right], masks, below)])["ar_1000"] == 0
    assert average_recall([Marked([right], masks, above)])["ar_10"] == pytest.approx(1)


def test_a_mask_covers_one_region_of_each_annotator() -> None:
    region = square(0, 0)
    assert average_recall([Marked([region, region], [region], [0.9])])["ar_1000"] == pytest.approx(0.5)
    one_each = average_recall([Marked([region], [region], [0.9])] * 3)
    assert (one_each["ar_1000"], one_each["num_regions"]) == (pytest.approx(1), 3)


def test_average_recall_of_no_masks_is_zero_and_of_no_regions_no_number() -> None:
    assert average_recall([Marked([square(0, 0)], [], [])])["ar_1000"] == 0
    without = average_recall([Marked([], [square(0, 0)], [0.5])])
    assert without["num_regions"] == 0
    assert all(math.isnan(value) for name, value in without.items() if name != "num_regions")


class Found:
    """A mask generator that returns the given masks, image by image; an error is raised."""

    def __init__(self, *results: list[dict[str, Any]] | Exception) -> None:
        self.results = iter(results)

    def generate(self, images: list[np.ndarray]) -> list[list[dict[str, Any]]]:
        (masks,) = [next(self.results) for _ in images]
        if isinstance(masks, Exception):
            raise masks
        return [masks]


def test_proposals_rank_by_predicted_iou_and_count_every_annotator() -> None:
    """TALL is found first, WIDE only by a mask below ten others, so that AR@10 misses it for both who marked it."""
    masks = [annotation(WIDE, predicted_iou=0.1)]
    masks += [annotation(SMALL, predicted_iou=0.5)] * 9 + [annotation(TALL, predicted_iou=0.9)]
    shown = []
    images = [region_image([[TALL, WIDE], [WIDE], []]), ImageError("empty", "no bytes"), region_image([[TALL]])]
    figures = evaluate_proposals(
        Found(masks, MemoryError()), images, min_area=500, on_masks=lambda image, masks: shown.append(len(masks))
    )
    assert figures["ar_10"] == pytest.approx(1 / 3)
    assert figures["ar_1000"] == pytest.approx(1)
    assert (figures["num_regions"], figures["num_masks"], figures["num_images"]) == (3, 11, 1)
    assert figures["failures"] == {"empty": 1, "out_of_memory": 1}
    assert shown == [11]
    with pytest.raises(RuntimeError, match="ours"):
        evaluate_proposals(Found(RuntimeError("ours")), [region_image([[TALL]])])


def test_the_papers_rank_keeps_the_thousand_masks_with_the_best_mean_of_confidence_and_stability() -> None:
    """SMALL fits one annotator's region but is the least stable of 1,001; by predicted IoU alone it is the best."""
    masks = [annotation(TALL, predicted_iou=0.6, stability_score=0.9)] * 1000
    masks += [annotation(SMALL, predicted_iou=0.7, stability_score=0.7)]
    images = [region_image([[TALL, SMALL]])]
    paper = evaluate_proposals(Found(masks), images, rank=by_confidence_and_stability)
    assert (paper["ar_1000"], paper["num_masks"]) == (pytest.approx(0.5), 1000)
    assert evaluate_proposals(Found(masks), images)["ar_10"] == pytest.approx(1)


def test_average_recall_is_the_one_of_a_plain_script_on_cocoeval() -> None:
    rng = np.random.default_rng(7)

    def squares(number: int) -> list[Rle]:
        return [square(*rng.integers(0, 150, 2), int(rng.integers(5, 50))) for _ in range(number)]

    marked = []
    for _ in range(3):
        masks = squares(1100)
        marked.append(Marked(squares(12) + masks[:5], masks, rng.random(1100).tolist()))

    def as_coco(masks: list[list[Rle]], scores: list[list[float]]) -> COCO:
        coco = COCO()
        annotations = [
            {
                "image_id": i + 1,
                "category_id": 1,
                "iscrowd": 0,
                "segmentation": mask,
                "area": float(mask_util.area(mask)),
                "score": score,
            }
            for i, (masks_of_image, ranks) in enumerate(zip(masks, scores, strict=True))
            for mask, score in zip(masks_of_image, ranks, strict=True)
        ]
        coco.dataset = {
            "images": [{"id": i + 1, "height": 200, "width": 200} for i in range(3)],
            "annotations": [{**one, "id": i + 1} for i, one in enumerate(annotations)],
            "categories": [{"id": 1}],
        }
        coco.createIndex()
        return coco

    plain = COCOeval(
        as_coco([one.regions for one in marked], [[0.0] * len(one.regions) for one in marked]),
        as_coco([one.masks for one in marked], [one.scores for one in marked]),
        "segm",
    )
    plain.params.useCats, plain.params.maxDets = 0, [10, 100, 1000]
    plain.evaluate()
    plain.accumulate()
    recall = plain.eval["recall"][:, 0]  # (IoU thresholds, sizes, numbers of masks)
    figures = average_recall(marked)
    assert 0.2 < figures["ar_1000"] < 0.9
    assert [figures["ar_10"], figures["ar_100"], figures["ar_1000"]] == recall[:, 0].mean(axis=0).tolist()
    assert [figures["ar_1000_small"], figures["ar_1000_medium"]] == recall[:, 1:3, 2].mean(axis=0).tolist()


def test_recall_by_frequency_counts_each_class_in_its_group() -> None:
    """One mask fits a cat and a frequent dog alike; of two rare regions one is found; a fish is of no group."""
    regions = [square(0, 0), square(0, 0), square(50, 50), square(100, 100), square(150, 150)]
    names = ["cat", "dog", "okapi", "okapi", "fish"]
    figures = recall_by_frequency(
        [Marked(regions, [square(0, 0), square(50, 50)], [0.9, 0.8], names)], {"cat": "c", "dog": "f", "okapi": "r"}
    )
    assert figures == {
        "ar_1000_frequent": pytest.approx(1),
        "num_regions_frequent": 1,
        "ar_1000_common": pytest.approx(1),
        "num_regions_common": 1,
        "ar_1000_rare": pytest.approx(0.5),
        "num_regions_rare": 2,
    }


def test_small_regions_are_left_out_with_their_names() -> None:
    image = dataclasses.replace(region_image([[TALL, SMALL, WIDE]]), names=[["tall", "small", "wide"]])
    figures = evaluate_proposals(
        Found([annotation(WIDE)]), [image], min_area=500, frequencies={"wide": "r", "small": "c", "tall": "f"}
    )
    assert [figures[f"num_regions_{group}"] for group in ("frequent", "common", "rare")] == [1, 0, 1]
    assert figures["ar_1000_rare"] == pytest.approx(1)
    assert figures["ar_1000_frequent"] == 0


def test_proposals_of_the_labeller_itself_recall_everything(tmp_path: Path) -> None:
    plan = labelled.make_output(str(tmp_path))
    figures = evaluate_proposals(standin.StandIn(), RegionData(plan.output))
    assert figures["ar_1000"] == pytest.approx(1)
    assert figures["num_images"] == 9
    assert figures["num_regions"] == figures["num_masks"] == 3 * 8  # one image is black
    assert figures["failures"] == {"not_an_image": 1}
