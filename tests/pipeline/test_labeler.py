"""The labeler without Ray: the row boundary, memory that runs out, devices that fail, the poison guard."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from samray.config import load_config
from samray.errors import ImageError, StorageError
from samray.output.schema import ANNOTATIONS_PER_IMAGE
from samray.pipeline import labeler
from samray.pipeline.attempts import CAREFUL_FROM_ATTEMPT, STRIKES_TO_BLAME, ShardAttempts
from samray.pipeline.faults import DeviceFault, is_out_of_memory, raise_if_fatal
from samray.pipeline.groups import MAX_CONSECUTIVE_OUT_OF_MEMORY
from samray.pipeline.labeler import EncodedImage, ShardLabeler
from samray.pipeline.report import Labelled
from samray.sam import checkpoints
from tests.support import standin

AcceleratorError: type[Exception] = getattr(torch, "AcceleratorError", RuntimeError)  # torch 2.6 has none yet
Pixels = NDArray[np.uint8]
Generate = Callable[[list[Pixels]], list[list[dict[str, Any]]]]


class Fake:
    """A mask generator that returns or raises what the test gave it."""

    def __init__(self, generate: Generate) -> None:
        self.generate = generate
        self.stage_seconds = {"decode": 0.0}


def _labeler(generate: Generate, **options: Any) -> ShardLabeler:
    return ShardLabeler(lambda points_per_batch: Fake(generate), max_pixels=10_000, **options)


def _image(seed: int, data: Any = None) -> EncodedImage:
    data = standin.make_image(seed) if data is None else data
    return EncodedImage(image_id=seed, file_name=f"{seed}.png", uri=f"/in/{seed}.png", data=data)


def _masks(images: list[Pixels]) -> list[list[dict[str, Any]]]:
    return [standin.masks_of(image) for image in images]


def test_more_masks_than_there_are_ids_fail_their_image_alone() -> None:
    """Ten thousand phrases and a low threshold may find them; the ids of the next image begin after 65,536."""
    many = [standin.masks_of(np.full((9, 9, 3), 200, np.uint8))[0]] * (ANNOTATIONS_PER_IMAGE + 1)
    masks = [many, many[1:]]
    first, second = _labeler(lambda images: [masks.pop(0) for _ in images]).label([_image(0), _image(1)]).records
    assert first.error == (
        "unsupported: 65,537 masks, and an image has at most 65,536: raise the thresholds, or set masks.max_masks"
    )
    assert (first.annotations, len(second.annotations), second.error) == ([], ANNOTATIONS_PER_IMAGE, None)


@pytest.mark.parametrize("options", [{}, {"num_threads": 3}, {"device_type": "cuda", "num_threads": 2}])
def test_records_are_in_order_whichever_is_faster(options: dict[str, Any]) -> None:
    def generate(images: list[Pixels]) -> list[list[dict[str, Any]]]:
        time.sleep(0.01 * int(images[0][0, 0, 0] % 3))
        return _masks(images)

    seen: list[Labelled] = []
    images = [_image(i, b"junk" if i == 4 else None) for i in range(20)]
    done = _labeler(generate, **options).label(images, on_progress=seen.append)

    assert [record.image_id for record in done.records] == list(range(20))
    assert [i for i, record in enumerate(done.records) if record.error] == [4]
    assert [record for batch in seen for record in batch.records] == done.records
    assert (done.batch_images, done.encoded_bytes) == (19, sum(len(image.data) for image in images))
    assert done.device_seconds == sum(batch.device_seconds for batch in seen)
    num_batches = sum(batch.batch_images > 0 for batch in seen)
    assert done.batch_room == num_batches * (16 if "device_type" in options else 1)
    assert done.records[7].annotations[1]["id"] == 7 * 65536 + 1


def test_each_fault_of_an_image_is_its_own_row() -> None:
    def generate(images: list[Pixels]) -> list[list[dict[str, Any]]]:
        if any(image.shape == (5, 5, 3) for image in images):
            raise ValueError("a bug that this image\nbrings to light")
        return _masks(images)

    images = [
        _image(0),
        _image(1, ImageError("missing", "no such file")),
        _image(2, b""),
        _image(3, standin.make_image(3, (5, 5))),
        _image(4, standin.make_image(4, (200, 200))),
        _image(5, lambda: ImageError("unreadable", "later")),
        _image(6, lambda: standin.make_image(6)),
        _image(7, np.zeros((8, 8, 3), np.uint8)),
    ]
    records = _labeler(generate, device_type="cuda").label(images).records

    reasons = [record.error and record.error.partition(":")[0] for record in records]
    assert reasons == [None, "missing", "empty", "internal", "too_large", "unreadable", None, None]
    assert records[3].error == "internal: ValueError: a bug that this image brings to light"
    assert (records[3].width, records[3].height) == (5, 5)
    assert all(not record.annotations for record in records if record.error)


def test_out_of_memory_of_a_group_is_cured_by_smaller_ones_and_then_fails_only_the_guilty() -> None:
    sizes: list[int] = []

    def generate(images: list[Pixels]) -> list[list[dict[str, Any]]]:
        sizes.append(len(images))
        if len(images) > 1 or images[0].shape[0] == 50:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return _masks(images)

    images = [_image(0), _image(1, standin.make_image(1, (50, 50))), _image(2)]
    records = _labeler(generate, device_type="cuda").label(images).records

    assert [record.error is None for record in records] == [True, False, True]
    assert records[1].error is not None
    assert records[1].error.startswith("out_of_memory: ")
    assert sizes[0] == 3


def test_groups_follow_the_memory_there_is() -> None:
    sizes: list[int] = []
    room = 5

    def generate(images: list[Pixels]) -> list[list[dict[str, Any]]]:
        sizes.append(len(images))
        time.sleep(0.01)  # the next groups are made during this, from what is known so far
        if len(images) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return _masks(images)

    labeler = _labeler(generate, device_type="cuda")
    images = [_image(i) for i in range(64)]
    assert all(record.error is None for record in labeler.label(images).records)
    assert sizes[:3] == [16, 8, 4]  # the group that did not fit is halved until it does
    assert set(sizes[3:]) <= {4, 8}  # the next ones begin at what did
    assert sizes.count(16) == 1

    room = 16
    sizes.clear()
    assert all(record.error is None for record in labeler.label(images * 3).records)
    assert 16 in sizes  # and grow again


def test_a_second_try_finds_the_memory_of_the_first_one_free() -> None:
    pixels_of_tries: list[weakref.ref[Pixels]] = []

    def generate(images: list[Pixels]) -> list[list[dict[str, Any]]]:
        assert all(ref() is None for ref in pixels_of_tries)
        activations = np.zeros(10, np.uint8)
        pixels_of_tries.append(weakref.ref(activations))
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return _masks(images)

    records = _labeler(generate, device_type="cuda").label([_image(i) for i in range(4)]).records
    assert [record.error for record in records] == [None] * 4


def test_fewer_points_at_once_before_an_image_is_given_up() -> None:
    def make(points_per_batch: int | None) -> Fake:
        def generate(images: list[Pixels]) -> list[list[dict[str, Any]]]:
            if points_per_batch is None or points_per_batch > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return _masks(images)

        return Fake(generate)

    (record,) = ShardLabeler(make, max_pixels=10_000).label([_image(0)]).records
    assert record.error is None
    assert record.annotations


def test_out_of_memory_at_every_image_is_the_devices_fault() -> None:
    def generate(images: list[Pixels]) -> list[list[dict[str, Any]]]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    labeler = _labeler(generate)
    with pytest.raises(DeviceFault, match="in a row"):
        labeler.label([_image(i) for i in range(MAX_CONSECUTIVE_OUT_OF_MEMORY + 1)])


@pytest.mark.parametrize("error", [AcceleratorError("CUDA error: x"), RuntimeError("CUDA error: illegal access")])
def test_a_fault_of_the_device_is_no_row(error: Exception) -> None:
    def generate(images: list[Pixels]) -> list[list[dict[str, Any]]]:
        raise error

    with pytest.raises(DeviceFault, match="CUDA error"):
        _labeler(generate).label([_image(0), _image(1)])


def test_storage_that_fails_as_a_whole_is_no_row() -> None:
    def fetch() -> bytes:
        raise StorageError("the bucket is away")

    with pytest.raises(StorageError):
        _labeler(_masks).label([_image(0, fetch)])


def test_the_first_attempts_run_at_full_speed_and_marks_go_with_their_shard(tmp_path: Path) -> None:
    output, folder = str(tmp_path), tmp_path / "_samray" / "attempts"
    for number in range(1, CAREFUL_FROM_ATTEMPT + 1):
        attempts = ShardAttempts(output, 12, "run")
        attempts.begin()
        assert attempts.number == number
        assert attempts.careful == (number == CAREFUL_FROM_ATTEMPT)
    attempts.mark(1)
    assert "shard-000012.image-00001.run.3" in {p.name for p in folder.iterdir()}
    attempts.unmark(1)
    assert not [p.name for p in folder.iterdir() if "image" in p.name]

    other = ShardAttempts(output, 13, "run")
    other.begin()
    attempts.clear()
    assert [p.name for p in folder.iterdir()] == ["shard-000013.attempt-0001"]


@pytest.mark.parametrize("runs", [["run"], ["run", "again", "and-again"]])
def test_an_image_is_blamed_only_when_attempt_after_attempt_died_at_it(tmp_path: Path, runs: list[str]) -> None:
    """kill -9 of the driver, and of a node, leaves the same marks as a poisonous image, so it takes many of them."""
    for number in range(CAREFUL_FROM_ATTEMPT - 1 + STRIKES_TO_BLAME):
        attempts = ShardAttempts(str(tmp_path), 0, runs[number % len(runs)])
        attempts.begin()
        assert not attempts.is_poison(1)
        if attempts.careful:
            attempts.mark(1)

    attempts = ShardAttempts(str(tmp_path), 0, "run")
    attempts.begin()
    assert attempts.is_poison(1)
    assert not attempts.is_poison(0)


def test_an_attempt_that_was_called_off_does_not_count(tmp_path: Path) -> None:
    for _ in range(5):
        attempts = ShardAttempts(str(tmp_path), 0, "run")
        attempts.begin()
        attempts.forget()
    assert attempts.number == 1


def test_an_images_own_error_is_told_also_when_memory_is_short() -> None:
    def make(points_per_batch: int | None) -> Fake:
        def generate(images: list[Pixels]) -> list[list[dict[str, Any]]]:
            if points_per_batch is None:
                raise torch.OutOfMemoryError("CUDA out of memory")
            raise ImageError("bad_prompt", "prompts[0] lies beside the image")

        return Fake(generate)

    (record,) = ShardLabeler(make, max_pixels=10_000).label([_image(0)]).records
    assert record.error == "bad_prompt: prompts[0] lies beside the image"


def test_a_fault_that_shows_when_memory_is_given_back_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(images: list[Pixels]) -> list[list[dict[str, Any]]]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def lost() -> None:
        raise AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    with pytest.raises(DeviceFault, match="illegal memory access"):
        _labeler(generate, device_type="cuda").label([_image(0), _image(1)])


@pytest.mark.parametrize(
    ("error", "is_memory", "is_fatal"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True, False),
        (AcceleratorError("CUDA error: out of memory"), True, False),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True, False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True, False),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True, False),
        (MemoryError(), True, False),
        (AcceleratorError("CUDA error: unspecified launch failure"), False, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False, True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False, True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False, True),
        (RuntimeError("shape '[3]' is invalid for input of size 4"), False, False),
        (ValueError("out of memory"), False, False),
    ],
)
def test_whose_fault_it_is(error: Exception, is_memory: bool, is_fatal: bool) -> None:
    assert is_out_of_memory(error) == is_memory
    with pytest.raises(DeviceFault) if is_fatal else contextlib.nullcontext():
        raise_if_fatal(error)


def test_an_actor_takes_a_gpu_only_where_it_has_reserved_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loaded(Exception):
        pass

    def load(name: str, checkpoint: str | None, device: str | None, dtype: str, **options: object) -> None:
        raise Loaded(device)

    monkeypatch.setattr(checkpoints, "load_model", load)
    for gpus, asked, expected in (
        (0.0, None, "cpu"),
        (0.5, None, None),
        (0.0, "cuda:1", "cuda:1"),
        (1.0, "cpu", "cpu"),
    ):
        monkeypatch.setattr(labeler, "reserved_gpus", lambda gpus=gpus: gpus)
        config = load_config(None, None, [] if asked is None else [f"model.device={asked}"])
        with pytest.raises(Loaded) as caught:
            labeler.build_labeler(config, 1)
        assert caught.value.args == (expected,)
