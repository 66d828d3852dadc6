"""The work of a labelling actor without Ray: encoded images in, one record per image out.

This is the only place that turns an exception into an image's error: whatever a single image causes goes into its row.
A device error is not an image's fault: it is raised, and ends the actor. The file is long because the way of an image,
from bytes to its record, is easier to follow in one place.
"""

from __future__ import annotations

import functools
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from samray.config import InputConfig
from samray.errors import ImageError, StorageError
from samray.inputs.child import ChildNotStarted
from samray.inputs.decode import refuse_size
from samray.inputs.decode_apart import decode_with_geo
from samray.labels.phrases import FoundMasks, distinct
from samray.output.embeddings import make_row
from samray.output.schema import ANNOTATIONS_PER_IMAGE, ImageRecord
from samray.pipeline.faults import DeviceFault, internal_error, is_out_of_memory, one_line, raise_if_fatal
from samray.pipeline.groups import GPU_GROUP_IMAGES, GROUP_PIXELS, GroupSize, OutOfMemoryCount
from samray.pipeline.kept import EmbeddingKeeper, WithEmbedding
from samray.pipeline.metrics import reserved_gpus
from samray.pipeline.report import Labelled
from samray.prompts import Prompt
from samray.rle.records import MaskRecord

if TYPE_CHECKING:
    import torch

    from samray.config import Config, MaskConfig
    from samray.inputs.raster_source import Geo
    from samray.labels.ways import Inputs
    from samray.sam.sam import Sam


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image of a shard from the fetch stage."""

    image_id: int
    file_name: str
    uri: str
    data: bytes | memoryview | np.ndarray | ImageError | Callable[[], bytes | ImageError]
    """Encoded bytes, decoded pixels, an error, or where to fetch the bytes later."""
    prompts: list[Any] | None = None
    """The user prompts for this image, or for `samray name` its masks; None to generate all masks."""
    shard: int | None = None
    """The shard that it is in; None for an image that no plan has."""


Decoded = tuple[EncodedImage, np.ndarray | ImageError]
"""An image and its pixels (H, W, 3) uint8, or an error."""

Work = tuple[np.ndarray, "list[Any] | None"]
"""The pixels of an image, and its prompts."""


class MaskSource(Protocol):
    """The part of samray.masks.MaskGenerator (or PromptedGenerator, for images with prompts) that the labeler needs."""

    @property
    def stage_seconds(self) -> dict[str, float]: ...

    @property
    def generate(self) -> Callable[..., list[Any]]:
        """Called with the images, or with the images and their prompts; gives the masks of each (for edges, a map)."""


class ShardLabeler:
    """Labels images with one model. Not thread-safe; uses threads internally.

    On a CPU several images are labelled in parallel, each by one thread with a separate mask generator: that scales
    better than several threads per image, and the results do not depend on the number of threads. On a GPU one thread
    labels groups of images, and the others decode.
    """

    def __init__(
        self,
        make_generator: Callable[[int | None], MaskSource],
        *,
        max_pixels: int,
        decode_timeout_s: float | None = None,
        bands: tuple[int, ...] | None = None,
        stretch: tuple[float, float] | None = None,
        num_threads: int = 1,
        device_type: str = "cpu",
    ) -> None:
        """make_generator(points_per_batch) creates a mask generator; None leaves the batch size to the generator, a
        number is for retrying an image that ran out of memory. decode_timeout_s: None uses the setting's default."""
        self.make_generator = make_generator
        self.input = InputConfig(max_pixels=max_pixels, bands=bands, stretch=stretch)
        if decode_timeout_s is not None:
            self.input = self.input.model_copy(update={"decode_timeout_s": decode_timeout_s})
        self._geo: dict[int, Geo] = {}  # id of a decoded image without a record -> where it is
        self.device_type = device_type
        self.num_workers = num_threads if device_type == "cpu" else 1
        self.group_size = GroupSize(1 if device_type == "cpu" else GPU_GROUP_IMAGES)
        self.generators = [make_generator(None) for _ in range(self.num_workers)]
        # As many generators as workers: each takes a free one, and none is used by two threads.
        self.free: queue.SimpleQueue[MaskSource] = queue.SimpleQueue()
        for generator in self.generators:
            self.free.put(generator)
        self.workers = ThreadPoolExecutor(self.num_workers, thread_name_prefix="label")
        self.decoders = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self.out_of_memory = OutOfMemoryCount()

    def label(
        self,
        images: Sequence[EncodedImage],
        on_progress: Callable[[Labelled], None] = lambda batch: None,
    ) -> Labelled:
        """One record per image, in order, whatever the images are.

        Raises DeviceFault, StorageError, and what on_progress raises.
        """
        # The generators sum up over their lifetime; a shard's share is the difference.
        before = self.stage_seconds()
        done = Labelled()
        num_ahead = 2 * self.num_workers  # enough to keep workers busy behind a slow image
        pending: deque[Future[Labelled]] = deque()

        def collect(num_left: int) -> None:
            while len(pending) > num_left:
                batch = pending.popleft().result()
                # The oldest first: records stay in the order of the images, whichever worker is faster.
                done.add(batch)
                on_progress(batch)

        try:
            # Submit and collect in turn: an unbounded queue would keep every decoded image of the shard in memory.
            for group in self._groups(images):
                pending.append(self.workers.submit(self._label_group, group))
                collect(num_ahead)
            collect(0)
        finally:
            # A generator is not thread-safe: the next call must not start while a thread of this one still uses it.
            for future in pending:
                future.cancel()
            wait(pending)
        assert len(done.records) == len(images), (len(done.records), len(images))  # rows out = images in
        done.stage_seconds = {k: v - before.get(k, 0.0) for k, v in self.stage_seconds().items()}
        return done

    def stage_seconds(self) -> dict[str, float]:
        """Seconds per stage since the start."""
        total: Counter[str] = Counter()
        for generator in self.generators:
            total.update(generator.stage_seconds)
        return dict(total)

    def _groups(self, images: Sequence[EncodedImage]) -> Iterator[list[Decoded]]:
        """Decoded images, in order; the next ones are decoded while the caller works on these."""
        waiting = deque(images)
        ahead: deque[tuple[EncodedImage, Future[np.ndarray | ImageError]]] = deque()
        group: list[Decoded] = []
        num_pixels = 0
        while waiting or ahead:
            # One more than a group, so that decoding continues while the caller labels the group.
            while waiting and len(ahead) < self.group_size.largest + 1:
                image = waiting.popleft()
                ahead.append((image, self.decoders.submit(self.decode, image)))
            # In order: an image that is slow to decode holds up its group, while those after it are decoded.
            image, future = ahead.popleft()
            decoded = future.result()
            # An image that failed takes a place in its group, to keep the order, but no pixels.
            size = decoded.shape[0] * decoded.shape[1] if isinstance(decoded, np.ndarray) else 0
            if group and (len(group) == self.group_size.largest or num_pixels + size > GROUP_PIXELS):
                yield group
                group, num_pixels = [], 0
            group.append((image, decoded))
            num_pixels += size
        if group:
            yield group

    def decode(self, image: EncodedImage) -> np.ndarray | ImageError:
        """Pixels or an error. Raises only storage errors that affect everything, and DeviceFault."""
        try:
            data = image.data() if callable(image.data) else image.data
            if isinstance(data, np.ndarray):  # in memory already, so only its masks have a limit
                refuse_size((data.shape[1], data.shape[0]), data.size)
            if isinstance(data, ImageError | np.ndarray):
                return data
            pixels, geo = decode_with_geo(data, self.input)
            if geo is not None:
                self._geo[image.image_id] = geo
            return pixels
        except ImageError as error:
            return error
        except StorageError:  # the storage as a whole does not answer: that ends the run
            raise
        except ChildNotStarted as error:  # the machine cannot start processes, for no image
            raise DeviceFault(f"cannot start a decoding process: {error}") from error
        except MemoryError:
            return ImageError("out_of_memory", "the decoded image does not fit into memory")
        except Exception as error:
            return ImageError("unreadable", one_line(error))

    def _label_group(self, group: list[Decoded]) -> Labelled:
        # Without the images that failed to decode, which `next(masks)` below skips in the same order.
        work = [(decoded, image.prompts) for image, decoded in group if isinstance(decoded, np.ndarray)]
        started = time.monotonic()
        generator = self.free.get()
        try:
            masks = iter(self._generate(generator, work))
        finally:
            self.free.put(generator)
        seconds = time.monotonic() - started
        return Labelled(
            device_seconds=seconds,
            records=[self.record(im, d, next(masks) if isinstance(d, np.ndarray) else d) for im, d in group],
            encoded_bytes=sum(len(image.data) for image, _ in group if isinstance(image.data, bytes | memoryview)),
            batch_images=len(work),
            batch_room=self.group_size.room(len(work)),
        )

    def record(self, image: EncodedImage, decoded: np.ndarray | ImageError, result: Any) -> ImageRecord:
        """The row of an image from what its generator returned for it, or from an error; a subclass may store it."""
        return make_record(image, decoded, result, self._geo.pop(image.image_id, None))

    def _generate(self, generator: MaskSource, work: list[Work]) -> list[list[MaskRecord] | ImageError]:
        """Masks or an error for each image. Retries a failing group in smaller groups, to fail only the images at
        fault."""
        answers: list[list[MaskRecord] | ImageError] = []
        while len(answers) < len(work):
            # Cut again each time: the size of a group may have been halved since.
            part = work[len(answers) :][: self.group_size.num_images]
            try:
                answers += masks_of(generator, part)
            except Exception as error:
                raise_if_fatal(error)
                is_memory = is_out_of_memory(error)
                answer = None if is_memory else error if isinstance(error, ImageError) else internal_error(error)
            else:
                self.out_of_memory.fitted()
                self.group_size.fitted(len(part))
                continue
            # After the except block, because the error's frames keep their device memory until then.
            if is_memory and self.device_type == "cuda":
                _empty_cache()
            if len(part) == 1:
                answers.append(self._generate_in_small_batches(part[0]) if answer is None else answer)
            elif is_memory:
                self.group_size.too_large(len(part))
            else:
                # Not memory, so one image is at fault: alone, each gets its own masks or error.
                answers += [result for single in part for result in self._generate(generator, [single])]
        return answers

    def _generate_in_small_batches(self, work: Work) -> list[MaskRecord] | ImageError:
        """Retry an image that did not fit with the usual batch size: use fewer points at a time, then give up."""
        # A new generator for each: its frugal mode also keeps one crop and one mask at a time in memory.
        for points_per_batch in (16, 4, 1):
            if self.device_type == "cuda":
                _empty_cache()
            try:
                masks = masks_of(self.make_generator(points_per_batch), [work])[0]
                self.out_of_memory.fitted()
                return masks
            except Exception as error:
                raise_if_fatal(error)
                if not is_out_of_memory(error):
                    return error if isinstance(error, ImageError) else internal_error(error)
        # May raise instead: after several such images the device is at fault, not the image.
        self.out_of_memory.add()
        height, width = work[0].shape[:2]
        return ImageError("out_of_memory", f"{width}x{height} pixels do not fit, even with one point at a time")


