"""Copies of the images, for formats that store them next to their labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pyarrow as pa

from samray.config import InputConfig
from samray.errors import ImageError
from samray.exports.images import LabelledImage
from samray.inputs.decode import is_of_size
from samray.inputs.listing import fetch_images
from samray.output.file_names import extension_of

if TYPE_CHECKING:
    from samray.exports.pieces import Job, Piece

_IMAGES_AT_ONCE: Final = 16


class Photo(NamedTuple):
    """An encoded image, as it is in the input."""

    extension: str
    data: bytes


def photos_of(
    job: Job[Any], piece: Piece, images: Iterable[LabelledImage], *, copy: bool
) -> Iterator[tuple[LabelledImage, Photo | None]]:
    """The images, each with its bytes; None without copy, or if it cannot be read any more at the size it was labelled.

    Raises: StorageError if the storage as a whole fails.
    """
    if not copy:
        yield from ((image, None) for image in images)
        return
    # Failed images are in the plan, but not among these: find each by its id.
    planned = pa.concat_tables(job.plan.read_shard(r.shard).slice(r.start, r.stop - r.start) for r in piece.rows)
    index_of = {image_id: index for index, image_id in enumerate(planned["image_id"].to_pylist())}
    config = InputConfig(**job.plan.run["identity"].get("input", {}))
    rest = iter(images)
    while batch := list(islice(rest, _IMAGES_AT_ONCE)):
        rows = planned.take([index_of[image.image_id] for image in batch])
        for image, data in zip(batch, fetch_images(rows, config), strict=True):
            # A photo that was replaced by one of another size would not fit its masks.
            if isinstance(data, ImageError) or not is_of_size(data, image.width, image.height):
                yield image, None
            else:
                # A name from a row or a URI may end with anything; tools need an image's extension.
                extension = extension_of(image.file_name)
                yield image, Photo(extension if extension[1:].isalnum() else ".jpg", data)
