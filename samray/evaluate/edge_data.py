"""Data for `samray evaluate edges`: the boundaries that people drew, images, and edge maps made elsewhere.

DATA is Parquet with one row per image: `width`, `height`; the boundaries of each annotator as COCO's compressed run
lengths, in `annotators` (structs with `boundary`) or `boundaries` (a list); and `jpeg` (the encoded image), or
`map_png` (its edge map), or neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from samray import storage
from samray.errors import ConfigError, ImageError, NotFoundError
from samray.evaluate.columns import is_bytes, is_list, is_text, schema_of
from samray.evaluate.edge_matching import Bool
from samray.output.shards import reraise_damaged
from samray.rle.runs import checked_runs, pixels
from samray.storage.tables import open_parquet

_COLUMNS: Final = ("image_id", "file_name", "width", "height", "boundaries", "annotators", "jpeg", "map_png")
_ROWS_AT_ONCE: Final = 4


@dataclass(frozen=True, slots=True)
class EdgeImage:
    """An image of DATA."""

    name: str
    """Its file name, or its id."""
    hw: tuple[int, int]
    """(H, W) in pixels."""
    boundaries: tuple[str, ...]
    """Run lengths of each annotator's boundaries."""
    jpeg: bytes | None
    """The encoded image, if DATA has it."""
    map_png: bytes | None
    """Its edge map, if DATA has it."""

    def boundary_masks(self) -> list[Bool]:
        """The boundaries of each annotator, (H, W) each. Raises: ImageError."""
        try:
            return [pixels(checked_runs(counts, self.hw), self.hw) for counts in self.boundaries]
        except ValueError as error:
            raise ImageError("unreadable", f"{self.name} has a boundary that does not fit it: {error}") from error


class EdgeData:
    """The images of DATA, in order; can be iterated any number of times.

    Raises: ConfigError if DATA does not exist or has no boundaries; StorageError, also while iterating.
    """

    def __init__(self, data: str, limit: int | None = None) -> None:
        """limit: use only the first N images of DATA."""
        self.uri = storage.normalize(data)
        self.where = storage.redact(self.uri)
        self.has_images = self.has_maps = True
        self._files: list[str] = []
        self.num_images = 0
        for uri in self._parquet_files():
            if limit is None or self.num_images < limit:
                self._add(uri)
        if limit is not None:
            self.num_images = min(self.num_images, limit)
        if self.num_images == 0:
            raise ConfigError(f"DATA {self.where} has no images: its Parquet has no rows")

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[EdgeImage]:
        left = self.num_images
        for uri in self._files:
            for row in _rows(uri):
                if left == 0:
                    return
                left -= 1
                yield _edge_image(row)

    def _parquet_files(self) -> list[str]:
        try:
            uris = sorted(entry.uri for entry in storage.list_files(self.uri))
        except NotFoundError as error:
            raise ConfigError(f"DATA {self.where} does not exist; give Parquet with boundaries") from error
        files = [uri for uri in uris if uri.lower().endswith(".parquet")]
        if not files:
            raise ConfigError(f"DATA {self.where} has no .parquet file; give Parquet with boundaries")
        return files

    def _add(self, uri: str) -> None:
        where = storage.redact(uri)
        schema, num_rows = schema_of(uri)
        kinds = {field.name: field.type for field in schema}
        has_size = all(pa.types.is_integer(kinds.get(side, pa.null())) for side in ("width", "height"))
        if not (has_size and _has_boundaries(kinds)):
            raise ConfigError(
                f"DATA {where} has no boundaries: expected width, height, and annotators with boundary, or boundaries; "
                f"found {', '.join(f'{name} {kind}' for name, kind in kinds.items())}"
            )
        # Only if all files have the column.
        self.has_images &= is_bytes(kinds.get("jpeg", pa.null()))
        self.has_maps &= is_bytes(kinds.get("map_png", pa.null()))
        self._files.append(uri)
        self.num_images += num_rows


def _has_boundaries(kinds: dict[str, pa.DataType]) -> bool:
    people: Any = kinds.get("annotators")
    if people is not None and is_list(people) and pa.types.is_struct(people.value_type):
        index = people.value_type.get_field_index("boundary")
        return index >= 0 and is_text(people.value_type.field(index).type)
    texts: Any = kinds.get("boundaries")
    return texts is not None and is_list(texts) and is_text(texts.value_type)


def _rows(uri: str) -> Iterator[dict[str, Any]]:
    with storage.open_read(uri) as stream, reraise_damaged(uri):
        file = open_parquet(stream)
        columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
        # Few rows at a time, because they contain whole images.
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _edge_image(row: dict[str, Any]) -> EdgeImage:
    if "annotators" in row:
        counts = [(person or {}).get("boundary") for person in row["annotators"] or []]
    else:
        counts = row["boundaries"] or []
    return EdgeImage(
        name=str(row.get("file_name") or row.get("image_id") or ""),
        hw=(row["height"] or 0, row["width"] or 0),
        boundaries=tuple(text for text in counts if text is not None),
        jpeg=row.get("jpeg"),
        map_png=row.get("map_png"),
    )


class FolderMaps:
    """Edge maps in a folder, found by the image's name without its extension, or by the last part of it."""

    def __init__(self, folder: str) -> None:
        """folder: PNG files, in subfolders, too. Raises: ConfigError if there are none, StorageError."""
        uri = storage.normalize(folder)
        self.where = storage.redact(uri)
        self._by_stem: dict[str, list[str]] = {}
        try:
            uris = [entry.uri for entry in storage.list_files(uri) if entry.uri.lower().endswith(".png")]
        except NotFoundError as error:
            raise ConfigError(f"--maps {self.where} does not exist") from error
        if not uris:
            raise ConfigError(f"--maps {self.where} has no PNG files")
        for path in uris:
            stem = path[:-4]
            self._by_stem.setdefault(stem.rpartition("/")[2], []).append(stem)
        self._ending = {path[:-4]: path[-4:] for path in uris}

    def __call__(self, image: EdgeImage) -> bytes:
        """The PNG file of an image. Raises: ImageError if there is none, or more than one; StorageError."""
        stem = image.name.rpartition(".")[0] or image.name
        candidates = self._by_stem.get(stem.rpartition("/")[2], [])
        # Images of several folders may share a name: the one with the same folders wins.
        exact = [path for path in candidates if path.endswith("/" + stem)]
        candidates = exact or candidates
        if not candidates:
            raise ImageError("missing", f"--maps {self.where} has no map of {image.name}")
        if len(candidates) > 1:
            raise ImageError("unreadable", f"--maps {self.where} has {len(candidates)} maps of {image.name}")
        return storage.read_bytes(candidates[0] + self._ending[candidates[0]])