def _empty_cache() -> None:
    import torch

    try:
        torch.cuda.empty_cache()
    except Exception as error:  # a device error that only shows now
        raise DeviceFault(one_line(error)) from error


def masks_of(generator: MaskSource, work: list[Work]) -> list[list[MaskRecord]]:
    """The masks of each image: all, or in a run with prompts the requested ones."""
    # A run has prompts for all of its images or for none.
    images = [pixels for pixels, _ in work]
    prompts = [user_prompts for _, user_prompts in work if user_prompts is not None]
    return generator.generate(images, prompts) if prompts else generator.generate(images)


def make_record(
    image: EncodedImage,
    decoded: np.ndarray | ImageError,
    result: list[MaskRecord] | WithEmbedding | ImageError,
    geo: Geo | None = None,
) -> ImageRecord:
    """The row of one image."""
    height, width = decoded.shape[:2] if isinstance(decoded, np.ndarray) else (0, 0)
    embedding = None
    if isinstance(result, WithEmbedding):
        embedding = make_row(image.image_id, (height, width), result.input_hw, result.maps, result.dtype)
        result = result.masks
    if not isinstance(result, ImageError) and len(result) > ANNOTATIONS_PER_IMAGE:  # thousands of phrases, for example
        embedding = None
        result = ImageError(
            "unsupported",
            f"{len(result):,} masks, and an image has at most {ANNOTATIONS_PER_IMAGE:,}: raise the thresholds, or set"
            " masks.max_masks",
        )
    error = str(result) if isinstance(result, ImageError) else None
    masks = [] if isinstance(result, ImageError) else result
    return ImageRecord(
        image_id=image.image_id,
        width=width,
        height=height,
        file_name=image.file_name,
        uri=image.uri,
        annotations=[{"id": image.image_id * ANNOTATIONS_PER_IMAGE + i, **mask} for i, mask in enumerate(masks)],
        error=error,
        phrases=list(distinct(p for p in image.prompts or () if isinstance(p, Prompt)).values()),
        presence=masks.presence if isinstance(masks, FoundMasks) else None,
        geo=geo,
        embedding=embedding,
    )


