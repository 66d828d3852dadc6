"""Single clicks on synthetic scenes, by kind of target: used by training, model comparisons and the demo."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from samray.evaluate.points import answer_clicks, mean_ious
from samray.sam.sam import Sam
from samray.scenes.paint import Source, Split
from samray.scenes.scene import Scene, make_scene


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
    found: dict[str, list[tuple[float, float]]] = {"object": []}
    for scene in scenes:
        pairs = [pair for answers in answer_clicks(model, scene.image, scene.masks) for pair in answers.pairs]
        for kind, pair in zip(scene.kinds, pairs, strict=True):
            found.setdefault(kind, []).append(pair)
    by_kind = {kind: mean_ious(pairs) for kind, pairs in found.items()}
    return {**by_kind["object"], "by_kind": by_kind}
