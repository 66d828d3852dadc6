"""Decode in a child process with limits on CPU time and memory.

An image of a few megabytes can take minutes or gigabytes to decode, which this process could not stop. In a child, the
kernel enforces the limits. Pixels come back in shared memory. The memory of small images is reused, because fresh pages
cost more than copying out of it; that of large images is passed to the caller.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import queue
import resource
import signal
import struct
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from samray.errors import ImageError
from samray.inputs import raster_files, tiff
from samray.inputs.child import Answer, Buffer, Child, ChildDied, how_it_ended, is_to_blame
from samray.inputs.decode import RGBArray

if TYPE_CHECKING:
    from samray.config import InputConfig
    from samray.inputs.raster_source import Geo

BASE_BYTES: Final = 512 << 20
BYTES_PER_PIXEL: Final = 64
"""Memory that a decoder may use, in addition to some copies of the file: float64 copies of float32 pixels need most."""

KEPT_BYTES: Final = 16 << 20
"""Maximum shared memory that a decoder keeps for the next image."""

_GEO_BYTES: Final = 3 << 30
"""Address space of GDAL, most of which is never used."""

_SIZE: Final = struct.Struct("<II")


class Decoder:
    """Decodes images in a child, which is started for the first image and again after each death. Not thread-safe."""

    def __init__(self, config: InputConfig) -> None:
        """config: its `max_pixels`, `decode_timeout_s` (CPU seconds per image), `bands` and `stretch`."""
        self.timeout_s = config.decode_timeout_s
        self._setup = setup_of(config)
        self._child: Child | None = None
        self._pixels = PixelsOf()

    def __call__(self, data: Buffer) -> RGBArray:
        """Like `raster_files.decode_image`. Raises ImageError (also timeout and quarantined) and ChildNotStarted."""
        return self.decode_with_geo(data)[0]

    def decode_with_geo(self, data: Buffer) -> tuple[RGBArray, Geo | None]:
        """The pixels, and where a GeoTIFF is."""
        deaths: list[ChildDied] = []
        while not is_to_blame(deaths):
            if self._child is None:
                self._child = Child("samray.inputs.decode_apart:answer_with", self._setup)
            try:
                # On a busy machine the process may wait for the CPU within its CPU time: that is not the image's fault.
                answer = self._child.ask(data, timeout_s=60 + 20 * self.timeout_s)
                return self._pixels(answer), _geo_of(answer)
            except ChildDied as death:
                # The request is sent again to a new child as long as its deaths prove nothing.
                self._child = None
                # The CPU limit was reached: certainly the image's fault, so one death is enough.
                if death.returncode == -signal.SIGXCPU:
                    raise ImageError(
                        "timeout",
                        f"decoding took more than {self.timeout_s:g} seconds of CPU time (input.decode_timeout_s);"
                        " convert the image, or raise the setting",
                    ) from death
                deaths.append(death)
        raise ImageError(
            "quarantined",
            f"decoding only this image ended the process {len(deaths)} times,"
            f" the last time by {how_it_ended(deaths[-1].returncode)}",
        )


class PixelsOf:
    """The parent's side of the memory that it shares with one child (`SharedPixels`)."""

    def __init__(self) -> None:
        self._shared: Any = b""

    def __call__(self, answer: Answer) -> RGBArray:
        """The pixels of an answer, or the ImageError that it is."""
        head, fd = answer
        if head.startswith(b"["):
            raise ImageError(*json.loads(head))
        height, width = _SIZE.unpack_from(head)
        # Without a descriptor the pixels are in the memory that was mapped for an earlier image.
        shared = self._shared
        if fd is not None:
            try:
                shared = mmap.mmap(fd, 0)
            finally:
                # The mapping stays valid without the descriptor.
                os.close(fd)
        pixels = np.frombuffer(shared, np.uint8, height * width * 3).reshape(height, width, 3)
        # Large: the caller gets the mapping itself, and the memory is freed with its array.
        if pixels.nbytes > KEPT_BYTES:
            return pixels
        self._shared = shared
        # Small: a copy, because the child writes the next image into the same memory.
        return pixels.copy()


