"""The table of kinds of input: one row each. Listing, fetching and the messages for a wrong INPUT ask it."""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc

from samray.inputs import folder, parquet, tar, uri_list
from samray.inputs.base import Reader

READERS: list[Reader] = [folder.READER, tar.READER, uri_list.READER, parquet.READER]


def reader_of(container: str | None) -> Reader | None:
    """The reader of a file that holds images; without one, of an image's own file. None for any other file."""
    if container is None:
        return _reader_of_the_rest()
    return next((reader for reader in READERS if reader.matches(container)), None)


def reader_of_all(files: pa.Table, *, files_are_meant: bool) -> Reader:
    """The reader of an INPUT: the one that takes every one of its files, otherwise the one of image files.

    files: with a column uri. files_are_meant: INPUT is a file or spells the ending out.
    """
    for reader in READERS:
        pattern = "(" + "|".join(re.escape(ending) for ending in reader.endings) + ")$"
        if (
            reader.endings
            and (files_are_meant or not reader.only_by_name)
            and pc.all(pc.match_substring_regex(files["uri"], pattern, ignore_case=True)).as_py()
        ):
            return reader
    return _reader_of_the_rest()


def _reader_of_the_rest() -> Reader:
    return next(reader for reader in READERS if not reader.endings)


def container_endings() -> tuple[str, ...]:
    """The endings of all files that hold images or name them."""
    return tuple(ending for reader in READERS for ending in reader.endings)


def list_endings() -> tuple[str, ...]:
    """The endings of files that may name images by URI; those that hold images as well come first."""
    readers = sorted((reader for reader in READERS if reader.lists_uris), key=lambda reader: reader.fetch is None)
    return tuple(ending for reader in readers for ending in reader.endings)


def what_to_give() -> str:
    """The kinds of INPUT, for messages: `give a folder, glob, tar, list of URIs or Parquet file`."""
    nouns = [noun for reader in READERS for noun in reader.nouns]
    return f"give a {', '.join(nouns[:-1])} or {nouns[-1]}"
