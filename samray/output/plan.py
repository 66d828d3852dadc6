"""The plan of a run: which images, with which ids, in which shards. Fixed once made; later images only add to it.

`_samray/manifest.parquet` holds the images (`samray.output.manifests`), `_samray/run.json` the run's identity; both
are created, never replaced, and run.json comes last: it is the mark that the plan is complete. A driver that dies in
between leaves a manifest whose own metadata say which run it belongs to, so the same command goes on from there and any
other is refused. Of two drivers that plan at once, the second finds the first one's manifest and takes it.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.errors import ConfigError, NotFoundError, StorageError
from samray.inputs.listing import list_images
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
from samray.output.shards import done_shards
from samray.storage.redaction import redact_json
from samray.storage.strict_json import parse_json

if TYPE_CHECKING:
    from samray.config import Config

RUN: Final = "run.json"

_PACKAGES: Final = ("numpy", "pillow", "pyarrow", "pycocotools", "ray", "torch")


@dataclass
class Plan:
    """A plan that lies in OUTPUT. Small and picklable: the images stay in the manifests until a shard is read."""

    output: str
    generations: list[Generation]
    run: dict[str, Any]
    """run.json as it lies, and the number of the last `generation`, which the shards written now will name."""
    _groups: dict[tuple[int, int], pa.Table] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_images(self) -> int:
        return sum(generation.num_images for generation in self.generations)

    @property
    def num_shards(self) -> int:
        return sum(generation.num_shards for generation in self.generations)

    @property
    def last_generation(self) -> int:
        """Its number: 0 until images joined."""
        return self.generations[-1].number

    def num_images_of(self, shard: int) -> int:
        """How many images a shard has: of a generation's shards all have the same number but the last."""
        generation = self._generation_of(shard)
        start = (shard - generation.first_shard) * generation.images_per_shard
        return min(generation.images_per_shard, generation.num_images - start)

    @property
    def skipped(self) -> Skipped:
        """What the listings of each INPUT left out, the last listing of each."""
        by_input = {generation.identity.get("input_uri"): generation.skipped for generation in self.generations}
        total = Skipped()
        for counts in by_input.values():
            total.update(Skipped(counts))
        return total

    def starts(self) -> list[int]:
        """The place of each shard's first image among all, and at the end how many there are."""
        return [0, *accumulate(self.num_images_of(shard) for shard in range(self.num_shards))]

    def read_shard(self, shard: int) -> pa.Table:
        """The shard's rows (`MANIFEST_SCHEMA`), in order, as they are now. Raises: StorageError.

        Reads one row group, and those of later generations that name images of the shard.
        """
        generation = self._generation_of(shard)
        start = (shard - generation.first_shard) * generation.images_per_shard
        group, first = divmod(start, generation.rows_per_group)
        table = self._groups.get((generation.number, group))
        if table is None:
            table = read_group(self.output, generation, group)
            self._groups = {(generation.number, group): table}  # the last one: shards mostly come in order
        rows = table.slice(first, self.num_images_of(shard))
        if rows.num_rows != self.num_images_of(shard) or not pc.all(pc.equal(rows["shard"], shard)).as_py():
            uri = storage.redact(manifest_uri(self.output, generation.number))
            raise StorageError(f"{uri} is damaged or was edited: its rows of shard {shard} are not those planned")
        for changed in self._changed(shard, after=generation.number):
            rows = with_rows(rows, changed)
        return rows

    def changed_images(self, shard: int, after: int) -> set[int]:
        """Ids of the shard's images that have changed after this generation. Raises: StorageError."""
        return {i for changed in self._changed(shard, after) for i in changed["image_id"].to_pylist()}

    def changed_shards(self) -> dict[int, int]:
        """Shard -> the last generation in which one of its images changed, where one did. Raises: StorageError."""
        changed: dict[int, int] = {}
        for generation in self.generations:
            if generation.num_changed:
                shards = read_changed(self.output, generation)["shard"]
                changed.update(dict.fromkeys(shards.unique().to_pylist(), generation.number))
        return changed

    def read_images(self, columns: list[str]) -> pa.Table:
        """These columns of all images, shard by shard, as they are now. Raises: StorageError."""
        names = [*dict.fromkeys(["image_id", *columns])]
        rows = [read_rows(self.output, generation, names) for generation in self.generations]
        sizes = [generation.num_images for generation in self.generations]
        images = pa.concat_tables(table.slice(0, size) for table, size in zip(rows, sizes, strict=True))
        for table, size in zip(rows, sizes, strict=True):
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
    """The plan that lies in OUTPUT, or a new one for INPUT. The input of an existing plan is not listed again.

    identity: what a run must share with the one it resumes (settings, checkpoint); the input's URI is added.
    joining: INPUT is to be compared with the plan (`samray.output.append`), and need not be the one it was made of.
    check: called with the images before a new plan is written, to raise what is then too late to say.

    Raises: ConfigError where OUTPUT belongs to a different run (with the differences) or INPUT holds nothing,
    StorageError.
    """
    output = storage.normalize(output_uri)
    wanted = run_identity(input_uri, identity)
    run = _read_run(output)
    if run is None:
        # In this order: run.json is written before any shard, so shards seen now mean that it is there a moment later.
        has_shards = bool(done_shards(output))
        run = _read_run(output)
        if run is None and has_shards:
            raise ConfigError(
                f"{storage.redact(output)} holds shards, but no {FOLDER}/{RUN} that says what they are; "
                "give another OUTPUT, or empty this one"
            )
        run = run or _write_plan(input_uri, output, config, wanted, check)
    plan = _plan_of(output, run)
    _refuse_other_run(plan, wanted, joining, config.default_identity())
    return plan


