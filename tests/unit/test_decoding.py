"""Decoding in a child: what takes too long or too much ends, what kills the child is blamed only with proof."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from samray.config import InputConfig
from samray.errors import ImageError
from samray.inputs import child
from samray.inputs import decode_apart as decoding
from samray.inputs.child import CRASHES_TO_BLAME, KILLS_TO_BLAME, Answer, Child, ChildDied, ChildNotStarted
from samray.inputs.decode import decode_image
from samray.inputs.decode_apart import Decoder, decode_apart
from tests.support import REPOSITORY

LIMIT = 4_000_000


def limits(max_pixels: int, timeout_s: float = 60.0) -> InputConfig:
    return InputConfig(max_pixels=max_pixels, decode_timeout_s=timeout_s)


def encoded(kind: str = "PNG", size: tuple[int, int] = (48, 32)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


def many_scans(number: int, side: int = 1500) -> bytes:
    """A small progressive JPEG in which one scan comes `number` times."""
    sink = io.BytesIO()
    Image.new("L", (side, side), 77).save(sink, "JPEG", progressive=True)
    data = sink.getvalue()
    scans = [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xda"]
    last = data[scans[-1] : -2]
    return data[:-2] + last * number + data[-2:]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_pixels_are_those_of_decode_image(kind: str) -> None:
    for size in ((48, 32), (500, 300), (3, 5), (2400, 2400), (3, 5)):  # the fourth is not kept
        data = encoded(kind, size)
        pixels = decode_apart(data, limits(6_000_000))
        np.testing.assert_array_equal(pixels, decode_image(data, 6_000_000))
        assert pixels.flags.writeable
        assert pixels.flags.c_contiguous
        first = pixels.copy()
        decode_apart(encoded(kind, (7, 9)), limits(6_000_000))
        np.testing.assert_array_equal(pixels, first)  # the memory that is shared is not the caller's


def test_errors_are_those_of_decode_image_and_the_child_goes_on() -> None:
    for data, limit in ((b"hello", LIMIT), (encoded()[:90], LIMIT), (encoded(), 10), (b"", LIMIT)):
        with pytest.raises(ImageError) as there:
            decode_image(data, limit)
        with pytest.raises(ImageError) as apart:
            decode_apart(data, limits(limit))
        assert str(apart.value) == str(there.value)
    assert decode_apart(encoded(), limits(LIMIT)).shape == (32, 48, 3)


def test_an_image_that_takes_too_long_fails_and_the_next_one_does_not() -> None:
    decoder = Decoder(limits(LIMIT, 1.0))
    data = many_scans(20_000)
    assert len(data) < 3_000_000
    with pytest.raises(ImageError, match=r"more than 1 seconds of CPU time \(input.decode_timeout_s\)") as caught:
        decoder(data)
    assert caught.value.reason == "timeout"
    assert decoder(encoded()).shape == (32, 48, 3)


def test_a_file_that_would_take_all_memory_is_a_failed_image() -> None:
    """An icon that says 16 x 16, and holds a picture that says 13,000 x 13,000 in four channels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 13_000, 13_000, 8, 6, 0, 0, 0))
    picture = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    data = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(picture), 22) + picture
    with pytest.raises(ImageError) as caught:
        Decoder(limits(1_000, 60.0))(data)
    assert caught.value.reason == "out_of_memory"


def _killing(monkeypatch: pytest.MonkeyPatch, times: int, signum: int) -> Callable[[], int]:
    """Let a signal from outside end the child at each of the next requests. Returns how many are left."""
    left = [times]
    ask = Child.ask

    def killed(self: Child, *parts: Any, **options: Any) -> Answer:
        if len(parts[0]) > 100 and left[0]:  # not the setup
            left[0] -= 1
            os.kill(self.pid, signum)
        return ask(self, *parts, **options)

    monkeypatch.setattr(Child, "ask", killed)
    return lambda: left[0]


def test_a_sound_image_outlives_kills_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    left = _killing(monkeypatch, KILLS_TO_BLAME - 1, signal.SIGKILL)
    assert Decoder(limits(LIMIT, 60.0))(encoded()).shape == (32, 48, 3)
    assert left() == 0


@pytest.mark.parametrize(("signum", "times"), [(signal.SIGKILL, KILLS_TO_BLAME), (signal.SIGSEGV, CRASHES_TO_BLAME)])
def test_an_image_at_which_the_child_ends_each_time_is_quarantined(
    monkeypatch: pytest.MonkeyPatch, signum: signal.Signals, times: int
) -> None:
    _killing(monkeypatch, times, signum)
    decoder = Decoder(limits(LIMIT, 60.0))
    with pytest.raises(
        ImageError, match=rf"ended the process {times} times, the last time by signal \d+ \({signum.name}\)"
    ):
        decoder(encoded())
    assert decoder(encoded()).shape == (32, 48, 3)


def test_without_a_child_no_image_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ChildNotStarted):
        Child("samray.inputs.decode_apart:no_such_function", b"")
    monkeypatch.setattr(child.sys, "executable", "/nowhere/python")
    with pytest.raises(ChildNotStarted):
        Decoder(limits(LIMIT, 60.0))(encoded())


def test_a_child_that_gives_no_answer_is_ended() -> None:
    stuck = Child("samray.inputs.decode_apart:answer_with", decoding.setup_of(limits(LIMIT, 600.0)))
    os.kill(stuck.pid, signal.SIGSTOP)
    with pytest.raises(ChildDied) as caught:
        stuck.ask(encoded(), timeout_s=0.2)
    assert caught.value.returncode == -signal.SIGKILL


@pytest.mark.parametrize("busy", [False, True])
def test_a_child_ends_with_its_parent_whatever_it_does(busy: bool, tmp_path: Path) -> None:
    slow = tmp_path / "slow.jpg"
    slow.write_bytes(many_scans(20_000))
    code = f"""
import threading, time
from samray.config import InputConfig
from samray.inputs.decode_apart import Decoder
decoder = Decoder(InputConfig(max_pixels={LIMIT}, decode_timeout_s=600.0))
decoder({encoded()!r})
if {busy}: threading.Thread(target=decoder, args=(open({str(slow)!r}, 'rb').read(),), daemon=True).start()
print(decoder._child.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as parent:
        assert parent.stdout is not None
        process = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    psutil.wait_procs([process], timeout=60)
    assert not process.is_running()


def test_the_child_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; import samray.inputs.decode_apart as _;"
        " print({'torch', 'ray', 'pyarrow', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "set()"
