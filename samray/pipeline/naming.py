"""`samray name`: the main job on the masks that an output has. They get names by CLIP, and nothing else is changed.

DEST is an output of its own: the images and ids of OUTPUT in the same order, and one Parquet file per shard, whose
existence is the only mark that the shard is done. A labelling actor reads the rows of its shard from OUTPUT; the images
are fetched, decoded and guarded as in `samray label`.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from samray import storage
from samray.config import Config, InputConfig
from samray.errors import ConfigError, ImageError
from samray.inputs.decode import RGBArray
from samray.labels.ways import EXAMPLE, Inputs, labels_identity, read_inputs
from samray.output.append import InputChanges
from samray.output.compact import fingerprint_finished, refuse_replaced, rows_between
from samray.output.credentials import read_credentials
from samray.output.destination import check_writable
from samray.output.identity import refuse_differences
from samray.output.manifests import MANIFEST_SCHEMA
from samray.output.plan import Plan, load_plan, write_plan
from samray.output.schema import ImageRecord
from samray.output.shards import FOLDER, done_shards
from samray.pipeline.labeler import EncodedImage, ShardLabeler, make_record
from samray.pipeline.metrics import reserved_gpus
from samray.pipeline.plan_run import RunPlan, finished_shards
from samray.pipeline.preflight import check_ray
from samray.pipeline.report import LabelReport
from samray.pipeline.run import finish_run
from samray.rle.records import MaskRecord

if TYPE_CHECKING:
    from samray.labels.zero_shot import Namer
    from samray.pipeline.labeler import MakeLabeler

Row = dict[str, Any]
"""A row of an output, from `pa.Table.to_pylist`."""

_NOT_MASKS: Final = {"edges": "edge maps", "embed": "embeddings"}
WAY: Final = "clip"
"""The only way that names masks which exist already."""


def name(
    output: str | Path,
    dest: str | Path,
    config: Config,
    *,
    retry_failed: bool = False,
    progress: bool = True,
) -> LabelReport:
    """Name the masks of a finished output by CLIP, in a new output dest, or finish an earlier call.

    dest has the same images, masks and ids, and `label` and `label_score` for each mask; an image that cannot be read
    any more is a failed row. config: `labels` with by="clip", phrases and checkpoint; of the rest, `model.device`,
    `output`, `cluster` and `storage` count. retry_failed: also the images that failed in finished shards of dest.
    Raises ConfigError before anything starts, StorageError if storage is unavailable or output changed during the run.
    """
    return name_with(output, dest, config, retry_failed=retry_failed, progress=progress)


def name_with(
    output: str | Path,
    dest: str | Path,
    config: Config,
    *,
    make_labelers: Callable[[Plan, int, Inputs], MakeLabeler] | None = None,
    on_plan: Callable[[RunPlan], None] = lambda planned: None,
    **options: Any,
) -> LabelReport:
    """`name`, with make_labelers(plan of output, images per shard of dest, inputs) to create what makes the labelers;
    by default with the network of config. on_plan is called with the plan before anything is started."""
    started = time.monotonic()
    planned, source, fingerprint = plan_names(str(output), str(dest), config)
    on_plan(planned)
    plan = planned.plan
    per_shard = plan.generations[0].images_per_shard
    labels = planned.labels
    assert labels is not None
    report = finish_run(
        planned,
        check=lambda: check_ray(planned.config, with_model=make_labelers is None),
        credentials=functools.partial(_credentials, plan, source, planned.config),
        make_labeler=(make_labelers or NamingLabelers)(source, per_shard, labels),
        # At the end: a shard of OUTPUT could be replaced at any time before.
        before_success=lambda: refuse_replaced(source, fingerprint, plan.output),
        **options,
    )
    report.wall_s = time.monotonic() - started
    return report


# --- the plan -------------------------------------------------------------------------------------------------------


def plan_names(output: str, dest: str, config: Config) -> tuple[RunPlan, Plan, str]:
    """Write the plan of DEST, or use the one that is there. Returns it, OUTPUT's plan, and the latter's fingerprint.

    Raises: ConfigError, before anything is written, if OUTPUT is not a finished output, DEST has something else, or the
    network or the phrases cannot be read; StorageError.
    """
    storage.configure(config.storage)
    if config.labels.by != WAY:
        raise ConfigError(f"samray name takes labels.by={WAY}, got labels.by={config.labels.by}")
    if config.labels.phrases is None:
        raise ConfigError(f"samray name needs labels.phrases, {EXAMPLE}")
    source = load_plan(output)
    where = storage.redact(source.output)
    task = source.run["identity"].get("task")
    if task in _NOT_MASKS:
        raise ConfigError(f"{where} has {_NOT_MASKS[task]} and no masks: there is nothing to name")
    if config.output.embeddings != "none":
        raise ConfigError("output.embeddings does not apply to samray name, which makes none; OUTPUT keeps its own")
    check_apart_from(source, storage.normalize(dest))
    check_writable(dest, "_samray", FOLDER)
    fingerprint, _ = fingerprint_finished(source)
    labels = read_inputs(config)
    assert labels is not None
    dest = storage.normalize(dest)
    begun = load_plan(dest) if storage.exists(storage.join(dest, "_samray", "run.json")) else None
    run = _run_of(source, config, labels, fingerprint, begun)
    if begun is None:
        check_ray(config, with_model=True)
        images = source.read_images([name for name in MANIFEST_SCHEMA.names if name != "shard"])
        plan = write_plan(dest, images, run["images_per_shard"], run)
    else:
        _refuse_other(begun, run, where)
        plan = begun
    storage.remove_leftovers(dest)
    planned = RunPlan(
        plan=plan,
        # The images are read as OUTPUT's run read them.
        config=config.model_copy(update={"input": InputConfig(**source.run["identity"].get("input", {}))}),
        weights=None,
        is_new=begun is None,
        is_checked=begun is None,
        changes=InputChanges(),
        prompts=None,
        labels=labels,
        versions=finished_shards(plan),
    )
    return planned, source, fingerprint


def check_apart_from(source: Plan, dest: str) -> None:
    """Raises: ConfigError if DEST is OUTPUT or inside it, or has something that is not an output."""
    if dest == source.output:
        raise ConfigError("DEST and OUTPUT must be different folders: a new output is written")
    if storage.join(dest, "").startswith(storage.join(source.output, FOLDER, "")):
        raise ConfigError(f"DEST must not be inside OUTPUT/{FOLDER}, where readers look for shards")
    if not storage.exists(storage.join(dest, "_samray", "run.json")) and done_shards(dest):
        raise ConfigError(f"{storage.redact(dest)} has shards without a description: choose another DEST")


def _run_of(source: Plan, config: Config, labels: Inputs, fingerprint: str, begun: Plan | None) -> dict[str, Any]:
    """The run.json of DEST: that of OUTPUT, with the names."""
    run = copy.deepcopy({key: value for key, value in source.run.items() if key not in ("generation", "num_images")})
    is_set = "images_per_shard" in config.output.model_fields_set
    shards_like = begun or source
    per_shard = config.output.images_per_shard if is_set else shards_like.generations[0].images_per_shard
    identity = run["identity"]
    # How its masks were made stays; names that it had are replaced.
    identity |= labels_identity(config, labels)
    identity["output"] = {"images_per_shard": per_shard}
    identity["names"] = {"output": storage.redact(source.output), "shards": fingerprint}
    settings = run.setdefault("config", {})
    settings["labels"] = config.labels.model_dump(mode="json")
    settings["output"] = {**settings.get("output", {}), "images_per_shard": per_shard, "embeddings": "none"}
    return run | {"images_per_shard": per_shard, "categories": list(labels.categories or ())}


def _refuse_other(begun: Plan, run: Mapping[str, Any], source: str) -> None:
    """Raises: ConfigError if DEST has other names, or is not an output of `samray name`."""
    recorded, dest = begun.run["identity"].get("names"), storage.redact(begun.output)
    if not isinstance(recorded, dict) or recorded.get("output") != source:
        raise ConfigError(f"{dest} has another output, and not the names of {source}: choose another DEST")
    if recorded.get("shards") != run["identity"]["names"]["shards"]:
        raise ConfigError(
            f"shards of {source} have been replaced since {dest} was begun, which would mix old rows with new ones; "
            "choose another DEST"
        )
    # A setting that is new since then counts as its default.
    refuse_differences(begun.output, begun.run["identity"], run["identity"], Config().default_identity())


def _credentials(plan: Plan, source: Plan, config: Config, shards: Sequence[int]) -> dict[int, dict[str, str]]:
    """As `read_credentials`, from the INPUT of OUTPUT's run."""
    num_hidden = sum(generation.num_hidden for generation in source.generations)
    if not num_hidden:
        return {}
    # DEST's own plan was made from URIs without credentials, so it does not know that they had any.
    (generation,) = plan.generations
    hiding = replace(plan, generations=[replace(generation, num_hidden=num_hidden)])
    return read_credentials(hiding, source.generations[0].identity["input_uri"], config, shards)


