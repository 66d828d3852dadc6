"""Check that an output is complete and sound: every planned image exactly once; deep: every mask decodes and fits its
row.

Works shard by shard: memory holds one shard, and 16 bytes per image to find images that are in two shards. Any damage
is reported as a sentence. A shard with a wrong checksum is not checked further.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from samray import storage
from samray.errors import NotFoundError, StorageError
from samray.output import manifests as generations
from samray.output import shards
from samray.output.append import stale_shards
from samray.output.plan import Plan, load_plan
from samray.output.schema import categories_of, count_named, num_common_of, reason_of, samray_metadata, schema_of
from samray.output.seals import is_intact, seal_of
from samray.output.verify_embeddings import check_embeddings, check_names, has_embeddings
from samray.output.verify_rows import check_asked, check_image, check_planned, check_status
from samray.storage.footers import statistics
from samray.storage.tables import open_parquet
from samray.text import abridged

_PROBLEMS_PER_SHARD: Final = 20
_PROBLEMS_OF_DUPLICATES: Final = 20


@dataclass
class VerifyReport:
    """Result of `verify`. Each problem is a sentence that names the shard and the image."""

    num_images: int = 0
    """Number of rows in the shards."""
    num_masks: int = 0
    num_failed: int = 0
    """Rows with status `failed`. They are not problems: each has its reason."""
    num_shards: int = 0
    num_without_checksum: int = 0
    """Shards of an older samray: damage that leaves plausible values cannot be detected."""
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(output: str, deep: bool = False) -> VerifyReport:
    """Check an output against its plan; `deep` also decodes every mask and recomputes its area and box.

    Raises: ConfigError if there is no plan, StorageError if the plan or storage cannot be read.
    """
    plan = load_plan(output)
    report = VerifyReport()
    report.problems += _check_plan(plan)
    names = storage.list_names(storage.join(plan.output, shards.FOLDER))
    done = {number for name in names if (number := shards.shard_number(name)) is not None}
    # Names with a dot are temporary files of writers that are at work or were killed.
    for name in sorted(names):
        number = shards.shard_number(name)
        if (number is None and not name.startswith(".")) or (number is not None and number >= plan.num_shards):
            report.problems.append(f"{shards.FOLDER}/{name} is not in the plan")
    success = shards.read_success(plan.output)
    images = _Images()
    for shard in range(plan.num_shards):
        if shard not in done:
            report.problems.append(f"{shards.FOLDER}/{shards.shard_name(shard)} is missing")
            continue
        report.num_shards += 1
        checked = _check_shard(plan, shard, deep, success)
        report.num_images += checked.num_images
        report.num_masks += checked.num_masks
        report.num_failed += checked.num_failed
        report.num_without_checksum += checked.without_checksum
        if checked.columns is not None:
            images.add(shard, checked.columns)
        more = len(checked.problems) - _PROBLEMS_PER_SHARD
        report.problems += checked.problems[:_PROBLEMS_PER_SHARD]
        if more > 0:
            report.problems.append(f"{shards.shard_name(shard)}: {more} more problems")
    report.problems += images.duplicates(plan)
    if has_embeddings(plan):
        report.problems += check_names(plan)
    report.problems += _check_changed(plan, done)
    report.problems += _check_success(plan, report.num_shards, success)
    return report


def _check_plan(plan: Plan) -> Iterator[str]:
    """Check that the manifests are unchanged and agree with run.json."""
    for generation in plan.generations:
        name = generations.manifest_uri(generations.FOLDER, generation.number)
        # None: manifests of older versions have no checksum.
        if is_intact(storage.read_bytes(generations.manifest_uri(plan.output, generation.number))) is False:
            yield f"{name} is damaged or was edited: its checksum does not match"
    first = plan.generations[0]
    planned = (plan.run.get("num_images"), plan.run.get("images_per_shard"))
    if planned != (first.num_images, first.images_per_shard):
        yield (
            f"{generations.FOLDER}/run.json plans {planned[0]} images in shards of {planned[1]}, "
            f"the manifest has {first.num_images} in shards of {first.images_per_shard}"
        )


def _check_changed(plan: Plan, done: set[int]) -> list[str]:
    try:
        stale = stale_shards(plan, done)
    except StorageError as error:  # an unreadable shard, which is already reported
        return [f"cannot find the shards that must be labelled again: {error}"]
    problem = "has an image that changed since: run the same command again"
    return [f"{shards.shard_name(shard)} {problem}" for shard in sorted(stale)]


def _check_success(plan: Plan, num_done: int, success: shards.Success | None) -> Iterator[str]:
    if success is None:
        if num_done == plan.num_shards:
            yield f"all shards are there, but {shards.SUCCESS} is missing: run the same command again"
        return
    if num_done != plan.num_shards:
        yield f"{shards.SUCCESS} is there, but only {num_done} of {plan.num_shards} shards are"
    elif success.num_shards != plan.num_shards:
        yield f"{shards.SUCCESS} names {success.num_shards} shards, the plan has {plan.num_shards}"
    elif not success.marks(plan.num_shards, plan.last_generation):
        yield (
            f"{shards.SUCCESS} names generation {success.generation} of the plan, the last one is "
            f"{plan.last_generation}: run the same command again"
        )


@dataclass
class _Checked:
    """Result of checking one shard."""

    problems: list[str] = field(default_factory=list)
    num_images: int = 0
    num_masks: int = 0
    num_failed: int = 0
    without_checksum: bool = False
    columns: pa.Table | None = None
    """Columns image_id and uri; None if they cannot be read."""


def _check_shard(plan: Plan, shard: int, deep: bool, success: shards.Success | None) -> _Checked:
    name = shards.shard_name(shard)
    try:
        data = storage.read_bytes(shards.shard_uri(plan.output, shard))
    except NotFoundError:
        return _Checked([f"{name} was deleted during the check"])
    intact = is_intact(data)
    if intact is False:
        return _Checked([f"{name} is damaged: its checksum does not match; delete it and run the same command again"])
    checked = _Checked(without_checksum=intact is None)
    try:
        file = open_parquet(data)
        table = file.read()
        # Offsets inside the file may be wrong; without the full check, later steps could read out of bounds.
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        checked.problems.append(f"{name} cannot be read as Parquet: {error}")
        return checked
    checked.num_images = table.num_rows
    # Before any value is used: the checks below rely on the types.
    if not table.schema.equals(schema_of(plan.run)):
        checked.problems.append(f"{name} has columns or types that samray does not write: {table.schema.names}")
        return checked
    # A slice, because files of older versions name no digests.
    recorded = success.digests[shard : shard + 1] if success else ()
    if recorded and recorded[0] not in (None, seal_of(file.metadata)):
        checked.problems.append(f"{name} was replaced after {shards.SUCCESS} was written; run the same command again")
    checked.num_failed = pc.sum(pc.equal(table["status"], "failed")).as_py() or 0
    checked.num_masks = pc.sum(pc.list_value_length(table["annotations"])).as_py() or 0
    # Two columns only: the shard's masks must not stay in memory until all shards are checked.
    checked.columns = pa.table({"image_id": pc.struct_field(table["image"], "image_id"), "uri": table["uri"]})
    checked.problems += _check_rows(plan, shard, file, table, deep)
    if has_embeddings(plan):
        rows = zip(table["image"].to_pylist(), table["status"].to_pylist(), strict=True)
        sizes = {image["image_id"]: (image["height"], image["width"]) for image, status in rows if status == "ok"}
        checked.problems += check_embeddings(plan, shard, sizes, deep)
    return checked


def _check_rows(plan: Plan, shard: int, file: pq.ParquetFile, table: pa.Table, deep: bool) -> Iterator[str]:
    """Check what a shard of the right schema says against the plan and against itself."""
    name = shards.shard_name(shard)
    try:
        yield from _check_metadata(plan, shard, table)
        yield from _check_statistics(name, file, table)
        yield from check_planned(name, plan.read_shard(shard), table)
        yield from check_status(name, table)
        convention = samray_metadata(table.schema).get("bbox_convention", "coco")
        has_gaps = "compacted_where" in plan.run
        # One row at a time as Python objects, which take far more memory than Arrow's.
        for i in range(table.num_rows):
            yield from check_image(name, table.slice(i, 1).to_pylist()[0], convention, deep, has_gaps=has_gaps)
    except StorageError as error:
        yield f"{name} cannot be compared with the plan: {error}"
    except Exception as error:  # an unexpected type of value is also damage
        yield f"{name} has values that samray does not write ({type(error).__name__}: {error})"


def _check_metadata(plan: Plan, shard: int, table: pa.Table) -> Iterator[str]:
    """Check the shard's metadata: which run wrote it, and its number of rows, masks and failures."""
    name = shards.shard_name(shard)
    metadata = samray_metadata(table.schema)
    if metadata.get("identity") != plan.run["identity"]:
        yield f"{name} was written by a run with other settings"
    names = categories_of(plan.run["identity"])
    if names is not None:
        labels = pc.unique(pc.struct_field(pc.list_flatten(table["annotations"]), "label")).drop_null().to_pylist()
        for label in sorted(set(labels) - set(names)):
            yield f"{name} has the name {label!r}, which is not one of those asked for: {abridged(names, 20)}"
        yield from check_asked(name, table, names, num_common_of(plan.run["identity"]))
    if metadata.get("generation", 0) > plan.last_generation:
        made_for = metadata["generation"]
        yield f"{name} was written for generation {made_for} of a plan, the last one here is {plan.last_generation}"
    stats = metadata.get("stats", {})
    if stats.get("shard", shard) != shard:
        yield f"{name} was written as {shards.shard_name(stats['shard'])}"
    errors = table["error"].drop_null().to_pylist()
    counted = {
        "num_images": table.num_rows,
        "num_masks": pc.sum(pc.list_value_length(table["annotations"])).as_py() or 0,
        "num_named": count_named(table),
        "failures": dict(Counter(reason_of(error) for error in errors)),
    }
    for key, number in counted.items():
        if stats.get(key, number) != number:
            yield f"{name}: its footer has {key} {stats[key]}, its rows give {number}"


