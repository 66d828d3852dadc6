"""The plan of a run: which images, with which ids, in which shards. Fixed once made.

`_samray/manifest.parquet` holds the images, `_samray/run.json` the run's identity; both are created, never replaced,
and run.json comes last: it is the mark that the plan is complete. A driver that dies in between leaves a manifest whose
own metadata say which run it belongs to, so the same command goes on from there and any other is refused. Of two
drivers that plan at once, the second finds the first one's manifest and takes it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from samray import __version__, storage
from samray.dataset.inputs import list_images
from samray.dataset.rows import INPUT_SCHEMA
from samray.dataset.schema import MAX_IMAGE_ID
from samray.dataset.shards import done_shards
from samray.errors import ConfigError, NotFoundError, StorageError

if TYPE_CHECKING:
    from samray.config import Config

FOLDER: Final = "_samray"
RUN: Final = "run.json"
MANIFEST: Final = "manifest.parquet"

_ROWS_PER_GROUP: Final = 16384
_PACKAGES: Final = ("numpy", "pillow", "pyarrow", "pycocotools", "ray", "torch")

MANIFEST_SCHEMA: Final = pa.schema([("image_id", pa.int64()), ("shard", pa.int32()), *INPUT_SCHEMA])


@dataclass
class Plan:
    """A plan that lies in OUTPUT. Small and picklable: the images stay in the manifest until a shard is read."""

    output: str
    num_images: int
    images_per_shard: int
    run: dict[str, Any]
    """run.json as it lies."""
    _groups: dict[int, pa.Table] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.images_per_shard)

    def num_images_of(self, shard: int) -> int:
        """How many images a shard has: all have the same number but the last."""
        assert 0 <= shard < self.num_shards, shard
        return min(self.images_per_shard, self.num_images - shard * self.images_per_shard)

    def read_shard(self, shard: int) -> pa.Table:
        """The shard's rows of the manifest (`MANIFEST_SCHEMA`), in order; reads one row group. Raises: StorageError."""
        rows_per_group = _rows_per_group(self.images_per_shard)
        start = shard * self.images_per_shard
        group = start // rows_per_group
        table = self._groups.get(group)
        if table is None:
            table = _read_manifest_group(self.output, group)
            self._groups = {group: table}  # the last one: shards mostly come in order
        rows = table.slice(start - group * rows_per_group, self.num_images_of(shard))
        assert pc.all(pc.equal(rows["shard"], shard)).as_py(), f"manifest and plan disagree about shard {shard}"
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": {}}


def make_plan(input_uri: str, output_uri: str, config: Config, identity: Mapping[str, Any]) -> Plan:
    """The plan that lies in OUTPUT, or a new one for INPUT. The input of an existing plan is not listed again.

    identity: what a run must share with the one it resumes (settings, checkpoint); the input's URI is added.

    Raises: ConfigError where OUTPUT belongs to a different run (with the differences) or INPUT holds nothing,
    StorageError.
    """
    output = storage.normalize(output_uri)
    wanted = _plain({**identity, "input_uri": storage.redact(storage.normalize(input_uri))})
    # In this order: run.json is written before any shard, so shards seen now mean that it is there a moment later.
    has_shards = bool(done_shards(output))
    run = _read_run(output)
    if run is None:
        if has_shards:
            raise ConfigError(
                f"{storage.redact(output)} holds shards, but no {FOLDER}/{RUN} that says what they are; "
                "give another OUTPUT, or empty this one"
            )
        run = _write_plan(input_uri, output, config, wanted)
    _refuse_other_run(output, run["identity"], wanted)
    return _plan_of(output, run)


def load_plan(output_uri: str) -> Plan:
    """The plan that lies in OUTPUT. Raises: ConfigError where there is none, StorageError."""
    output = storage.normalize(output_uri)
    run = _read_run(output)
    if run is None:
        raise ConfigError(f"{storage.redact(output)} holds no samray run ({FOLDER}/{RUN} is missing)")
    return _plan_of(output, run)


def _plan_of(output: str, run: dict[str, Any]) -> Plan:
    return Plan(output, int(run["num_images"]), int(run["images_per_shard"]), run)


def _uri(output: str, name: str) -> str:
    return storage.join(output, FOLDER, name)


# --- run.json ------------------------------------------------------------------------------------------------------


def _read_run(output: str) -> dict[str, Any] | None:
    uri = _uri(output, RUN)
    try:
        run = json.loads(storage.read_bytes(uri))
        if not {"identity", "num_images", "images_per_shard"} <= run.keys():
            raise ValueError("it is not samray's")
    except NotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{storage.redact(uri)} cannot be understood: {error}; give another OUTPUT") from error
    return dict(run)