MakeLabeler = Callable[["Config", int], ShardLabeler]
"""Called with the settings and the number of threads, in each labelling actor."""


def build_labeler(
    config: Config,
    num_threads: int,
    checkpoint_sha256: str | None = None,
    labels: Inputs | None = None,
    adapter_sha256: str | None = None,
) -> ShardLabeler:
    """Create the labeler of a Ray actor, which generates masks.

    labels: what finding masks with names needs (`samray.labels.ways.read_inputs`); None to find masks without names.
    Raises: as `shard_labeler`; ConfigError if the network of labels cannot be loaded.
    """
    import torch

    from samray.labels.ways import generator_maker
    from samray.masks.generator import MaskGenerator
    from samray.masks.prompted import PromptedGenerator
    from samray.masks.seams import of_one_tile
    from samray.masks.tiling_generator import TilingGenerator

    makers: dict[int, Any] = {}  # what is derived from the example is derived once per model

    def make_generator(model: Sam | torch.device, points_per_batch: int | None) -> MaskSource:
        if labels is not None:
            if id(model) not in makers:
                makers[id(model)] = generator_maker(model, config, labels)
            source: MaskSource = makers[id(model)](points_per_batch)
            return source
        assert not isinstance(model, torch.device)
        masks: MaskConfig = config.masks
        # A given number of points means a retry after running out of memory.
        frugal = points_per_batch is not None
        if frugal:
            masks = masks.model_copy(update={"points_per_batch": points_per_batch})
        if config.input.prompts is not None:
            generator: MaskGenerator | PromptedGenerator = PromptedGenerator(model, masks)
        elif masks.tile is not None:
            of_tile = MaskGenerator(model, of_one_tile(masks), frugal=frugal)
            return TilingGenerator(MaskGenerator(model, masks, frugal=frugal), of_tile)
        else:
            generator = MaskGenerator(model, masks, frugal=frugal)
        return generator if config.output.embeddings == "none" else EmbeddingKeeper(generator, config.output.embeddings)

    return shard_labeler(config, num_threads, checkpoint_sha256, make_generator, adapter_sha256=adapter_sha256)


