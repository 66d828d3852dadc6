"""The labelling actors of `samray label --from`: stored embeddings in, one record per image out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from samray import storage
from samray.errors import ImageError, NotFoundError, StorageError
from samray.output.compact import rows_by_shard
from samray.output.embeddings import RowReader, maps_of
from samray.output.schema import ImageRecord
from samray.output.shards import read_shard
from samray.pipeline.kept import packed_embedding
from samray.pipeline.labeler import EncodedImage, ShardLabeler, shard_labeler
from samray.rle.records import MaskRecord

if TYPE_CHECKING:
    from torch import Tensor

    from samray.config import Config
    from samray.inputs.decode import RGBArray
    from samray.masks.generator import MaskGenerator
    from samray.masks.prompted import PromptedGenerator
    from samray.output.plan import Plan
    from samray.sam.sam import Sam

Row = dict[str, Any]
"""The image, status and error of a row of OUTPUT, and where its embedding is: its `shard` and `place`."""


@dataclass
class StoredLabelers:
    """Makes the labelers of a run, in its actors."""

    source: Plan
    """The plan of OUTPUT."""
    images_per_shard: int
    """Images per shard of DEST."""

    def __call__(self, config: Config, num_threads: int) -> ShardLabeler:
        """Raises: as `shard_labeler`."""
        from samray.masks.generator import MaskGenerator
        from samray.masks.prompted import PromptedGenerator

        def make_generator(model: Sam, points_per_batch: int | None) -> StoredGenerator:
            masks, frugal = config.masks, points_per_batch is not None
            if frugal:  # a retry after running out of memory
                masks = masks.model_copy(update={"points_per_batch": points_per_batch})
            if config.input.prompts is not None:
                return StoredGenerator(PromptedGenerator(model, masks))
            return StoredGenerator(MaskGenerator(model, masks, frugal=frugal))

        model = self.source.run["identity"]["model"]
        weights, adapter = model.get("checkpoint_sha256"), model.get("adapter_sha256")

        def make(*args: Any, **options: Any) -> StoredLabeler:
            return StoredLabeler(self.source, self.images_per_shard, *args, **options)

        return shard_labeler(config, num_threads, weights, make_generator, make, adapter_sha256=adapter)


class Stored:
    """The embedding of an image, from when it is read until its masks are done."""

    def __init__(self) -> None:
        self.embedding: Tensor | None = None


class StoredGenerator:
    """Makes masks from embeddings, which come as the first of an image's prompts."""

    def __init__(self, generator: MaskGenerator | PromptedGenerator) -> None:
        self._generator: Any = generator
        self.stage_seconds = generator.stage_seconds

    def generate(self, images: Sequence[RGBArray], prompts: Sequence[list[Any]] = ()) -> list[list[MaskRecord]]:
        """images: of the right size, whatever their pixels. Raises: ImageError (`bad_prompt`)."""
        if not (prompts and prompts[0] and isinstance(prompts[0][0], Stored)):
            # The built-in image of `alone`, of which there is no embedding.
            return list(self._generator.generate(images, *([prompts] if prompts else [])))
        embeddings = [own[0].embedding for own in prompts]
        sizes = [image.shape[:2] for image in images]
        from samray.masks.prompted import PromptedGenerator

        if isinstance(self._generator, PromptedGenerator):
            return self._generator.generate_from(embeddings, sizes, [own[1:] for own in prompts])
        return list(self._generator.generate_from(embeddings, sizes))


class StoredLabeler(ShardLabeler):
    """Takes sizes and embeddings of images from OUTPUT instead of reading them."""

    def __init__(self, source: Plan, images_per_shard: int, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._source, self._images_per_shard, self._starts = source, images_per_shard, source.starts()
        self._reader = RowReader(source)
        self._shard: int | None = None
        self._rows: dict[int, Row] = {}
        """image_id -> row, of the shard in work."""

    def label(self, images: Sequence[EncodedImage], *args: Any, **options: Any) -> Any:
        """As of `ShardLabeler`. Raises: also StorageError if OUTPUT cannot be read."""
        for shard in {image.shard for image in images if image.shard is not None}:
            self._look_at(shard)
        ready = [i if i.shard is None else replace(i, prompts=[Stored(), *(i.prompts or [])]) for i in images]
        return super().label(ready, *args, **options)

    def _look_at(self, shard: int) -> None:
        """Read which images of a shard of DEST there are, by position: OUTPUT may have shards of another size."""
        if shard == self._shard:
            return
        start = shard * self._images_per_shard
        number = min(self._images_per_shard, self._starts[-1] - start)
        rows: dict[int, Row] = {}
        for of, places in rows_by_shard(self._starts, np.arange(start, start + number)):
            first = int(places[0])
            part = read_shard(self._source.output, of, ["image", "status", "error"]).slice(first, len(places))
            for place, row in enumerate(part.to_pylist(), first):
                rows[row["image"]["image_id"]] = {**row, "shard": of, "place": place}
        self._rows, self._shard = rows, shard

    def decode(self, image: EncodedImage) -> np.ndarray | ImageError:
        """Pixels without a value, of the right size; reads the embedding if the image waits for it.

        Raises: StorageError if OUTPUT lacks it.
        """
        if image.shard is None:  # the built-in image of `alone`
            return super().decode(image)
        self._look_at(image.shard)
        row = self._rows[image.image_id]
        if row["status"] == "failed":
            return ImageError.parse(row["error"])
        hw = row["image"]["height"] or 0, row["image"]["width"] or 0
        if min(hw) < 1 or hw[0] * hw[1] > self.max_pixels:  # edited: masks of this size could fill the memory
            where = storage.redact(self._source.output)
            raise StorageError(
                f"{where} says that image {image.image_id} has {hw[1]}x{hw[0]} pixels, which its run refuses "
                f"(input.max_pixels={self.max_pixels}); `samray verify {where}` shows details"
            )
        if image.prompts and isinstance(image.prompts[0], Stored):
            image.prompts[0].embedding = self._read(row, hw)
        return np.broadcast_to(np.zeros(3, np.uint8), (*hw, 3))

    def _read(self, row: Row, hw: tuple[int, int]) -> Tensor:
        image_id, where = row["image"]["image_id"], storage.redact(self._source.output)
        try:
            stored = self._reader.read(row["shard"], row["place"], image_id)
            if stored is None or (stored["height"], stored["width"]) != hw:
                raise StorageError(
                    f"{where} has no embedding of image {image_id}; `samray verify {where}` shows details"
                )
            maps = maps_of(stored)
            if not all(np.isfinite(values).all() for values in maps.values()):
                raise ValueError("values that are not finite")
            return packed_embedding(maps)
        except NotFoundError as error:
            raise StorageError(
                f"{where} lacks an embedding file: {error}; `samray verify {where}` shows all"
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise StorageError(
                f"{where} has a damaged embedding of image {image_id}: {error}; "
                f"`samray verify --deep {where}` shows details"
            ) from error

    def record(self, image: EncodedImage, decoded: np.ndarray | ImageError, result: Any) -> ImageRecord:
        """The new row; an image that failed in OUTPUT stays as it is there."""
        if image.prompts and isinstance(image.prompts[0], Stored):
            image.prompts[0].embedding = None  # those of a whole shard may not fit into memory
        row = self._rows.get(image.image_id)
        if image.shard is not None and row is not None and row["status"] == "failed":
            return ImageRecord(**row["image"], uri=image.uri, error=row["error"])
        return super().record(image, decoded, result)
