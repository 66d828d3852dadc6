"""Bounds what a Parquet file may expand to, from the headers of its pages, before Arrow decodes them.

A few bytes of Parquet may stand for terabytes: a page of zeros compresses a thousandfold, a run of equal numbers has
any length, and a long string in a dictionary costs a bit for each row that repeats it. The footer's sizes may be wrong,
so the pages' own headers are read (`samray.storage.page_headers`).
Source: the Parquet format, `parquet.thrift` (PageHeader) and Encodings.md; Thrift's compact protocol.
"""

from __future__ import annotations

import bisect
import io
import threading
from collections.abc import Callable
from typing import Any, BinaryIO, Final

import pyarrow as pa

from samray.storage.page_headers import Column, read_page
from samray.storage.page_values import content_of, longest_value, shared_prefixes, values_of

MAX_EXPANDED_BYTES: Final = 2**29
"""Memory for the columns that are read at once; more only if they are large in the file, too."""
MAX_EXPANSION: Final = 64
"""More than `MAX_EXPANDED_BYTES` is allowed up to this many times the bytes in the file."""

_DICTIONARIES, _DELTA_BYTE_ARRAY = (2, 8), 7
"""Encodings: indices into a dictionary, in the form of either version; texts that share prefixes."""

_INEXACT: Final = 16
"""Times the bytes in the file that a column may seem to expand to without a closer look."""


class CheckedStream(io.RawIOBase):
    """A stream of a Parquet file that checks columns on their way to Arrow, which reads each of them at once."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._starts: list[int] = []
        """First bytes of columns, sorted."""
        self._expected: dict[int, dict[tuple[int, str], tuple[Column, Budget]]] = {}
        """By their first byte, then by row group and name: a damaged footer may have several at one place."""
        self._unknown: list[tuple[Callable[[], list[Column]], Budget]] = []
        self._lock = threading.Lock()  # Arrow may read in threads of its own

    def expect(self, find: Callable[[], list[Column]], budget: Budget) -> None:
        """Check these columns when they are read.

        find: called at the first read, when Arrow has looked at their part of the footer: it then raises if that is
        damaged, which ends the process where Python looks at it.
        """
        with self._lock:
            self._unknown.append((find, budget))

    def _add(self, columns: list[Column], budget: Budget) -> None:
        for column in columns:
            if column.start not in self._expected:
                bisect.insort(self._starts, column.start)
            self._expected.setdefault(column.start, {})[column.group, column.name] = column, budget

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        start = self._stream.tell()
        data = self._stream.read(size)
        view = memoryview(data)
        with self._lock:
            while self._unknown:
                find, budget = self._unknown.pop(0)
                self._add(find(), budget)
            first = bisect.bisect_left(self._starts, start)
            last = bisect.bisect_left(self._starts, start + len(data))
            columns = [column for at in self._starts[first:last] for column in self._expected[at].values()]
        for column, budget in columns:
            budget.spend(view[column.start - start : column.end - start], column)
        return data

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)


class Budget:
    """Adds up what the columns that are read at once expand to."""

    def __init__(self, file_bytes: int) -> None:
        """file_bytes: of the whole file. Columns that share bytes do not make it larger."""
        self._file_bytes = file_bytes
        self._num_bytes = self._expanded = 0

    def spend(self, data: memoryview, column: Column) -> None:
        """Check a column of a row group, given its bytes in the file.

        Raises: pa.ArrowInvalid if the limits are exceeded, or a header is damaged.
        """
        self._num_bytes = min(self._num_bytes + len(data), self._file_bytes)
        limit = max(MAX_EXPANDED_BYTES, MAX_EXPANSION * self._num_bytes)
        position, longest, dictionary, is_exact = 0, 0, None, False
        num_left = column.num_values
        while num_left > 0 and position < len(data):
            page = read_page(data, position)
            position = page.end
            # What Arrow allocates to decompress the page, and for values of fixed size.
            self._expanded += page.size + page.num_values * column.value_bytes
            if page.is_dictionary:
                dictionary, longest, is_exact = page, page.size, False
            else:
                num_left -= page.num_values
                if column.is_text and self._expanded <= limit:
                    left = limit - self._expanded
                    if page.encoding in _DICTIONARIES and dictionary is not None:
                        # Too much only by a part of what is allowed: else the longest value is looked up.
                        most = max(column.num_values, page.num_values) * longest
                        if not is_exact and most > _INEXACT * len(data):
                            longest, is_exact = longest_value(content_of(data, dictionary, column)), True
                        self._expanded += page.num_values * longest
                    elif page.encoding == _DELTA_BYTE_ARRAY and page.num_values * page.size > left:
                        self._expanded += shared_prefixes(values_of(data, page, column), page.num_values)
            if self._expanded > limit:
                raise pa.ArrowInvalid(
                    f"with the column {column.name}, {self._num_bytes:,} bytes would expand to more than"
                    f" {limit / 2**30:.1f} GiB: the file is damaged, or made to exhaust memory"
                )
