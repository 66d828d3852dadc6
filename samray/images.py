"""Encoded image bytes to RGB uint8 (H, W, 3), whatever camera, scanner or joker they come from.

Decisions, where formats leave room:

- EXIF and TIFF orientation is applied: masks lie on the picture as people see it.
- Transparency is laid over white, as most viewers show it; colours hidden under full transparency do not shine through.
- 16-bit grey is scaled by 1/257 (65535 becomes 255). 32-bit integers within 0..65535 are treated as 16-bit. Floats
  within 0..1 are scaled by 255, within 0..255 taken as they are. Anything wider is stretched from its minimum to its
  maximum; NaN and infinities become black.
- CMYK follows Pillow, which knows that JPEGs hold it inverted; no colour profile is applied.
- Of animations and multi-page files the first frame is taken.

The number of pixels is checked in the header, before anything is decoded.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pillow_heif
from PIL import Image, ImageCms, UnidentifiedImageError

from samray.errors import ImageError

RGBArray = npt.NDArray[np.uint8]

# Only pure decoders of pixel formats: others of Pillow's plugins start programs (EPS) or fetch other files.
# (Multi-picture JPEGs come through JPEG.) Builds of Pillow may lack some.
Image.init()
pillow_heif.register_heif_opener()
FORMATS: Final = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF", "HEIF", "ICO", "PSD")
    if name in Image.OPEN
)
_MULTI_PICTURE_JPEG: Final = ".mpo"

_MAGIC: Final = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"RIFF", "WebP"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\0\0\x01\0", "Windows icon"),
    (b"8BPS", "Photoshop file"),
)
_UNSUPPORTED: Final = (
    (b"%PDF", "PDF document"),
    (b"%!PS", "PostScript file"),
    (b"<svg", "SVG drawing"),
    (b"FUJIFILMCCD-RAW", "raw camera file"),
)
_HEIF_BRANDS: Final = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")

# What Pillow's decoders raise on damaged data; found by feeding them some.
_DECODE_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    NotImplementedError,
    RuntimeError,
    EOFError,
    AssertionError,
    struct.error,
    zlib.error,
    ImageCms.PyCMSError,
)
_EXIF_ORIENTATION: Final = 0x0112

# A damaged photograph in a million is a row with an error, not a line on the terminal of each worker.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def image_extensions() -> tuple[str, ...]:
    """File name endings, lower case with the dot, of the formats that `decode_image` reads; sorted."""
    known = Image.registered_extensions()
    return tuple(sorted({_MULTI_PICTURE_JPEG, *(ending for ending, name in known.items() if name in FORMATS)}))


def decode_image(data: bytes | bytearray | memoryview, max_pixels: int) -> RGBArray:
    """Encoded bytes as (H, W, 3) uint8 RGB, C-contiguous and writable, upright.

    max_pixels: width x height above which the image is refused undecoded.
    Raises: ImageError with reason empty, not_an_image, unsupported, truncated, too_large, out_of_memory or unreadable.
    """
    if len(data) == 0:
        raise ImageError("empty", "the file has no bytes")
    data = bytes(data)
    try:
        with _open(data, max_pixels) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    "too_large",
                    f"{width}x{height} is {width * height} pixels, more than input.max_pixels={max_pixels}",
                )
            image.load()
            return _to_rgb(_upright(image))
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("out_of_memory", "the decoded image does not fit into memory") from error
    except _DECODE_ERRORS as error:
        raise _decode_error(data, error) from error


def is_of_size(data: bytes, width: int, height: int) -> bool:
    """Whether `decode_image` would give this width and height, by the header alone; False where that is damaged."""
    try:
        with _open(data, width * height) as image:
            if image.size == (width, height):  # also of a picture on its side some of Pillow's decoders say so
                return True
            return image.size == (height, width) and _orientation(image) in range(5, 9)
    except (ImageError, MemoryError, *_DECODE_ERRORS):
        return False


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The image with its header read. Raises ImageError where no decoder takes it."""
    # Pillow's own limit is a global of the process: raised where the user allows more, never lowered. It refuses at
    # twice its value, so what it refuses is always above ours, too.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"more pixels than input.max_pixels={max_pixels}") from error
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error


