"""Read single images of an output of any size: one footer and one row group of one shard."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from samray import storage
from samray.errors import ConfigError, NotFoundError, StorageError
from samray.inputs.rows import take
from samray.output.manifests import check_manifest, manifest_uri
from samray.output.plan import Plan, load_plan
from samray.output.schema import check_columns, schema_of
from samray.output.seals import seal_of
from samray.output.shards import FOLDER, read_success, reraise_damaged, shard_name, shard_number, shard_uri
from samray.output.where import Where
from samray.storage.footers import statistics
from samray.storage.tables import footer_bytes, open_parquet, parse_footer

log = logging.getLogger(__name__)

_FIRST_READ_BYTES: Final = 16 * 1024
"""Bytes read first: enough for the footer of a shard with one or two row groups."""
_THREADS: Final = 32


def read_image(output: str, image_id: int) -> dict[str, Any]:
    """The row of one image, as stored: image, annotations, uri, status, error.

    Reads the part of the plan around that id, and the footer and one row group of one shard.

    Raises: ConfigError if OUTPUT does not have the image, or not yet; StorageError.
    """
    plan = load_plan(output)
    where = storage.redact(plan.output)
    for shard, is_planned in shards_of(plan, image_id):
        uri = shard_uri(plan.output, shard)
        try:
            row = _find(plan.output, shard, image_id)
        except NotFoundError as error:
            raise ConfigError(
                f"image {image_id} of {where} is not labelled yet: {shard_name(shard)} is missing; finish the run first"
            ) from error
        if row is not None:
            return row
        if is_planned:
            raise StorageError(
                f"{storage.redact(uri)} lacks image {image_id}, which the plan has in it; "
                f"`samray verify {where}` shows details"
            )
    raise ConfigError(f"{where} has no image_id {image_id} among its {plan.num_images} images")


def _find(output: str, shard: int, image_id: int) -> dict[str, Any] | None:
    """The row of an image in a shard; None if it is not there. Raises: NotFoundError, StorageError."""
    uri = shard_uri(output, shard)
    size = storage.file_size(uri)
    footer = read_shard_footer(output, shard, size)
    with reraise_damaged(uri):
        groups = groups_with(footer, "image.image_id", image_id)
    # Mostly one group. Of several, the id column alone tells which has the image, without reading masks.
    for group in groups:
        if len(groups) > 1 and _row_of(read_row_group(uri, size, footer, group, ["image.image_id"]), image_id) < 0:
            continue
        table = read_row_group(uri, size, footer, group)
        row = _row_of(table, image_id)
        if row >= 0:
            return dict(table.slice(row, 1).to_pylist()[0])
    return None


def shards_of(plan: Plan, image_id: int) -> Iterator[tuple[int, bool]]:
    """Shards that may have an image, and whether the plan is certain about it."""
    for generation in plan.generations:
        uri = manifest_uri(plan.output, generation.number)
        size = storage.file_size(uri)
        footer = read_footer(uri, size)
        with reraise_damaged(uri):
            check_manifest(footer.schema.to_arrow_schema())
            shards = statistics(footer, "shard")
            groups = groups_with(footer, "image_id", image_id)
        for group in groups:
            shard = shards[group]
            if shard is not None and shard.min == shard.max:
                yield int(shard.min), False  # for a shard this large, its own footer is faster to read
                continue
            # Small shards share a row group of the manifest; two of its columns tell which shard it is.
            rows = read_row_group(uri, size, footer, group, ["image_id", "shard"])
            index = pc.index(rows["image_id"], image_id).as_py()
            if index >= 0:
                yield int(rows["shard"][index].as_py()), True


def _row_of(table: pa.Table, image_id: int) -> int:
    return int(pc.index(pc.struct_field(table["image"], "image_id"), image_id).as_py())


def groups_with(footer: pq.FileMetaData, column: str, value: Any) -> list[int]:
    """The row groups that may have a value, according to their statistics. Raises: pa.ArrowInvalid."""
    groups = []
    for group, bounds in enumerate(statistics(footer, column)):
        # Without statistics any group may have the value.
        if bounds is None or bounds.min <= value <= bounds.max:
            groups.append(group)
    return groups


# --- reading by ranges ---------------------------------------------------------------------------------------------


def read_footer(uri: str, size: int | None) -> pq.FileMetaData:
    """Read only the footer of a Parquet file: a first guess at its length, then the rest if it is longer.

    size: of the file, in bytes; None reads the whole file. Raises: NotFoundError, StorageError.
    """
    start = 0 if size is None else max(0, size - _FIRST_READ_BYTES)
    tail = storage.read_bytes(uri) if size is None else storage.read_bytes(uri, start, size - start)
    # The last eight bytes give the length; only a large footer needs a second request.
    length = footer_bytes(tail)
    if size is not None and len(tail) < length <= size:
        tail = storage.read_bytes(uri, size - length, length - len(tail)) + tail
    with reraise_damaged(uri):
        return parse_footer(tail)


def read_shard_footer(output: str, shard: int, size: int | None) -> pq.FileMetaData:
    """Read the footer of a shard (see `read_footer`).

    Raises: NotFoundError, StorageError, also if the file has the wrong columns.
    """
    uri = shard_uri(output, shard)
    footer = read_footer(uri, size)
    with reraise_damaged(uri):
        check_columns(footer.schema.to_arrow_schema())
    return footer


def read_row_group(
    uri: str, size: int | None, footer: pq.FileMetaData, group: int, columns: list[str] | None = None
) -> pa.Table:
    """One row group, in one chunk: one request, or a few if `columns` leaves gaps. Raises: StorageError."""
    with reraise_damaged(uri), storage.open_read(uri, size=size, buffered=False) as stream:
        # With pre-buffering, adjacent columns are fetched as one range.
        file = open_parquet(stream, footer)
        return file.read_row_group(group, columns=columns, use_threads=False).combine_chunks()


# --- an index of all images ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """Locations of the rows of images: eight bytes per image, which lets each worker hold millions."""

    shards: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    """Row index within the shard's file."""
    sizes: npt.NDArray[np.int64]
    """Bytes of each shard of the plan; 0 if it does not exist."""
    digests: dict[int, str | None]
    """The checksum (`samray.output.seals`) of each existing shard; None for a shard without one."""


