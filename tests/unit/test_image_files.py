"""Files that are not what their name says, hold several pictures, or are of a kind that is not decoded."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from samray.errors import ImageError
from samray.inputs.decode import decode_image, is_of_size
from tests.support.tiffs import Tags, colour, tiff

LIMIT = 100_000_000
THUMBNAIL, FULL = colour((128, 32, 32), 16, 12), colour((16, 144, 16), 160, 120)
REDUCED: Tags = {254: 1}


def error_of(data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(data, LIMIT)
    return caught.value


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    sink = io.BytesIO()
    (image or Image.linear_gradient("L").resize((48, 32)).convert("RGB")).save(sink, kind, **options)
    return sink.getvalue()


# --- several pictures in a TIFF ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        tiff((THUMBNAIL, REDUCED), (FULL, {})),
        tiff((THUMBNAIL, {255: 2}), (FULL, {})),
        tiff((THUMBNAIL, REDUCED), subs=((FULL, {}),)),
        tiff((THUMBNAIL, REDUCED), subs=((colour((0, 0, 9), 40, 30), REDUCED), (FULL, {}))),
        tiff((THUMBNAIL, {254: 5}), (colour((9, 9, 9), 8, 8), {}), (FULL, {})),
        tiff((FULL, {}), (THUMBNAIL, REDUCED)),
        tiff((FULL, {}), (colour((0, 0, 9), 320, 240), {})),  # pages: the first is taken, as ever
    ],
)
def test_a_tiff_whose_first_picture_is_a_thumbnail_gives_the_full_picture(data: bytes) -> None:
    np.testing.assert_array_equal(decode_image(data, LIMIT), FULL)
    assert is_of_size(data, 160, 120)


@pytest.mark.parametrize(
    "data",
    [
        tiff((THUMBNAIL, REDUCED | {50706: 1025}), subs=((FULL, {}),)),
        tiff((THUMBNAIL, REDUCED), subs=((FULL[..., 0].astype(np.uint16), {262: 32803}),)),
        tiff((THUMBNAIL, REDUCED), subs=((FULL, {262: 34892}),)),
        tiff((THUMBNAIL, {}), (FULL[..., 0], {259: 34713})),
        tiff((FULL[..., 0].astype(np.uint16), {262: 32803})),
        b"II*\0\x10\0\0\0CR\x02\0" + bytes(400),
        b"FUJIFILMCCD-RAW 0201",
        b"IIRO\x08\0\0\0",
        b"\0\0\0\x18ftypcrx \0\0\0\x01",
    ],
)
def test_raw_camera_files_are_not_labelled_by_their_thumbnail(data: bytes) -> None:
    error = error_of(data)
    assert error.reason == "unsupported"
    assert "raw camera file" in error.message
    assert "develop" in error.message


def test_directories_in_a_circle_and_out_of_the_file_end() -> None:
    circle = bytearray(tiff((THUMBNAIL, REDUCED)))
    (first,) = struct.unpack_from("<I", circle, 4)
    struct.pack_into("<I", circle, len(circle) - 4, first)
    np.testing.assert_array_equal(decode_image(bytes(circle), LIMIT), THUMBNAIL)
    struct.pack_into("<I", circle, len(circle) - 4, 2**32 - 2)
    np.testing.assert_array_equal(decode_image(bytes(circle), LIMIT), THUMBNAIL)


# --- samples of a TIFF ---------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 65535, 40 * 24).reshape(24, 40).astype(np.uint16)


@pytest.mark.parametrize(
    ("pixels", "tags", "ends"),
    [
        ((RAMP >> 8).astype(np.uint8), {262: 0}, (255, 0)),
        (RAMP, {262: 0}, (255, 0)),
        (RAMP, {262: 1}, (0, 255)),
        (RAMP.astype(np.uint32) * 65537, {}, (0, 255)),
        (RAMP.astype(np.uint32), {}, (0, 255)),
        ((RAMP.astype(np.int64) * 65537 - 2**31).astype(np.int32), {}, (0, 255)),
        ((RAMP.astype(np.int32) - 32768).astype(np.int16), {}, (0, 255)),
        (((RAMP >> 8).astype(np.int16) - 128).astype(np.int8), {}, (0, 255)),
        ((RAMP / 65535).astype(np.float32), {262: 0}, (255, 0)),
    ],
)
def test_deep_grey(pixels: np.ndarray, tags: Tags, ends: tuple[int, int]) -> None:
    grey = decode_image(tiff((pixels, tags)), LIMIT)[..., 0].astype(int)
    assert (grey[0, 0], grey[-1, -1]) == ends
    steps = np.diff(grey.ravel())
    assert (steps >= 0).all() if ends == (0, 255) else (steps <= 0).all()
    assert abs(grey.mean() - 127.5) < 2


@pytest.mark.parametrize(
    ("pixels", "tags", "words"),
    [
        (np.stack([RAMP] * 5, 2), {}, "5 values per pixel, 16-bit unsigned integers"),
        (np.stack([RAMP] * 2, 2), {262: 1}, "2 values per pixel, 16-bit unsigned integers"),
        ((RAMP / 65535).astype(np.float64), {}, "1 value per pixel, 64-bit floats"),
        (np.stack([RAMP / 65535] * 3, 2).astype(np.float32), {}, "3 values per pixel, 32-bit floats"),
        (RAMP, {259: 34887}, "compression 34887"),
    ],
)
def test_samples_that_are_not_decoded_are_named(pixels: np.ndarray, tags: Tags, words: str) -> None:
    error = error_of(tiff((pixels, tags)))
    assert error.reason == "unsupported"
    assert words in error.message
    assert "convert" in error.message


# --- PNG -----------------------------------------------------------------------------------------------------------


def _png_with(texts: list[tuple[str, str, bool]], **options: Any) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, text, packed in texts:
        info.add_text(key, text, zip=packed)
    return encoded("PNG", pnginfo=info, **options)


def _after_the_pixels(data: bytes, kind: bytes, body: bytes) -> bytes:
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data[:-12] + chunk + data[-12:]


@pytest.mark.parametrize(
    "data",
    [
        _png_with([("workflow", "x" * (2 << 20), True)]),
        _png_with([("workflow", "x" * (2 << 20), False)]),
        _png_with([(f"k{i}", "x" * (1 << 20), True) for i in range(70)]),
        _png_with([("XML:com.adobe.xmp", "x" * (2 << 20), True)]),
        _after_the_pixels(encoded("PNG"), b"zTXt", b"late\0\0" + zlib.compress(bytes(3 << 20))),
        _after_the_pixels(encoded("PNG"), b"iTXt", b"late\0\1\0\0\0" + zlib.compress(bytes(3 << 20))),
        encoded("PNG", icc_profile=bytes(2 << 20)),
    ],
)
def test_large_texts_and_profiles_of_a_png_do_no_harm(data: bytes) -> None:
    np.testing.assert_array_equal(decode_image(data, LIMIT), decode_image(encoded("PNG"), LIMIT))
    assert is_of_size(data, 48, 32)


def test_a_png_keeps_the_orientation_that_a_text_holds() -> None:
    xmp = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = _png_with([("workflow", "x" * (2 << 20), True), ("XML:com.adobe.xmp", xmp, False)])
    assert decode_image(data, LIMIT).shape == (48, 32, 3)


# --- damage that is not a missing end ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_a_small_file_that_is_damaged_but_whole_is_not_called_truncated(kind: str) -> None:
    data = bytearray(encoded(kind, Image.new("RGB", (8, 8))))
    assert len(data) < 900
    at = {"JPEG": 4, "PNG": 16, "GIF": 10, "WEBP": 12, "TIFF": struct.unpack_from("<I", data, 4)[0] + 2}[kind]
    data[at : at + 12] = b"\xee" * 12
    assert error_of(bytes(data)).reason in ("unreadable", "unsupported")
    assert error_of(encoded(kind, Image.new("RGB", (8, 8)))[: len(data) // 2]).reason == "truncated"


def test_decoders_that_refuse_a_sound_file_are_quoted() -> None:
    deep = bytearray(encoded("JPEG"))
    deep[deep.index(b"\xff\xc0") + 4] = 12
    assert "12-bit" in (error := error_of(bytes(deep))).message
    assert error.reason == "unsupported"
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, 2, 2, 16, 3)
    assert error_of(header + bytes(200)).reason == "unsupported"


# --- other files ---------------------------------------------------------------------------------------------------

SECRET = b"root:x:0:0:hunter2:/root:/bin/bash\n"


def _tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = len(SECRET)
        archive.addfile(info, io.BytesIO(SECRET))
    return sink.getvalue()


def _zip() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.txt", SECRET)
    return sink.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
S3_ERROR = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>hunter2</Message></Error>'


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        (LFS, "not_an_image", "git lfs pull"),
        (b"<!DOCTYPE html><html>hunter2", "not_an_image", "HTML page"),
        (b"\xef\xbb\xbf\n <HTML>", "not_an_image", "HTML page"),
        (b"<?xml version='1.0'?><!DOCTYPE html PUBLIC ''><html xmlns=''>", "not_an_image", "HTML page"),
        (S3_ERROR, "not_an_image", "error message of a storage service"),
        (b"<Error><Code>NoSuchKey</Code></Error>", "not_an_image", "error message of a storage service"),
        (b"<?xml version='1.0'?><svg xmlns=''>", "unsupported", "SVG"),
        (b"<?xml version='1.0'?><notes>", "not_an_image", "XML document"),
        (b'{"error": "hunter2"}', "not_an_image", "JSON"),
        (bytes(128) + b"DICM" + bytes(200), "unsupported", "DICOM"),
        (_zip(), "not_an_image", "ZIP"),
        (gzip.compress(SECRET, mtime=0), "not_an_image", "gzip"),
        (_tar(), "not_an_image", "tar archive"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "unsupported", "video"),
        (b"RIFF\x24\0\0\0AVI LIST", "unsupported", "AVI"),
        (b"\xff\x0a" + bytes(30), "unsupported", "JPEG XL"),
        (b"%PDF-1.7", "unsupported", "PDF"),
        (bytes(4096), "not_an_image", "zero"),
        (SECRET, "not_an_image", "text"),
        (b"\x01\x02\x03" + SECRET, "not_an_image", "no image format"),
        (b"P5\n" + SECRET, "unreadable", "PPM"),
        (b"P1 1 1 " + SECRET, "unreadable", "PPM"),
        (b"BM" + SECRET, "truncated", "BMP"),
    ],
)
def test_other_files_are_named_and_never_quoted(data: bytes, reason: str, words: str) -> None:
    error = error_of(data)
    assert words in str(error)
    assert error.reason == reason
    for part in ("root", "hunter2", "/bin"):
        assert part not in str(error)


@pytest.mark.parametrize("start", [b"", b"\0", b"\xff\xd8\xff", b"P6 ", b"P2 4 4 255 ", b"BM", b"GIF89a", b"8BPS"])
def test_no_byte_of_a_private_file_is_in_an_error(start: bytes) -> None:
    words = b"correcthorse batterystaple 8812764 " * 40
    error = str(error_of(start + words))
    assert not any(word in error for word in ("correct", "horse", "battery", "staple", "8812764"))


@pytest.mark.parametrize(
    "data",
    [
        tiff((np.arange(36, dtype=np.uint16).reshape(3, 4, 3) * 1800, {273: (8, 32, 56), 279: (24,) * 3, 284: 2})),
        tiff((np.zeros((3, 4, 4), np.uint16), {262: 5, 273: (8, 32, 56, 80), 279: (24,) * 4, 284: 2})),
        None,
    ],
    ids=["planar 16-bit RGB", "planar 16-bit CMYK", "compressed big-endian floats"],
)
def test_layouts_that_pillow_decodes_to_wrong_pixels_are_refused(data: bytes | None) -> None:
    error = error_of(_big_endian_floats() if data is None else data)
    assert error.reason == "unsupported"
    assert "in a layout that is not decoded" in error.message


def _big_endian_floats() -> bytes:
    """A deflated TIFF of 2x2 floats, most significant byte first."""
    packed = zlib.compress(np.array([[0, 0.5], [0.5, 1]], ">f4").tobytes())
    tags = {256: 2, 257: 2, 258: 32, 259: 8, 262: 1, 273: 8, 277: 1, 278: 2, 279: len(packed), 339: 3}
    start = 8 + len(packed) + len(packed) % 2
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"MM\0*" + struct.pack(">I", start) + packed + bytes(len(packed) % 2)
    return head + struct.pack(">H", len(tags)) + entries + bytes(4)