def run_identity(input_uri: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """`identity` with the input's URI, as JSON gives it back, and without the credentials that a URI may hold."""
    return dict(redact_json({**identity, "input_uri": storage.redact(storage.normalize(input_uri))}))


def load_plan(output_uri: str) -> Plan:
    """The plan that lies in OUTPUT. Raises: ConfigError where there is none, StorageError."""
    output = storage.normalize(output_uri)
    run = _read_run(output)
    if run is None:
        raise ConfigError(f"{storage.redact(output)} holds no samray run ({FOLDER}/{RUN} is missing)")
    return _plan_of(output, run)


def write_plan(output_uri: str, images: pa.Table, images_per_shard: int, run: Mapping[str, Any]) -> Plan:
    """A plan of its own kind: for images that are known, their ids included, in an OUTPUT that holds nothing else.

    images: a table with the columns of `MANIFEST_SCHEMA` but `shard`. run: what run.json is to say, its `identity`
    included. Where the same plan lies there already, it is taken. Raises: ConfigError where another does, StorageError.
    """
    output = storage.normalize(output_uri)
    storage.check_output(output)
    images, credentials = hide(images)
    places = pa.array(range(images.num_rows), pa.int64())
    shards = pc.cast(pc.divide(places, images_per_shard), pa.int32())
    table = images.append_column("shard", shards).select(MANIFEST_SCHEMA.names)
    first = Generation(0, redact_json(run["identity"]), table.num_rows, images_per_shard, num_hidden=len(credentials))
    if not create_generation(output, first, table):
        held = read_generation(output, 0)
        if held != first:
            refuse_differences(output, held.identity if held else {}, first.identity, {})
            raise ConfigError(
                f"{storage.redact(output)} holds a plan of other images; give another folder, or empty it"
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
        if not {"identity", "num_images", "images_per_shard"} <= run.keys():
            raise ValueError("it is not samray's")
        if not (isinstance(run["identity"], dict) and isinstance(run.get("config", {}), dict)):
            raise ValueError("its settings are not an object")
    except NotFoundError:
        return None
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{storage.redact(uri)} cannot be understood: {error}; give another OUTPUT") from error
    return dict(run)


def _write_plan(
    input_uri: str, output: str, config: Config, wanted: dict[str, Any], check: Callable[[pa.Table], object]
) -> dict[str, Any]:
    """Manifest, then run.json, unless another driver has put its own there; then that one's."""
    held = read_generation(output, 0)
    if held is None:
        skipped = Skipped()
        listed, credentials = hide(pa.concat_tables(list_images(input_uri, config.input, skipped)))
        check(listed)
        table = build_manifest(listed, config.output.images_per_shard)
        own = Generation(
            0,
            wanted,
            table.num_rows,
            config.output.images_per_shard,
            skipped=skipped.redacted(),
            num_hidden=len(credentials),
        )
        held = own if create_generation(output, own, table) else read_generation(output, 0)
        if held is None:
            raise StorageError(f"{storage.redact(manifest_uri(output, 0))} was removed while it was being used")
    refuse_differences(output, held.identity, wanted, config.default_identity())
    run = {"identity": wanted, "input": wanted["input_uri"], "config": config.model_dump(mode="json")}
    return _create_run(output, held, run)


def _create_run(output: str, first: Generation, run: Mapping[str, Any]) -> dict[str, Any]:
    """Write run.json unless it is there; returns what is there."""
    full = {
        "num_images": first.num_images,
        "images_per_shard": first.images_per_shard,
        **versions(_PACKAGES),
        **redact_json(run),
    }
    storage.put_new(storage.join(output, FOLDER, RUN), json.dumps(full, indent=2, sort_keys=True).encode() + b"\n")
    written = _read_run(output)
    if written is None:
        raise StorageError(f"{storage.redact(storage.join(output, FOLDER, RUN))} was removed while it was being used")
    return written


def _refuse_other_run(plan: Plan, wanted: dict[str, Any], joining: bool, defaults: Mapping[str, Any]) -> None:
    """Raises: ConfigError with each setting that differs from those of the plan."""
    held = dict(plan.run["identity"])
    inputs = [redact_json(generation.identity.get("input_uri")) for generation in plan.generations]
    if joining or wanted["input_uri"] in inputs:
        held["input_uri"] = wanted["input_uri"]
    if joining or plan.run.get("compacted_from"):
        # A new generation is cut as this run says; a compacted one was cut for its readers.
        held["output"] = wanted["output"]
    refuse_differences(plan.output, held, wanted, defaults)
