"""The columns of a Parquet file: where their pages are, how they are compressed, and the headers of the pages.

Read exactly as Arrow reads them: what it would skip is skipped, and what it would cut to 32 bits is refused.
Source: the Parquet format, `parquet.thrift` (PageHeader); Thrift's compact protocol.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from samray.storage.footers import raw_footer
from samray.storage.thrift import BINARY, BOOL, INT32, LIST, STRUCT, read_struct

_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_2 = 0, 2, 3
_DETAILS_OF: Final = {_DATA_PAGE: 5, _DICTIONARY_PAGE: 7, _DATA_PAGE_2: 8}
"""The field of a header with more about a page of this type."""
_MAX_HEADER_BYTES: Final = 2**24
"""Arrow's own limit."""

_VALUE_BYTES: Final = {
    "BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12, "BYTE_ARRAY": 8,
}  # fmt: skip
"""Bytes per value of Parquet's types; the schema has the length of a FIXED_LEN_BYTE_ARRAY."""

_PARQUET_MR: Final = re.compile(r"parquet-mr(?: version (\d+)\.(\d+)\.(\d+))?")
_SHORT_BYTES: Final = 100
"""Before 1.2.9, parquet-mr did not count all bytes of a column. Arrow reads this many more (PARQUET-816)."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a row group: where its pages are in the file, and what is needed to read their headers."""

    name: str
    group: int
    start: int
    end: int
    num_values: int
    """Arrow reads no page after these."""
    codec: Callable[[], int]
    """Looked up only if it is needed: Python's part of Arrow ends the process for one that it does not know."""
    value_bytes: int
    """Per value in memory; for texts, which may have any length, that of their offset."""
    is_text: bool
    has_levels: tuple[bool, bool]
    """Whether pages have repetition and definition levels."""


@dataclass(frozen=True, slots=True)
class Page:
    """A page's header. body: its position behind the header."""

    is_dictionary: bool
    size: int
    """Uncompressed."""
    body: int
    end: int
    num_values: int
    encoding: int
    level_bytes: int | None
    """Bytes of uncompressed levels in front (version 2); None if they are part of what is compressed."""
    is_compressed: bool


def chosen_columns(footer: pq.FileMetaData, names: Sequence[str] | None) -> list[int]:
    """Indices of the columns that Arrow reads for these names; None: all. A name may be that of a struct or list."""
    paths = [footer.schema.column(j).path for j in range(footer.num_columns)]
    if names is None:
        return list(range(len(paths)))
    return [j for j, path in enumerate(paths) if any(path == name or path.startswith(f"{name}.") for name in names)]


def columns_of(
    footer: pq.FileMetaData, group: int, chosen: Sequence[int] | None = None, codecs: Codecs | None = None
) -> list[Column]:
    """The columns of a row group; chosen: indices of those to return, None for all. codecs: of the same footer."""
    codecs = codecs or Codecs(footer)
    columns, row_group = [], footer.row_group(group)
    old = _PARQUET_MR.match((footer.created_by or "").lower())
    more = _SHORT_BYTES if old and tuple(int(number or 0) for number in old.groups()) < (1, 2, 9) else 0
    for j in range(row_group.num_columns) if chosen is None else chosen:
        # Only what needs no conversion: of a damaged value, that would end the process.
        chunk, column = row_group.column(j), footer.schema.column(j)
        if chunk.num_values == 0:  # Arrow reads none of its pages, and they may have no place
            continue
        start = chunk.data_page_offset
        if chunk.has_dictionary_page and chunk.dictionary_page_offset > 0:
            start = min(start, chunk.dictionary_page_offset)
        columns.append(
            Column(
                name=column.path,
                group=group,
                start=start,
                end=start + chunk.total_compressed_size + more,
                num_values=chunk.num_values,
                codec=functools.partial(codecs.of, group, j),
                value_bytes=_VALUE_BYTES.get(column.physical_type) or max(0, column.length),
                is_text=column.physical_type == "BYTE_ARRAY",
                has_levels=(column.max_repetition_level > 0, column.max_definition_level > 0),
            )
        )
    return columns


class Codecs:
    """The codecs of columns, from the bytes of a footer, which are made and read only if one is asked for."""

    def __init__(self, footer: pq.FileMetaData) -> None:
        self._footer = footer
        self._of_all: dict[int, int | None] = {}
        """Column -> its codec, if it is the same in all row groups."""

    def of(self, group: int, column: int) -> int:
        """Raises: pa.ArrowInvalid if the footer is damaged."""
        if column not in self._of_all:
            self._of_all[column] = self._find(column)
        if (known := self._of_all[column]) is not None:
            return known
        try:
            chunk = self._root[LIST, 4][group][LIST, 1][column]
            codec: int = chunk[STRUCT, 3][INT32, 4]
            return codec
        except (IndexError, KeyError) as error:
            raise pa.ArrowInvalid("the footer is damaged") from error

    def _find(self, column: int) -> int | None:
        # A codec follows its column's path, a list of texts. What looks like it elsewhere can only add a second one.
        names = [name.encode() for name in self._footer.schema.column(column).path.split(".")]
        if len(names) >= 15 or max(map(len, names)) >= 128:  # their lengths take several bytes
            return None
        path = b"".join(bytes([len(name)]) + name for name in names)
        mark = bytes([LIST | 1 << 4, len(names) << 4 | BINARY]) + path + bytes([INT32 | 1 << 4])
        codecs = {part[0] for part in self._bytes.split(mark)[1:] if part}
        return codecs.pop() >> 1 if len(codecs) == 1 else None

    @functools.cached_property
    def _bytes(self) -> bytes:
        return raw_footer(self._footer)

    @functools.cached_property
    def _root(self) -> dict[tuple[int, int], Any]:
        return read_struct(memoryview(self._bytes), 0)[0]


def read_page(data: memoryview, position: int) -> Page:
    """The header of the page at a position. Raises: pa.ArrowInvalid."""
    try:
        header, body = read_struct(data[: position + _MAX_HEADER_BYTES], position)
        kind = header[INT32, 1]
        size, compressed = header[INT32, 2], header[INT32, 3]
        details = header.get((STRUCT, _DETAILS_OF[kind]), {}) if kind in _DETAILS_OF else {}
        num_values = details.get((INT32, 1), 0)
        levels = [details.get((INT32, number), 0) for number in (5, 6)] if kind == _DATA_PAGE_2 else []
        if min(size, compressed, num_values, *levels) < 0:
            raise pa.ArrowInvalid("a page has a negative size")
        if sum(levels) > size:
            raise pa.ArrowInvalid("a page has more levels than bytes")
        return Page(
            is_dictionary=kind == _DICTIONARY_PAGE,
            size=size,
            body=body,
            end=body + compressed,
            num_values=num_values,
            encoding=details.get((INT32, 4 if kind == _DATA_PAGE_2 else 2), 0),
            level_bytes=sum(levels) if kind == _DATA_PAGE_2 else None,
            is_compressed=details.get((BOOL, 7), True) if kind == _DATA_PAGE_2 else True,
        )
    except (IndexError, KeyError) as error:
        raise pa.ArrowInvalid("the header of a page is damaged") from error
