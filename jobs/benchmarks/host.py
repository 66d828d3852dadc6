"""`jobs/benchmark.py host`: what an image costs the host of a GPU, with the device's work taken out.

The embedded model runs on a stand-in for the device (`device_standin`), so that samray takes the code paths of a GPU
and makes real masks. Milliseconds are CPU time of the labelling thread without the operations on the device; the share
under the interpreter lock is sampled by another process (`lock_watch`). Kernels are counted, but not launched.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

import samray
from jobs.benchmarks.compare import photographs, typical_settings
from jobs.benchmarks.device_standin import DeviceStandIn, seconds_to_enter, to_device
from jobs.benchmarks.lock_watch import LockWatch
from samray.config import InputConfig
from samray.inputs.decode import decode_image
from samray.inputs.decode_apart import Decoder
from samray.output.schema import ImageRecord, records_to_table
from samray.output.shards import shard_bytes
from samray.sam.sam import Sam
from samray.storage.tables import to_stream

T = TypeVar("T")

CHILD = "decode, in the child"
ACTOR = ("read", "hand over pixels", "preprocess", "encode", "decode", "score", "nms", "run lengths", "records", "glue")
WRITE = ("rows", "shard")
_STAGES = [CHILD, *ACTOR, *WRITE, "device", "a loop", "a hash"]
_ROWS = 64


class _Clock:
    """CPU milliseconds per stage, without those of stages inside of it and of the device."""

    def __init__(self, watch: LockWatch) -> None:
        self.watch = watch
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.operations: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.syncs: dict[str, Counter[str]] = {}
        self._has_runs = False
        self.device = DeviceStandIn(time.thread_time, lambda: watch.stage("device"))

    @contextmanager
    def stage(self, name: str, *, queued: bool = False) -> Iterator[None]:
        if name == "rle":  # twice per image: run lengths, then records with COCO's strings
            self._has_runs = not self._has_runs
            name = "run lengths" if self._has_runs else "records"
        device, kernels, syncs = self.device.seconds, self.device.kernels, self.device.syncs.copy()
        operations, inner_operations = self.device.operations, sum(self.operations.values())
        inner = sum(self.seconds.values())
        with self.watch.stage(name):
            start = time.thread_time()
            yield
            spent = time.thread_time() - start
        inner_operations = sum(self.operations.values()) - inner_operations
        self.operations[name] += self.device.operations - operations - inner_operations
        self.kernels[name] += self.device.kernels - kernels
        self.syncs.setdefault(name, Counter()).update(self.device.syncs - syncs)
        inner = sum(self.seconds.values()) - inner
        self.seconds[name] += spent - inner - (self.device.seconds - device)

    def timed(self, name: str, body: Callable[..., T], *arguments: Any) -> T:
        with self.stage(name):
            return body(*arguments)


class _Generator(samray.MaskGenerator):
    """Counts by the benchmark's clock, and finishes images in the same thread."""

    def __init__(self, model: Sam, config: samray.MaskConfig, clock: _Clock) -> None:
        super().__init__(model, config)
        self.overlaps = False
        self._stage = clock.stage


