"""Stage 4: the labelling actor, a process that holds one model."""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import pyarrow as pa
import ray

from samray import storage
from samray.cluster.processes import end_with_ray
from samray.errors import ImageError, SamrayError
from samray.inputs.child import ChildNotStarted
from samray.inputs.listing import fetch_images
from samray.output.credentials import reveal
from samray.output.embedding_files import EmbeddingWriter
from samray.output.schema import ImageRecord, records_to_table
from samray.pipeline.attempts import ShardAttempts, TileMarks
from samray.pipeline.faults import DeviceFault
from samray.pipeline.fetch import sample_files
from samray.pipeline.isolated import IsolatedLabeler
from samray.pipeline.labeler import EncodedImage, ShardLabeler, build_labeler
from samray.pipeline.large_images import too_large_for_tiles
from samray.pipeline.metrics import ActorFigures, record
from samray.pipeline.report import Labelled, ShardSummary
from samray.pipeline.tiling import (
    LEASE_S,
    STAGE,
    TILES_PER_PART,
    LargeImage,
    OpenImage,
    Size,
    sizes_from,
)
from samray.prompts import Prompt
from samray.storage.tables import to_stream

if TYPE_CHECKING:
    from samray.config import Config
    from samray.output.plan import Plan

logger = logging.getLogger(__name__)

LABELLED = pa.schema(
    [
        ("shard", pa.int64()),
        ("retry", pa.bool_()),
        ("attempt", pa.int32()),  # 0: the shard was skipped because the run is stopping
        ("indices", pa.list_(pa.int32())),
        ("tiles", pa.string()),  # as in SOURCE
        ("rows", pa.large_binary()),  # the records as an Arrow stream
        ("summary", pa.string()),
    ]
)


class Abandoned(Exception):
    """The run is stopping without time to finish this shard."""