def index_images(plan: Plan, *, keep_empty: bool = True, where: Where | None = None) -> ImageIndex:
    """Index the images with status `ok` in the existing shards, in plan order.

    keep_empty: include images without masks. where: leave out images that it does not select. Reads the footers; rows
    only of shards with failed images, to count masks, or for where. Raises: ConfigError if there is no such image,
    StorageError.
    """
    names = storage.list_names(storage.join(plan.output, FOLDER))
    sizes = np.zeros(plan.num_shards, np.int64)
    for name, size in names.items():
        shard = shard_number(name)
        if shard is not None and shard < plan.num_shards:
            sizes[shard] = size
    done = np.flatnonzero(sizes)
    output = storage.redact(plan.output)
    if len(done) < plan.num_shards:
        missing = plan.num_shards - len(done)
        log.warning(
            "%s: %d of %d shards are not there yet; their images are left out", output, missing, plan.num_shards
        )
    # Small requests, whose time is mostly latency: hence many threads.
    with ThreadPoolExecutor(_THREADS) as pool:
        rows_and_digests = list(
            pool.map(lambda shard: _wanted_rows(plan, int(shard), int(sizes[shard]), keep_empty, where), done)
        )
    rows_of_shards = [rows for rows, _ in rows_and_digests]
    digests = {int(shard): digest for shard, (_, digest) in zip(done, rows_and_digests, strict=True)}
    _warn_of_replaced(plan, digests)
    if not any(len(rows) for rows in rows_of_shards):
        if where is not None:
            raise ConfigError(f"where: {where.text} selects none of the labelled images of {output}")
        raise ConfigError(f"{output} has no labelled images{'' if keep_empty else ' with masks'} yet")
    shards = np.repeat(done.astype(np.int32), [len(rows) for rows in rows_of_shards])
    return ImageIndex(shards, np.concatenate(rows_of_shards), sizes, digests)


def _warn_of_replaced(plan: Plan, digests: dict[int, str | None]) -> None:
    """Log a warning if shards differ from those in `_SUCCESS`: a run is replacing some, or was stopped while it did."""
    success = read_success(plan.output)
    named = enumerate(success.digests if success else ())
    # A shard that is missing now counts as unchanged: the caller warns of it.
    replaced = [shard for shard, digest in named if digest is not None and digests.get(shard, digest) != digest]
    if replaced:
        log.warning(
            "%s: %d of %d shards were replaced since _SUCCESS was written (%s, ...); run the same command again to "
            "finish that update",
            storage.redact(plan.output), len(replaced), plan.num_shards, shard_name(replaced[0]),
        )  # fmt: skip


