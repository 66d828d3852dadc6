"""What tests ask of an output."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from samray import storage
from samray.output.shards import done_shards, read_shard
from samray.output.verify import verify
from tests.support import standin


def rows_of(output: str) -> list[dict[str, Any]]:
    """Every row of every shard, in order; the output is sound."""
    report = verify(output, deep=True)
    assert report.ok, report.problems
    return [row for shard in sorted(done_shards(output)) for row in read_shard(output, shard).to_pylist()]


def expected_masks(data: bytes) -> list[dict[str, Any]]:
    """What the stand-in labeler finds in encoded bytes, without ids."""
    with Image.open(io.BytesIO(data)) as image:
        return standin.masks_of(np.asarray(image.convert("RGB")))


def check_every_image_once(output: str, data_of: dict[str, bytes]) -> None:
    """The output has one ok row for each of these images (by file name), with the masks of its pixels."""
    rows = rows_of(output)
    assert sorted(row["image"]["file_name"] for row in rows) == sorted(data_of)
    for row in rows:
        assert row["status"] == "ok", row["error"]
        image_id = row["image"]["image_id"]
        wanted = expected_masks(data_of[row["image"]["file_name"]])
        assert row["annotations"] == [{"id": image_id * 65536 + i, **mask} for i, mask in enumerate(wanted)]


def attempts_left(output: str) -> dict[str, int]:
    """Marks of the poison guard that are still there."""
    return storage.list_names(storage.join(output, "_samray", "attempts"))
