"""The interface of a kind of input: files of some endings, how to list the images in one, and how to fetch their bytes.

A file of this package defines one `Reader`, and a row in `readers` registers it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from samray import storage
from samray.errors import ImageError
from samray.inputs.skipped import Skipped

if TYPE_CHECKING:
    import pyarrow as pa

    from samray.config import InputConfig
    from samray.inputs.uri_rows import UriRows

FetchFile = Callable[[str], "bytes | ImageError"]


@dataclass(frozen=True, slots=True)
class Container:
    """A file that holds images or names them, or a folder or glob with its files."""

    uri: str
    etag: str | None
    """Changes if the file is replaced; None if nothing tells."""
    root: str
    """The folder that file names are relative to, and that lists may name files below."""
    prefix: str
    """Prefix of the names of its images: its own name below root without the ending; "" if it is all of INPUT."""
    files: pa.Table | None = None
    """uri, size, etag and problem of each file of INPUT, for readers with `list_at_once`."""
    files_are_meant: bool = False
    """Whether INPUT is a file or spells the ending out: then every file is to be listed, whatever its name."""


@dataclass(frozen=True, slots=True)
class Part:
    """The content of a container."""

    rows: pa.Table | UriRows | None = None
    """A table of `INPUT_SCHEMA`, or the rows of a list, which are still to be merged with those of other lists."""
    skipped: Skipped = field(default_factory=Skipped)
    error: str | None = None
    """Why the file, or what follows the rows, cannot be read."""
    refused: Exception | None = None
    """The error, if it may be the storage's and not the file's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """One kind of input."""

    name: str
    """As in "none of its 3 tar files can be read"."""
    nouns: tuple[str, ...]
    """Words for it in messages, as in "give a folder, glob or tar"."""
    nothing: str
    """As in "no image in the tar"."""
    endings: tuple[str, ...]
    """File extensions in lower case; matched in any case. Empty for the kind that takes what no other kind takes."""
    list: Callable[[Container, InputConfig], Part]
    """The images of a container. Raises: ConfigError, FileError for a fault of this one file, StorageError."""
    fetch: Callable[[str, Sequence[dict[str, Any]], InputConfig, FetchFile], Sequence[bytes | ImageError]] | None = None
    """The bytes of rows (of `INPUT_SCHEMA`, as dicts) that `list` made for one container; None if it makes rows of
    other files only. The last argument fetches a file that a row refers to. Raises: StorageError."""
    list_at_once: bool = False
    """Whether one call of `list` takes all files of INPUT; else each file is a call, many at a time."""
    fetch_at_once: bool = False
    """Whether one call of `fetch` takes all rows of a container; else each row is a call, many at a time."""
    lists_uris: bool = False
    """Whether a container may name images by URI."""
    only_by_name: bool = False
    """Whether INPUT must spell the ending out: a folder of .txt files holds captions, not lists."""
    distinct_names: bool = False
    """Whether no two images of one container have the same file_name."""

    def matches(self, uri: str) -> bool:
        """Whether a file is of this kind, by its name."""
        return uri.lower().endswith(self.endings)


def too_large(size: int, config: InputConfig) -> ImageError:
    """The error of an image with more bytes than are allowed."""
    return ImageError("too_large", f"{size} bytes are more than input.max_bytes={config.max_bytes}")


def relative_to(uri: str, root: str) -> str:
    """The path of a file below root."""
    return uri[len(storage.join(root, "")) :]
