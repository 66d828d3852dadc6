"""The elements of a large JSON file's top-level lists, one at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, Final

_CHUNK_BYTES: Final = 4 * 2**20
MAX_VALUE_CHARS: Final = 256 * 2**20
"""Of one element; the file may be of any size."""

_SPACE: Final = " \t\n\r"


class JsonStream:
    """Reads `{"key": [element, ...], "other": value, ...}` with no more in memory than an element and a chunk."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._ended = False

    def items(self) -> Iterator[tuple[str, Any]]:
        """(key, element) for each element of a list, (key, value) for each other value, in the file's order.

        Raises: ValueError where the file is no JSON object.
        """
        self._expect("{")
        if self._peek() == "}":
            return
        while True:
            key = self._value()
            if not isinstance(key, str):
                raise ValueError("the file is no JSON object")
            self._expect(":")
            if self._peek() == "[":
                self._at += 1
                if self._peek() == "]":
                    self._at += 1
                else:
                    while True:
                        yield key, self._value()
                        if self._expect(",]") == "]":
                            break
            else:
                yield key, self._value()
            if self._expect(",}") == "}":
                return

    def _more(self) -> bool:
        """Read on; False at the end of the file."""
        if self._ended:
            return False
        # A value longer than a chunk is tried again with twice as much, so that trying stays linear.
        chunk = self._stream.read(max(_CHUNK_BYTES, len(self._text) - self._at))
        self._ended = not chunk
        self._text = self._text[self._at :] + self._decode(chunk, self._ended)
        self._at = 0
        return True

    def _peek(self) -> str:
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                raise ValueError("the file ends too early")

    def _expect(self, characters: str) -> str:
        found = self._peek()
        if found not in characters:
            raise ValueError(f"expected {' or '.join(characters)}, found {found!r}")
        self._at += 1
        return found

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # else a number might go on
                    self._at = end
                    return value
                problem: Exception = ValueError("the file ends too early")
            except (ValueError, RecursionError) as error:
                problem = error
            if len(self._text) - self._at > MAX_VALUE_CHARS or not self._more():
                raise ValueError(f"it is damaged: {problem}") from problem
