"""The part of Thrift's compact protocol in which Parquet writes its footer and the headers of its pages.

Source: the Thrift specification, `thrift-compact-protocol.md`.
"""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa

_BOOLS, _BYTE, INTS, _DOUBLE, BINARY, LISTS, STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12
"""Types of Thrift's compact protocol."""
BOOL, INT32, INT64, LIST = 1, 5, 6, 9
_MAX_NESTING: Final = 16


def read_struct(data: memoryview, position: int, depth: int = 0) -> tuple[dict[tuple[int, int], Any], int]:
    """The 32-bit and 64-bit numbers, truth values, texts, structs and lists of structs of a struct by type and field
    number, and the position behind it.

    By type, because Arrow ignores a field of another type than it expects. Raises: IndexError, pa.ArrowInvalid if it is
    damaged.
    """
    if depth > _MAX_NESTING:
        raise pa.ArrowInvalid("the header of a page is nested too deeply")
    fields: dict[tuple[int, int], Any] = {}
    number = 0
    while (byte := data[position]) != 0:
        position += 1
        kind, delta = byte & 15, byte >> 4
        if delta:
            number += delta
        else:
            number, position = read_signed(data, position)
        # Arrow would cut these to 16 and 32 bits, and see other numbers.
        if not -(2**15) <= number < 2**15:
            raise pa.ArrowInvalid("the header of a page has a field number of more than 16 bits")
        if kind in _BOOLS:
            fields[BOOL, number] = kind == _BOOLS[0]
        elif kind == STRUCT:
            fields[STRUCT, number], position = read_struct(data, position, depth + 1)
        elif kind == INT32:
            value, position = read_signed(data, position)
            if not -(2**31) <= value < 2**31:
                raise pa.ArrowInvalid("the header of a page has a number of more than 32 bits")
            fields[INT32, number] = value
        elif kind == INT64:
            fields[INT64, number], position = read_signed(data, position)
        elif kind == BINARY:
            length, position = read_unsigned(data, position)
            fields[BINARY, number] = data[position : position + length]
            position += length
        elif kind == LIST and data[position] & 15 == STRUCT:
            size, position = read_list_size(data, position)
            fields[LIST, number] = items = []
            for _ in range(size):
                item, position = read_struct(data, position, depth + 1)
                items.append(item)
        else:
            position = _skip(data, position, kind, depth)
    return fields, position + 1


def _skip(data: memoryview, position: int, kind: int, depth: int) -> int:
    """The position behind a value that is not needed."""
    if depth > _MAX_NESTING:
        raise pa.ArrowInvalid("the header of a page is nested too deeply")
    if kind == _BYTE:
        return position + 1
    if kind == _DOUBLE:
        return position + 8
    if kind in INTS:
        return read_unsigned(data, position)[1]
    if kind == BINARY:
        length, position = read_unsigned(data, position)
        return position + length
    if kind == STRUCT:
        return read_struct(data, position, depth + 1)[1]
    if kind not in LISTS:
        raise pa.ArrowInvalid("the header of a page has a field of an unknown type")
    item = data[position] & 15
    size, position = read_list_size(data, position)
    for _ in range(size):
        position = position + 1 if item in _BOOLS else _skip(data, position, item, depth + 1)
    return position


def read_list_size(data: memoryview, position: int) -> tuple[int, int]:
    """The number of items of a list, and the position of the first one."""
    size = data[position] >> 4
    position += 1
    if size == 15:
        size, position = read_unsigned(data, position)
    if size > len(data) - position:  # each item has a byte or more
        raise pa.ArrowInvalid("the header of a page has a list that is longer than the page")
    return size, position


def read_unsigned(data: memoryview, position: int) -> tuple[int, int]:
    """A number of seven bits per byte, lowest first, and the position behind it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position
        if shift > 63:
            raise pa.ArrowInvalid("a number in the header of a page is too long")


def read_signed(data: memoryview, position: int) -> tuple[int, int]:
    value, position = read_unsigned(data, position)
    return (value >> 1) ^ -(value & 1), position
