"""The plan of a run: which images, with which ids, in which shards. A plan never changes; later images are appended.

`_samray/manifest.parquet` has the images (`samray.output.manifests`), `_samray/run.json` the run's identity. Both are
created once and never replaced. run.json comes last and marks the plan as complete. If a driver dies in between, the
manifest's metadata name its run: the same command resumes, any other is refused. If two drivers plan at the same time,
the second finds the manifest of the first and uses it.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.errors import ConfigError, NotFoundError, StorageError
from samray.inputs.listing import list_images
from samray.inputs.repeats import mark_duplicates
from samray.inputs.skipped import Skipped
from samray.output.credentials import hide
from samray.output.identity import refuse_differences, versions
from samray.output.manifests import (
    FOLDER,
    MANIFEST_SCHEMA,
    Generation,
    build_manifest,
    create_generation,
    manifest_uri,
    read_changed,
    read_generation,
    read_generations,
    read_group,
    read_rows,
    with_rows,
)
from samray.output.schema import categories_of
from samray.output.shards import done_shards
from samray.storage.redaction import redact_json
from samray.storage.strict_json import parse_json

if TYPE_CHECKING:
    from samray.config import Config

RUN: Final = "run.json"

_SECTIONS: Final = ("input", "model", "masks", "labels", "output", "cluster")
_PACKAGES: Final = ("numpy", "pillow", "pyarrow", "pycocotools", "ray", "torch")


@dataclass
class Plan:
    """A plan stored in OUTPUT. Small and picklable: the images are read from the manifests, shard by shard."""

    output: str
    generations: list[Generation]
    run: dict[str, Any]
    """run.json as stored, plus the number of the last `generation`, which new shards record."""
    _groups: dict[tuple[int, int], pa.Table] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_images(self) -> int:
        return sum(generation.num_images for generation in self.generations)

    @property
    def num_shards(self) -> int:
        return sum(generation.num_shards for generation in self.generations)

    @property
    def last_generation(self) -> int:
        """Number of the last generation: 0 until images were appended."""
        return self.generations[-1].number

    def num_images_of(self, shard: int) -> int:
        """Number of images in a shard: the same for all shards of a generation except the last."""
        generation = self._generation_of(shard)
        start = (shard - generation.first_shard) * generation.images_per_shard
        return min(generation.images_per_shard, generation.num_images - start)

    @property
    def skipped(self) -> Skipped:
        """Files that the listings of each INPUT left out, from the latest listing of each."""
        # A later listing of the same INPUT replaces the counts of an earlier one.
        by_input = {generation.identity.get("input_uri"): generation.skipped for generation in self.generations}
        total = Skipped()
        for counts in by_input.values():
            total.update(Skipped(counts))
        return total

    def starts(self) -> list[int]:
        """Index of each shard's first image among all images, followed by the number of images."""
        return [0, *accumulate(self.num_images_of(shard) for shard in range(self.num_shards))]

    def read_shard(self, shard: int) -> pa.Table:
        """The shard's current rows (`MANIFEST_SCHEMA`), in order. Raises: StorageError.

        Reads one row group, and the row groups of later generations that have images of this shard.
        """
        generation = self._generation_of(shard)
        start = (shard - generation.first_shard) * generation.images_per_shard
        group, first = divmod(start, generation.rows_per_group)
        table = self._groups.get((generation.number, group))
        if table is None:
            table = read_group(self.output, generation, group)
            self._groups = {(generation.number, group): table}  # keep one: shards are mostly read in order
        rows = table.slice(first, self.num_images_of(shard))
        # An edited manifest must not move an image to another shard: it would be labelled twice, or never.
        if rows.num_rows != self.num_images_of(shard) or not pc.all(pc.equal(rows["shard"], shard)).as_py():
            uri = storage.redact(manifest_uri(self.output, generation.number))
            raise StorageError(f"{uri} is damaged or was edited: its rows of shard {shard} differ from the plan")
        # Later generations have only the new values of changed images, not copies of all others.
        for changed in self._changed(shard, after=generation.number):
            rows = with_rows(rows, changed)
        return rows

    def changed_images(self, shard: int, after: int) -> set[int]:
        """Ids of the shard's images that changed after this generation. Raises: StorageError."""
        return {i for changed in self._changed(shard, after) for i in changed["image_id"].to_pylist()}

    def changed_shards(self) -> dict[int, int]:
        """Shard -> the last generation in which one of its images changed; only changed shards. Raises:
        StorageError."""
        changed: dict[int, int] = {}
        # In order, so that the last generation with a change remains.
        for generation in self.generations:
            if generation.num_changed:
                shards = read_changed(self.output, generation)["shard"]
                changed.update(dict.fromkeys(shards.unique().to_pylist(), generation.number))
        return changed

    def read_images(self, columns: list[str]) -> pa.Table:
        """These columns of all images, in shard order, with their current values. Raises: StorageError."""
        # The id is needed to match newer rows, also if the caller does not ask for it.
        names = [*dict.fromkeys(["image_id", *columns])]
        rows = [read_rows(self.output, generation, names) for generation in self.generations]
        sizes = [generation.num_images for generation in self.generations]
        images = pa.concat_tables(table.slice(0, size) for table, size in zip(rows, sizes, strict=True))
        for table, size in zip(rows, sizes, strict=True):
            # Rows after the generation's own images are newer values of images of earlier generations.
            if table.num_rows > size:
                images = with_rows(images, table.slice(size))
        return images.select(columns)

    def _changed(self, shard: int, after: int) -> list[pa.Table]:
        later = [g for g in self.generations if g.number > after and g.num_changed]
        return [read_changed(self.output, generation, shard) for generation in later]

    def _generation_of(self, shard: int) -> Generation:
        assert 0 <= shard < self.num_shards, shard
        return self.generations[bisect_right(self.generations, shard, key=lambda g: g.first_shard) - 1]

    def __getstate__(self) -> dict[str, Any]:
        # Plans are sent to every task: without the cached rows.
        return {**self.__dict__, "_groups": {}}


