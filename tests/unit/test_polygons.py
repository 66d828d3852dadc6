"""Outlines of masks as polygons: filled, they are the very mask, and its components and holes are OpenCV's."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from samray.rle.polygons import join, outlines, simplified
from samray.rle.runs import run_lengths
from tests.support.exported import fill
from tests.support.handmade import HEIGHT, WIDTH, annotation, blob


def runs_of(mask: np.ndarray) -> np.ndarray:
    runs = run_lengths(annotation(mask)["segmentation"]["counts"])
    assert runs is not None
    return runs


def components_of(mask: np.ndarray) -> list[list[np.ndarray]]:
    """The outer ring and the holes of each component."""
    (components,) = outlines([runs_of(mask)], mask.shape)
    return components


def ring_with_island() -> np.ndarray:
    mask = np.zeros((12, 12), dtype=bool)
    mask[1:11, 1:11] = True
    mask[3:9, 3:9] = False
    mask[5:7, 5:7] = True
    mask[5, 5] = False
    return mask


def checkers() -> np.ndarray:
    return np.indices((9, 7)).sum(axis=0) % 2 == 0


SHAPES = {
    "one pixel": np.eye(1, dtype=bool),
    "one pixel of many": np.arange(20).reshape(4, 5) == 13,
    "everything": np.ones((4, 6), dtype=bool),
    "touching corners": np.eye(5, dtype=bool),
    "checkers": checkers(),
    "checkers inverted": ~checkers(),
    "a ring with an island that has a hole": ring_with_island(),
    "one row": np.array([[1, 0, 1, 1, 0, 1]], dtype=bool),
    "one column": np.array([[1], [0], [1]], dtype=bool),
    "frame at the border": np.pad(np.zeros((3, 3), dtype=bool), 1, constant_values=True),
    **{f"noise {seed}": np.random.default_rng(seed).random((17, 23)) < 0.5 for seed in range(20)},
    **{f"blob {seed}": blob(seed) for seed in range(20)},
}


@pytest.mark.parametrize("name", SHAPES)
def test_polygons_fill_to_the_very_mask(name: str) -> None:
    mask = SHAPES[name]
    height, width = mask.shape
    polygons = [join(rings) for rings in components_of(mask)]
    parts = [fill(polygon, mask.shape) for polygon in polygons]
    assert np.array_equal(np.sum(parts, axis=0), mask)  # each component by itself, and none over another
    assert np.array_equal(fill(join(polygons), mask.shape), mask)  # and all in one
    # pycocotools' own filling, in which a component's hole is a bridge away and no second polygon
    flat = [polygon.ravel().astype(float).tolist() for polygon in polygons]
    merged = coco_mask.merge(coco_mask.frPyObjects(flat, height, width))
    assert np.array_equal(coco_mask.decode(merged).astype(bool), mask)


def test_polygons_are_those_of_opencv() -> None:
    """As many components and holes as OpenCV finds, where a component is joined by edges and not by corners."""
    cv2 = pytest.importorskip("cv2", reason="opencv is in the test extra: the count of outlines is NOT compared")
    for seed in range(20):
        mask = blob(seed)
        components = components_of(mask)
        num_components = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] - 1
        background = cv2.connectedComponents(np.pad(~mask, 1, constant_values=True).astype(np.uint8), connectivity=8)
        assert len(components) == num_components
        assert sum(len(rings) - 1 for rings in components) == background[0] - 2


def test_outlines_of_many_masks_are_those_of_each() -> None:
    runs = [runs_of(blob(seed)) for seed in range(5)]
    together = list(outlines([*runs, np.array([HEIGHT * WIDTH])], (HEIGHT, WIDTH)))  # the last one empty
    assert together[-1] == []
    for one, outline in zip(runs, together, strict=False):
        (alone,) = outlines([one], (HEIGHT, WIDTH))
        flat = [[ring.tolist() for ring in rings] for rings in outline]
        assert flat == [[ring.tolist() for ring in rings] for rings in alone]


def test_outer_rings_and_holes_run_opposite_ways() -> None:
    components = components_of(ring_with_island())

    def doubled_area(ring: np.ndarray) -> int:
        x, y = ring.T
        return int(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))

    areas = sorted([doubled_area(ring) // 2 for ring in rings] for rings in components)
    assert areas == [[-100, 36], [-3]]


def test_very_many_rings_are_joined_in_time() -> None:
    mask = np.random.default_rng(0).random((200, 200)) < 0.5
    components = components_of(mask)
    assert len(components) > 1000
    assert np.array_equal(fill(join([join(rings) for rings in components]), mask.shape), mask)


def test_simplified_rings_stay_within_the_tolerance() -> None:
    y, x = np.indices((80, 80))
    disc = (x - 40) ** 2 + (y - 40) ** 2 < 30**2
    ((ring,),) = components_of(disc)
    fewer = simplified(ring, 1.0)
    assert len(fewer) < len(ring) / 4
    filled = fill(fewer, disc.shape)
    assert (filled & disc).sum() / (filled | disc).sum() > 0.95
