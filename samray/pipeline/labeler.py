"""Encoded images in, one record each out: what a labelling actor does, without Ray.

The one row boundary of the pipeline stands here: whatever one image does wrong becomes its row's error. A fault of the
device is no image's fault; it is raised, and the actor ends with it.
"""

from __future__ import annotations

import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from samray.config import InputConfig
from samray.errors import ImageError, StorageError
from samray.inputs.child import ChildNotStarted
from samray.inputs.decode_apart import decode_apart
from samray.output.schema import ANNOTATIONS_PER_IMAGE, ImageRecord
from samray.pipeline.faults import DeviceFault, internal_error, is_out_of_memory, one_line, raise_if_fatal
from samray.pipeline.groups import GPU_GROUP_IMAGES, GROUP_PIXELS, GroupSize, OutOfMemoryCount
from samray.pipeline.metrics import reserved_gpus
from samray.pipeline.report import Labelled
from samray.rle.records import MaskRecord

if TYPE_CHECKING:
    from samray.config import Config, MaskConfig
    from samray.prompts import Prompt
    from samray.sam.sam import Sam


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image of a shard as the fetch stage hands it over."""

    image_id: int
    file_name: str
    uri: str
    data: bytes | memoryview | np.ndarray | ImageError | Callable[[], bytes | ImageError]
    """Encoded bytes, decoded pixels, why there are none, or where to get the bytes when their turn comes."""
    prompts: list[Prompt] | None = None
    """What masks a person asked for; None where the generator is to find all by itself."""


Decoded = tuple[EncodedImage, np.ndarray | ImageError]
"""An image and its pixels (H, W, 3) uint8, or why there are none."""

Work = tuple[np.ndarray, "list[Prompt] | None"]
"""The pixels of an image, and its prompts."""


class MaskSource(Protocol):
    """What the labeler needs of samray.masks.MaskGenerator or, for images with prompts, PromptedGenerator."""

    stage_seconds: dict[str, float]

    @property
    def generate(self) -> Callable[..., list[list[MaskRecord]]]:
        """Called with the images, or with the images and their prompts."""


class ShardLabeler:
    """Labels images with one model. Call it from one thread at a time; it has threads of its own.

    On a CPU several images are labelled at once, each by one thread with a mask generator of its own: that scales
    better than several threads on one image, and the numbers do not depend on how many there are. On a GPU one thread
    labels groups of images, and the others decode.
    """

    def __init__(
        self,
        make_generator: Callable[[int | None], MaskSource],
        *,
        max_pixels: int,
        decode_timeout_s: float | None = None,
        num_threads: int = 1,
        device_type: str = "cpu",
    ) -> None:
        """make_generator(points_per_batch) gives a mask generator; None leaves the batch to the generator, and a number
        is for an image that took too much memory that way. decode_timeout_s: None takes the setting's default."""
        self.make_generator = make_generator
        self.max_pixels = max_pixels
        self.decode_timeout_s = InputConfig().decode_timeout_s if decode_timeout_s is None else decode_timeout_s
        self.device_type = device_type
        self.num_workers = num_threads if device_type == "cpu" else 1
        self.group_size = GroupSize(1 if device_type == "cpu" else GPU_GROUP_IMAGES)
        self.generators = [make_generator(None) for _ in range(self.num_workers)]
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
        """One record for each image, in their order, whatever the images are like.

        Raises DeviceFault, StorageError, and what on_progress raises.
        """
        before = self._stage_seconds()
        done = Labelled()
        num_ahead = 2 * self.num_workers  # enough that no worker waits for a slow image before its own
        pending: deque[Future[Labelled]] = deque()

        def collect(num_left: int) -> None:
            while len(pending) > num_left:
                batch = pending.popleft().result()
                done.add(batch)
                on_progress(batch)

        try:
            for group in self._groups(images):
                pending.append(self.workers.submit(self._label_group, group))
                collect(num_ahead)
            collect(0)
        finally:
            for future in pending:
                future.cancel()
            wait(pending)
        assert len(done.records) == len(images), (len(done.records), len(images))  # rows out = images in
        done.stage_seconds = {k: v - before.get(k, 0.0) for k, v in self._stage_seconds().items()}
        return done

    def _stage_seconds(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for generator in self.generators:
            total.update(generator.stage_seconds)
        return dict(total)

    def _groups(self, images: Sequence[EncodedImage]) -> Iterator[list[Decoded]]:
        """Decoded images, in order; the next ones are being decoded while the caller works on these."""
        waiting = deque(images)
        ahead: deque[tuple[EncodedImage, Future[np.ndarray | ImageError]]] = deque()
        group: list[Decoded] = []
        num_pixels = 0
        while waiting or ahead:
            while waiting and len(ahead) < self.group_size.largest + 1:
                image = waiting.popleft()
                ahead.append((image, self.decoders.submit(self.decode, image)))
            image, future = ahead.popleft()
            decoded = future.result()
            size = decoded.shape[0] * decoded.shape[1] if isinstance(decoded, np.ndarray) else 0
            if group and (len(group) == self.group_size.largest or num_pixels + size > GROUP_PIXELS):
                yield group
                group, num_pixels = [], 0
            group.append((image, decoded))
            num_pixels += size
        if group:
            yield group

    def decode(self, image: EncodedImage) -> np.ndarray | ImageError:
        """Pixels, or why there are none. Part of the row boundary: only storage that fails as a whole is raised."""
        try:
            data = image.data() if callable(image.data) else image.data
            if isinstance(data, ImageError | np.ndarray):
                return data
            return decode_apart(data, self.max_pixels, self.decode_timeout_s)
        except ImageError as error:
            return error
        except StorageError:
            raise
        except ChildNotStarted as error:
            raise DeviceFault(f"no process for decoding can be started: {error}") from error
        except MemoryError:
            return ImageError("out_of_memory", "the decoded image does not fit into memory")
        except Exception as error:
            return ImageError("unreadable", one_line(error))

    def _label_group(self, group: list[Decoded]) -> Labelled:
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
            records=[make_record(im, d, next(masks) if isinstance(d, np.ndarray) else d) for im, d in group],
            encoded_bytes=sum(len(image.data) for image, _ in group if isinstance(image.data, bytes | memoryview)),
            batch_images=len(work),
            batch_room=self.group_size.room(len(work)),
        )

    def _generate(self, generator: MaskSource, work: list[Work]) -> list[list[MaskRecord] | ImageError]:
        """Masks or an error for each image. A failing group is run again in smaller ones, to fail only the guilty."""
        answers: list[list[MaskRecord] | ImageError] = []
        while len(answers) < len(work):
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
            # Only after the except block, where the error is gone, is what its frames held on the device free again.
            if is_memory and self.device_type == "cuda":
                _empty_cache()
            if len(part) == 1:
                answers.append(self._generate_in_small_batches(part[0]) if answer is None else answer)
            elif is_memory:
                self.group_size.too_large(len(part))
            else:
                answers += [one for each in part for one in self._generate(generator, [each])]
        return answers

    def _generate_in_small_batches(self, work: Work) -> list[MaskRecord] | ImageError:
        """The image alone did not fit with the usual number of points at once: try fewer, then give it up."""
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
        self.out_of_memory.add()
        height, width = work[0].shape[:2]
        return ImageError("out_of_memory", f"{width}x{height} pixels do not fit, even with one point at a time")


