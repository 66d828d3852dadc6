"""A toy kind of input: a text file with one image per line, in base64."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from samray import storage
from samray.errors import ImageError
from samray.inputs.base import Container, FetchFile, Part, Reader
from samray.inputs.rows import input_rows

if TYPE_CHECKING:
    from samray.config import InputConfig


def list_lines(container: Container, config: InputConfig) -> Part:
    number = len(storage.read_bytes(container.uri).splitlines())
    uris = pa.array([f"{container.uri}#line={i}" for i in range(number)], pa.string())
    names = pa.array([f"{container.prefix}line-{i}.png" for i in range(number)], pa.string())
    lines = pa.array(range(number), pa.int64())
    return Part(input_rows(uris, names, etag=container.etag, container=container.uri, row=lines))


def fetch_lines(
    uri: str, items: Sequence[dict[str, Any]], config: InputConfig, fetch_file: FetchFile
) -> list[bytes | ImageError]:
    lines = storage.read_bytes(uri).splitlines()
    return [base64.b64decode(lines[item["row"]]) for item in items]


READER: Final = Reader(
    name="base64",
    nouns=("base64 file",),
    nothing="no line in the base64 file",
    endings=(".b64",),
    list=list_lines,
    fetch=fetch_lines,
    fetch_at_once=True,
)
