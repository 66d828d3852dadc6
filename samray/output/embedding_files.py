"""Write the embedding files of a shard while its images are labelled: memory holds those of one file."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from samray import storage
from samray.errors import NotFoundError
from samray.output.embeddings import IMAGES_PER_FILE, file_bytes, file_uri, read_file, read_generation_of
from samray.output.plan import Plan
from samray.output.schema import ImageRecord


class EmbeddingWriter:
    """Takes the records of a shard in order, and writes a file as soon as its last image is there.

    `num_bytes` and `seconds` sum up what was written.
    """

    def __init__(self, plan: Plan, shard: int, indices: Sequence[int], *, retry: bool, compression_level: int) -> None:
        """indices: in the shard, of the images that come. retry: only these of a finished shard are redone."""
        self._plan, self._shard, self._retry, self._level = plan, shard, retry, compression_level
        self._waiting = list(indices)
        self._ids = plan.read_shard(shard)["image_id"].to_pylist()
        self._rows: list[dict[str, Any]] = []
        self._redone: set[int] = set()
        self.num_bytes = 0
        self.seconds = 0.0

    def add(self, records: Iterable[ImageRecord]) -> None:
        """The next records; those of failed images have no embedding. Raises: StorageError."""
        for record in records:
            index = self._waiting.pop(0)
            assert record.image_id == self._ids[index], (record.image_id, index)
            self._redone.add(record.image_id)
            if record.embedding is not None:
                self._rows.append(record.embedding)
            file = index // IMAGES_PER_FILE
            if not self._waiting or self._waiting[0] // IMAGES_PER_FILE != file:
                started = time.monotonic()
                self._write(file)
                self.seconds += time.monotonic() - started
                self._rows, self._redone = [], set()

    def _write(self, file: int) -> None:
        uri = file_uri(self._plan.output, self._shard, file)
        rows = self._rows
        if self._retry:
            # The other rows of the file stay as they are, and the order is the plan's.
            rows = [*self._others(file), *rows]
            rows.sort(key=lambda row: self._ids.index(row["image_id"]))
        data = file_bytes(rows, self._plan.run, self._level)
        self.num_bytes += len(data)
        if self._retry:
            storage.put(uri, data)
        elif not storage.put_new(uri, data) and self._is_outdated(file):
            # Left by a run that was killed before an image changed; unread, because its shard does not exist.
            storage.put(uri, data)

    def _others(self, file: int) -> list[dict[str, Any]]:
        try:
            return [
                row for row in read_file(self._plan.output, self._shard, file) if row["image_id"] not in self._redone
            ]
        except NotFoundError:  # deleted: `verify` names the images that are missing
            return []

    def _is_outdated(self, file: int) -> bool:
        """Whether an image has changed since the file was written."""
        made_by = read_generation_of(self._plan.output, self._shard, file)
        return not self._redone.isdisjoint(self._plan.changed_images(self._shard, after=made_by))
