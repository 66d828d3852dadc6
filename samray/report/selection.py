"""The figures of `samray report --where`: exact counts of the selection, and a sample of its images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from samray import storage
from samray.errors import ConfigError
from samray.output import sample
from samray.output.plan import Plan
from samray.output.schema import schema_of
from samray.output.selected import scan
from samray.output.where import Where
from samray.report.page import Counts


def draw_selected(
    plan: Plan, shards: Sequence[int], where: Where, columns: Sequence[str]
) -> tuple[Counts, list[tuple[sample.Draw, pa.Table]], dict[sample.Draw, npt.NDArray[np.int64]]]:
    """Exact counts of the selection, and a random sample of row groups: their selected rows, with these columns and the
    selected masks, and where in its row group each of these rows is. Failed images are not part of it.

    Raises: ConfigError if the expression is wrong or selects nothing, StorageError.
    """
    schema = schema_of(plan.run)
    where.check(schema)
    num_images = num_masks = 0
    groups: list[sample.Draw] = []
    for group in scan(plan, shards, where):
        number = int((group.images & group.ok).sum())
        num_images += number
        num_masks += group.num_selected
        groups += [(group.shard, group.group)] * (number > 0)
    if not num_images:
        raise ConfigError(f"where: {where.text} selects no labelled image of {storage.redact(plan.output)}")
    if num_images > sample.SAMPLE_IMAGES or len(groups) > sample.MAX_GROUPS:
        wanted = max(1, sample.SAMPLE_IMAGES * len(groups) // num_images)
        groups = sample.spread(groups, min(sample.MAX_GROUPS, wanted))
    drawn, selected_rows = [], {}
    for draw, table in sample.read_groups(plan.output, groups, sorted({*columns, *where.columns(schema)})):
        images, masks = where.flags(table)
        images &= np.asarray(table["status"].to_numpy() == "ok", bool)
        # Of a very large row group only the first rows are read, which may have none of the selected.
        if images.any():
            drawn.append((draw, where.take(table, images, masks)))
            selected_rows[draw] = np.flatnonzero(images)
    counts = Counts(num_images, num_masks, 0, Counter(), Counter(), 0.0, 1.0)
    return counts, drawn, selected_rows