def host(
    photos: Path, image_hw: tuple[int, int], num_images: int, points: int, points_per_batch: int
) -> dict[str, Any]:
    """Milliseconds per image, by stage, of photographs scaled to one size, with about 100 masks each.

    Thresholds are chosen for each photograph: a third of the candidates passes the IoU filter, about 100 masks stay. By
    default four batches of prompts, as with 32x32 points on a large GPU, but of 64: the CPU stands in for the device.
    """
    torch.set_num_threads(1)
    decoder = Decoder(InputConfig())
    with LockWatch(_STAGES) as watch:
        clock = _Clock(watch)
        _image(0, next(photographs(photos, (300, 450), 1)), 4, points_per_batch, clock, decoder)  # warms up
        for counts in (clock.seconds, clock.operations, clock.kernels, clock.syncs):
            counts.clear()
        images = photographs(photos, (image_hw[0], image_hw[1]), num_images)
        rows = [_image(i, image, points, points_per_batch, clock, decoder) for i, image in enumerate(images)]
        _write(rows, clock)
        clock.timed("a loop", _loop)
        clock.timed("a hash", hashlib.sha256, bytes(1 << 27))
    per_image = {name: clock.seconds[name] * 1000 / len(rows) for name in (CHILD, *ACTOR)}
    per_image |= {name: clock.seconds[name] * 1000 / _ROWS for name in WRITE}
    # The way to the stand-in is under the lock, and is not samray's.
    to_enter = {name: 1000 * seconds_to_enter() * clock.operations[name] / len(rows) for name in ACTOR}
    under_lock = {name: max(per_image[name] * watch.share(name) - to_enter[name], 0.0) for name in ACTOR}
    per_image |= {name: max(per_image[name] - ms, 0.0) for name, ms in to_enter.items()}
    masks = sum(len(row.annotations) for row in rows) / len(rows)
    of_masks = sum(per_image[name] for name in ("run lengths", "records", *WRITE))
    return {
        "images": len(rows),
        "image_hw": list(image_hw),
        "masks_per_image": masks,
        "cpu_ms_per_image": per_image,
        "stand_in_ms_per_image_left_out": to_enter,
        "under_the_lock_ms_per_image": under_lock,
        "samples": {name: sum(watch.samples[name]) for name in per_image},
        "share_under_the_lock_of_a_loop_and_of_a_hash": [watch.share("a loop"), watch.share("a hash")],
        "actor_ms_per_image": sum(per_image[name] for name in ACTOR),
        "actor_under_the_lock_ms_per_image": sum(under_lock.values()),
        "all_ms_per_image": sum(per_image.values()),
        "ms_per_mask_after_filters": of_masks / masks if masks else None,
        "kernels_per_image": {name: number / len(rows) for name, number in clock.kernels.items() if number},
        "synchronisations_per_image": {
            name: {kind: number / len(rows) for kind, number in counts.items()}
            for name, counts in clock.syncs.items()
            if counts
        },
    }


def _image(number: int, image: Any, points: int, points_per_batch: int, clock: _Clock, decoder: Decoder) -> ImageRecord:
    """The row of an image, from its file on."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    data = clock.timed("read", file.getvalue)
    clock.timed(CHILD, decode_image, data, InputConfig().max_pixels)
    pixels = clock.timed("hand over pixels", decoder, data)
    masks = _label(pixels, points, points_per_batch, clock)
    name = f"{number}.jpg"
    height, width = image.shape[:2]
    return ImageRecord(image_id=number, height=height, width=width, file_name=name, uri=name, annotations=masks)


def _loop() -> None:
    for _ in range(5_000_000):
        pass


def _label(image: Any, points: int, points_per_batch: int, clock: _Clock) -> list[Any]:
    """Masks of an image on the stand-in."""
    model = samray.load_model("tiny", None, "cpu", "float32")
    settings: dict[str, Any] = {**typical_settings(model, image, points), "points_per_side": points}
    config = samray.MaskConfig(points_per_batch=points_per_batch, **settings)
    with torch.inference_mode(), clock.device:
        to_device(model)
        generator = _Generator(model, config, clock)
        model.resize(image)  # the first image of a size is resized by Pillow
        masks: list[list[Any]] = clock.timed("glue", generator.generate, [image])
    return masks[0]


def _write(rows: list[ImageRecord], clock: _Clock) -> None:
    """Rows of a shard as Arrow, then as Parquet."""
    many = [rows[number % len(rows)] for number in range(_ROWS)]
    run: dict[str, Any] = {}
    table = records_to_table(many, run)
    clock.timed("rows", lambda: to_stream(records_to_table(many, run)))
    clock.timed("shard", shard_bytes, table)
