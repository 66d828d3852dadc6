"""The classical segmentation: a tree that partitions the picture at every cost, and finds what is there to be seen."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from samray.train.regions import RegionTree, region_tree


def blocks(height: int = 96, width: int = 128) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Four noisy rectangles, of which the two on the left have almost the same colour; and the rectangle of a pixel."""
    quadrant = (np.arange(height)[:, None] >= height // 2) * 2 + (np.arange(width) >= width // 2)
    colours = np.array([[200, 60, 60], [40, 80, 200], [185, 60, 60], [40, 190, 70]])
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    return (colours[quadrant] + noise).clip(0, 255).astype(np.uint8), quadrant


@pytest.fixture(scope="module")
def tree() -> RegionTree:
    return region_tree(blocks()[0])


def test_every_node_is_what_its_children_are_together(tree: RegionTree) -> None:
    num_leaves = int(tree.leaves.max()) + 1
    assert len(tree.parent) == 2 * num_leaves - 1
    assert (np.bincount(tree.leaves.ravel()) == tree.area[:num_leaves]).all()
    assert tree.parent[-1] == -1
    assert tree.area[-1] == tree.leaves.size
    for node in range(num_leaves, len(tree.parent)):
        children = np.flatnonzero(tree.parent == node)
        assert len(children) == 2
        assert (children < node).all()
        assert tree.area[children].sum() == tree.area[node]
        assert (tree.cost[children] <= tree.cost[node]).all()
        both = tree.mask(int(children[0])).astype(int) + tree.mask(int(children[1]))
        assert (both == tree.mask(node)).all()


@pytest.mark.parametrize("cost", [0.0, 1.0, 5.0, 20.0, 1e9])
def test_a_cut_covers_every_pixel_once(tree: RegionTree, cost: float) -> None:
    assert (sum(tree.mask(int(node)).astype(int) for node in tree.cut(cost)) == 1).all()


def test_the_regions_to_be_seen_are_found_and_alike_ones_merge_first(tree: RegionTree) -> None:
    quadrant = blocks()[1]
    wanted = [quadrant == i for i in range(4)] + [quadrant % 2 == 0]
    large = [tree.mask(int(node)) for node in np.flatnonzero(tree.area > 1000)]
    for region in wanted:
        assert max((mask & region).sum() / (mask | region).sum() for mask in large) > 0.95


def test_one_colour_is_one_region_in_the_end() -> None:
    tree = region_tree(np.full((40, 50, 3), 90, np.uint8))
    assert (tree.mask(len(tree.parent) - 1)).all()
    assert tree.cost[-1] == pytest.approx(0, abs=1e-3)
