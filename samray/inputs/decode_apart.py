"""Decoding in a process of its own, with limits on CPU time and memory.

A picture of a few megabytes may take minutes or gigabytes to decode, and nothing in this process could stop that. In a
child the kernel does. Pixels come back in shared memory. That of small images is kept, as fresh pages cost more than
copying out of it; that of large ones goes to the caller as it is.
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
from typing import Any, Final

import numpy as np

from samray.errors import ImageError
from samray.inputs.child import Answer, Buffer, Child, ChildDied, how_it_ended, is_to_blame
from samray.inputs.decode import RGBArray, decode_image

BASE_BYTES: Final = 512 << 20
BYTES_PER_PIXEL: Final = 64
"""Memory that a decoder may take, beside some copies of the file: float64 copies of float32 pixels need most."""

KEPT_BYTES: Final = 16 << 20
"""Largest shared memory that a decoder keeps for the next image."""

_SETUP: Final = struct.Struct("<Qd")
_SIZE: Final = struct.Struct("<II")


class Decoder:
    """Decodes images in a child, which is started with the first image and again after each death. One thread at a
    time."""

    def __init__(self, max_pixels: int, timeout_s: float) -> None:
        """timeout_s: seconds of CPU time for one image."""
        self.max_pixels = max_pixels
        self.timeout_s = timeout_s
        self._child: Child | None = None
        self._shared: Any = b""

    def __call__(self, data: Buffer) -> RGBArray:
        """As `decode_image`. Raises ImageError, with the reasons timeout and quarantined too, and ChildNotStarted."""
        deaths: list[ChildDied] = []
        while not is_to_blame(deaths):
            if self._child is None:
                self._child = Child(
                    "samray.inputs.decode_apart:answer_with", _SETUP.pack(self.max_pixels, self.timeout_s)
                )
            try:
                # A process that has the CPU time but not the CPU waits for it: that is not the image's fault.
                return self._pixels(self._child.ask(data, timeout_s=60 + 20 * self.timeout_s))
            except ChildDied as death:
                self._child = None
                if death.returncode == -signal.SIGXCPU:
                    raise ImageError(
                        "timeout",
                        f"decoding took more than {self.timeout_s:g} seconds of CPU time (input.decode_timeout_s);"
                        " convert the image, or raise the setting",
                    ) from death
                deaths.append(death)
        raise ImageError(
            "quarantined",
            f"decoding this image, alone, ended the process {len(deaths)} times,"
            f" at last by {how_it_ended(deaths[-1].returncode)}",
        )

    def _pixels(self, answer: Answer) -> RGBArray:
        head, fd = answer
        if head.startswith(b"["):
            raise ImageError(*json.loads(head))
        height, width = _SIZE.unpack(head)
        shared = self._shared
        if fd is not None:
            try:
                shared = mmap.mmap(fd, 0)
            finally:
                os.close(fd)
        pixels = np.frombuffer(shared, np.uint8, height * width * 3).reshape(height, width, 3)
        if pixels.nbytes > KEPT_BYTES:
            return pixels
        self._shared = shared
        return pixels.copy()


_idle: dict[tuple[int, int, float], queue.SimpleQueue[Decoder]] = defaultdict(queue.SimpleQueue)


def decode_apart(data: Buffer, max_pixels: int, timeout_s: float) -> RGBArray:
    """As `Decoder`, with one that no other thread of this process uses; there are as many as threads call at once."""
    idle = _idle[os.getpid(), max_pixels, timeout_s]  # a forked process leaves its parent's decoders alone
    try:
        decoder = idle.get_nowait()
    except queue.Empty:
        decoder = Decoder(max_pixels, timeout_s)
    try:
        return decoder(data)
    finally:
        idle.put(decoder)


def answer_with(setup: bytes) -> Callable[[bytes], Answer]:
    """The child's side, see `child.Child`."""
    max_pixels, timeout_s = _SETUP.unpack(setup)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    num_bytes = BASE_BYTES + BYTES_PER_PIXEL * max_pixels
    shared = _Shared()

    def answer(request: bytes) -> Answer:
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + timeout_s))
        _limit(resource.RLIMIT_AS, num_bytes + 4 * len(request))
        try:
            pixels = decode_image(request, max_pixels)
            fd = shared.put(pixels)
            return _SIZE.pack(*pixels.shape[:2]), fd
        except ImageError as error:
            return json.dumps([error.reason, error.message]).encode(), None
        except MemoryError:
            return json.dumps(["out_of_memory", "the decoded image does not fit into memory"]).encode(), None

    return answer


class _Shared:
    """Memory that both processes see."""

    def __init__(self) -> None:
        self.buffer: Any = b""

    def put(self, pixels: RGBArray) -> int | None:
        """Copy the pixels there. Returns the descriptor of new memory if what is kept is too small, else None."""
        buffer, fd = self.buffer, None
        if pixels.nbytes > len(buffer):
            fd = _memory(pixels.nbytes)
            buffer = mmap.mmap(fd, pixels.nbytes)
            if pixels.nbytes <= KEPT_BYTES:
                self.buffer = buffer
        np.frombuffer(buffer, np.uint8, pixels.size)[:] = pixels.reshape(-1)
        return fd


def _limit(what: int, value: int) -> None:
    """Set the soft limit, as far as the hard limit allows."""
    hard = resource.getrlimit(what)[1]
    with contextlib.suppress(ValueError, OSError):  # macOS has no limit of the address space
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
