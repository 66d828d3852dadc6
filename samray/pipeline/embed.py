"""`samray embed`: the main job with another generator. Each image gets its embedding, and a row without masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samray.config.embed import EmbedConfig
from samray.pipeline.kept import Embedder
from samray.pipeline.labeler import ShardLabeler, shard_labeler
from samray.pipeline.plan_run import RunPlan
from samray.pipeline.report import LabelReport
from samray.pipeline.run import label_with

if TYPE_CHECKING:
    from samray.config import Config
    from samray.sam.sam import Sam


def embed(
    input: str | Path,
    output: str | Path,
    config: EmbedConfig | None = None,
    *,
    retry_failed: bool = False,
    append: bool = False,
    redo_changed: bool = False,
    progress: bool = True,
) -> LabelReport:
    """Store the embedding of every image of input in output/embeddings/, or finish an earlier run.

    output also has the plan, and one row per image with its status, as for `samray.label`, whose options these are.
    `samray.label_from` makes masks from it, and `samray.read_embedding` reads one image.
    Raises ConfigError before anything starts, StorageError if storage is unavailable.
    """
    return embed_with(
        input,
        output,
        config or EmbedConfig(),
        retry_failed=retry_failed,
        append=append,
        redo_changed=redo_changed,
        progress=progress,
    )


def embed_with(
    input: str | Path,
    output: str | Path,
    config: EmbedConfig,
    *,
    make_labeler: Callable[[Config, int], ShardLabeler] | None = None,
    on_plan: Callable[[RunPlan], None] = lambda planned: None,
    **options: Any,
) -> LabelReport:
    """`embed`, with make_labeler(config, num_threads) to create the labeler of each actor; by default with the model of
    config. on_plan is called with the plan before anything is started."""
    make = EmbedLabelers()

    def planned(plan: RunPlan) -> None:
        # Before the actors get a copy: each checks the weights that it loads.
        model = plan.plan.run["identity"]["model"]
        make.checkpoint_sha256, make.adapter_sha256 = model.get("checkpoint_sha256"), model.get("adapter_sha256")
        on_plan(plan)

    report = label_with(
        str(input),
        str(output),
        config,
        make_labeler=make_labeler or make,
        with_model=make_labeler is None,
        on_plan=planned,
        **options,
    )
    report.only_embeddings, report.warning = True, None  # it warns of images without masks
    return report


@dataclass
class EmbedLabelers:
    """Makes the labelers of a run, in its actors."""

    checkpoint_sha256: str | None = None
    adapter_sha256: str | None = None

    def __call__(self, config: Config, num_threads: int) -> ShardLabeler:
        """Raises: as `shard_labeler`."""
        from samray.masks.generator import MaskGenerator

        def make_generator(model: Sam, points_per_batch: int | None) -> Embedder:
            # A given number means a retry after running out of memory.
            return Embedder(MaskGenerator(model, frugal=points_per_batch is not None), config.output.embeddings)

        return shard_labeler(
            config, num_threads, self.checkpoint_sha256, make_generator, adapter_sha256=self.adapter_sha256
        )