def _write_plan(input_uri: str, output: str, config: Config, wanted: dict[str, Any]) -> dict[str, Any]:
    """Manifest, then run.json, unless another driver has put its own there; then that one's."""
    held = _read_manifest_metadata(output)
    if held is None:
        table = build_manifest(pa.concat_tables(list_images(input_uri, config.input)), config.output.images_per_shard)
        own = {"identity": wanted, "num_images": table.num_rows, "images_per_shard": config.output.images_per_shard}
        created = storage.put_new(_uri(output, MANIFEST), _manifest_bytes(table, own))
        held = own if created else _read_manifest_metadata(output)
        if held is None:
            raise StorageError(f"{storage.redact(_uri(output, MANIFEST))} was removed while it was being used")
    _refuse_other_run(output, held["identity"], wanted)
    run = {
        **held,
        "samray_version": __version__,
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in _PACKAGES}},
        "input": wanted["input_uri"],
        "config": _plain(config.model_dump(mode="json")),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    storage.put_new(_uri(output, RUN), json.dumps(run, indent=2, sort_keys=True).encode() + b"\n")
    written = _read_run(output)
    if written is None:
        raise StorageError(f"{storage.redact(_uri(output, RUN))} was removed while it was being used")
    return written


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """As JSON gives it back, and without the credentials that a URI may hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return storage.redact(value) if isinstance(value, str) else value


def _refuse_other_run(output: str, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises: ConfigError with each setting that differs."""
    there, asked = _flat(held), _flat(wanted)
    missing = "not set"
    differences = [
        f"  {key}: {there.get(key, missing)} there, {asked.get(key, missing)} now"
        for key in sorted(there.keys() | asked.keys())
        if there.get(key, missing) != asked.get(key, missing)
    ]
    if differences:
        raise ConfigError(
            f"{storage.redact(output)} belongs to a run with other settings:\n"
            + "\n".join(differences)
            + "\nuse those settings to finish it, or give another OUTPUT for these"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = json.dumps(value)
    return flat


# --- the manifest --------------------------------------------------------------------------------------------------


def build_manifest(images: pa.Table, images_per_shard: int) -> pa.Table:
    """Ids and shards for the images of an input. Returns a table of `MANIFEST_SCHEMA`."""
    places = pa.array(range(images.num_rows), pa.int64())
    shards = pc.cast(pc.divide(places, images_per_shard), pa.int32())
    columns = [image_ids(images["file_name"]), shards, *(images[name] for name in INPUT_SCHEMA.names)]
    return pa.Table.from_arrays(columns, schema=MANIFEST_SCHEMA)


def image_ids(file_names: pa.ChunkedArray) -> pa.ChunkedArray:
    """The number in names like sa_<n>.jpg, else the row's place; places for all where two would get the same id."""
    places = pa.chunked_array([pa.array(range(len(file_names)), pa.int64())])
    digits = pc.struct_field(pc.extract_regex(file_names, r"(?:^|/)sa_0*(?P<n>[0-9]{1,15})\.[^./]+$"), "n")
    numbers = pc.cast(digits, pa.int64())
    numbers = pc.if_else(pc.less_equal(numbers, MAX_IMAGE_ID), numbers, None)
    ids = pc.coalesce(numbers, places)
    return ids if pc.count_distinct(ids).as_py() == len(ids) else places


def _rows_per_group(images_per_shard: int) -> int:
    """A whole number of shards, so that a shard's rows always lie in one row group."""
    return images_per_shard * max(1, _ROWS_PER_GROUP // images_per_shard)


def _manifest_bytes(table: pa.Table, own: Mapping[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata({b"samray": json.dumps(own, sort_keys=True).encode()}),
        sink,
        compression="zstd",
        row_group_size=_rows_per_group(own["images_per_shard"]),
    )
    return bytes(sink.getvalue())


def _open_manifest(output: str) -> Any:
    return storage.open_read(_uri(output, MANIFEST))


def _read_manifest_metadata(output: str) -> dict[str, Any] | None:
    """What the manifest says of its run; None where there is no manifest."""
    uri = storage.redact(_uri(output, MANIFEST))
    try:
        with _open_manifest(output) as stream:
            held = json.loads((pq.read_schema(stream).metadata or {}).get(b"samray", b"{}"))
    except NotFoundError:
        return None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"{uri} is damaged: {error}; give another OUTPUT") from error
    if not {"identity", "num_images", "images_per_shard"} <= held.keys():
        raise ConfigError(f"{uri} was not written by samray; give another OUTPUT")
    return dict(held)


def _read_manifest_group(output: str, group: int) -> pa.Table:
    uri = storage.redact(_uri(output, MANIFEST))
    try:
        with _open_manifest(output) as stream:
            return pq.ParquetFile(stream).read_row_group(group)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"{uri} is damaged: {error}; the plan of this OUTPUT is lost") from error
