"""Stream the elements of the top-level lists in a large JSON file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, Final

_CHUNK_BYTES: Final = 4 * 2**20
MAX_VALUE_CHARS: Final = 64 * 2**20
"""Maximum size of one element; the file may be of any size. A parsed element takes up to 25 bytes per character."""

_SPACE: Final = " \t\n\r"
_WORDS: Final = ("true", "false", "null", "-", "NaN", "Infinity", "-Infinity")
_CUT: Final = re.compile(r"\s*|\.|[eE][+-]?|\\?u?[0-9a-fA-F]{0,4}")
"""The start of a number or of an escape, at the end of the text read so far."""
_NEAR_THE_END: Final = 16
"""Characters: an error this close to the end of the text read so far may only mean that more text is needed."""


class JsonStream:
    """Reads `{"key": [element, ...], "other": value, ...}`; holds one element and one chunk in memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        # -sig: skips a byte order mark, which is not JSON.
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._ended = False
        self._num_bytes = 0
        self._where = ""
        """The current list, and the number of its elements read so far."""

    def items(self, bare: str | None = None) -> Iterator[tuple[str, Any]]:
        """Yield (key, element) for each element of a list, and (key, value) for each other value, in the file's order.

        bare: the key for the elements of a file that is a list itself; with None such a file is an error.
        Raises: ValueError if the file is not a JSON object, with the reason and position.
        """
        if bare is not None and self._peek() == "[":
            yield from self._elements(bare)
        else:
            yield from self._members()
        self._where = ""
        if (character := self._next_character()) is not None:
            raise ValueError(f"it has {character!r} after its end, at {self._position(self._at)}; expected one value")

    def _members(self) -> Iterator[tuple[str, Any]]:
        self._expect("{")
        if self._peek() == "}":
            self._at += 1
            return
        while True:
            key = self._value()
            if not isinstance(key, str):
                raise ValueError("the file is not a JSON object")
            self._expect(":")
            if self._peek() == "[":
                yield from self._elements(key)
            else:
                yield key, self._value()
            self._where = ""
            if self._expect(",}") == "}":
                return

    def _elements(self, key: str) -> Iterator[tuple[str, Any]]:
        self._at += 1
        if self._peek() == "]":
            self._at += 1
            return
        number = 0
        name = f" {key[:40]!r}" if key else ""
        while True:
            self._where = f", inside the list{name}, after {number:,} whole elements"
            yield key, self._value()
            number += 1
            self._where = f", inside the list{name}, after {number:,} whole elements"
            if self._expect(",]") == "]":
                return

    def _too_early(self) -> ValueError:
        return ValueError(
            f"it ends too early: after {self._num_bytes:,} bytes{self._where}; the file was truncated when it was "
            "written or copied: fetch or export it again"
        )

    def _more(self) -> bool:
        """Read the next chunk; False at the end of the file."""
        if self._ended:
            return False
        # Retry a value longer than a chunk with twice as much text each time, which keeps parsing linear.
        chunk = self._stream.read(max(_CHUNK_BYTES, len(self._text) - self._at))
        self._ended = not chunk
        try:
            self._text = self._text[self._at :] + self._decode(chunk, self._ended)
        except UnicodeDecodeError as error:
            if self._ended:  # in the middle of a character
                raise self._too_early() from None
            raise ValueError(f"it is damaged, or not UTF-8, near byte {self._num_bytes + error.start:,}") from None
        self._num_bytes += len(chunk)
        self._at = 0
        return True

    def _peek(self) -> str:
        character = self._next_character()
        if character is None:
            raise self._too_early()
        return character

    def _next_character(self) -> str | None:
        """The next non-space character, without consuming it; None at the end of the file."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return None

    def _expect(self, characters: str) -> str:
        character = self._peek()
        if character not in characters:
            raise ValueError(f"expected {' or '.join(characters)}, found {character!r}, at {self._position(self._at)}")
        self._at += 1
        return character

    def _position(self, at: int) -> str:
        return f"about byte {self._num_bytes - len(self._text[at:].encode()):,}{self._where}"

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # else a number may continue
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                if not self._may_go_on(error):
                    raise ValueError(f"it is damaged: {error.msg} at {self._position(error.pos)}") from error
            except RecursionError:
                raise ValueError(f"it is nested too deeply at {self._position(self._at)}") from None
            # Before more is read: a value without an end would fill the memory.
            if len(self._text) - self._at > MAX_VALUE_CHARS:
                raise ValueError(
                    f"it has a value of more than {MAX_VALUE_CHARS:,} characters at {self._position(self._at)}"
                )
            if not self._more():
                raise self._too_early()

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether the error only means that the rest of the value is missing."""
        if error.msg.startswith("Unterminated string"):
            return True
        rest = self._text[error.pos :]
        if not self._ended:
            return len(rest) < _NEAR_THE_END
        # At the end of the file: truncated only if the rest begins a word, a number or an escape.
        return any(word.startswith(rest) for word in _WORDS) or _CUT.fullmatch(rest) is not None
