"""The errors that samray raises on purpose; any other exception is a bug.

Each message says what was expected, what was found, and what to do. It never contains a credential.
"""

from __future__ import annotations

from typing import Final

IMAGE_ERROR_REASONS: Final = frozenset(
    {
        "missing",
        "empty",
        "not_an_image",
        "truncated",
        "too_large",
        "timeout",
        "unsupported",
        "not_allowed",
        "duplicate",
        "bad_prompt",
        "out_of_memory",
        "internal",
        "quarantined",
        "unreadable",
    }
)
"""The values of `ImageError.reason`; reports count failures by them."""


class SamrayError(Exception):
    """Base of every error that samray raises on purpose."""


class ConfigError(SamrayError):
    """An impossible setting, input or output. Raised before anything starts."""


class StorageError(SamrayError):
    """Storage could not be read or written, after retries where they make sense."""


class UnavailableError(StorageError):
    """Storage failed on every retry (see `storage.timeout_s`). A later attempt may succeed."""


class FileError(StorageError):
    """One file cannot be read (a directory, no permission, an invalid name), although its storage responds."""


class RefusedError(FileError):
    """The storage refuses the file: no permission, or a response that may be the same for all files."""


class NotFoundError(FileError):
    """The file, the folder or its bucket does not exist."""


class TooLargeError(FileError):
    """The file has more bytes than allowed. size: its size, or the number of bytes read until the limit was passed."""

    def __init__(self, size: int, message: str) -> None:
        super().__init__(size, message)
        self.size = size

    def __str__(self) -> str:
        return str(self.args[1])


class BucketNotFoundError(NotFoundError):
    """The bucket does not exist; nothing is known about the file."""


class ImageError(SamrayError):
    """One image cannot be labelled. It becomes a row with `status=failed`; the run continues.

    `reason` is one of `IMAGE_ERROR_REASONS`; `str(error)` goes into the row's `error` column.
    """

    def __init__(self, reason: str, message: str) -> None:
        assert reason in IMAGE_ERROR_REASONS, reason
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    @classmethod
    def parse(cls, text: str) -> ImageError:
        """The error whose `str` this is, out of a column; a reason of a newer samray counts as unreadable."""
        reason, _, message = text.partition(": ")
        return cls(reason if reason in IMAGE_ERROR_REASONS else "unreadable", message)

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"
