"""`jobs/benchmark.py decode`: JPEG decoding by samray, Pillow and OpenCV."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from samray.inputs.decode import decode_image


def decode(photos: Path, megapixels: float, limit: int | None) -> dict[str, Any]:
    """CPU milliseconds to decode a JPEG, medians of one round, and for how many files the pixels are Pillow's.

    The photographs as they are, and some of them scaled to `megapixels`, baseline and progressive. "half size" decodes
    at half the resolution, which libjpeg-turbo can do from the frequencies; its difference is measured at the size of
    the model's input.
    """
    files = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[:limit]
    width = round((megapixels * 1e6 * 3 / 2) ** 0.5)
    sets: dict[str, list[bytes]] = {"photographs": [file.read_bytes() for file in files]}
    for name, how in (
        ("scaled", {}),
        ("scaled, 4:4:4", {"subsampling": 0}),
        ("scaled, progressive", {"progressive": True}),
    ):
        sets[name] = [_encoded(file, (width, width * 2 // 3), how) for file in files[:8]]
    return {name: _of_files(encoded) for name, encoded in sets.items()}


def _encoded(file: Path, size: tuple[int, int], how: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    Image.open(file).convert("RGB").resize(size, Image.Resampling.BICUBIC).save(sink, "JPEG", quality=90, **how)
    return sink.getvalue()


def _of_files(encoded: list[bytes]) -> dict[str, Any]:
    ways: dict[str, Callable[[bytes], Any]] = {
        "samray": lambda data: decode_image(data, 10**9),
        "pillow": _by_pillow,
        "opencv": _by_opencv,
        "half size": _at_half_size,
    }
    milliseconds: dict[str, list[float]] = {name: [] for name in ways}
    same = dict.fromkeys(("samray", "opencv"), 0)
    half_size_difference = 0
    for data in encoded:
        pixels = {}
        for name, way in ways.items():
            start = time.process_time()
            pixels[name] = way(data)
            milliseconds[name].append(1000 * (time.process_time() - start))
        for name in same:
            same[name] += np.array_equal(pixels[name], pixels["pillow"])
        half = np.abs(_to_input(pixels["pillow"]) - _to_input(pixels["half size"])).max()
        half_size_difference = max(half_size_difference, int(half))
    medians = {name: statistics.median(values) for name, values in milliseconds.items()}
    return {
        "images": len(encoded),
        "median_ms": medians,
        "pillow / samray": medians["pillow"] / medians["samray"],
        "images_with_pillows_pixels": same,
        "half_size_largest_difference": half_size_difference,
    }


def _by_pillow(data: bytes) -> Any:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _by_opencv(data: bytes) -> Any:
    import cv2

    cv2.setNumThreads(1)
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    assert bgr is not None
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def _at_half_size(data: bytes) -> Any:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (image.width // 2, image.height // 2))
    return np.asarray(image.convert("RGB"))


def _to_input(image: Any) -> Any:
    return np.asarray(Image.fromarray(image).resize((1024, 682), Image.Resampling.BILINEAR), dtype=np.int16)
