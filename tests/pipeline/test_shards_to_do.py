"""Stage 1: the shards to do, as Ray Data streams them."""

from __future__ import annotations

from typing import Any

import pytest

from samray.cluster.sizes import data_settings
from samray.config import load_config
from samray.pipeline.fetch import SHARDS_PER_TASK, shards_to_do, source_table
from samray.prompts import Prompt


@pytest.mark.parametrize("number", [1, 3, 2 * SHARDS_PER_TASK + 1])
def test_each_shard_is_a_block_of_its_own(local_ray: None, number: int) -> None:
    todo = {shard: shard % 3 == 0 for shard in range(10, 10 + number)}
    with data_settings(load_config().cluster):
        blocks: Any = list(shards_to_do(source_table(todo)).iter_batches(batch_size=None, batch_format="pyarrow"))
    assert [block.num_rows for block in blocks] == [1] * number
    rows = [row for block in blocks for row in block.to_pylist()]
    empty = dict.fromkeys(("prompts", "credentials", "tiles", "part"))
    expected = [{"shard": s, "retry": retry, **empty} for s, retry in todo.items()]
    assert sorted(rows, key=lambda row: row["shard"]) == expected


def test_prompts_travel_with_their_shard() -> None:
    click = Prompt.parse({"points": [[3, 4]], "labels": [1]})
    rows = source_table({7: False, 8: False}, {8: {2: [click]}, 7: {}}).to_pylist()
    assert [row["shard"] for row in rows] == [7, 8]
    assert rows[0]["prompts"] == "{}"
    assert '"2"' in rows[1]["prompts"]


def test_parts_of_large_images_come_before_their_shard() -> None:
    parts = {8: [(2, 0, 16), (2, 16, 20)]}
    rows = source_table({7: False, 8: True, 9: False}, tiles={8: {2: (500, 400)}}, parts=parts).to_pylist()
    assert [(row["shard"], row["part"]) for row in rows] == [
        (7, None),
        (8, "[1, 2, 0, 16]"),
        (8, "[2, 2, 16, 20]"),
        (8, None),
        (9, None),
    ]
    assert [row["tiles"] for row in rows] == [None, *['{"2": [500, 400]}'] * 3, None]
