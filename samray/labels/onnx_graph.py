"""Refuse ONNX files that are more than a plain graph with its weights, before onnxruntime sees them.

A graph may name other files for its weights, operators that libraries add, functions that expand without bound, and
loops without end. A convolutional network needs none of these. The file is walked as it is stored (protobuf): nothing
is run, copied or unpacked, and the nesting that is followed is fixed.

Source: onnx.proto of the ONNX standard; the numbers below are its fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSORS: Final = (5, 10)
_ATTRIBUTE_GRAPHS: Final = (6, 11)
_ATTRIBUTE_SPARSE: Final = (22, 23)
_TENSOR_EXTERNAL: Final = (13, 14)
"""The file that has the tensor's data, and whether there is one."""
_STANDARD: Final = (b"", b"ai.onnx")
"""Domains of the operators of the standard."""
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5

Value = int | memoryview


def problem_of(data: bytes | memoryview) -> str | None:
    """The problem of the content of an ONNX file, as the end of a sentence; None if it has none."""
    try:
        return _model_problem(memoryview(data))
    except ValueError:
        return "is not an ONNX file, or was cut off"


def _model_problem(data: memoryview) -> str | None:
    num_graphs = 0
    for number, value in _fields(data):
        if number == _MODEL_GRAPH:
            num_graphs += 1
            if (problem := _graph_problem(_message(value))) is not None:
                return problem
        elif number in (_MODEL_FUNCTIONS, _MODEL_TRAINING):
            return "has functions or training steps of its own, which are not run"
    return None if num_graphs == 1 else "is not an ONNX file: it has no graph"


def _graph_problem(data: memoryview) -> str | None:
    for number, value in _fields(data):
        problem = None
        if number == _GRAPH_NODE:
            problem = _node_problem(_message(value))
        elif number == _GRAPH_INITIALIZER:
            problem = _tensor_problem(_message(value))
        elif number == _GRAPH_SPARSE:
            problem = _SPARSE
        if problem is not None:
            return problem
    return None


def _node_problem(data: memoryview) -> str | None:
    operator, domain, attributes = b"", b"", []
    for number, value in _fields(data):
        if number == _NODE_OPERATOR:
            operator = bytes(_message(value))
        elif number == _NODE_DOMAIN:
            domain = bytes(_message(value))
        elif number == _NODE_ATTRIBUTE:
            attributes.append(_message(value))
    name = operator[:80].decode("utf-8", "replace")
    if domain not in _STANDARD:
        where = domain[:80].decode("utf-8", "replace")
        return f"has the operator {where}.{name}, which is not one of the ONNX standard"
    for attribute in attributes:
        for number, value in _fields(attribute):
            if number in _ATTRIBUTE_GRAPHS:
                return f"has the operator {name} with a graph inside, a loop or a branch"
            if number in _ATTRIBUTE_SPARSE:
                return _SPARSE
            if number in _ATTRIBUTE_TENSORS and (problem := _tensor_problem(_message(value))) is not None:
                return problem
    return None


_SPARSE: Final = "has sparse tensors, which no network of this kind has"


def _tensor_problem(data: memoryview) -> str | None:
    # A location of 0 says that the data is in the file.
    if any(number in _TENSOR_EXTERNAL and value != 0 for number, value in _fields(data)):
        return "has its weights in other files, which are not read"
    return None


def _fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    """The fields of a protobuf message: number, and an integer or the bytes. Raises: ValueError if it is not one."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, kind = key >> 3, key & 7
        value: Value
        if kind == _VARINT:
            value, position = _varint(data, position)
        else:
            if kind == _BYTES:
                length, position = _varint(data, position)
            elif kind in (_FIXED_32, _FIXED_64):
                length = 4 if kind == _FIXED_32 else 8
            else:
                raise ValueError(f"wire type {kind}")
            if length > len(data) - position:
                raise ValueError("cut off")
            value, position = data[position : position + length], position + length
        yield number, value


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """The integer at position, and the position behind it. Raises: ValueError if it does not end."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("an integer that does not end")


def _message(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("an integer in place of a message")
    return value
