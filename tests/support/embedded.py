"""Outputs with embeddings, made by small random models without Ray, as a run makes them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from jobs.benchmarks.weights import random_sam
from samray import storage
from samray.config import Config, load_config
from samray.config.embed import EmbedConfig
from samray.inputs.listing import fetch_images
from samray.masks.generator import MaskGenerator
from samray.output.embedding_files import EmbeddingWriter
from samray.output.plan import Plan, make_plan
from samray.output.schema import records_to_table
from samray.output.shards import commit_shard, mark_success, read_shard, replace_shard
from samray.pipeline.fetch import indices_to_redo
from samray.pipeline.kept import Embedder
from samray.pipeline.labeler import EncodedImage, ShardLabeler, build_labeler
from samray.pipeline.plan_run import run_identity
from samray.pipeline.write import put_rows
from samray.sam.spec import ModelSpec
from tests.support.labelled import make_input

MASKS = ("masks.points_per_side=4", "masks.pred_iou_thresh=0.8", "masks.stability_score_thresh=0.5")


@functools.cache
def weights_of(spec: ModelSpec) -> dict[str, Any]:
    return {name: tensor.contiguous() for name, tensor in random_sam(spec).state_dict().items()}


def write_weights(spec: ModelSpec, path: Path) -> str:
    save_file(weights_of(spec), path)
    return str(path)


def config_of(spec: ModelSpec, checkpoint: str, *overrides: str) -> Config:
    base = [f"model.checkpoint={checkpoint}", "output.images_per_shard=4", *MASKS]
    resolved = load_config(None, None, [*base, *overrides])
    # The names of settings are checked against a table that only knows published models.
    sections = {name: getattr(resolved, name) for name in Config.model_fields}
    return Config(**{**sections, "model": resolved.model.model_copy(update={"name": spec.name})})


def begin(root: str, config: Config, number: int = 10) -> Plan:
    """The plan of `root`/in to `root`/labels."""
    source = make_input(storage.join(root, "in"), "files", number)
    return make_plan(source, storage.join(root, "labels"), config, run_identity(config))


def labeler_of(config: Config) -> ShardLabeler:
    if isinstance(config, EmbedConfig):
        model: Any = build_labeler(config, 1).generators[0]
        generator = MaskGenerator(model._generator.model)
        return ShardLabeler(lambda _: Embedder(generator, config.output.embeddings), max_pixels=10**6)
    return build_labeler(config, 1)


def do_shard(plan: Plan, config: Config, labeler: ShardLabeler, shard: int, *, retry: bool = False) -> None:
    """Label a shard and commit it, in the order of the pipeline; retry: only what is to be done again."""
    rows = plan.read_shard(shard)
    indices = indices_to_redo(plan, shard, True) if retry else list(range(rows.num_rows))
    images = images_of(rows.take(indices), shard, config)
    level = config.output.compression_level
    if config.output.embeddings == "none":
        done = labeler.label(images)
    else:
        writer = EmbeddingWriter(plan, shard, indices, retry=retry, compression_level=level)
        done = labeler.label(images, lambda batch: writer.add(batch.records))
    table = records_to_table(done.records, plan.run)
    if retry:
        replace_shard(plan.output, shard, put_rows(read_shard(plan.output, shard), indices, table))
    else:
        commit_shard(plan.output, shard, table)


def images_of(rows: Any, shard: int, config: Config) -> list[EncodedImage]:
    fetched = fetch_images(rows, config.input)
    columns: Sequence[str] = ("image_id", "file_name", "uri")
    each = zip(*(rows[name].to_pylist() for name in columns), fetched, strict=True)
    return [EncodedImage(*values, shard=shard) for values in each]


def finish(plan: Plan, config: Config) -> Plan:
    """All shards, and `_SUCCESS`."""
    labeler = labeler_of(config)
    for shard in range(plan.num_shards):
        do_shard(plan, config, labeler, shard)
    mark_success(plan.output, num_images=plan.num_images, num_failed=1)
    return plan
