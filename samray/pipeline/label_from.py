"""`samray label --from`: the main job on the embeddings that an output has. Neither images nor the encoder are needed.

DEST is an output of its own: the images and ids of OUTPUT in the same order, and one Parquet file per shard, whose
existence is the only mark that the shard is done. A labelling actor reads the embeddings of its images from OUTPUT.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samray import storage
from samray.config import Config, InputConfig, ModelConfig
from samray.errors import ConfigError, ImageError, NotFoundError, StorageError
from samray.inputs.prompt_file import PromptFile
from samray.output.append import InputChanges
from samray.output.compact import fingerprint_finished, refuse_replaced, rows_by_shard
from samray.output.destination import check_writable
from samray.output.embeddings import RowReader, kind_of, maps_of
from samray.output.identity import refuse_differences
from samray.output.manifests import MANIFEST_SCHEMA
from samray.output.plan import Plan, load_plan, write_plan
from samray.output.schema import GEO, ImageRecord, has_geo
from samray.output.shards import FOLDER, read_shard
from samray.pipeline.kept import packed_embedding
from samray.pipeline.labeler import EncodedImage, ShardLabeler, shard_labeler
from samray.pipeline.naming import check_apart_from
from samray.pipeline.plan_run import RunPlan, finished_shards
from samray.pipeline.preflight import check_ray, check_weights
from samray.pipeline.report import LabelReport, no_masks
from samray.pipeline.run import finish_run
from samray.rle.records import MaskRecord
from samray.sam.weights_file import WeightsFile

if TYPE_CHECKING:
    from torch import Tensor

    from samray.inputs.decode import RGBArray
    from samray.masks.generator import MaskGenerator
    from samray.masks.prompted import PromptedGenerator
    from samray.pipeline.labeler import MakeLabeler
    from samray.sam.sam import Sam

Row = dict[str, Any]
"""The image, status and error of a row of OUTPUT, and where its embedding is: its `shard` and `index`."""


def label_from(
    output: str | Path,
    dest: str | Path,
    config: Config | None = None,
    *,
    retry_failed: bool = False,
    progress: bool = True,
) -> LabelReport:
    """Label the images of a finished output again from its embeddings, into a new output dest; or finish that.

    The masks are those of `samray.label` with the same settings: with float32 embeddings exactly, else nearly. The
    model is the one that made the embeddings, with its weights and dtype if config does not give them. Settings that
    need the images are refused: crops, names and `input` except prompts. retry_failed: also the images that failed in
    finished shards of dest.
    Raises ConfigError before anything starts, StorageError if storage is unavailable or output changed during the run.
    """
    report = label_from_with(output, dest, config or Config(), retry_failed=retry_failed, progress=progress)
    if report.warning:
        warnings.warn(report.warning, stacklevel=2)
    return report


def label_from_with(
    output: str | Path,
    dest: str | Path,
    config: Config,
    *,
    make_labelers: Callable[[Plan, int], MakeLabeler] | None = None,
    on_plan: Callable[[RunPlan], None] = lambda planned: None,
    **options: Any,
) -> LabelReport:
    """`label_from`, with make_labelers(plan of output, images per shard of dest) to create what makes the labelers; by
    default with the model of output. on_plan is called with the plan before anything is started."""
    started = time.monotonic()
    with_model = make_labelers is None
    planned, source, fingerprint = plan_label_from(str(output), str(dest), config, with_model=with_model)
    on_plan(planned)
    plan = planned.plan
    report = finish_run(
        planned,
        check=lambda: _check(planned.config, planned.weights, with_model),
        credentials=lambda shards: {},
        make_labeler=(make_labelers or StoredLabelers)(source, plan.generations[0].images_per_shard),
        reads_images=False,
        # At the end: a shard of OUTPUT could be replaced at any time before.
        before_success=lambda: refuse_replaced(source, fingerprint, plan.output),
        **options,
    )
    report.wall_s = time.monotonic() - started
    if report.num_labelled and not report.num_masks:
        report.warning = no_masks(report.num_labelled, planned.config)
    return report


# --- the plan --------------------------------------------------------------------------------------------------------


def plan_label_from(output: str, dest: str, config: Config, *, with_model: bool = True) -> tuple[RunPlan, Plan, str]:
    """Write the plan of DEST, or use the one that is there. Returns it, OUTPUT's plan, and the latter's fingerprint.

    Raises: ConfigError, before anything is written, if OUTPUT is not finished or has no embeddings, the model is not
    the one that made them, a setting needs the images, or DEST has something else; StorageError.
    """
    storage.configure(config.storage)
    source = load_plan(output)
    where = storage.redact(source.output)
    if kind_of(source.run["identity"]) == "none":
        raise ConfigError(
            f"{where} has no embeddings: label it with output.embeddings, or use samray embed, then --from its output"
        )
    _refuse_settings(config)
    check_apart_from(source, storage.normalize(dest))
    check_writable(dest, "_samray", FOLDER)
    fingerprint, _ = fingerprint_finished(source)
    given, config = config.model, _of_the_same_model(config, source)
    weights = WeightsFile(config.model.name, config.model.checkpoint, config.model.adapter)
    _refuse_other_weights(weights, source, named_by_output(given, config.model))
    dest = storage.normalize(dest)
    begun = load_plan(dest) if storage.exists(storage.join(dest, "_samray", "run.json")) else None
    if begun is not None:
        config = config.as_begun(begun.run["identity"])
    prompt_file = None if config.input.prompts is None else PromptFile.read(config.input.prompts)
    if prompt_file is not None and any(prompt.text is not None for prompt in prompt_file.prompts):
        raise ConfigError(
            f"input.prompts {storage.redact(prompt_file.uri)} has texts, which need the images, and --from reads only "
            "embeddings: leave them out, and name the masks afterwards with samray name"
        )
    run = _run_of(source, config, weights, fingerprint, prompt_file, begun)
    images = source.read_images([name for name in MANIFEST_SCHEMA.names if name != "shard"])
    prompts = prompt_file.match(images) if prompt_file else None
    if begun is None:
        _check(config, weights if with_model else None, with_model)
        plan = write_plan(dest, images, run["images_per_shard"], run)
    else:
        _refuse_other(begun, run, where, config)
        plan = begun
    storage.remove_leftovers(dest)
    planned = RunPlan(
        plan=plan,
        config=config,
        weights=weights if with_model else None,
        is_new=begun is None,
        is_checked=begun is None,
        changes=InputChanges(),
        prompts=prompts,
        labels=None,
        versions=finished_shards(plan),
    )
    return planned, source, fingerprint


def _check(config: Config, weights: WeightsFile | None, with_model: bool) -> None:
    check_weights(weights)
    check_ray(config, with_model=with_model)


def _refuse_settings(config: Config) -> None:
    """Raises: ConfigError for settings that need the images or the encoder."""
    if config.masks.crop_n_layers:
        raise ConfigError(
            "masks.crop_n_layers needs the encoder, because an output has no embeddings of crops: leave it out, or "
            "label the images themselves"
        )
    if config.masks.tile is not None:
        raise ConfigError(
            "masks.tile needs the images, because an output has no embeddings of tiles: leave it out, or label the "
            "images themselves"
        )
    if config.labels.by is not None:
        raise ConfigError(
            f"labels.by={config.labels.by} needs the images, and --from reads only embeddings: leave it out, and name "
            "the masks afterwards with samray name"
        )
    if config.output.embeddings != "none":
        raise ConfigError("output.embeddings does not apply to --from: its embeddings are those of OUTPUT")
    unused = [key for key in InputConfig.model_fields if key != "prompts" and key in config.input.model_fields_set]
    if unused:
        raise ConfigError(
            f"input.{unused[0]} does not apply to --from, which reads no images; of input only prompts does"
        )


def named_by_output(given: ModelConfig, used: ModelConfig) -> list[str]:
    """The settings of files with weights that the run.json of OUTPUT gave, not the user."""
    files = ("checkpoint", "adapter")
    return [f"model.{key}" for key in files if key not in given.model_fields_set and getattr(used, key) is not None]


def _refuse_other_weights(weights: WeightsFile, source: Plan, named: list[str]) -> None:
    """Raises: ConfigError if these weights, with their adapter, are not those that made the embeddings of OUTPUT.

    named: the settings that its run.json gave.
    """
    where = storage.redact(source.output)
    origin = f" ({' and '.join(named)} from the run.json of {where})" if named else ""
    try:
        identity = weights.identity
    except ConfigError as error:
        raise ConfigError(f"{error}{origin}") from error
    for setting, key in (("checkpoint", "checkpoint_sha256"), ("adapter", "adapter_sha256")):
        sha256, stored_sha256 = identity.get(key), source.run["identity"]["model"].get(key)
        if sha256 != stored_sha256:
            path = getattr(weights, setting)
            file = "" if path is None else f" {storage.redact(str(path))}"
            raise ConfigError(
                f"model.{setting}{file} is not the one that made the embeddings of {where}: SHA-256 "
                f"{(sha256 or 'none')[:12]}, there {str(stored_sha256 or 'none')[:12]}; set model.{setting} to that "
                f"run's{origin}"
            )


def _of_the_same_model(config: Config, source: Plan) -> Config:
    """The settings with the model of OUTPUT if the user named none, and its input. Raises: ConfigError for another
    model."""
    identity, keys_set = source.run["identity"], config.model.model_fields_set
    try:
        stored = {key: identity["model"][key] for key in ("name", "dtype")}
        stored |= {key: source.run.get("config", {}).get("model", {}).get(key) for key in ("checkpoint", "adapter")}
        # Checked here, because the copy below checks nothing; the name by `WeightsFile`.
        ModelConfig(**{**stored, "name": ModelConfig().name})
        if not isinstance(stored["name"], str):
            raise TypeError("the name of the model is not a text")
    except (KeyError, TypeError, ConfigError) as error:
        raise ConfigError(f"the run.json of {storage.redact(source.output)} is damaged: {error}") from error
    if "name" in keys_set and config.model.name != stored["name"]:
        raise ConfigError(
            f"model.name={config.model.name} cannot use the embeddings of {storage.redact(source.output)}, which "
            f"{stored['name']} made; leave model.name out"
        )
    model = config.model.model_copy(update={key: value for key, value in stored.items() if key not in keys_set})
    # Sizes and limits of the images are those of OUTPUT's run.
    # No duplicates to skip, because INPUT is not listed: the rows of OUTPUT say which images failed.
    overrides = {"prompts": config.input.prompts, "skip_duplicates": False}
    settings = InputConfig(**{**identity.get("input", {}), **overrides})
    # Built again from the user's values: mask settings that are not given follow the model.
    sections = {name: getattr(config, name) for name in type(config).model_fields}
    return Config(**{**sections, "model": model, "input": settings})


def _run_of(
    source: Plan, config: Config, weights: WeightsFile, fingerprint: str, prompts: PromptFile | None, begun: Plan | None
) -> dict[str, Any]:
    """The run.json of DEST."""
    is_set = "images_per_shard" in config.output.model_fields_set
    per_shard = config.output.images_per_shard if is_set else (begun or source).generations[0].images_per_shard
    identity = config.identity()
    identity["model"] |= weights.identity
    identity["output"] = {"images_per_shard": per_shard}
    identity |= prompts.identity if prompts else {}
    identity["input_uri"] = source.run["identity"]["input_uri"]
    stored = kind_of(source.run["identity"])
    identity["from"] = {"output": storage.redact(source.output), "embeddings": stored, "shards": fingerprint}
    settings = config.model_dump(mode="json")
    settings["output"]["images_per_shard"] = per_shard
    return {
        "identity": identity,
        "input": identity["input_uri"],
        "config": settings,
        "images_per_shard": per_shard,
        **({"geo": True} if has_geo(source.run) else {}),
    }


def _refuse_other(begun: Plan, run: Mapping[str, Any], source: str, config: Config) -> None:
    """Raises: ConfigError if DEST has other masks, or is not made from embeddings."""
    recorded, dest = begun.run["identity"].get("from"), storage.redact(begun.output)
    if not isinstance(recorded, dict) or recorded.get("output") != source:
        raise ConfigError(f"{dest} has another output, and not masks from {source}: choose another DEST")
    if recorded.get("shards") != run["identity"]["from"]["shards"]:
        raise ConfigError(
            f"shards of {source} have been replaced since {dest} was begun, which would mix masks of old embeddings "
            "with new ones; choose another DEST"
        )
    refuse_differences(begun.output, begun.run["identity"], run["identity"], config.default_identity())


# --- in the actors ---------------------------------------------------------------------------------------------------


@dataclass
class StoredLabelers:
    """Makes the labelers of a run, in its actors."""

    source: Plan
    """The plan of OUTPUT."""
    images_per_shard: int
    """Images per shard of DEST."""

    def __call__(self, config: Config, num_threads: int) -> ShardLabeler:
        """Raises: as `shard_labeler`."""
        from samray.masks.generator import MaskGenerator
        from samray.masks.prompted import PromptedGenerator

        def make_generator(model: Sam, points_per_batch: int | None) -> StoredGenerator:
            masks, frugal = config.masks, points_per_batch is not None
            if frugal:  # a retry after running out of memory
                masks = masks.model_copy(update={"points_per_batch": points_per_batch})
            if config.input.prompts is not None:
                return StoredGenerator(PromptedGenerator(model, masks))
            return StoredGenerator(MaskGenerator(model, masks, frugal=frugal))

        model = self.source.run["identity"]["model"]
        weights, adapter = model.get("checkpoint_sha256"), model.get("adapter_sha256")

        def make(*args: Any, **options: Any) -> StoredLabeler:
            return StoredLabeler(self.source, self.images_per_shard, *args, **options)

        return shard_labeler(config, num_threads, weights, make_generator, make, adapter_sha256=adapter)


class Stored:
    """The embedding of an image, from when it is read until its masks are done."""

    def __init__(self) -> None:
        self.embedding: Tensor | None = None


class StoredGenerator:
    """Makes masks from embeddings, which come as the first of an image's prompts."""

    def __init__(self, generator: MaskGenerator | PromptedGenerator) -> None:
        self._generator: Any = generator
        self.stage_seconds = generator.stage_seconds

    def generate(self, images: Sequence[RGBArray], prompts: Sequence[list[Any]] = ()) -> list[list[MaskRecord]]:
        """images: of the right size, whatever their pixels. Raises: ImageError (`bad_prompt`)."""
        if not (prompts and prompts[0] and isinstance(prompts[0][0], Stored)):
            # The built-in image of `alone` has no embedding.
            return list(self._generator.generate(images, *([prompts] if prompts else [])))
        embeddings = [stored.embedding for stored, *_ in prompts]
        sizes = [image.shape[:2] for image in images]
        from samray.masks.prompted import PromptedGenerator

        if isinstance(self._generator, PromptedGenerator):
            return self._generator.generate_from(embeddings, sizes, [user_prompts for _, *user_prompts in prompts])
        return list(self._generator.generate_from(embeddings, sizes))


