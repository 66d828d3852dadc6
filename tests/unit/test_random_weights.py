"""The seeded weights of the benchmarks and tests: every family finds many masks under them."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.benchmarks.weights import blobs, random_sam
from samray.config import MaskConfig
from samray.masks import MaskGenerator
from samray.sam.spec import ModelSpec
from tests.support.micro import FAMILIES, MICRO, MICRO_VIT


@pytest.mark.parametrize(
    "spec", [MICRO, MICRO_VIT, *FAMILIES], ids=lambda spec: f"{spec.name} {type(spec.encoder).__name__}"
)
def test_masks_are_many_and_distinct(spec: ModelSpec) -> None:
    settings = MaskConfig(points_per_side=8, stability_score_thresh=0.5)
    (masks,) = MaskGenerator(random_sam(spec), settings).generate([blobs(1, (60, 80))])
    assert len(masks) > 3
    assert len({mask["area"] for mask in masks}) > 3
    assert np.std([mask["predicted_iou"] for mask in masks]) > 0
