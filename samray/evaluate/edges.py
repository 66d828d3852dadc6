"""Boundary detection (SAM paper, section 7.2): edge maps against the boundaries that people drew.

The maps come first, the matching after them: it takes most of the time, needs no model, and runs as one task per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from samray.cluster.tasks import run_tasks
from samray.errors import ImageError
from samray.evaluate.edge_data import EdgeImage
from samray.evaluate.edge_matching import EdgeCounts, check_installed, count_matches, thresholds_of
from samray.evaluate.edge_scores import best_f, edge_scores
from samray.evaluate.failures import Failures
from samray.masks.edge_png import decode_edges

MapSource = Callable[[EdgeImage], bytes]
"""Gives the edge map of an image as PNG. Raises: ImageError."""


def map_in_data(image: EdgeImage) -> bytes:
    """The map in DATA itself."""
    if image.map_png is None:
        raise ImageError("missing", f"{image.name} has no map_png in DATA")
    return image.map_png


def evaluate_edges(
    images: Iterable[EdgeImage],
    maps: MapSource,
    num_thresholds: int,
    *,
    on_ray: bool = False,
    address: str | None = None,
    on_map: Callable[[], None] = lambda: None,
    on_image: Callable[[Failures], None] = lambda failures: None,
) -> dict[str, Any]:
    """`edge_scores`, num_images, num_failed, failures (reason -> number), and per_image.

    maps: called for each image, in this process. num_thresholds: with equal steps between 0 and 1. on_ray, address: as
    for `run_tasks`. on_map is called after each map, on_image after each image. per_image: for each image that could be
    used its name and the threshold, recall, precision and F where F is best.
    Raises: ConfigError if OR-Tools or scikit-image is not installed.
    """
    # Before the maps are made, which may take long.
    check_installed()
    failures = Failures()
    names: list[str] = []
    counts: list[EdgeCounts] = []
    with_maps = _with_maps(images, maps, failures, on_map)
    task = partial(_count, num_thresholds=num_thresholds)
    for name, result in run_tasks(task, with_maps, on_ray=on_ray, address=address):
        if isinstance(result, ImageError):
            failures.add(result)
        else:
            names.append(name)
            counts.append(result)
        on_image(failures)
    thresholds = thresholds_of(num_thresholds)
    pairs = sorted(zip(names, counts, strict=True), key=lambda pair: pair[0])  # Ray's tasks end in any order
    per_image = [{"name": name, **best_f(thresholds, edge_counts)._asdict()} for name, edge_counts in pairs]
    scores = edge_scores(thresholds, counts) if counts else {}
    return {**scores, "num_images": len(counts), **failures.figures(), "per_image": per_image}


def _with_maps(
    images: Iterable[EdgeImage], maps: MapSource, failures: Failures, on_map: Callable[[], None]
) -> Iterator[EdgeImage]:
    """The images with their maps; those without one count as failed."""
    for image in images:
        data: bytes | None = None
        try:
            data = maps(image)
        except ImageError as error:
            failures.add(error)
        on_map()
        if data is not None:
            # Without the image, which would only be sent to the task.
            yield replace(image, map_png=data, jpeg=None)


def _count(image: EdgeImage, num_thresholds: int) -> tuple[str, EdgeCounts | ImageError]:
    """The work of one task."""
    try:
        boundaries = image.boundary_masks()
        if not boundaries:
            raise ImageError("empty", f"{image.name} has no boundaries: no annotator marked it")
        assert image.map_png is not None
        edges = decode_edges(image.map_png, image.hw, image.name)
    except ImageError as error:
        return image.name, error
    return image.name, count_matches(edges, boundaries, thresholds_of(num_thresholds))