def make_plan(
    input_uri: str,
    output_uri: str,
    config: Config,
    identity: Mapping[str, Any],
    *,
    joining: bool = False,
    check: Callable[[pa.Table], object] = lambda images: None,
) -> Plan:
    """Read the plan in OUTPUT, or make a new one for INPUT. The input of an existing plan is not listed again.

    identity: what a run must share with the one it resumes (settings, checkpoint); the input's URI is added.
    joining: INPUT will be compared with the plan (`samray.output.append`) and may differ from the plan's input.
    check: called with the images before a new plan is written; may raise.

    Raises: ConfigError if OUTPUT belongs to a different run (lists the differences) or INPUT is empty, StorageError.
    """
    output = storage.normalize(output_uri)
    wanted = run_identity(input_uri, identity)
    run = _read_run(output)
    if run is None:
        # The order matters: run.json is written before any shard, so if a shard is seen, run.json exists.
        has_shards = bool(done_shards(output))
        run = _read_run(output)
        if run is None and has_shards:
            raise ConfigError(
                f"{storage.redact(output)} has shards, but no {FOLDER}/{RUN} that describes them; "
                "choose another OUTPUT, or empty this one"
            )
        run = run or _write_plan(input_uri, output, config, wanted, check)
    plan = _plan_of(output, run)
    # Also for a plan that was just made: another driver may have written it first, with other settings.
    _refuse_other_run(plan, wanted, joining, config.default_identity())
    return plan


def preview_plan(input_uri: str, output_uri: str, config: Config, identity: Mapping[str, Any]) -> tuple[Plan, pa.Table]:
    """The plan that `make_plan` would write to an OUTPUT that holds none, unwritten, and its images (`INPUT_SCHEMA`).

    Raises: ConfigError if INPUT holds nothing, StorageError.
    """
    wanted = run_identity(input_uri, identity)
    generation, images = _list_generation(input_uri, config, wanted)
    return Plan(storage.normalize(output_uri), [generation], {"identity": wanted, "generation": 0}), images


