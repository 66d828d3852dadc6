"""The rows of an input's listing: which image, and where its bytes are."""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa

INPUT_SCHEMA: Final = pa.schema(
    [
        ("uri", pa.string()),  # what the output records; tar members as fsspec writes them, tar://member::archive
        ("file_name", pa.string()),  # relative to the input's root, so that equal basenames stay apart
        ("size", pa.int64()),  # encoded bytes; null where only reading would tell
        ("container", pa.string()),  # the tar or Parquet file that holds the image; null for a file of its own
        ("offset", pa.int64()),  # first byte in the tar
        ("row", pa.int64()),  # place in the Parquet file
    ]
)


def input_rows(uris: Any, names: Any, sizes: Any = None, container: str | None = None, **places: Any) -> pa.Table:
    """A table of `INPUT_SCHEMA`; columns that are not given are null."""
    sizes = pa.nulls(len(uris), pa.int64()) if sizes is None else sizes
    columns = {"uri": uris, "file_name": names, "size": sizes, **places}
    columns["container"] = pa.array([container], pa.string()).take(pa.array([0] * len(uris), pa.int8()))
    for name in ("offset", "row"):
        columns.setdefault(name, pa.nulls(len(uris), pa.int64()))
    return pa.table({field.name: columns[field.name] for field in INPUT_SCHEMA}).cast(INPUT_SCHEMA)