def _empty_cache() -> None:
    import torch

    try:
        torch.cuda.empty_cache()
    except Exception as error:  # a fault of the device that shows only now
        raise DeviceFault(one_line(error)) from error


def masks_of(generator: MaskSource, work: list[Work]) -> list[list[MaskRecord]]:
    """The masks of each image: all that there are or, of a run with prompts, those that were asked for."""
    images = [pixels for pixels, _ in work]
    prompts = [own for _, own in work if own is not None]
    return generator.generate(images, prompts) if prompts else generator.generate(images)


def make_record(
    image: EncodedImage, decoded: np.ndarray | ImageError, masks: list[MaskRecord] | ImageError
) -> ImageRecord:
    """The row of one image."""
    height, width = decoded.shape[:2] if isinstance(decoded, np.ndarray) else (0, 0)
    error = str(masks) if isinstance(masks, ImageError) else None
    found = [] if isinstance(masks, ImageError) else masks
    return ImageRecord(
        image_id=image.image_id,
        width=width,
        height=height,
        file_name=image.file_name,
        uri=image.uri,
        annotations=[{"id": image.image_id * ANNOTATIONS_PER_IMAGE + i, **mask} for i, mask in enumerate(found)],
        error=error,
    )


MakeLabeler = Callable[["Config", int], ShardLabeler]
"""Called with the settings and the number of threads, in each labelling actor."""


def build_labeler(config: Config, num_threads: int, checkpoint_sha256: str | None = None) -> ShardLabeler:
    """The labeler of an actor of Ray's: loads the model, where nothing else is set onto a GPU that it has reserved.

    Raises: ConfigError if the weights are not those with checkpoint_sha256, or cannot be loaded.
    """
    import torch

    from samray.masks.generator import MaskGenerator
    from samray.masks.prompted import PromptedGenerator
    from samray.sam.checkpoints import load_model

    torch.set_num_threads(1)  # threads each take an image of their own, see ShardLabeler
    device = config.model.device
    if device is None and reserved_gpus() == 0:
        device = "cpu"  # Ray hides no GPU from an actor that has reserved none
    model: Sam = load_model(
        config.model.name, config.model.checkpoint, device, config.model.dtype, sha256=checkpoint_sha256
    )

    def make_generator(points_per_batch: int | None) -> MaskSource:
        masks: MaskConfig = config.masks
        frugal = points_per_batch is not None
        if frugal:
            masks = masks.model_copy(update={"points_per_batch": points_per_batch})
        if config.input.prompts is not None:
            return PromptedGenerator(model, masks)
        return MaskGenerator(model, masks, frugal=frugal)

    return ShardLabeler(
        make_generator,
        max_pixels=config.input.max_pixels,
        decode_timeout_s=config.input.decode_timeout_s,
        num_threads=num_threads,
        device_type=model.device.type,
    )