def _wanted_rows(
    plan: Plan, shard: int, size: int, keep_empty: bool, where: Where | None
) -> tuple[npt.NDArray[np.int32], str | None]:
    """The row indices of a shard to keep, and its checksum."""
    uri = shard_uri(plan.output, shard)
    footer = read_shard_footer(plan.output, shard, size)
    # Images are found by their row, so a shard of another length would give wrong ones.
    if footer.num_rows != plan.num_images_of(shard):
        raise StorageError(
            f"{storage.redact(uri)} has {footer.num_rows} rows, expected {plan.num_images_of(shard)} as planned; "
            "`samray verify` shows details"
        )
    status = statistics(footer, "status")
    wanted, start = [], 0
    for group in range(footer.num_row_groups):
        num_rows = footer.row_group(group).num_rows
        bounds = status[group]
        keep = np.ones(num_rows, bool)
        # If the statistics say "ok" only, the column need not be read.
        if bounds is None or not bounds.min == bounds.max == "ok":
            keep = _numpy(pc.equal(read_row_group(uri, size, footer, group, ["status"])["status"], "ok"))
        if not keep_empty:
            # This column of the masks is the fastest to read: the same two numbers repeat.
            table = read_row_group(uri, size, footer, group, ["annotations.list.element.segmentation.size"])
            keep = keep & _numpy(pc.greater(pc.list_value_length(table["annotations"]), 0))
        # Without a term over images alone all of them stay.
        if where is not None and where.selects_images:
            table = read_row_group(uri, size, footer, group, where.columns(schema_of(plan.run)))
            keep = keep & where.flags(table)[0]
        wanted.append(start + np.flatnonzero(keep))
        start += num_rows
    return np.concatenate([np.empty(0, np.int64), *wanted]).astype(np.int32), seal_of(footer)


def _numpy(array: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    return np.asarray(array.to_numpy(), bool)


@dataclass(frozen=True, slots=True)
class ContainerIndex:
    """Locations of images inside tars and Parquet files: 20 bytes per image."""

    names: list[str]
    container: npt.NDArray[np.int32]
    """Index into `names`; -1 for an image in a file of its own."""
    at: npt.NDArray[np.int64]
    """First byte in a tar; row in a Parquet file."""
    sizes: npt.NDArray[np.int64]
    """Bytes in a tar; -1 in a Parquet file."""
    extents: dict[int, str]
    """Image index -> pieces of a sparse tar member."""

    def locate(self, index: int) -> dict[str, Any] | None:
        """The columns of `INPUT_SCHEMA` that locate an image; None for an image in a file of its own."""
        if self.container[index] < 0:
            return None
        name, at, size = self.names[self.container[index]], int(self.at[index]), int(self.sizes[index])
        if size < 0:
            return {"container": name, "row": at}
        return {"container": name, "offset": at, "size": size, "extents": self.extents.get(index)}


def read_uris(plan: Plan, index: ImageIndex) -> list[str]:
    """The URIs of the images of an index, in its order. Raises: StorageError."""
    uris: list[str] = take(plan.read_images(["uri"])["uri"], _places(plan, index)).to_pylist()
    return uris


def _places(plan: Plan, index: ImageIndex) -> pa.Array:
    """Row indices in the plan of the images of an index."""
    # (num_shards,): index in the plan of each shard's first image.
    first = np.cumsum([0, *(plan.num_images_of(shard) for shard in range(plan.num_shards - 1))])
    return pa.array(first[index.shards] + index.rows)


def index_containers(plan: Plan, index: ImageIndex) -> ContainerIndex | None:
    """Locate the images of an index in containers; None if each is a file of its own. Raises: StorageError."""
    names = plan.read_images(["container"])["container"]
    if names.null_count == len(names):
        return None
    places = _places(plan, index)
    planned = plan.read_images(["offset", "row", "size"]).take(places)
    coded = names.dictionary_encode().unify_dictionaries().combine_chunks().take(places)  # few names, much text
    # -1 for null, which NumPy's integers do not have.
    offsets, rows, sizes = (np.asarray(column.fill_null(-1).to_numpy(), np.int64) for column in planned.columns)
    in_tar = offsets >= 0
    extents = plan.read_images(["extents"])["extents"].take(places)
    with_holes = pc.indices_nonzero(pc.is_valid(extents))
    return ContainerIndex(
        coded.dictionary.to_pylist(),
        np.asarray(coded.indices.fill_null(-1).to_numpy(), np.int32),
        np.where(in_tar, offsets, rows),
        np.where(in_tar, sizes, -1),
        dict(zip(with_holes.to_pylist(), extents.take(with_holes).to_pylist(), strict=True)),
    )
