"""New images join an old output: what INPUT holds now against what the plan says, and a new generation for the rest.

An image is the one of its URI; it has changed when its size or etag is known on both sides and differs. Finished shards
are not touched by images that join: those go into shards of their own. A changed image is labelled again in its place,
and only when that is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.errors import StorageError
from samray.inputs.listing import list_images
from samray.inputs.rows import take
from samray.inputs.skipped import Skipped
from samray.output.credentials import hide, hide_known
from samray.output.manifests import MANIFEST_SCHEMA, Generation, build_manifest, create_generation
from samray.output.plan import Plan, load_plan, run_identity
from samray.output.shards import read_metadata, unmark_success

if TYPE_CHECKING:
    from samray.config import Config

_MAX_EXAMPLES: Final = 3
_MAX_TRIES: Final = 10
_NUM_THREADS: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What INPUT holds that the plan does not, and what was done about it."""

    listed: bool = False
    """Whether INPUT was listed at all."""
    num_new: int = 0
    num_changed: int = 0
    appended: bool = False
    """Whether the new images join the plan."""
    redone: bool = False
    """Whether the changed images are to be labelled again."""
    examples: list[str] = field(default_factory=list)
    """URIs of a few changed images."""
    skipped: Skipped | None = None
    """What the listing of INPUT left out; None if it was not listed."""


def missing_shards(plan: Plan, done: Collection[int]) -> set[int]:
    """The shards of the plan that are not there. done: what is; a later generation's may be among it."""
    return set(range(plan.num_shards)).difference(done)


def stale_shards(plan: Plan, done: Collection[int]) -> set[int]:
    """The finished shards with an image that has changed since, and is to be labelled again. Reads their footers only.

    Raises: StorageError.
    """
    changed = {shard: number for shard, number in plan.changed_shards().items() if shard in done}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        made_by = pool.map(lambda shard: read_metadata(plan.output, shard).get("generation", 0), changed)
        return {shard for shard, number in zip(changed, made_by, strict=True) if number < changed[shard]}


def compare(plan: Plan, listed: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The rows of `listed` (`INPUT_SCHEMA`) that the plan does not have, and the plan's rows that have changed, with
    the size, etag and place of now (`MANIFEST_SCHEMA`), by shard. Raises: StorageError.
    """
    held = plan.read_images(["image_id", "shard", "uri", "file_name", "size", "etag", "problem"])
    uris = hide_known(held["uri"])
    new = listed.filter(pc.is_null(pc.index_in(listed["uri"], value_set=uris)))
    at = pc.index_in(uris, value_set=listed["uri"])
    held, now = held.filter(pc.is_valid(at)), take(listed, pc.drop_null(at))
    differs = pa.chunked_array([pa.repeat(pa.scalar(False), held.num_rows)])
    for mark in ("size", "etag"):
        differs = pc.or_(differs, pc.fill_null(pc.not_equal(held[mark], now[mark]), False))
    # What a list may name depends on a setting, and links in a tar on its other members.
    differs = pc.or_(differs, pc.not_equal(pc.fill_null(held["problem"], ""), pc.fill_null(now["problem"], "")))
    held, now = held.filter(differs), now.filter(differs)
    given = {"image_id": held["image_id"], "shard": held["shard"], "file_name": held["file_name"]}
    columns = [given.get(name, now[name] if name in now.schema.names else None) for name in MANIFEST_SCHEMA.names]
    return new, pa.Table.from_arrays(columns, schema=MANIFEST_SCHEMA).sort_by("shard")


def join_images(
    plan: Plan,
    input_uri: str,
    config: Config,
    identity: Mapping[str, Any],
    *,
    append: bool,
    redo_changed: bool,
    dry_run: bool = False,
) -> tuple[Plan, News]:
    """List INPUT, and add a generation for its new images (append) and its changed ones (redo_changed).

    Returns the plan as it is then, which is the old one where there was nothing to add. Where another driver adds a
    generation at the same moment, that one counts first and INPUT is compared again. dry_run: only compare.
    Raises: ConfigError where INPUT holds nothing or no image id is left, StorageError.
    """
    skipped = Skipped()
    listed, credentials = hide(pa.concat_tables(list_images(input_uri, config.input, skipped)))
    for _ in range(_MAX_TRIES):
        new, changed = compare(plan, listed)
        news = News(
            listed=True,
            num_new=new.num_rows,
            num_changed=changed.num_rows,
            appended=append,
            redone=redo_changed,
            examples=[storage.redact(uri) for uri in changed["uri"].slice(0, _MAX_EXAMPLES).to_pylist()],
            skipped=skipped,
        )
        new = new if append else new.slice(0, 0)
        changed = changed if redo_changed else changed.slice(0, 0)
        if dry_run or not (new.num_rows or changed.num_rows):
            return plan, news
        generation = Generation(
            plan.last_generation + 1,
            run_identity(input_uri, identity),
            num_images=new.num_rows,
            images_per_shard=config.output.images_per_shard,
            first_shard=plan.num_shards,
            num_changed=changed.num_rows,
            skipped=skipped.redacted(),
            num_hidden=len(credentials),
        )
        rows = build_manifest(new, generation.images_per_shard, plan.read_images(["image_id"])["image_id"])
        place = rows.schema.get_field_index("shard")
        rows = rows.set_column(place, "shard", pc.cast(pc.add(rows["shard"], plan.num_shards), pa.int32()))
        # First: `_SUCCESS` says that every shard is there, which is over the moment the generation is.
        unmark_success(plan.output)
        added = create_generation(plan.output, generation, rows, changed)
        plan = load_plan(plan.output)
        if added:
            return plan, news
    raise StorageError(f"{storage.redact(plan.output)}: other runs add images all the time; try again")
