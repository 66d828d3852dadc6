"""`samray.label_dataset`: labelling as a stage of a user's own Ray Data pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray.data

from samray.cluster.processes import end_with_ray
from samray.cluster.session import ensure_ray
from samray.cluster.sizes import WHOLE_CPU_LEFT, check_fits, choose_sizes, cluster_nodes
from samray.config import Config
from samray.config.labels import WAYS
from samray.errors import ConfigError, ImageError
from samray.inputs.parquet_types import is_text
from samray.labels.ways import read_inputs
from samray.output.schema import ANNOTATION, NAMED_ANNOTATION, PRESENCE
from samray.pipeline.labeler import EncodedImage, ShardLabeler, build_labeler
from samray.pipeline.metrics import ActorFigures
from samray.prompts import Prompt
from samray.sam.weights_file import WeightsFile
from samray.storage.tables import code_free

if TYPE_CHECKING:
    from ray.data import Dataset

IMAGES_PER_BATCH = 16
ADDED_COLUMNS = ("annotations", "status", "error")
"""And `presence` with a way that has such scores."""


def label_dataset(
    ds: Dataset,
    config: Config | None = None,
    *,
    phrases_column: str | None = None,
    make_labeler: Callable[[Config, int], ShardLabeler] | None = None,
) -> Dataset:
    """Add the columns `annotations`, `status` and `error` to ds, with labels.by=sam3 also `presence`; lazy, like every
    Ray Data stage.

    The images are in the column config.input.image_column, else in `bytes` or `image`: encoded bytes, Hugging Face's
    `struct<bytes, path>`, or RGB or grey uint8 arrays. An image that cannot be labelled has status `failed` and a
    reason. Where a GeoTIFF is (the column `geo` of `samray.label`) is not added.
    phrases_column names a column of lists of strings: phrases of this image alone, besides those of config.labels; null
    means none. Annotation ids are image_id * 65536 + index if ds has an integer column `image_id`, else only the index.
    make_labeler is called once in each actor with config and its number of threads. Each actor leaves one of its CPUs
    for the stages before and after this one. Raises: ConfigError for settings that are not possible here.
    """
    config = config or Config()
    if config.input.prompts is not None:
        raise ConfigError("input.prompts is for samray.label: the images of a dataset have no names to match")
    if config.masks.tile is not None:
        raise ConfigError("masks.tile is for samray.label: a dataset has no output to keep the masks of tiles in")
    if config.output.embeddings != "none":
        raise ConfigError("output.embeddings is for samray.label: a dataset has no output to store them next to")
    if make_labeler is None:  # every actor must load the weights that this machine has
        labels = read_inputs(config, None if phrases_column is None else [])
        model = config.model
        weights = WeightsFile(model.name, model.checkpoint, model.adapter) if config.labels.needs_sam else None
        digests: Any = weights.identity if weights else {}
        make_labeler = functools.partial(build_labeler, labels=labels, **digests)
    is_fixed = ensure_ray(config.cluster)
    nodes, device = cluster_nodes(), config.model.device
    # A lazy dataset does not know its number of rows: assume more than there are actors.
    sizes = choose_sizes(config.cluster, nodes, 1_000_000, device, cpus_left=WHOLE_CPU_LEFT)
    if is_fixed:
        sizes = check_fits(sizes, nodes, device, spare_cpus=WHOLE_CPU_LEFT)
    # An integer batch_size: Ray Data wants one for stages with GPUs.
    return ds.map_batches(
        DatasetLabeler,
        fn_constructor_kwargs={
            "config": config,
            "num_threads": sizes.num_threads,
            "make_labeler": make_labeler,
            "phrases_column": phrases_column,
        },
        batch_size=IMAGES_PER_BATCH,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=sizes.min_actors, max_size=sizes.max_actors),
        num_cpus=sizes.actor_cpus,
        num_gpus=sizes.actor_gpus,
        udf_modifying_row_count=False,
    )


class DatasetLabeler:
    """Ray Data's callable for label_dataset: a table of images in, the same table with labels out."""

    def __init__(
        self,
        config: Config,
        num_threads: int,
        make_labeler: Callable[[Config, int], ShardLabeler],
        phrases_column: str | None = None,
    ) -> None:
        end_with_ray()
        self.phrases_column = phrases_column
        self.image_column = config.input.image_column
        has_names = config.labels.gives_names or phrases_column is not None
        self.annotation = NAMED_ANNOTATION if has_names else ANNOTATION
        by = config.labels.by
        self.has_presence = by is not None and WAYS[by].presence
        self.figures = ActorFigures()
        self.labeler = make_labeler(config, num_threads)

    def __call__(self, batch: pa.Table) -> pa.Table:
        added = (*ADDED_COLUMNS, PRESENCE.name) if self.has_presence else ADDED_COLUMNS
        taken = [name for name in added if name in batch.column_names]
        if taken:
            raise ConfigError(f"the dataset already has columns named {', '.join(taken)}: rename or drop them")
        images = [
            EncodedImage(
                image_id=number or 0,
                file_name="",
                uri="",
                data=prompts if isinstance(prompts, ImageError) else data,
                prompts=None if isinstance(prompts, ImageError) else prompts,
            )
            for number, data, prompts in zip(_image_ids(batch), self._images(batch), self._prompts(batch), strict=True)
        ]
        done = self.labeler.label(images, on_progress=lambda batch: self.figures.add(batch, self.labeler.num_workers))
        done = self.figures.finish(done, self.labeler.num_workers)
        records = done.records
        # Rows out = rows in, in the same order, so columns can be appended.
        errors = [record.error for record in records]
        batch = batch.append_column(
            "annotations", pa.array([r.annotations for r in records], pa.list_(self.annotation))
        )
        batch = batch.append_column("status", pa.array(["failed" if error else "ok" for error in errors], pa.string()))
        batch = batch.append_column("error", pa.array(errors, pa.string()))
        if not self.has_presence:
            return batch
        return batch.append_column(PRESENCE, pa.array([r.presence or [] for r in records], PRESENCE.type))

    def _images(self, batch: pa.Table) -> Iterator[bytes | np.ndarray | ImageError]:
        name = self._column(batch)
        try:
            # The user's data may come from anywhere: an extension type could run code when a value is read.
            code_free(name, batch.schema.field(name).type)
        except ValueError as error:
            raise ConfigError(f"the dataset cannot be labelled: {error}") from error
        return images_of(batch[name])

    def _prompts(self, batch: pa.Table) -> Iterator[list[Prompt] | ImageError | None]:
        """The texts of each row; None without a column of them."""
        name = self.phrases_column
        if name is None:
            yield from [None] * batch.num_rows
            return
        if name not in batch.column_names:
            raise ConfigError(f"the dataset has no column {name!r} (phrases_column); it has {batch.column_names}")
        kind = batch.schema.field(name).type
        if not _is_texts(kind):
            raise ConfigError(f"the column {name!r} (phrases_column) is of type {kind}, expected lists of strings")
        for phrases in batch[name].to_pylist():
            try:
                yield [Prompt(text=phrase) for phrase in phrases or ()]
            except ConfigError as error:
                yield ImageError("bad_prompt", f"{name}: {error}")

    def _column(self, batch: pa.Table) -> str:
        # `bytes` is what Ray's read_binary_files calls it, `image` what read_images does.
        for name in (self.image_column, "bytes", "image"):
            if name in batch.column_names:
                return name
        raise ConfigError(
            f"the dataset has no column {self.image_column!r} (input.image_column), nor `bytes` or `image`;"
            f" it has {', '.join(batch.column_names)}"
        )