def _unidentified(data: bytes) -> ImageError:
    for magic, name in _UNSUPPORTED:
        if data[:64].lstrip().startswith(magic):
            return ImageError("unsupported", f"this is a {name}; convert it to JPEG or PNG")
    kind = _kind(data)
    if kind is None:
        return ImageError("not_an_image", f"no image format starts with {data[:16]!r}")
    if len(data) < 512 or _is_cut(data):
        return ImageError("truncated", f"{kind} ends inside its header, after {len(data)} bytes")
    return ImageError("unreadable", f"the header of this {kind} is damaged")


def _decode_error(data: bytes, error: Exception) -> ImageError:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, NotImplementedError):
        return ImageError("unsupported", said)
    if isinstance(error, EOFError) or "truncated" in said.lower() or _is_cut(data):
        return ImageError("truncated", f"the file ends after {len(data)} bytes, inside the picture ({said})")
    return ImageError("unreadable", said)


def _kind(data: bytes) -> str | None:
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF"
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return "HEIF"
    return next((name for magic, name in _MAGIC if data.startswith(magic)), None)


def _is_cut(data: bytes) -> bool:
    """Whether the format's own end mark or length says that bytes are missing at the end."""
    kind = _kind(data)
    if kind == "JPEG":
        return b"\xff\xd9" not in data[-64:]
    if kind == "PNG":
        return b"IEND" not in data[-64:]
    if kind == "GIF":
        return b";" not in data[-64:]
    if kind == "WebP":
        return len(data) < 8 or len(data) < 8 + int.from_bytes(data[4:8], "little")
    if kind == "BMP":
        return len(data) < int.from_bytes(data[2:6], "little")
    if kind in ("AVIF", "HEIF"):
        return _ends_inside_box(data)
    return False


def _ends_inside_box(data: bytes) -> bool:
    """Whether a file made of sized boxes (ISO base media) ends before its last box does."""
    place = 0
    while place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        if size < 8:  # 0: up to the end of the file; 1: a 64-bit size, which no image has
            return False
        place += size
    return place != len(data)


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says; damaged EXIF says nothing."""
    orientation = _orientation(image)
    if orientation == 1:
        return image
    transpose = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return image.transpose(transpose[orientation])


def _orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF counts; 1, which is upright, also where EXIF is damaged."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except _DECODE_ERRORS:
        return 1
    return int(orientation) if orientation in range(2, 9) else 1


def _to_rgb(image: Image.Image) -> RGBArray:
    if image.mode.startswith("I;16"):
        return _grey_to_rgb((np.asarray(image).astype(np.uint32) + 128) // 257)
    if image.mode == "I":
        values = np.asarray(image)
        if values.min() >= 0 and values.max() <= 65535:
            return _grey_to_rgb((values.astype(np.uint32) + 128) // 257)
        return _grey_to_rgb(_stretched(values.astype(np.float64)))
    if image.mode == "F":
        return _grey_to_rgb(_float_to_byte(np.asarray(image)))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        # P with tRNS goes through RGBA, which gives each palette entry its alpha; so do L and RGB with a colour key.
        return _over_white(image if image.mode == "RGBA" else image.convert("RGBA"))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _over_white(image: Image.Image) -> RGBArray:
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(image, mask=image.getchannel("A"))
    return np.array(canvas)


def _grey_to_rgb(grey: npt.NDArray[Any]) -> RGBArray:
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def _float_to_byte(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    finite = np.isfinite(values)
    known = np.where(finite, values, 0.0).astype(np.float64)
    low, high = float(known.min()), float(known.max())
    if low >= 0 and high <= 1:
        known *= 255
    elif low < 0 or high > 255:
        known = _stretched(known)
    known[~finite] = 0.0
    return known.round()


def _stretched(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    low, high = float(values.min()), float(values.max())
    if high == low:
        return np.zeros_like(values)
    stretched: npt.NDArray[np.float64] = (values - low) * (255 / (high - low))
    return stretched.round()