def shard_labeler(
    config: Config,
    num_threads: int,
    checkpoint_sha256: str | None,
    make_generator: Callable[[Any, int | None], MaskSource],
    make: Callable[..., ShardLabeler] = ShardLabeler,
    adapter_sha256: str | None = None,
) -> ShardLabeler:
    """Create a labeler with the model of config, by default on a GPU that the actor has reserved.

    make_generator(model, points_per_batch), make: create its generators, and the labeler itself. model: the device if
    the run needs no SAM (`LabelsConfig.needs_sam`).
    Raises: ConfigError if weights or adapter do not have these SHA-256, or cannot be loaded.
    """
    import torch

    from samray.sam.checkpoints import choose_device, load_model

    torch.set_num_threads(1)  # each thread labels a separate image, see ShardLabeler
    settings = config.model
    # Ray does not hide GPUs from an actor without a reservation.
    device = "cpu" if settings.device is None and reserved_gpus() == 0 else settings.device
    model: Sam | torch.device
    if config.labels.needs_sam:
        model = load_model(
            settings.name, settings.checkpoint, device, settings.dtype,
            sha256=checkpoint_sha256, adapter=settings.adapter, adapter_sha256=adapter_sha256,
        )  # fmt: skip
    else:
        model = choose_device(device)
    return make(
        functools.partial(make_generator, model),
        max_pixels=config.input.max_pixels,
        decode_timeout_s=config.input.decode_timeout_s,
        bands=config.input.bands,
        stretch=config.input.stretch,
        num_threads=num_threads,
        device_type=model.type if isinstance(model, torch.device) else model.device.type,
    )