def _is_texts(kind: pa.DataType) -> bool:
    """Whether values are lists of strings, or all null."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return is_text(kind.value_type) or bool(pa.types.is_null(kind.value_type))
    return bool(pa.types.is_null(kind))


def _image_ids(batch: pa.Table) -> list[int | None]:
    if "image_id" in batch.column_names and pa.types.is_integer(batch.schema.field("image_id").type):
        return list(batch["image_id"].to_pylist())
    return [None] * batch.num_rows


def images_of(column: pa.ChunkedArray) -> Iterator[bytes | np.ndarray | ImageError]:
    """The column's images: encoded bytes, pixels (H, W, 3) uint8, or an error."""
    for chunk in column.chunks:
        if isinstance(chunk, pa.ExtensionArray):  # Ray's tensor columns, of fixed or variable shape
            try:
                values: list[Any] = list(chunk.to_numpy(zero_copy_only=False))
            except (ValueError, TypeError, OverflowError) as error:  # a shape that does not match the data
                yield from [ImageError("unsupported", f"not a readable array: {error}")] * len(chunk)
                continue
        else:
            values = chunk.to_pylist()
        yield from map(_image_of, values)


def _image_of(value: Any) -> bytes | np.ndarray | ImageError:
    if isinstance(value, dict):  # Hugging Face's Image feature
        value = value.get("bytes")
    if value is None:
        return ImageError("missing", "the row has no image")
    if isinstance(value, bytes):
        return value
    pixels = np.asarray(value)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] in (1, 3) and pixels.size:
        # Grey becomes three equal channels.
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
    shape = "x".join(map(str, pixels.shape))
    return ImageError("unsupported", f"expected uint8 (H, W, 3) or (H, W), got {pixels.dtype} {shape}")