def _geo_of(answer: Answer) -> Geo | None:
    geo: Geo | None = json.loads(answer[0][_SIZE.size :] or b"null")
    return geo


_idle: dict[tuple[int, bytes], queue.SimpleQueue[Decoder]] = defaultdict(queue.SimpleQueue)


def decode_apart(data: Buffer, config: InputConfig) -> RGBArray:
    """Like `Decoder`, with one that no other thread of this process uses: one decoder per concurrent caller."""
    return decode_with_geo(data, config)[0]


def decode_with_geo(data: Buffer, config: InputConfig) -> tuple[RGBArray, Geo | None]:
    """`decode_apart`, and where a GeoTIFF is."""
    idle = _idle[os.getpid(), setup_of(config)]  # a forked process must not use its parent's decoders
    try:
        decoder = idle.get_nowait()
    except queue.Empty:
        decoder = Decoder(config)
    try:
        return decoder.decode_with_geo(data)
    finally:
        idle.put(decoder)


def setup_of(config: InputConfig) -> bytes:
    """Settings of a child."""
    return json.dumps([config.max_pixels, config.decode_timeout_s, config.bands, config.stretch]).encode()


def answer_with(setup: bytes) -> Callable[[bytes], Answer]:
    """The child's side; see `child.Child`."""
    max_pixels, timeout_s, bands, stretch = json.loads(setup)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    num_bytes = BASE_BYTES + BYTES_PER_PIXEL * max_pixels
    shared = SharedPixels()
    uses_gdal = bands is not None or stretch is not None

    def answer(request: bytes) -> Answer:
        nonlocal uses_gdal
        limit_resource(resource.RLIMIT_CPU, math.ceil(time.process_time() + timeout_s))
        has_geo = tiff.is_tiff(request) and tiff.has_geo(request)
        uses_gdal = uses_gdal or has_geo  # once loaded, it stays
        limit_resource(resource.RLIMIT_AS, num_bytes + (_GEO_BYTES if uses_gdal else 0) + 4 * len(request))
        try:
            pixels = raster_files.decode_image(request, max_pixels, bands, stretch)
            geo = raster_files.geo_of(request) if has_geo else None
            head, fd = shared.answer(pixels)
            return head + (b"" if geo is None else json.dumps(geo).encode()), fd
        except ImageError as error:
            return json.dumps([error.reason, error.message]).encode(), None
        except MemoryError:
            return json.dumps(["out_of_memory", "the decoded image does not fit into memory"]).encode(), None

    return answer


class SharedPixels:
    """The child's side of the memory that it shares with its parent (`PixelsOf`)."""

    def __init__(self) -> None:
        self.buffer: Any = b""

    def answer(self, pixels: RGBArray) -> Answer:
        """The answer that gives these pixels to the parent."""
        return _SIZE.pack(*pixels.shape[:2]), self._put(pixels)

    def _put(self, pixels: RGBArray) -> int | None:
        """Copy the pixels into it. Returns the descriptor of new memory if the present one is too small, else None."""
        buffer, fd = self.buffer, None
        if pixels.nbytes > len(buffer):
            fd = _memory(pixels.nbytes)
            buffer = mmap.mmap(fd, pixels.nbytes)
            if pixels.nbytes <= KEPT_BYTES:
                self.buffer = buffer
        np.frombuffer(buffer, np.uint8, pixels.size)[:] = pixels.reshape(-1)
        return fd


def limit_resource(what: int, value: int) -> None:
    """Set the soft limit, as far as the hard limit allows."""
    hard = resource.getrlimit(what)[1]
    with contextlib.suppress(ValueError, OSError):  # macOS has no address-space limit
        resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _memory(num_bytes: int) -> int:
    """The descriptor of memory that two processes can map."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("samray-pixels")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, num_bytes)
    return fd
