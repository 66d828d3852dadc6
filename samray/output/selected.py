"""Find what a `Where` selects in an output, from the columns that it names alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from samray.output.plan import Plan
from samray.output.schema import schema_of
from samray.output.shards import open_shard
from samray.output.where import Bools, Where

_THREADS: Final = 8
_ROWS_AT_ONCE: Final = 4096
_MASKS: Final = "annotations.list.element."


@dataclass(frozen=True, slots=True)
class GroupSelection:
    """The selection in a row group of a shard."""

    shard: int
    group: int
    first_row: int
    """The group's first row in its shard."""
    images: Bools
    """(N,): the selected rows of the group."""
    ok: Bools
    """(N,): the rows with status `ok`."""
    num_masks: int
    """Masks of the selected images, before the selection of masks."""
    num_selected: int
    """Selected masks."""


def scan(plan: Plan, shards: Iterable[int], where: Where) -> Iterator[GroupSelection]:
    """Compute the selection in each row group of these shards, in order. Raises: ConfigError, StorageError."""
    columns = [*where.columns(schema_of(plan.run)), "status"]
    if not any(name.startswith(_MASKS) for name in columns):
        columns.append(f"{_MASKS}id")  # the number of masks
    with ThreadPoolExecutor(_THREADS) as pool:
        for groups in pool.map(lambda shard: _scan_shard(plan, shard, where, columns), shards):
            yield from groups


def _scan_shard(plan: Plan, shard: int, where: Where, columns: list[str]) -> list[GroupSelection]:
    groups, first = [], 0
    with open_shard(plan.output, shard) as file:
        for group in range(file.num_row_groups):
            images, ok, num_masks, num_selected = [], [], 0, 0
            # In parts: a row group of another writer may have millions of rows.
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns):
                table = pa.Table.from_batches([batch])
                selected, masks = where.flags(table)
                lengths = pc.fill_null(pc.list_value_length(table["annotations"]), 0).to_numpy()
                images.append(selected)
                ok.append(np.asarray(pc.equal(table["status"], "ok").to_numpy(), bool))
                num_masks += int(lengths[selected].sum())
                num_selected += int(masks.sum())
            all_images, all_ok = (np.concatenate([np.zeros(0, bool), *parts]) for parts in (images, ok))
            groups.append(GroupSelection(shard, group, first, all_images, all_ok, num_masks, num_selected))
            first += len(groups[-1].images)
    return groups


def selected_images(plan: Plan, where: Where) -> tuple[npt.NDArray[np.int64], float]:
    """Indices in the plan of the selected images of a finished output, and the fraction of their masks that is
    selected. Raises: ConfigError, StorageError."""
    starts = plan.starts()
    places, num_masks, num_selected = [np.zeros(0, np.int64)], 0, 0
    for group in scan(plan, range(plan.num_shards), where):
        places.append(starts[group.shard] + group.first_row + np.flatnonzero(group.images))
        num_masks += group.num_masks
        num_selected += group.num_selected
    return np.concatenate(places), num_selected / max(num_masks, 1)