class StoredLabeler(ShardLabeler):
    """Takes sizes and embeddings of images from OUTPUT instead of reading them."""

    def __init__(self, source: Plan, images_per_shard: int, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._source, self._images_per_shard, self._starts = source, images_per_shard, source.starts()
        self._reader = RowReader(source.output)
        self._shard: int | None = None
        self._rows: dict[int, Row] = {}
        """image_id -> row, of the shard in work."""

    def label(self, images: Sequence[EncodedImage], *args: Any, **options: Any) -> Any:
        """As in `ShardLabeler`. Raises: also StorageError if OUTPUT cannot be read."""
        for shard in {image.shard for image in images if image.shard is not None}:
            self._read_shard(shard)
        ready = [i if i.shard is None else replace(i, prompts=[Stored(), *(i.prompts or [])]) for i in images]
        return super().label(ready, *args, **options)

    def _read_shard(self, shard: int) -> None:
        """Read which images of a shard of DEST there are, by position: OUTPUT may have shards of another size."""
        if shard == self._shard:
            return
        start = shard * self._images_per_shard
        number = min(self._images_per_shard, self._starts[-1] - start)
        rows: dict[int, Row] = {}
        for source_shard, indices in rows_by_shard(self._starts, np.arange(start, start + number)):
            first = int(indices[0])
            columns = ["image", "status", "error", *([GEO.name] if has_geo(self._source.run) else [])]
            part = read_shard(self._source.output, source_shard, columns).slice(first, len(indices))
            for index, row in enumerate(part.to_pylist(), first):
                rows[row["image"]["image_id"]] = {**row, "shard": source_shard, "index": index}
        self._rows, self._shard = rows, shard

    def decode(self, image: EncodedImage) -> np.ndarray | ImageError:
        """Pixels without a value, of the right size; reads the embedding if the image waits for it.

        Raises: StorageError if OUTPUT lacks it.
        """
        if image.shard is None:  # the built-in image of `alone`
            return super().decode(image)
        self._read_shard(image.shard)
        row = self._rows[image.image_id]
        if row["status"] == "failed":
            return ImageError.parse(row["error"])
        hw = row["image"]["height"], row["image"]["width"]
        if image.prompts and isinstance(image.prompts[0], Stored):
            image.prompts[0].embedding = self._read(row, hw)
        return np.broadcast_to(np.zeros(3, np.uint8), (*hw, 3))

    def _read(self, row: Row, hw: tuple[int, int]) -> Tensor:
        image_id, where = row["image"]["image_id"], storage.redact(self._source.output)
        try:
            stored = self._reader.read(row["shard"], row["index"], image_id)
            if stored is None or (stored["height"], stored["width"]) != hw:
                raise StorageError(
                    f"{where} has no embedding of image {image_id}; `samray verify {where}` shows details"
                )
            return packed_embedding(maps_of(stored))
        except NotFoundError as error:
            raise StorageError(
                f"{where} lacks an embedding file: {error}; `samray verify {where}` shows all"
            ) from error
        except (ValueError, KeyError) as error:
            raise StorageError(f"{where} has a damaged embedding of image {image_id}: {error}") from error

    def record(self, image: EncodedImage, decoded: np.ndarray | ImageError, result: Any) -> ImageRecord:
        """The new row; an image that failed in OUTPUT stays as it is there."""
        if image.prompts and isinstance(image.prompts[0], Stored):
            image.prompts[0].embedding = None  # those of a whole shard may not fit into memory
        row = self._rows.get(image.image_id)
        if image.shard is not None and row is not None and row["status"] == "failed":
            return ImageRecord(**row["image"], uri=image.uri, error=row["error"])
        record = super().record(image, decoded, result)
        return record if row is None else replace(record, geo=row.get("geo"))
