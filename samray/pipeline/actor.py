"""Stage 4: the labelling actor, a process that holds one model."""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from samray import storage
from samray.cluster.processes import end_with_ray
from samray.errors import ImageError, SamrayError
from samray.inputs.child import ChildNotStarted
from samray.inputs.listing import fetch_images
from samray.output.credentials import reveal
from samray.output.embedding_files import EmbeddingWriter
from samray.output.schema import records_to_table
from samray.pipeline.alone import LonelyLabeler
from samray.pipeline.attempts import ShardAttempts
from samray.pipeline.faults import DeviceFault
from samray.pipeline.fetch import sample_files
from samray.pipeline.labeler import EncodedImage, ShardLabeler, build_labeler
from samray.pipeline.metrics import ActorFigures, record
from samray.pipeline.report import Labelled, ShardSummary
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
        ("places", pa.list_(pa.int32())),
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
        try:
            self.labeler = make_labeler(config, num_threads)
        except SamrayError as error:
            # If raised here, Ray would keep starting actors; raised with the first shard, it ends the run.
            self.fault = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self.fault is not None:
            raise self.fault
        # batch_size=1: exactly one shard.
        (shard,), (retry,) = batch["shard"].to_pylist(), batch["retry"].to_pylist()
        left_alone = {"shard": shard, "retry": retry, "attempt": 0}
        if not self._may_begin(shard):
            return self._row(left_alone)
        # After `_may_begin`: a shard that is skipped leaves no mark. Before any work: a death must be counted.
        attempts = ShardAttempts(self.plan.output, shard, self.run_id)
        attempts.begin()
        images, places = self._unpack(shard, batch)
        writer = self._embedding_writer(shard, places, retry)
        try:
            done = self._label(images, attempts, functools.partial(self._advance, shard, writer))
        except Abandoned:
            # A cancelled attempt is no evidence against its images.
            attempts.forget()
            return self._row(left_alone)
        except DeviceFault:
            # Re-raised, it would end the job; a dead process is replaced, and the shard is run again.
            logger.exception("the device failed: this labelling process exits, and Ray starts a new one")
            logging.shutdown()
            os._exit(1)
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
                "places": places,
                "rows": to_stream(records_to_table(done.records, self.plan.run)),
                "summary": ShardSummary.of(shard, done).to_json(),
            }
        )

    def _label(
        self, images: list[EncodedImage], attempts: ShardAttempts, on_progress: Callable[[Labelled], None]
    ) -> Labelled:
        if not attempts.careful:
            return self.labeler.label(images, on_progress)
        # A child with a model of its own: this process, and its model, stay as they are.
        alone = LonelyLabeler(self.config, self.make_labeler, self.labeler.decode)
        try:
            return alone.label(images, attempts, on_progress)
        except ChildNotStarted as error:
            raise RuntimeError(
                f"a labelling process on {platform.node()} dies even on a harmless image ({error}): the machine is at"
                " fault; check its memory and driver, then run again"
            ) from error
        finally:
            alone.close()

    def _may_begin(self, shard: int) -> bool:
        try:
            return bool(ray.get(self.state.begin.remote(shard)))
        except ray.exceptions.RayError:
            return True  # without the state actor there is no progress display, but work goes on

    def _embedding_writer(self, shard: int, places: list[int], retry: bool) -> EmbeddingWriter | None:
        """What stores the embeddings of a shard, if the run wants them."""
        if self.config.output.embeddings == "none":
            return None
        level = self.config.output.compression_level
        return EmbeddingWriter(self.plan, shard, places, retry=retry, compression_level=level)

    def _advance(self, shard: int, writer: EmbeddingWriter | None, batch: Labelled) -> None:
        # As they come, and all before the row of the shard is returned: a finished shard has all of its embeddings.
        if writer is not None:
            writer.add(batch.records)
        self.figures.add(batch, self.labeler.num_workers)
        try:
            # Waits for the answer once per group of images: that is how an actor learns that it shall stop.
            keep_on = ray.get(self.state.advance.remote(shard, len(batch.records)))
        except ray.exceptions.RayError:
            return
        if not keep_on:
            raise Abandoned

    def _unpack(self, shard: int, batch: pa.Table) -> tuple[list[EncodedImage], list[int]]:
        # The small columns become Python objects; of the bytes only one image at a time is copied.
        images = batch["images"].combine_chunks().values
        data = images.field("data")
        credentials = json.loads(batch["credentials"].to_pylist()[0] or "{}")
        columns = ("place", "image_id", "file_name", "uri", "reason", "message", "prompts")
        encoded, places = [], []
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
            places.append(index)
        return encoded, places

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
