"""The plan of a run, printed before it starts or, in a dry run, instead."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.markup import escape

from samray import storage
from samray.cluster.cpus import allowed_cpus
from samray.cluster.gpus import num_gpus
from samray.config import Config, InputConfig, MaskConfig
from samray.config.base import as_typed
from samray.config.models import MODELS
from samray.output.destination import check_is_folder
from samray.text import abridged, count, duration, size, two_columns

if TYPE_CHECKING:
    from samray.inputs.prompt_file import MatchedPrompts
    from samray.inputs.skipped import Skipped
    from samray.output.append import InputChanges
    from samray.pipeline.plan_run import Preview, RunPlan


_LONG_S: Final = 24 * 3600
_MANY_PROMPTS: Final = 50_000
_VALUE_BYTES: Final = {"float32": 4, "float16": 2, "int8": 1}


def print_plan(planned: RunPlan) -> None:
    """Print the plan of a run or dry run to stderr."""
    plan = planned.plan
    num_done = sum(plan.num_images_of(shard) for shard in planned.versions)
    most = max(generation.images_per_shard for generation in plan.generations)
    cut = " in" if planned.preview is None else ", to be cut into"
    done = f"{count(num_done, 'image')} in {count(len(planned.versions), 'shard')}" if planned.versions else "none"
    rows = [
        ("input", _inputs(planned)),
        ("images", f"{plan.num_images:,}{cut} {count(plan.num_shards, 'shard')} of up to {most}"),
        ("done before", done),
        *_change_rows(planned.changes),
        *_prompts(planned.prompts),
        *skipped_rows(planned.skipped),
        *_problems(planned.preview),
    ]
    sha256 = plan.run["identity"]["model"].get("checkpoint_sha256")
    output = plan.output if planned.preview is None else planned.preview.output_uri
    finds_all = planned.config.labels.finds_all and planned.config.finds_masks
    masks = [("masks", masks_in_words(planned.config))] if finds_all else []
    if planned.config.output.embeddings != "none":
        masks += embedding_rows(planned.config, output, plan.num_images - num_done)
    masks += [] if planned.labels is None else planned.labels.plan_rows(planned.config)
    _print(rows, masks, output, planned.config, sha256, plan.num_images - num_done)


def _inputs(planned: RunPlan) -> str:
    if planned.preview is not None:
        return planned.preview.input_uri
    return ", ".join(dict.fromkeys(generation.identity["input_uri"] for generation in planned.plan.generations))


def _change_rows(changes: InputChanges) -> list[tuple[str, str]]:
    """Differences between INPUT and the plan, and what will be done about them."""
    if not changes.listed:
        return [("new images", "not checked: INPUT was not listed again; --append adds new images")]
    rows = []
    if changes.num_new:
        rows.append(
            ("new images", f"{changes.num_new:,}, {'added' if changes.appended else 'left out (--append adds them)'}")
        )
    if changes.loses_geo:
        rows.append(
            ("", "with TIFFs; their CRS is not stored, as OUTPUT has no column geo: label them into a new OUTPUT")
        )
    if changes.num_changed:
        what = "will be labelled again" if changes.redone else "kept (--redo-changed labels them again)"
        rows.append(("changed images", f"{changes.num_changed:,}, {what}: {', '.join(changes.examples)}"))
    return rows


def skipped_rows(skipped: Skipped) -> list[tuple[str, str]]:
    """Files that the listing of INPUT left out, one row per reason."""
    return [("left out" if i == 0 else "", line) for i, line in enumerate(skipped.lines())]


def _problems(preview: Preview | None) -> list[tuple[str, str]]:
    """Images that cannot be read according to the listing: how many, and why the first one."""
    if preview is None or not preview.num_unreadable:
        return []
    return [("will fail", f"{count(preview.num_unreadable, 'image')}; the first: {preview.first_problem}")]


def _prompts(prompts: MatchedPrompts | None) -> list[tuple[str, str]]:
    """User prompts: how many, and for which images they could not be matched."""
    if prompts is None:
        return []
    rows = [("prompts", f"{prompts.num_prompts:,}, on {count(len(prompts.by_index), 'image')}")]
    if prompts.num_unknown:
        shown = abridged(prompts.unknown, len(prompts.unknown), total=prompts.num_unknown)
        rows.append(
            ("not found", f"{count(prompts.num_unknown, 'image')} with prompts that INPUT does not have: {shown}")
        )
    return rows


def _print(
    rows: list[tuple[str, str]],
    masks: list[tuple[str, str]],
    output: str,
    config: Config,
    checkpoint_sha256: str | None,
    num_images: int,
) -> None:
    rows = [
        *rows,
        *model_rows(config, checkpoint_sha256),
        *_bands(config.input),
        *masks,
        *cost_rows(config, num_images),
        ("runs on", _where(config)),
        ("output", output),
    ]
    table = two_columns()
    for name, value in rows:
        table.add_row(f"[bold]{name}[/bold]", escape(storage.redact(value)))
    Console(stderr=True, highlight=False).print(table, soft_wrap=True)


def _bands(config: InputConfig) -> list[tuple[str, str]]:
    """The bands used as red, green and blue."""
    bands = "the first three" if config.bands is None else as_typed(config.bands)
    rows = [] if config.bands is None and config.stretch is None else [("bands", bands)]
    if config.stretch is not None:
        low, high = config.stretch
        rows.append(("stretch", f"percentiles {low:g} to {high:g} of each image and band"))
    return rows


def model_rows(config: Config, checkpoint_sha256: str | None) -> list[tuple[str, str]]:
    """The SAM that makes the masks, if one does."""
    if not config.labels.needs_sam:
        return []
    model = f"{config.model.name}, {config.model.checkpoint or 'its own weights'}"
    if checkpoint_sha256:
        model += f" (SHA-256 {checkpoint_sha256[:12]}...)"
    if config.model.adapter is not None:
        model += f" with the adapter {config.model.adapter}"
    return [("model", model)]


def cost_rows(config: Config, num_images: int) -> list[tuple[str, str]]:
    """Estimated cost of the run: prompts per image, time on CPUs, weights to download.

    num_images: images left to label.
    """
    rows = []
    if config.labels.finds_all and not config.masks_are_prompted:
        passes, prompts = work_per_image(config.masks) if config.finds_masks else (1, 0)
        tile = config.masks.tile if config.finds_masks else None
        per = "image" if tile is None else f"image of up to {tile}x{tile} and per tile of a larger one"
        asked = f"{count(prompts, 'prompt')} per {per}, " if config.finds_masks else ""
        rows.append(("work", f"{asked}image encoder run {count(passes, 'time')}"))
        if tile is not None:
            overlap = f"overlapping by {config.masks.tile_overlap:.0%} or more, and an overview"
            rows.append(("tiles", f"{overlap}; their number is known once the run has read the images' headers"))
        cpu_s = None if tile is not None else _cpu_seconds(config, passes, prompts)
        if cpu_s is not None and num_images:
            seconds = cpu_s * num_images
            words = f"roughly {duration(seconds)} on these CPUs for {count(num_images, 'image')}"
            if seconds > _LONG_S:
                fewer = (
                    "to save time, lower masks.points_per_side or masks.crop_n_layers, or use a smaller model or GPUs"
                )
                words = f"WARNING: {words}; {fewer}"
            rows.append(("time", words))
        elif prompts > _MANY_PROMPTS:
            rows.append(("WARNING", f"{count(prompts, 'prompt')} per image take long on any GPU; SA-1B used 3,072"))
    if config.labels.needs_sam and config.model.checkpoint is None:
        from samray.sam.weights_file import local_weights

        spec = MODELS[config.model.name]
        if spec.url is not None and local_weights(spec) is None:
            rows.append(("download", f"{spec.size_mb:,.0f} MB of weights, once per machine"))
    return rows


def embedding_rows(config: Config, output: str, num_images: int) -> list[tuple[str, str]]:
    """Size of the stored embeddings before compression, with a warning if a local OUTPUT has less space.

    num_images: images left to encode.
    """
    dtype = config.output.embeddings
    num_bytes = MODELS[config.model.name].embedding_values * _VALUE_BYTES[dtype]
    rows = [("embeddings", f"stored as {dtype}, {size(num_bytes)} per image, {size(num_bytes * num_images)} in all")]
    if storage.is_local(output):
        folder = check_is_folder(output)
        free = shutil.disk_usage(folder).free
        if num_bytes * num_images > free:
            fewer = "" if dtype == "int8" else ", or set output.embeddings to a smaller type"
            rows.append(("WARNING", f"the disk of {folder} has {size(free)} left; choose another OUTPUT{fewer}"))
    return rows


def work_per_image(masks: MaskConfig) -> tuple[int, int]:
    """Encoder passes and point prompts per image: layer i has 4^i crops."""
    layers = range(masks.crop_n_layers + 1)
    if masks.point_grids is not None:
        points = [len(grid) for grid in masks.point_grids]
    else:
        points = [int(masks.points_per_side / masks.crop_n_points_downscale_factor**layer) ** 2 for layer in layers]
    return sum(4**layer for layer in layers), sum(points[layer] * 4**layer for layer in layers)


def _cpu_seconds(config: Config, passes: int, prompts: int) -> float | None:
    """CPU seconds per image, within a factor of about three; None if the run is not on this machine's CPUs."""
    core_seconds = MODELS[config.model.name].core_seconds
    if config.cluster.address or os.environ.get("RAY_ADDRESS") or core_seconds is None:
        return None
    if num_gpus() and config.model.device != "cpu":
        return None
    encode, decode = core_seconds
    # The cores that this process may use, not all of the machine's.
    return (passes * encode + prompts * decode) / allowed_cpus()


def masks_in_words(config: Config) -> str:
    """The method that makes the masks, and the filters."""
    if config.masks_are_prompted:
        return f"one for each prompt of {config.input.prompts}"
    masks = config.masks
    points = "custom points" if masks.point_grids else f"{masks.points_per_side} x {masks.points_per_side} points"
    crops = f", {count(masks.crop_n_layers, 'layer')} of crops" if masks.crop_n_layers else ""
    tiles = f" in each tile of {masks.tile} pixels" if masks.tile is not None else ""
    filters = f"predicted IoU > {masks.pred_iou_thresh:g}, stability >= {masks.stability_score_thresh:g}"
    return f"{points}{crops}{tiles}, {filters}"


def _where(config: Config) -> str:
    cluster = config.cluster
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        most = f"at most {cluster.max_actors}" if cluster.max_actors else "as many as fit"
        return f"the Ray cluster at {address}: at least {count(cluster.min_actors, 'actor')}, {most}"
    gpus = f", {count(num_gpus(), 'GPU')}" if num_gpus() else ", no GPU"
    return f"this machine: {count(allowed_cpus(), 'CPU core')}{gpus}"
