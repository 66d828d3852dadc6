"""Small outputs, committed as a run commits them, for tests of what reads them."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from samray import storage
from samray.config import Config, load_config
from samray.errors import ImageError
from samray.inputs.decode import decode_image
from samray.inputs.listing import fetch_images
from samray.output.plan import Plan, make_plan
from samray.output.schema import ImageRecord, records_to_table
from samray.output.shards import commit_shard, done_shards, mark_success
from tests.support import standin

BROKEN = 3
"""This image of `make_output` cannot be decoded, and so is a failed row."""
BLACK = 5
"""And this one has no masks."""


def image_bytes(number: int) -> bytes:
    """PNG, (24 + number, 16) pixels of noise; one image broken, one black."""
    if number == BROKEN:
        return b"no image"
    if number == BLACK:
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((16, 24 + number, 3), np.uint8)).save(buffer, format="PNG")
        return buffer.getvalue()
    return standin.make_image(number, (24 + number, 16))


def make_input(folder: str, kind: str = "files", number: int = 10) -> str:
    """Images as files, in two tars, or in a Parquet file, on any storage. Returns what to label."""
    images = {f"img_{i:03d}.png": image_bytes(i) for i in range(number)}
    if kind == "files":
        for name, data in images.items():
            storage.put(storage.join(folder, name), data)
        return folder
    if kind == "tar":
        for part in range(2):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as archive:
                for name in sorted(images)[part::2]:
                    member = tarfile.TarInfo(name)
                    member.size = len(images[name])
                    archive.addfile(member, io.BytesIO(images[name]))
            storage.put(storage.join(folder, f"part-{part}.tar"), buffer.getvalue())
        return storage.join(folder, "*.tar")
    sink = pa.BufferOutputStream()
    rows = [{"image": {"bytes": data, "path": name}} for name, data in images.items()]
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=4)
    storage.put(storage.join(folder, "images.parquet"), bytes(sink.getvalue()))
    return storage.join(folder, "images.parquet")


def make_output(root: str, kind: str = "files", *overrides: str, number: int = 10) -> Plan:
    """`root`/in labelled by the stand-in to `root`/labels, in shards of four: a failed row and one without masks."""
    config = load_config(None, None, ["output.images_per_shard=4", *overrides])
    source = make_input(storage.join(root, "in"), kind, number)
    plan = make_plan(source, storage.join(root, "labels"), config, config.identity())
    label_missing(plan, config)
    return plan


def label_missing(plan: Plan, config: Config) -> None:
    """Commit the shards that are not there yet, and `_SUCCESS`."""
    for shard in sorted(set(range(plan.num_shards)) - done_shards(plan.output)):
        rows = plan.read_shard(shard)
        fetched = fetch_images(rows, config.input)
        records = [record_of(row, data) for row, data in zip(rows.to_pylist(), fetched, strict=True)]
        assert commit_shard(plan.output, shard, records_to_table(records, plan.run))
    mark_success(plan.output)


def record_of(row: dict[str, Any], data: bytes | ImageError) -> ImageRecord:
    """The row of an image, with the masks that the stand-in finds."""
    columns = {name: row[name] for name in ("image_id", "file_name", "uri")}
    try:
        if isinstance(data, ImageError):
            raise data
        pixels = decode_image(data, 10**6)
    except ImageError as error:
        return ImageRecord(**columns, width=0, height=0, error=str(error))
    height, width = pixels.shape[:2]
    return ImageRecord(**columns, width=width, height=height, annotations=standin.masks_of(pixels))
