"""`jobs/benchmark.py edge-draws DATA`: how far the BSDS500 benchmark's results can be reproduced at all.

The benchmark completes its matching problem with arcs to outliers that it draws with a generator seeded from the clock.
Here the whole of that problem is solved, with other draws each time, at the thresholds around the published best one.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from ortools.graph.python.linear_sum_assignment import SimpleLinearSumAssignment
from skimage.morphology import thin

from samray import storage
from samray.evaluate.edge_data import EdgeData
from samray.evaluate.edge_matching import MAX_DISTANCE, Bool, EdgeCounts, Int64, pixel_pairs, thresholds_of
from samray.evaluate.edge_scores import best_f
from samray.evaluate.edges import map_in_data
from samray.masks.edge_png import decode_edges
from samray.storage.tables import read_parquet

AROUND: Final = range(-2, 4)
"""Thresholds around the published one, in steps of 0.01."""
DEGREE: Final = 6
"""Arcs that are drawn for each pixel and each pair of outliers."""
TOLERANCE: Final = 0.005


def edge_draws(data: str, draws: int, seed: int, names: list[str] | None) -> dict[str, Any]:
    """Per draw, in how many images the best threshold is the published one, with R, P and F within 0.005.

    data: images with maps, boundaries and published threshold, recall, precision and f. names: of the images whose
    matching is repeated; None: all. whole_numbers: in how many of all images the published recall and precision are
    whole numbers of the boundary and edge pixels that are counted here; whole_numbers_of: images whose published
    threshold is one of the 99, not interpolated.
    """
    thresholds = thresholds_of(99)
    hits = np.zeros((0, draws), bool)
    whole: list[bool] = []
    images: dict[str, Any] = {}
    for image, row in zip(EdgeData(data), read_parquet(storage.read_bytes(data)).to_pylist(), strict=True):
        edges = decode_edges(map_in_data(image), image.hw, image.name)
        boundaries = image.boundary_masks()
        # The threshold at or below the published one, which may be interpolated.
        at = int(row["threshold"] * 100 + 1e-6) - 1
        if abs(row["threshold"] - thresholds[at]) < 1e-6:
            whole.append(_is_whole(row, boundaries, thin(edges >= thresholds[at])))
        if names is not None and image.name not in names:
            continue
        around = thresholds[[at + step for step in AROUND if 0 <= at + step < len(thresholds)]]
        bests = [
            best_f(around, _counts(edges, boundaries, around, np.random.default_rng([seed, draw])))
            for draw in range(draws)
        ]
        agrees = [
            abs(best.threshold - row["threshold"]) < 1e-4
            and all(abs(getattr(best, name) - row[name]) <= TOLERANCE for name in ("recall", "precision", "f"))
            for best in bests
        ]
        hits = np.vstack([hits, agrees])
        if not all(agrees):
            published = {name: row[name] for name in ("threshold", "recall", "precision", "f")}
            images[image.name] = {
                "agreeing_draws": sum(agrees),
                "published": published,
                "draws": [[round(float(value), 5) for value in best] for best in bests],
            }
    return {
        "images": len(hits),
        "whole_numbers": sum(whole),
        "whole_numbers_of": len(whole),
        "agreeing_images_per_draw": hits.sum(axis=0).tolist(),
        "not_in_every_draw": images,
    }


def _is_whole(row: dict[str, Any], boundaries: list[Bool], edges: Bool) -> bool:
    matched = (row["recall"] * sum(int(b.sum()) for b in boundaries), row["precision"] * int(edges.sum()))
    # Six digits are published.
    return all(abs(number - round(number)) < 1e-6 * number + 1e-3 for number in matched)


def _counts(edges: npt.NDArray[Any], boundaries: list[Bool], thresholds: Any, rng: np.random.Generator) -> EdgeCounts:
    """As `count_matches`, with the benchmark's whole matching problem."""
    counts = np.zeros((4, len(thresholds)), np.int64)
    for index, threshold in enumerate(thresholds):
        thinned = thin(edges >= threshold)
        matched = np.zeros_like(thinned)
        for boundary in boundaries:
            of_map, of_boundary = _match(thinned, boundary, rng)
            matched |= of_map
            counts[:2, index] += of_boundary.sum(), boundary.sum()
        counts[2:, index] = matched.sum(), thinned.sum()
    return EdgeCounts(*counts)


def _match(first: Bool, second: Bool, rng: np.random.Generator) -> tuple[Bool, Bool]:
    """Which pixels of each have a match, (H, W)."""
    max_pixels = MAX_DISTANCE * float(np.hypot(*first.shape))
    i, j, distances = pixel_pairs(first, second, max_pixels)
    matched1, matched2 = np.zeros(first.shape, bool), np.zeros(second.shape, bool)
    if len(i) == 0:
        return matched1, matched2
    rows, i = np.unique(i, return_inverse=True)
    columns, j = np.unique(j, return_inverse=True)
    num1, num2 = len(rows), len(columns)
    outlier_cost = int(np.ceil(100 * max_pixels * 100))
    own1, own2 = np.arange(num1), np.arange(num2)
    # Rows: pixels of the first map, then outliers; columns: pixels of the second map, then outliers.
    outliers1 = _drawn(rng, num1, num1 - 1)
    outliers1 += outliers1 >= own1[:, None]  # any but its own
    outliers2 = _drawn(rng, num2, num2 - 1)
    outliers2 += outliers2 >= own2[:, None]
    pairs = _drawn(rng, max(num1, num2), min(num1, num2))
    most = np.repeat(np.arange(len(pairs)), pairs.shape[1])
    of_pairs = (num1 + most, num2 + pairs.ravel()) if num1 < num2 else (num1 + pairs.ravel(), num2 + most)
    arcs: list[tuple[Int64, Int64, Int64 | int]] = [
        (i, j, distances),
        (np.repeat(own1, outliers1.shape[1]), num2 + outliers1.ravel(), outlier_cost),
        (num1 + outliers2.ravel(), np.repeat(own2, outliers2.shape[1]), outlier_cost),
        (*of_pairs, outlier_cost),
        (own1, num2 + own1, 100 * outlier_cost),
        (num1 + own2, own2, 100 * outlier_cost),
    ]
    problem = SimpleLinearSumAssignment()
    for tails, heads, costs in arcs:
        problem.add_arcs_with_cost(
            tails.astype(np.int32), heads.astype(np.int32), np.broadcast_to(costs, tails.shape).astype(np.int64)
        )
    status = problem.solve()
    assert status == problem.OPTIMAL, status  # its own outliers are a solution
    mates = np.fromiter((problem.right_mate(row) for row in range(num1)), np.int64, num1)
    has_match = mates < num2
    matched1.flat[np.flatnonzero(first)[rows[has_match]]] = True
    matched2.flat[np.flatnonzero(second)[columns[mates[has_match]]]] = True
    return matched1, matched2


def _drawn(rng: np.random.Generator, num: int, below: int) -> Int64:
    """(num, DEGREE) numbers below a limit, those of a row all different; fewer columns if the limit is lower."""
    degree = min(DEGREE, below)
    drawn = rng.integers(0, max(below, 1), (num, degree))
    while True:
        ordered = np.sort(drawn, axis=1)
        repeats = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if not repeats.any():
            return drawn
        drawn[repeats] = rng.integers(0, below, (int(repeats.sum()), degree))
