"""JPEGs that are not decoded by Pillow have the pixels that Pillow gives, and damaged ones its errors."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from samray.errors import ImageError
from samray.inputs import decode
from samray.inputs.decode import decode_image
from samray.inputs.plain_jpeg import decode_plain_jpeg
from samray.scenes.photographs import photograph_files

LIMIT = 10**7


def by_pillow(monkeypatch: pytest.MonkeyPatch, data: bytes) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(decode, "decode_plain_jpeg", lambda data, image: None)
        return outcome(data)


def outcome(data: bytes) -> Any:
    """Pixels, or reason and message of the error."""
    try:
        return decode_image(data, LIMIT)
    except ImageError as error:
        return error.reason, error.message


def is_plain(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return decode_plain_jpeg(data, image) is not None


def same(first: Any, second: Any) -> bool:
    if isinstance(first, tuple) or isinstance(second, tuple):
        return isinstance(first, tuple) and isinstance(second, tuple) and first == second
    return np.array_equal(first, second)


def picture(height: int, width: int) -> np.ndarray:
    """A part of a photograph, with noise, so that all frequencies occur."""
    with Image.open(photograph_files()[0][1]) as image:
        photo = np.asarray(image.convert("RGB"))[:height, :width].astype(np.int64)
    noise = np.random.default_rng(height).integers(-20, 21, photo.shape)
    return np.ascontiguousarray((photo + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
@pytest.mark.parametrize(("height", "width"), [(256, 256), (255, 253), (17, 31), (1, 1), (2, 200)])
def test_the_pixels_are_pillows(monkeypatch: pytest.MonkeyPatch, subsampling: str, height: int, width: int) -> None:
    for quality in (30, 90, 100):
        data = simplejpeg.encode_jpeg(picture(height, width), quality, "RGB", subsampling)
        pixels = decode_image(data, LIMIT)
        assert is_plain(data)
        assert same(pixels, by_pillow(monkeypatch, data))
        assert pixels.flags.c_contiguous
        assert pixels.flags.writeable


@pytest.mark.parametrize("luma", [0x14, 0x41, 0x44, 0x13, 0x31])
def test_rare_subsamplings_are_left_to_pillow(monkeypatch: pytest.MonkeyPatch, luma: int) -> None:
    """simplejpeg has no name for 4:4:1 (0x14), and raised a KeyError: the image failed."""
    data = bytearray(simplejpeg.encode_jpeg(picture(64, 64), 90, "RGB", "444"))
    data[data.index(b"\xff\xc0") + 11] = luma  # horizontal and vertical factor; the scan is then too short
    assert same(outcome(bytes(data)), by_pillow(monkeypatch, bytes(data)))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_progressive_ones_have_pillows_pixels(monkeypatch: pytest.MonkeyPatch, subsampling: int) -> None:
    file = io.BytesIO()
    Image.fromarray(picture(250, 249)).save(file, "JPEG", progressive=True, subsampling=subsampling, optimize=True)
    assert is_plain(file.getvalue())
    assert same(outcome(file.getvalue()), by_pillow(monkeypatch, file.getvalue()))


def test_restart_markers(monkeypatch: pytest.MonkeyPatch) -> None:
    _, encoded = cv2.imencode(".jpg", picture(250, 249), [cv2.IMWRITE_JPEG_RST_INTERVAL, 3])
    assert is_plain(encoded.tobytes())
    assert same(outcome(encoded.tobytes()), by_pillow(monkeypatch, encoded.tobytes()))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours_are_left_to_pillow(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    file = io.BytesIO()
    Image.fromarray(picture(64, 64)).convert(mode).save(file, "JPEG")
    assert not is_plain(file.getvalue())
    assert same(outcome(file.getvalue()), by_pillow(monkeypatch, file.getvalue()))


def test_colours_without_transformation_are_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.fromarray(picture(64, 64)).save(file, "JPEG", keep_rgb=True)
    assert not is_plain(file.getvalue())
    assert same(outcome(file.getvalue()), by_pillow(monkeypatch, file.getvalue()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(monkeypatch: pytest.MonkeyPatch, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(picture(40, 70)).save(file, "JPEG", exif=exif)
    pixels = decode_image(file.getvalue(), LIMIT)
    assert pixels.shape == ((40, 70, 3) if orientation < 5 else (70, 40, 3))
    assert same(pixels, by_pillow(monkeypatch, file.getvalue()))


def test_a_second_frame_with_another_size_is_not_decoded() -> None:
    data = simplejpeg.encode_jpeg(picture(64, 64), 90, "RGB", "420")
    at = data.index(b"\xff\xc0")
    frame = bytearray(data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")])
    frame[5:9] = bytes([0x10, 0, 0x10, 0])  # 4,096 x 4,096
    for twice in (
        data[:at] + bytes(frame) + data[at:],
        data[: at + len(frame)] + bytes(frame) + data[at + len(frame) :],
    ):
        with Image.open(io.BytesIO(twice)) as image:
            assert decode_plain_jpeg(twice, image) is None


@pytest.mark.parametrize("is_progressive", [False, True])
def test_damaged_ones_end_as_they_do_with_pillow(monkeypatch: pytest.MonkeyPatch, is_progressive: bool) -> None:
    file = io.BytesIO()
    Image.fromarray(picture(100, 120)).save(file, "JPEG", progressive=is_progressive)
    data, rng = file.getvalue(), np.random.default_rng(1)
    plain = 0
    for number in range(400):
        damaged = bytearray(data)
        if number % 4 == 0:
            damaged = damaged[: int(rng.integers(2, len(data)))]
        for _ in range(int(rng.integers(1, 4)) if number % 4 else 0):
            damaged[int(rng.integers(2, len(data)))] = int(rng.integers(0, 256))
        assert same(outcome(bytes(damaged)), by_pillow(monkeypatch, bytes(damaged))), number
        try:
            plain += is_plain(bytes(damaged))
        except (OSError, SyntaxError):
            continue
    assert 0 < plain < 400
