"""A thousand damaged images of every format that is decoded: one row each, and none of them ends or stops anything."""

from __future__ import annotations

import io
import random
import struct
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, features

from samray.config import load_config
from samray.errors import IMAGE_ERROR_REASONS
from samray.inputs.decode import decode_image
from samray.pipeline.labeler import EncodedImage
from tests.support import standin

NUM_IMAGES = 1000
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "ICO", "PSD", "AVIF", "JPEG2000", "HEIF")


def sound_image(kind: str, seed: int) -> bytes:
    """A small image, in one of the format's modes and compressions."""
    options: dict[str, object] = {}
    if kind == "JPEG":
        options = {
            "progressive": seed % 2 == 0,
            "exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0",
        }
    if kind == "TIFF":
        options = {"compression": ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")[seed % 5]}
    mode = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "P", "LA", "I;16"), "GIF": ("P", "L")}.get(kind, ("RGB",))
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    pixels[:12] = seed * 7 % 256
    if kind == "PSD":
        header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, 24, 32, 8, 3)
        return header + bytes(12) + struct.pack(">H", 0) + pixels.transpose(2, 0, 1).tobytes()
    name = mode[seed % len(mode)]
    if name == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels).convert(name)
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def mutated(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """A few random changes: bytes, bits, numbers, lost and doubled pieces, a piece of another file."""
    body = bytearray(data)
    for _ in range(dice.randint(1, 6)):
        offset = dice.randrange(min(len(body), 200) if dice.random() < 0.6 else len(body))
        what = dice.randrange(7)
        if what == 0:
            body[offset] = dice.randrange(256)
        elif what == 1:
            body[offset] ^= 1 << dice.randrange(8)
        elif what == 2:
            number = dice.choice([0, 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, len(body)])
            body[offset : offset + 4] = struct.pack(dice.choice("<>") + "I", number)
        elif what == 3:
            del body[offset : offset + dice.randint(1, 40)]
        elif what == 4:
            body[offset:offset] = body[offset : offset + dice.randint(1, 200)] * dice.randint(1, 3)
        elif what == 5:
            body[offset : offset + 30] = other[offset : offset + 30]
        else:
            del body[max(offset, 20) :]
        if not body:
            break
    return bytes(body)


def images() -> Iterator[EncodedImage]:
    dice = random.Random(13)
    for number in range(NUM_IMAGES):
        kind, other = FORMATS[number % len(FORMATS)], dice.choice(FORMATS)
        data = mutated(sound_image(kind, number // len(FORMATS)), sound_image(other, number), dice)
        yield EncodedImage(number, f"{number}.{kind.lower()}", f"/in/{number}", data)


def test_every_format_is_decoded_before_it_is_damaged() -> None:
    for kind in FORMATS:
        for seed in range(5):
            assert decode_image(sound_image(kind, seed), 10_000).shape in ((24, 32, 3), (32, 24, 3), (18, 24, 3))


@pytest.mark.skipif(
    not features.check("avif"),
    reason="no AVIF in this Pillow, so NO damaged image of any format is tested: pip install -c constraints.txt pillow",
)
def test_a_thousand_damaged_images_give_a_row_each() -> None:
    config = load_config(None, None, ["input.max_pixels=1_000_000", "input.decode_timeout_s=20"])
    done = standin.make_labeler(config, 2).label(list(images()))

    assert [record.image_id for record in done.records] == list(range(NUM_IMAGES))
    reasons = Counter(record.error.partition(":")[0] if record.error else "ok" for record in done.records)
    assert set(reasons) <= IMAGE_ERROR_REASONS | {"ok"}
    assert not {"internal", "quarantined", "timeout"} & set(reasons), reasons
    for kind in FORMATS:  # the damage was real, and some of each was survived or at least named
        errors = [r.error for r in done.records if r.file_name.endswith(f".{kind.lower()}")]
        assert sum(error is not None for error in errors) > 15, kind
        assert all(error is None or len(error) > 20 for error in errors)