# --- in the actors --------------------------------------------------------------------------------------------------


@dataclass
class NamingLabelers:
    """Makes the labelers of a run, in its actors."""

    source: Plan
    """The plan of OUTPUT."""
    images_per_shard: int
    """Images per shard of DEST."""
    labels: Inputs

    def __call__(self, config: Config, num_threads: int) -> ShardLabeler:
        """Raises: ConfigError if the network is not the run's, or cannot be loaded."""
        import torch

        from samray.labels.clip import ClipInputs, load_namer

        assert isinstance(self.labels, ClipInputs)
        torch.set_num_threads(1)  # each thread names the masks of a separate image, see ShardLabeler
        device = config.model.device
        if device is None and reserved_gpus() == 0:
            device = "cpu"  # Ray does not hide GPUs from an actor without a reservation
        namer = load_namer(config, self.labels, device)
        return NamingLabeler(
            self.source,
            self.images_per_shard,
            functools.partial(NameGenerator, namer),
            max_pixels=config.input.max_pixels,
            decode_timeout_s=config.input.decode_timeout_s,
            bands=config.input.bands,
            stretch=config.input.stretch,
            num_threads=num_threads,
            device_type=namer.network.device.type,
        )


class NameGenerator:
    """Names the masks of images; the masks are the `prompts` of the main job."""

    def __init__(self, namer: Namer, crops_at_once: int | None = None) -> None:
        self.namer = namer if crops_at_once is None else replace(namer, crops_at_once=crops_at_once)
        self.stage_seconds = {"name": 0.0}

    def generate(self, images: Sequence[RGBArray], masks: Sequence[list[MaskRecord]]) -> list[list[MaskRecord]]:
        """The masks of each image with their names. Raises: ImageError if an image or a mask is not as it was."""
        started = time.perf_counter()
        named = [self._named(image, records) for image, records in zip(images, masks, strict=True)]
        self.stage_seconds["name"] += time.perf_counter() - started
        return named

    def _named(self, image: RGBArray, masks: list[MaskRecord]) -> list[MaskRecord]:
        hw = list(image.shape[:2])
        if any(mask["segmentation"]["size"] != hw for mask in masks):
            size = masks[0]["segmentation"]["size"]
            raise ImageError(
                "unreadable", f"the image is {hw[1]}x{hw[0]}, its masks are for {size[1]}x{size[0]}: it was replaced"
            )
        try:
            return self.namer.name(image, masks)
        except ValueError as error:
            raise ImageError("unreadable", f"OUTPUT's row of it is damaged: it has {error}") from error