def _check_statistics(name: str, file: pq.ParquetFile, table: pa.Table) -> Iterator[str]:
    """Check the statistics by which readers skip row groups against the rows."""
    columns = {
        "image.image_id": pc.struct_field(table["image"], "image_id"),
        "image.file_name": pc.struct_field(table["image"], "file_name"),
        "status": table["status"],
    }
    footer = file.metadata
    for path, column in columns.items():
        start = 0
        for group, stated in enumerate(statistics(footer, path)):
            num_rows = footer.row_group(group).num_rows
            values = column.slice(start, num_rows)
            start += num_rows
            # Readers then read the whole group: slower, never wrong.
            if stated is None:
                continue
            true = pc.min_max(values).as_py()
            wrong = (stated.min, stated.max) != (true["min"], true["max"])
            if wrong or stated.null_count not in (None, values.null_count):
                yield f"{name}: the statistics of {path} in row group {group} are wrong; lookups would miss images"


class _Images:
    """The ids and URIs of all images seen, to find images that are in two shards."""

    def __init__(self) -> None:
        self._shards: list[int] = []
        self._ids: list[npt.NDArray[np.int64]] = []
        self._uris: list[npt.NDArray[np.int64]] = []

    def add(self, shard: int, columns: pa.Table) -> None:
        """columns: image_id and uri of the shard's rows."""
        ids = pc.fill_null(columns["image_id"], -1)
        self._shards.append(shard)
        self._ids.append(np.asarray(ids.to_numpy(), np.int64))
        # Python hashes: 64 bits; equal hashes are compared again by value.
        self._uris.append(np.array([hash(uri) for uri in columns["uri"].to_pylist()], np.int64))

    def duplicates(self, plan: Plan) -> Iterator[str]:
        """One sentence for each image_id and each URI that is in two shards, up to a limit of each."""
        for number, (first, other, image_id) in enumerate(self._in_two_shards(self._ids)):
            if number == _PROBLEMS_OF_DUPLICATES:
                break
            yield f"image {image_id} is in {shards.shard_name(first)} and in {shards.shard_name(other)}"
        for number, (first, other, key) in enumerate(self._in_two_shards(self._uris)):
            if number == _PROBLEMS_OF_DUPLICATES:
                break
            pair = [shards.read_shard(plan.output, shard, ["uri"])["uri"].to_pylist() for shard in (first, other)]
            for uri in sorted({uri for uri in pair[0] if uri and hash(uri) == key} & set(pair[1])):
                yield (
                    f"the URI {storage.redact(uri)!r} is in {shards.shard_name(first)} and in "
                    f"{shards.shard_name(other)}"
                )

    def _in_two_shards(self, values: list[npt.NDArray[np.int64]]) -> Iterator[tuple[int, int, int]]:
        """Each value that is in two shards, with those shards."""
        if not values:
            return
        flat = np.concatenate(values)
        shard_of = np.repeat(self._shards, [len(part) for part in values])
        order = np.argsort(flat, kind="stable")
        flat, shard_of = flat[order], shard_of[order]
        # Equal values are neighbours now.
        for index in np.flatnonzero((flat[1:] == flat[:-1]) & (shard_of[1:] != shard_of[:-1])).tolist():
            yield int(shard_of[index]), int(shard_of[index + 1]), int(flat[index])
