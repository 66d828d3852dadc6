"""Append images to an existing output: compare INPUT with the plan, and add a generation for new and changed images.

Images are identified by URI. An image has changed if its size or ETag is known on both sides and differs. New images go
into new shards; finished shards are not touched. Changed images are labelled again in their own shard, only on request.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.errors import StorageError
from samray.inputs.listing import list_images
from samray.inputs.repeats import REASON as DUPLICATE
from samray.inputs.repeats import mark_duplicates
from samray.inputs.rows import take
from samray.inputs.skipped import Skipped
from samray.output.credentials import hide, hide_known
from samray.output.manifests import MANIFEST_SCHEMA, Generation, build_manifest, create_generation
from samray.output.plan import Plan, has_tiffs, load_plan, run_identity
from samray.output.schema import has_geo
from samray.output.shards import read_metadata, unmark_success

if TYPE_CHECKING:
    from samray.config import Config

_MAX_EXAMPLES: Final = 3
_MAX_TRIES: Final = 10
_NUM_THREADS: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class InputChanges:
    """Differences between INPUT and the plan, and what was done about them."""

    listed: bool = False
    """Whether INPUT was listed at all."""
    num_new: int = 0
    num_changed: int = 0
    appended: bool = False
    """Whether the new images were added to the plan."""
    redone: bool = False
    """Whether the changed images will be labelled again."""
    examples: list[str] = field(default_factory=list)
    """URIs of a few changed images."""
    loses_geo: bool = False
    """Whether TIFFs are added to an OUTPUT that has no column for where they are."""
    skipped: Skipped | None = None
    """Files that the listing of INPUT left out; None if it was not listed."""


def missing_shards(plan: Plan, done: Collection[int]) -> set[int]:
    """The planned shards that do not exist. done: existing shards, possibly with some of a later generation."""
    return set(range(plan.num_shards)).difference(done)


def stale_shards(plan: Plan, done: Collection[int]) -> set[int]:
    """Finished shards with images that changed since and must be labelled again. Reads only footers.

    Raises: StorageError.
    """
    changed = {shard: number for shard, number in plan.changed_shards().items() if shard in done}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        # A shard records the generation that it was made for; an older one has not seen the change.
        made_by = pool.map(lambda shard: read_metadata(plan.output, shard).get("generation", 0), changed)
        return {shard for shard, number in zip(changed, made_by, strict=True) if number < changed[shard]}


def compare(plan: Plan, listed: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Rows of `listed` (`INPUT_SCHEMA`) that the plan does not have, and rows of the plan that changed, with the
    current size, ETag and location (`MANIFEST_SCHEMA`), by shard. Raises: StorageError.
    """
    planned = plan.read_images(["image_id", "shard", "uri", "file_name", "size", "etag", "problem"])
    # `listed` is redacted already, the plan of an older version may not be.
    uris = hide_known(planned["uri"])
    new = listed.filter(pc.is_null(pc.index_in(listed["uri"], value_set=uris)))
    at = pc.index_in(uris, value_set=listed["uri"])
    planned, now = planned.filter(pc.is_valid(at)), take(listed, pc.drop_null(at))
    differs = pa.chunked_array([pa.repeat(pa.scalar(False), planned.num_rows)])
    # A size or ETag that one side does not know (null) is not a difference.
    for mark in ("size", "etag"):
        differs = pc.or_(differs, pc.fill_null(pc.not_equal(planned[mark], now[mark]), False))
    # Not compared: problems from lists depend on a setting, and those of links in a tar on other members.
    differs = pc.or_(differs, pc.not_equal(_problem_without_duplicates(planned), _problem_without_duplicates(now)))
    # What it repeated is gone, or has changed: without this the image would be labelled nowhere.
    differs = pc.or_(differs, pc.and_not(_is_duplicate(planned), _is_duplicate(now)))
    planned, now = planned.filter(differs), now.filter(differs)
    # Id, shard and name stay; size, ETag and location become the current ones.
    unchanged = {"image_id": planned["image_id"], "shard": planned["shard"], "file_name": planned["file_name"]}
    columns = [unchanged.get(name, now[name] if name in now.schema.names else None) for name in MANIFEST_SCHEMA.names]
    return new, pa.Table.from_arrays(columns, schema=MANIFEST_SCHEMA).sort_by("shard")


def _problem_without_duplicates(rows: pa.Table) -> pa.ChunkedArray:
    """The problem of each image; "" for none, and for duplicates, which depend on other images."""
    return pc.if_else(_is_duplicate(rows), "", pc.fill_null(rows["problem"], ""))


def _is_duplicate(rows: pa.Table) -> pa.ChunkedArray:
    return pc.starts_with(pc.fill_null(rows["problem"], ""), f"{DUPLICATE}:")


def _order(plan: Plan, images: pa.Table) -> npt.NDArray[np.int64]:
    """(N,), for `mark_duplicates`: first the images that the plan labels, then its duplicates, then new ones."""
    planned = plan.read_images(["uri", "problem"])
    at = pc.index_in(hide(images)[0]["uri"], value_set=hide_known(planned["uri"]))
    is_duplicate = pc.cast(_is_duplicate(planned), pa.int64()).take(at)
    return np.asarray(pc.fill_null(is_duplicate, 2).to_numpy(), np.int64)


def join_images(
    plan: Plan,
    input_uri: str,
    config: Config,
    identity: Mapping[str, Any],
    *,
    append: bool,
    redo_changed: bool,
    dry_run: bool = False,
) -> tuple[Plan, InputChanges]:
    """List INPUT, and add a generation for its new images (append) and its changed images (redo_changed).

    Returns the current plan; the old one if there was nothing to add. If another driver adds a generation at the same
    time, INPUT is compared again with that plan. dry_run: only compare.
    Raises: ConfigError if INPUT is empty or no image id is left, StorageError.
    """
    images, skipped = list_images(input_uri, config.input)
    if config.input.skip_duplicates:
        images = mark_duplicates(images, config.input, _order(plan, images))
    listed, credentials = hide(images)
    # A driver that loses the race for a number compares the same listing with the winner's plan.
    for _ in range(_MAX_TRIES):
        new, changed = compare(plan, listed)
        changes = InputChanges(
            listed=True,
            num_new=new.num_rows,
            num_changed=changed.num_rows,
            appended=append,
            redone=redo_changed,
            loses_geo=append and not has_geo(plan.run) and has_tiffs(new["file_name"]),
            examples=[storage.redact(uri) for uri in changed["uri"].slice(0, _MAX_EXAMPLES).to_pylist()],
            skipped=skipped,
        )
        new = new if append else new.slice(0, 0)
        changed = changed if redo_changed else changed.slice(0, 0)
        if dry_run or not (new.num_rows or changed.num_rows):
            return plan, changes
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
        # `build_manifest` numbers the shards from 0.
        index = rows.schema.get_field_index("shard")
        rows = rows.set_column(index, "shard", pc.cast(pc.add(rows["shard"], plan.num_shards), pa.int32()))
        # First: `_SUCCESS` means that all shards exist, which is no longer true once the generation exists.
        unmark_success(plan.output)
        added = create_generation(plan.output, generation, rows, changed)
        # Another driver may have taken the number; its images are then part of the next comparison.
        plan = load_plan(plan.output)
        if added:
            return plan, changes
    raise StorageError(f"{storage.redact(plan.output)}: other runs keep adding images; try again")
