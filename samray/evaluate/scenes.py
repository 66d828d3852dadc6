"""Synthetic scenes to measure on: single clicks by kind of target, for training, model comparisons and the demo; and
scenes whose objects have names as DATA of `samray evaluate oneshot`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
from pycocotools import mask as coco_mask

from samray.evaluate.points import answer_clicks, mean_ious
from samray.evaluate.regions import RegionImage
from samray.sam.sam import Sam
from samray.scenes.named import named_scene
from samray.scenes.paint import Source, Split
from samray.scenes.scene import Scene, make_scene

SCENES: Final = "scenes"
"""The DATA that means `NamedScenes`."""

_NUM_SCENES: Final = 100


class NamedScenes:
    """DATA like `samray.evaluate.regions.RegionData`: painted scenes with a name for each region that has one."""

    where, layout = SCENES, SCENES

    def __init__(self, limit: int | None = None) -> None:
        self.num_images = _NUM_SCENES if limit is None else limit

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[RegionImage]:
        for seed in range(self.num_images):
            scene = named_scene(seed)
            # pycocotools reads masks column by column.
            rles = [coco_mask.encode(np.asfortranarray(mask, np.uint8)) for mask in scene.masks]
            yield RegionImage(f"{SCENES} {seed}", scene.image, [rles], [list(scene.names)])


def heldout_scenes(
    num_scenes: int, size: int = 256, source: Source | None = None, *, first_seed: int = 0, split: Split = "heldout"
) -> Iterator[Scene]:
    """The fixed scenes for comparing models: seeds from `first_seed`, objects that training never shows."""
    for seed in range(first_seed, first_seed + num_scenes):
        yield make_scene(seed, size, source, split)


def evaluate_clicks(model: Sam, scenes: Iterable[Scene]) -> dict[str, Any]:
    """Mean IoU of one centre click per target, at the scenes' own resolution.

    Returns miou, miou_oracle and num_regions as `mean_ious` does, over the whole objects, and by_kind with the same
    three values for each kind. NaN without targets.
    """
    ious_of_kind: dict[str, list[tuple[float, float]]] = {"object": []}
    for scene in scenes:
        pairs = [pair for answers in answer_clicks(model, scene.image, scene.masks) for pair in answers.pairs]
        for kind, pair in zip(scene.kinds, pairs, strict=True):
            ious_of_kind.setdefault(kind, []).append(pair)
    by_kind = {kind: mean_ious(pairs) for kind, pairs in ious_of_kind.items()}
    return {**by_kind["object"], "by_kind": by_kind}
