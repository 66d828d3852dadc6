"""Write the embedding files of a shard while its images are labelled: memory holds those of one file."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from samray import storage
from samray.errors import NotFoundError, StorageError
from samray.output.embeddings import AGAIN, IMAGES_PER_FILE, file_bytes, file_uri
from samray.output.plan import Plan
from samray.output.schema import ImageRecord, samray_metadata
from samray.output.seals import is_intact
from samray.output.shards import reraise_damaged, shard_uri
from samray.storage.tables import open_parquet


class EmbeddingWriter:
    """Takes the records of a shard in order, and writes a file as soon as its last image is there.

    `num_bytes` and `seconds` sum up what was written.
    """

    def __init__(self, plan: Plan, shard: int, places: Sequence[int], *, retry: bool, compression_level: int) -> None:
        """places: indices in the shard of the images that come. retry: only these of a finished shard are redone."""
        self._plan, self._shard, self._retry, self._level = plan, shard, retry, compression_level
        self._waiting = list(places)
        self._ids = plan.read_shard(shard)["image_id"].to_pylist()
        self._rows: list[dict[str, Any]] = []
        self._redone: set[int] = set()
        self.num_bytes = 0
        self.seconds = 0.0

    def add(self, records: Iterable[ImageRecord]) -> None:
        """The next records; those of failed images have no embedding. Raises: StorageError."""
        for record in records:
            place = self._waiting.pop(0)
            assert record.image_id == self._ids[place], (record.image_id, place)
            self._redone.add(record.image_id)
            if record.embedding is not None:
                self._rows.append(record.embedding)
            file = place // IMAGES_PER_FILE
            if not self._waiting or self._waiting[0] // IMAGES_PER_FILE != file:
                started = time.monotonic()
                self._write(file)
                self.seconds += time.monotonic() - started
                self._rows, self._redone = [], set()

    def _write(self, file: int) -> None:
        uri = file_uri(self._plan.output, self._shard, file)
        data = file_bytes(self._rows, self._plan.run, self._level)
        if self._retry or not storage.put_new(uri, data):
            data = self._update(uri, file, data)
        self.num_bytes += len(data)

    def _update(self, uri: str, file: int, data: bytes) -> bytes:
        """Write a file that exists. data: with the new rows only; returns what the file has now."""
        if not self._retry and storage.exists(shard_uri(self._plan.output, self._shard)):
            return data  # another attempt has finished the shard: its embeddings stay with its rows
        # Left by an attempt that was killed, or by another one at work. Nobody has read it unless the shard is there.
        # Equal in most cases; but an image may have failed there, or have changed since.
        try:
            there = storage.read_bytes(uri)
        except NotFoundError:  # deleted: `verify` names the images that are missing
            there = b""
        others = self._others(uri, file, there) if there else []
        if others:
            rows = sorted([*others, *self._rows], key=lambda row: self._ids.index(row["image_id"]))
            data = file_bytes(rows, self._plan.run, self._level)
        if data != there:
            storage.put(uri, data)
        return data

    def _others(self, uri: str, file: int, there: bytes) -> list[dict[str, Any]]:
        """The rows to keep of a file: of images that are not redone, or failed now and have not changed since.

        Raises: StorageError if a finished shard's file cannot be kept.
        """
        made_by: dict[str, Any] = {}
        if is_intact(there):
            with reraise_damaged(uri):
                table = open_parquet(there).read()
                made_by = samray_metadata(table.schema)
        # One of a run that was here before, with other weights or images, counts as damaged.
        if made_by.get("identity") != self._plan.run["identity"]:
            if self._retry:
                raise StorageError(f"{storage.redact(uri)} is damaged, or another run wrote it; {AGAIN}")
            return []  # all of its images are here
        changed = self._plan.changed_images(self._shard, after=made_by.get("generation", 0)) & self._redone
        leave = changed.union(row["image_id"] for row in self._rows)
        keep = set(self._ids[file * IMAGES_PER_FILE : (file + 1) * IMAGES_PER_FILE]) - leave
        return [row for row in table.to_pylist() if row["image_id"] in keep]