class LabelActor:
    """One row of FETCHED in, one row of LABELLED out."""

    def __init__(
        self,
        plan: Plan,
        config: Config,
        run_id: str,
        state: Any,
        num_threads: int,
        make_labeler: Callable[[Config, int], ShardLabeler] = build_labeler,
    ) -> None:
        self.opened = OpenImage()
        # Settings of this process: an actor starts without the driver's.
        storage.configure(config.storage)
        end_with_ray()
        self.plan = plan
        self.config = config
        self.run_id = run_id
        self.state = state
        self.make_labeler = make_labeler
        self.fault: SamrayError | None = None
        self.figures = ActorFigures()
        self.stages_before: dict[str, float] = {}
        if config.masks.tile is not None:
            # Ray restarts an actor under the same id: what the process before it was at is free for all.
            state.release.remote(_actor_id())
        try:
            self.labeler = make_labeler(config, num_threads)
        except SamrayError as error:
            # If raised here, Ray would keep starting actors; raised with the first shard, it ends the run.
            self.fault = error

    def __del__(self) -> None:
        self.opened.close()  # the copy of a large image on this machine's disk

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self.fault is not None:
            raise self.fault
        # batch_size=1: exactly one shard.
        (shard,), (retry,) = batch["shard"].to_pylist(), batch["retry"].to_pylist()
        left_alone = {"shard": shard, "retry": retry, "attempt": 0}
        credentials = json.loads(batch["credentials"].to_pylist()[0] or "{}")
        sizes = sizes_from(batch["tiles"].to_pylist()[0])
        if (part := batch["part"].to_pylist()[0]) is not None:
            number, index, first, last = json.loads(part)
            image = self._large_image(shard, index, sizes[index], credentials, retry)
            self._label_part(image, -number, range(first, last))
            # The write stage has nothing to do for it. Negative: the driver's count of shards in flight has it so.
            return self._row({**left_alone, "shard": -number})
        if not self._may_begin(shard):
            return self._row(left_alone)
        # After `_may_begin`: a shard that is skipped leaves no mark. Before any work: a death must be counted.
        attempts = ShardAttempts(self.plan.output, shard, self.run_id)
        attempts.begin()
        images, indices = self._unpack(shard, batch)
        writer = self._embedding_writer(shard, indices, retry)
        try:
            untiled = [image for image, index in zip(images, indices, strict=True) if index not in sizes]
            done = self._label(untiled, attempts, functools.partial(self._advance, shard, writer))
            large = {
                index: self._label_large(
                    self._large_image(shard, index, sizes[index], credentials, retry), image, attempts
                )
                for image, index in zip(images, indices, strict=True)
                if index in sizes
            }
            rest = iter(done.records)
            done.records = [large.get(index) or next(rest) for index in indices]
        except Abandoned:
            # A cancelled attempt is not evidence against its images.
            attempts.forget()
            return self._row(left_alone)
        except DeviceFault:
            self._exit()
        finally:
            self.opened.close()
        # Measured in another process, and sent along with the images.
        done.stage_seconds["fetch"] = batch["fetch_s"].to_pylist()[0]
        if writer is not None:
            done.stage_seconds["embeddings"], done.embedding_bytes = writer.seconds, writer.num_bytes
        done = self.figures.finish(done, self.labeler.num_workers)
        return self._row(
            {
                "shard": shard,
                "retry": retry,
                "attempt": attempts.number,
                "indices": indices,
                "tiles": batch["tiles"].to_pylist()[0],
                "rows": to_stream(records_to_table(done.records, self.plan.run)),
                "summary": ShardSummary.of(shard, done).to_json(),
            }
        )

    def _label(
        self, images: list[EncodedImage], attempts: ShardAttempts, on_progress: Callable[[Labelled], None]
    ) -> Labelled:
        if not attempts.careful:
            return self.labeler.label(images, on_progress)
        return self._label_alone(images, attempts, on_progress)

    def _label_alone(
        self, images: list[EncodedImage], attempts: ShardAttempts | TileMarks, on_progress: Callable[[Labelled], None]
    ) -> Labelled:
        # A child with a model of its own: this process, and its model, stay as they are.
        isolated = IsolatedLabeler(self.config, self.make_labeler, self.labeler.decode)
        try:
            return isolated.label(images, attempts, on_progress)
        except ChildNotStarted as error:
            raise RuntimeError(
                f"a labelling process on {platform.node()} dies even on a harmless image ({error}): the machine is at"
                " fault; check its memory and driver, then run again"
            ) from error
        finally:
            isolated.close()

    # --- large images -------------------------------------------------------------------------------------------------

    def _large_image(self, shard: int, index: int, size: Size, credentials: dict[str, str], retry: bool) -> LargeImage:
        return LargeImage(
            plan=self.plan, config=self.config, run_id=self.run_id, shard=shard, index=index, size=size,
            credentials=credentials, retry=retry,
        )  # fmt: skip

    def _label_part(self, image: LargeImage, key: int, numbers: range) -> None:
        """Label some tiles of an image. What goes wrong with them is left to the row of the shard."""
        # Each part of a file that cannot be unpacked would try that again.
        if not self._may_begin(key) or self._answer(lambda: self.state.has_failed.remote(image.name), False):
            self.opened.close()
            return
        attempts = ShardAttempts(
            self.plan.output, image.shard, self.run_id, part=f"tiles-{image.index}-{numbers.start}"
        )
        attempts.begin()
        is_open = False
        try:
            if not attempts.careful:
                claim = functools.partial(self._claim, key)
                with self._at_tiles():
                    error = image.label(self._label_tiles(key), claim, self._costs, self.opened, numbers)
                if error is not None:
                    self.state.fail.remote(image.name)
                else:
                    # Open for the next part of the image, if there will be one.
                    left = image.left()
                    is_open = self._answer(lambda: self.state.has_free.remote(*left), False)
        except Abandoned:
            attempts.forget()
        except DeviceFault:
            self._exit()
        else:
            attempts.clear(has_parts=True)
        finally:
            if not is_open:
                self.opened.close()

    @contextmanager
    def _at_tiles(self) -> Iterator[None]:
        """Renew the lease of this actor's tiles from time to time: one tile may take minutes, and so may unpacking."""
        is_over, actor = threading.Event(), _actor_id()

        def renew() -> None:
            while not is_over.wait(LEASE_S / 4):
                self.state.renew.remote(actor, LEASE_S)

        thread = threading.Thread(target=renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _label_large(self, image: LargeImage, encoded: EncodedImage, attempts: ShardAttempts) -> ImageRecord:
        """A row without masks, which are in the files of the tiles; or with an error."""
        marks = TileMarks(attempts, image.index) if attempts.careful else None
        error = too_large_for_tiles(image.size, self.config)
        if error is not None:
            pass
        elif marks is not None and marks.is_poison(0):
            message = f"the labelling processes of {marks.strikes(0)} attempts died on this image"
            error = ImageError("quarantined", message)
        else:
            claim = functools.partial(self._claim, image.shard)
            with self._at_tiles():
                error = image.label(self._label_tiles(image.shard, marks), claim, self._costs, self.opened)
        height, width = (0, 0) if error else image.size.hw
        return ImageRecord(
            image_id=encoded.image_id,
            width=width,
            height=height,
            file_name=encoded.file_name,
            uri=encoded.uri,
            error=None if error is None else str(error),
        )

    def _label_tiles(self, key: int, marks: TileMarks | None = None) -> Callable[..., Labelled]:
        def label(images: list[EncodedImage], on_progress: Callable[[Labelled], None]) -> Labelled:
            self.stages_before = self.labeler.stage_seconds()

            def keep(batch: Labelled) -> None:
                on_progress(batch)
                self._keep_on(key, 0, len(batch.records))

            if marks is None:
                return self.labeler.label(images, keep)
            return self._label_alone(images, marks, keep)

        return label

    def _claim(self, key: int, image: str, tiles: list[int]) -> list[int]:
        self._keep_on(key, 0)
        try:
            claimed: list[int] = ray.get(self.state.claim.remote(image, tiles, _actor_id(), LEASE_S, TILES_PER_PART))
            return claimed
        except ray.exceptions.RayError:
            return tiles[:TILES_PER_PART]  # others may label them, too: one file stays

    def _answer(self, ask: Callable[[], Any], default: bool) -> bool:
        """The answer of the state actor; default if it does not answer."""
        try:
            return bool(ray.get(ask()))
        except ray.exceptions.RayError:
            return default

    def _costs(self, batch: Labelled) -> dict[str, float]:
        """The cost of each tile of a batch. Tiles do not count as images."""
        self.figures.add(replace(batch, records=[]), self.labeler.num_workers)
        total = {"device_seconds": batch.device_seconds, **self.figures.lap(self.labeler.num_workers)}
        stages = self.labeler.stage_seconds()
        total |= {STAGE + key: value - self.stages_before.get(key, 0.0) for key, value in stages.items()}
        self.stages_before = stages
        return {key: value / max(1, len(batch.records)) for key, value in total.items()}

    def _exit(self) -> NoReturn:
        # Re-raised, it would end the job; a dead process is replaced, and the shard is run again.
        logger.exception("the device failed: this labelling process exits, and Ray starts a new one")
        logging.shutdown()
        os._exit(1)

    def _may_begin(self, shard: int) -> bool:
        # Without the state actor there is no progress display, but work continues.
        return self._answer(lambda: self.state.begin.remote(shard), True)

    def _embedding_writer(self, shard: int, indices: list[int], retry: bool) -> EmbeddingWriter | None:
        """The writer of the embeddings of a shard, if the run stores them."""
        if self.config.output.embeddings == "none":
            return None
        level = self.config.output.compression_level
        return EmbeddingWriter(self.plan, shard, indices, retry=retry, compression_level=level)

    def _advance(self, shard: int, writer: EmbeddingWriter | None, batch: Labelled) -> None:
        # As they come, and all before the row of the shard is returned: a finished shard has all of its embeddings.
        if writer is not None:
            writer.add(batch.records)
        self.figures.add(batch, self.labeler.num_workers)
        self._keep_on(shard, len(batch.records))

    def _keep_on(self, shard: int, num_images: int, num_tiles: int = 0) -> None:
        """Raises: Abandoned."""
        try:
            # Waits for the answer once per group of images: that is how an actor learns that it shall stop.
            keep_on = ray.get(self.state.advance.remote(shard, num_images, num_tiles))
        except ray.exceptions.RayError:
            return
        if not keep_on:
            raise Abandoned

    def _unpack(self, shard: int, batch: pa.Table) -> tuple[list[EncodedImage], list[int]]:
        # The small columns become Python objects; of the bytes only one image at a time is copied.
        images = batch["images"].combine_chunks().values
        data = images.field("data")
        credentials = json.loads(batch["credentials"].to_pylist()[0] or "{}")
        columns = ("index", "image_id", "file_name", "uri", "reason", "message", "prompts")
        encoded, indices = [], []
        for i, row in enumerate(zip(*(images.field(c).to_pylist() for c in columns), strict=True)):
            index, image_id, file_name, uri, reason, message, user_prompts = row
            source: bytes | ImageError | Callable[[], bytes | ImageError]
            if reason is not None:
                source = ImageError(reason, message)
            elif data[i].is_valid:
                source = data[i].as_buffer().to_pybytes()
            else:
                # Too many bytes for the object store: fetched by a decoding thread, when it is this image's turn.
                source = functools.partial(self._fetch_late, shard, index, credentials)
            prompts = None if user_prompts is None else [Prompt.parse(value) for value in json.loads(user_prompts)]
            encoded.append(EncodedImage(image_id, file_name, uri, source, prompts, shard))
            indices.append(index)
        return encoded, indices

    def _fetch_late(self, shard: int, index: int, credentials: dict[str, str]) -> bytes | ImageError:
        # The plan has no credentials; they travel with the shard.
        rows = reveal(self.plan.read_shard(shard).slice(index, 1), credentials)
        sample = functools.partial(sample_files, self.plan, credentials)
        (data,) = fetch_images(rows, self.config.input, sample)
        if isinstance(data, bytes):
            record("samray_encoded_bytes", len(data))
        return data

    def _row(self, values: dict[str, Any]) -> pa.Table:
        return pa.Table.from_pylist([values], schema=LABELLED)


def _actor_id() -> str:
    return str(ray.get_runtime_context().get_actor_id())
