"""`samray edges`: the main job with another generator. Each image gets an edge map, as PNG, instead of masks.

The maps of a shard are written before its Parquet file, which remains the only mark that the shard is done. Each map is
written all or nothing, under a name that follows from the plan: a shard that is done again replaces them by the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from samray import storage
from samray.config import Config
from samray.config.edges import EdgesConfig
from samray.errors import ImageError
from samray.masks.edge_png import encode_edges
from samray.output.file_names import shared_stems, stem_of
from samray.output.schema import ImageRecord
from samray.pipeline.labeler import EncodedImage, ShardLabeler, make_record, shard_labeler
from samray.pipeline.plan_run import RunPlan
from samray.pipeline.report import LabelReport
from samray.pipeline.run import label_with

if TYPE_CHECKING:
    from samray.sam.sam import Sam

FOLDER: Final = "edges"
"""Folder of the maps in OUTPUT."""


def detect_edges(
    input: str | Path,
    output: str | Path,
    config: EdgesConfig | None = None,
    *,
    retry_failed: bool = False,
    append: bool = False,
    redo_changed: bool = False,
    progress: bool = True,
) -> LabelReport:
    """Write an edge map of every image of input to output/edges/, or finish an earlier run.

    The map of `a/1.jpg` is `edges/a/1.png`, grey, as large as the image. output also has the plan, and one row per
    image with its status, as for `samray.label`, whose options these are. Source: SAM paper, sections 7.2 and D.2.
    Raises ConfigError before anything starts, StorageError if storage is unavailable.
    """
    return detect_edges_with(
        input,
        output,
        config or EdgesConfig(),
        retry_failed=retry_failed,
        append=append,
        redo_changed=redo_changed,
        progress=progress,
    )


def detect_edges_with(
    input: str | Path,
    output: str | Path,
    config: EdgesConfig,
    *,
    make_labelers: Callable[[str], EdgeLabelers] | None = None,
    on_plan: Callable[[RunPlan], None] = lambda planned: None,
    **options: Any,
) -> LabelReport:
    """`detect_edges`, with make_labelers(folder of the maps) to create what makes the labelers; by default with the
    model of config. on_plan is called with the plan before anything is started."""
    make = (make_labelers or EdgeLabelers)(storage.join(storage.normalize(str(output)), FOLDER))

    def planned(plan: RunPlan) -> None:
        # Filled before the actors get a copy: names that would collide are known only with the plan.
        make.stems.update(shared_stems(plan.plan, endings=(".png",)))
        model = plan.plan.run["identity"]["model"]
        make.checkpoint_sha256, make.adapter_sha256 = model.get("checkpoint_sha256"), model.get("adapter_sha256")
        on_plan(plan)

    report = label_with(
        input,
        output,
        config,
        make_labeler=make,
        with_model=make_labelers is None,
        on_plan=planned,
        **options,
    )
    report.maps, report.warning = make.folder, None  # it warns of images without masks
    return report


@dataclass
class EdgeLabelers:
    """Makes the labelers of a run, in its actors."""

    folder: str
    """Where the maps go."""
    checkpoint_sha256: str | None = None
    adapter_sha256: str | None = None
    stems: dict[int, str] = field(default_factory=dict)
    """image_id -> name of the map without its extension, for images that would share it with another."""

    def __call__(self, config: Config, num_threads: int) -> ShardLabeler:
        from samray.masks.edges import EdgeGenerator

        assert isinstance(config, EdgesConfig)

        def make_generator(model: Sam, points_per_batch: int | None) -> EdgeGenerator:
            return EdgeGenerator(model, config.edges, points_per_batch=points_per_batch)

        make = functools.partial(EdgeLabeler, self, config.edges.bits)
        return shard_labeler(config, num_threads, self.checkpoint_sha256, make_generator, make, self.adapter_sha256)

    def uri(self, image: EncodedImage) -> str:
        """Where the map of an image goes."""
        stem = self.stems.get(image.image_id) or stem_of(image.file_name)
        return storage.join(self.folder, f"{stem}.png")


class EdgeLabeler(ShardLabeler):
    """Writes the map of each image, and returns a row without masks."""

    def __init__(self, made_by: EdgeLabelers, bits: int, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._made_by, self._bits = made_by, bits

    def record(self, image: EncodedImage, decoded: np.ndarray | ImageError, result: Any) -> ImageRecord:
        """Raises: StorageError."""
        if isinstance(result, ImageError):
            return make_record(image, decoded, result)
        if image.file_name:  # not of the built-in image of `alone`
            # Before the row is returned, so before the shard's file: a finished shard has all of its maps.
            storage.put(self._made_by.uri(image), encode_edges(result, self._bits))
        return make_record(image, decoded, [])