def run_identity(input_uri: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """`identity` with the input's URI, round-tripped through JSON, without any credentials in the URI."""
    return dict(redact_json({**identity, "input_uri": storage.redact(storage.normalize(input_uri))}))


def load_plan(output_uri: str) -> Plan:
    """Load the plan in OUTPUT. Raises: ConfigError if it has none, StorageError."""
    output = storage.normalize(output_uri)
    run = _read_run(output)
    if run is None:
        raise ConfigError(f"{storage.redact(output)} is not the output of a samray run ({FOLDER}/{RUN} is missing)")
    return _plan_of(output, run)


def write_plan(output_uri: str, images: pa.Table, images_per_shard: int, run: Mapping[str, Any]) -> Plan:
    """Write a plan for images whose ids are already known, in an otherwise empty OUTPUT.

    images: a table with the columns of `MANIFEST_SCHEMA` except `shard`. run: the content of run.json, with its
    `identity`. If OUTPUT already has the same plan, returns that. Raises: ConfigError if it has a different one,
    StorageError.
    """
    output = storage.normalize(output_uri)
    # Before anything is written: a store that overwrites keys cannot decide between two writers.
    storage.check_output(output)
    images, credentials = hide(images)
    places = pa.array(range(images.num_rows), pa.int64())
    shards = pc.cast(pc.divide(places, images_per_shard), pa.int32())
    table = images.append_column("shard", shards).select(MANIFEST_SCHEMA.names)
    first = Generation(0, redact_json(run["identity"]), table.num_rows, images_per_shard, num_hidden=len(credentials))
    if not create_generation(output, first, table):
        # The same command, killed before run.json, may have left this manifest: if it is equal, go on from there.
        generation = read_generation(output, 0)
        if generation != first:
            refuse_differences(output, generation.identity if generation else {}, first.identity, {})
            raise ConfigError(
                f"{storage.redact(output)} has a plan for other images; choose another folder, or empty it"
            )
    return _plan_of(output, _create_run(output, first, run))


def _plan_of(output: str, run: dict[str, Any]) -> Plan:
    generations = read_generations(output)
    return Plan(output, generations, {**run, "generation": generations[-1].number})


# --- run.json ------------------------------------------------------------------------------------------------------


def _read_run(output: str) -> dict[str, Any] | None:
    uri = storage.join(output, FOLDER, RUN)
    try:
        run = parse_json(storage.read_bytes(uri))
        # Everything after this relies on these keys, so a run.json of another program is refused here.
        if not {"identity", "num_images", "images_per_shard"} <= run.keys():
            raise ValueError("it is not samray's")
        for settings in (run["identity"], run.get("config", {})):
            if not all(isinstance(part, dict) for part in (settings, *(settings.get(name, {}) for name in _SECTIONS))):
                raise ValueError("its settings are not an object")
    except NotFoundError:
        return None
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{storage.redact(uri)} is not valid: {error}; choose another OUTPUT") from error
    return dict(run)


def _write_plan(
    input_uri: str, output: str, config: Config, wanted: dict[str, Any], check: Callable[[pa.Table], object]
) -> dict[str, Any]:
    """Write the manifest, then run.json, unless another driver was first: then return its run.json."""
    # A manifest without run.json: its driver died in between, or is about to write run.json.
    generation = read_generation(output, 0)
    if generation is None:
        listed, images = _list_generation(input_uri, config, wanted)
        # Before the manifest is created: a refused input leaves no plan in OUTPUT.
        check(images)
        table = build_manifest(images, config.output.images_per_shard)
        generation = listed if create_generation(output, listed, table) else read_generation(output, 0)
        if generation is None:
            raise StorageError(f"{storage.redact(manifest_uri(output, 0))} was deleted during the run")
    # The manifest may be another driver's: only a run with the same settings may go on with it.
    refuse_differences(output, generation.identity, wanted, config.default_identity())
    run = {"identity": wanted, "input": wanted["input_uri"], "config": config.model_dump(mode="json")}
    if (categories := categories_of(wanted)) is not None:
        run["categories"] = categories
    if has_tiffs(read_rows(output, generation, ["file_name"])["file_name"]):
        run["geo"] = True  # the shards have the column `GEO`; not a setting, because INPUT decides
    return _create_run(output, generation, run)


def has_tiffs(file_names: pa.ChunkedArray) -> bool:
    """Whether images may be GeoTIFFs, and this samray can read where they are."""
    if find_spec("rasterio") is None:
        return False
    return bool(pc.any(pc.match_substring_regex(file_names, r"\.tiff?$", ignore_case=True)).as_py())


def _list_generation(input_uri: str, config: Config, wanted: dict[str, Any]) -> tuple[Generation, pa.Table]:
    """The first generation of a plan for INPUT, and its images (`INPUT_SCHEMA`) without credentials."""
    listed, skipped = list_images(input_uri, config.input)
    if config.input.skip_duplicates:
        listed = mark_duplicates(listed, config.input)
    images, credentials = hide(listed)
    generation = Generation(
        0,
        wanted,
        images.num_rows,
        config.output.images_per_shard,
        skipped=skipped.redacted(),
        num_hidden=len(credentials),
    )
    return generation, images


def _create_run(output: str, first: Generation, run: Mapping[str, Any]) -> dict[str, Any]:
    """Write run.json unless it exists; returns what is stored."""
    full = {
        "num_images": first.num_images,
        "images_per_shard": first.images_per_shard,
        **versions(_PACKAGES),
        **redact_json(run),
    }
    storage.put_new(storage.join(output, FOLDER, RUN), json.dumps(full, indent=2, sort_keys=True).encode() + b"\n")
    # Read back instead of returning `full`: another driver may have been first.
    written = _read_run(output)
    if written is None:
        raise StorageError(f"{storage.redact(storage.join(output, FOLDER, RUN))} was deleted during the run")
    return written


def _refuse_other_run(plan: Plan, wanted: dict[str, Any], joining: bool, defaults: Mapping[str, Any]) -> None:
    """Raises: ConfigError with each setting that differs from those of the plan."""
    recorded = dict(plan.run["identity"])
    # Redacted again, because an older version may have hidden less of a URI.
    inputs = [redact_json(generation.identity.get("input_uri")) for generation in plan.generations]
    if joining or wanted["input_uri"] in inputs:
        # An INPUT that was appended later also resumes this output.
        recorded["input_uri"] = wanted["input_uri"]
    if joining or plan.run.get("compacted_from"):
        # A new generation uses this run's shard size; compacting may have changed it in the older ones.
        recorded["output"] = {**recorded.get("output", {}), "images_per_shard": wanted["output"]["images_per_shard"]}
    refuse_differences(plan.output, recorded, wanted, defaults)
