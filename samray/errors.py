"""The errors samray raises on purpose; everything else that escapes is a bug.

Each message says what was expected, what came, and what to do, and never holds a credential.
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
        "bad_prompt",
        "out_of_memory",
        "internal",
        "quarantined",
        "unreadable",
    }
)
"""The slugs an `ImageError` may carry; reports count failures by them."""


class SamrayError(Exception):
    """Base of every error that samray raises on purpose."""


class ConfigError(SamrayError):
    """The user asked for something that cannot be: a setting, an input or an output. Raised before anything starts."""


class StorageError(SamrayError):
    """Storage could not be read or written, after the retries that made sense."""


class UnavailableError(StorageError):
    """Storage failed for as long as it was tried again (`storage.timeout_s`). Trying later may help."""


class FileError(StorageError):
    """One file cannot be read (a directory, no permission, an impossible name), though its storage answers."""


class RefusedError(FileError):
    """The storage refuses the file: no permission, or an answer that may be the same for every other file."""


class NotFoundError(FileError):
    """The file, the folder or its bucket does not exist."""


class TooLargeError(FileError):
    """The file has more bytes than asked for; size: how many it has, or how many were read until that showed."""

    def __init__(self, size: int, message: str) -> None:
        super().__init__(size, message)
        self.size = size

    def __str__(self) -> str:
        return str(self.args[1])


class BucketNotFoundError(NotFoundError):
    """The bucket does not exist, which says nothing about the file."""


class ImageError(SamrayError):
    """One image cannot be labelled. It becomes a row with `status=failed`, never a dead job.

    `reason` is one of `IMAGE_ERROR_REASONS`; `str(error)` is what stands in the row's `error` column.
    """

    def __init__(self, reason: str, message: str) -> None:
        assert reason in IMAGE_ERROR_REASONS, reason
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"