class NamingLabeler(ShardLabeler):
    """Takes the rows of the images from OUTPUT and returns them with names."""

    def __init__(self, source: Plan, images_per_shard: int, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._source, self._images_per_shard, self._starts = source, images_per_shard, source.starts()
        self._shard: int | None = None
        self._rows: dict[int, Row] = {}
        """image_id -> row, of the shard in work."""

    def label(self, images: Sequence[EncodedImage], *args: Any, **options: Any) -> Any:
        """As in `ShardLabeler`. Raises: also StorageError if OUTPUT cannot be read."""
        for shard in {image.shard for image in images if image.shard is not None} - {self._shard}:
            self._rows, self._shard = self._read(shard), shard
        return super().label([self._with_masks(image) for image in images], *args, **options)

    def _read(self, shard: int) -> dict[int, Row]:
        """The rows of OUTPUT for a shard of DEST, by position: OUTPUT may have shards of another size."""
        start = shard * self._images_per_shard
        number = min(self._images_per_shard, self._starts[-1] - start)
        table, _ = rows_between(self._source, self._starts, start, number)
        return {row["image"]["image_id"]: row for row in table.to_pylist()}

    def _with_masks(self, image: EncodedImage) -> EncodedImage:
        if image.shard is None:  # the built-in image of `alone`
            return replace(image, prompts=[_mask_of_all(image.data)])
        row = self._rows[image.image_id]
        if row["status"] == "failed":
            return replace(image, prompts=[], data=ImageError.parse(row["error"]))
        return replace(image, prompts=row["annotations"])

    def record(self, image: EncodedImage, decoded: np.ndarray | ImageError, result: Any) -> ImageRecord:
        """OUTPUT's row with the names, or a failed row. A row without masks stays as it is, whatever the image is."""
        if image.shard is None:
            return make_record(image, decoded, result)
        row = self._rows[image.image_id]
        known = {"uri": row["uri"]} | {name: row.get(name) for name in ("corrections", "geo", "tiles")}
        if not row["annotations"]:
            return ImageRecord(**row["image"], **known, error=row["error"])
        if isinstance(result, ImageError):
            return ImageRecord(**row["image"], **known | {"corrections": None}, error=str(result))
        return ImageRecord(**row["image"], **known, annotations=result)


def _mask_of_all(pixels: Any) -> MaskRecord:
    """A mask of the whole image, for a first test of the network."""
    from samray.rle.encode import compress

    hw = (pixels.shape[0], pixels.shape[1])
    box = [0.0, 0.0, float(hw[1]), float(hw[0])]
    return MaskRecord(
        segmentation=compress(np.array([0, hw[0] * hw[1]]), hw),
        bbox=box,
        area=hw[0] * hw[1],
        predicted_iou=1.0,
        stability_score=1.0,
        point_coords=[],
        crop_box=box,
    )
