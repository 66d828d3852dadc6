"""The table of kinds of input: one row each. Listing, fetching and the messages for a wrong INPUT ask it."""

from __future__ import annotations

from samray.inputs import parquet, tar, uri_list
from samray.inputs.base import Reader

READERS: list[Reader] = [tar.READER, uri_list.READER, parquet.READER]


def reader_of(uri: str) -> Reader | None:
    """The reader of a file by its name; None for an image or anything else."""
    return next((reader for reader in READERS if reader.matches(uri)), None)


def container_endings() -> tuple[str, ...]:
    """The endings of all files that hold images or name them."""
    return tuple(ending for reader in READERS for ending in reader.endings)


def list_endings() -> tuple[str, ...]:
    """The endings of files that may name images by URI; those that hold images as well come first."""
    readers = sorted((reader for reader in READERS if reader.lists_uris), key=lambda reader: reader.fetch is None)
    return tuple(ending for reader in readers for ending in reader.endings)


def what_to_give() -> str:
    """What an INPUT may be, for messages: `give a folder, glob, tar, list of URIs or Parquet file`."""
    nouns = ["folder", "glob", *(reader.noun for reader in READERS)]
    return f"give a {', '.join(nouns[:-1])} or {nouns[-1]}"
