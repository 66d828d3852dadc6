"""Decode image bytes to RGB uint8 (H, W, 3), whatever camera, scanner or attacker they come from.

Decisions, if formats leave room:

- EXIF and TIFF orientation is applied: masks fit the image as people see it.
- Transparent images are composited over white, as in most viewers; colours hidden by full transparency do not show.
- 16-bit grey is scaled by 1/257 (65535 becomes 255), 12-bit grey by 255/4095. 32-bit integers within 0..65535 are
  treated as 16-bit. Floats within 0..1 are scaled by 255; floats within 0..255 are unchanged. Wider ranges are
  stretched from minimum to maximum; NaN and infinities become black. Then TIFFs with WhiteIsZero are inverted.
- Ordinary JPEGs are decoded faster than by Pillow, to the same pixels (`plain_jpeg`).
- CMYK follows Pillow, which handles inverted JPEGs; no colour profile is applied.
- Animations and multi-page files: the first frame. TIFFs whose first image is marked as a thumbnail: the full image.
  Raw camera files are refused, because developing them is a matter of taste.

The number of pixels is checked in the header, before decoding.
"""

from __future__ import annotations

import io
import logging
import re
import struct
import warnings
import zlib
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pillow_heif
from PIL import AvifImagePlugin, Image, ImageCms, UnidentifiedImageError

from samray.errors import ImageError
from samray.inputs import kinds as image_kinds
from samray.inputs import tiff
from samray.inputs.plain_jpeg import decode_plain_jpeg
from samray.rle.runs import MAX_PIXELS, MAX_SIDE

RGBArray = npt.NDArray[np.uint8]

# Only decoders of pixel formats: other Pillow plugins start programs (EPS) or fetch files. (Multi-picture JPEGs are
# handled as JPEG.) Builds of Pillow may lack some.
Image.init()
# One thread: an image's time is limited in CPU seconds, and images are decoded in parallel.
pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
FORMATS: Final = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF", "HEIF", "ICO", "PSD")
    if name in Image.OPEN
)
_MULTI_PICTURE_JPEG: Final = ".mpo"

# What Pillow's decoders raise on damaged data; found by fuzzing.
DECODE_ERRORS: Final = (
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

USE_BANDS: Final = (
    "convert it to 8-bit JPEG or PNG, or name the bands to use, such as input.bands=[4,3,2] (red, green, blue) or [1]"
)

_TEXT_CHUNKS: Final = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
ORIENTATION_TEXT: Final = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
_MAX_ORIENTATION_TEXT: Final = 256 * 1024

_REFUSALS: Final = re.compile("cannot handle|unsupported|not supported|not implemented|unknown|unable to determine")
"""Pillow's messages about valid files of a kind that it does not decode."""

# One damaged photo in a million is a failed row, not a warning on the terminal of each worker.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
logging.getLogger("PIL").setLevel(logging.CRITICAL)


@cache
def image_extensions() -> tuple[str, ...]:
    """File extensions, lower case with the dot, of the formats that `decode_image` reads; sorted."""
    known = Image.registered_extensions()
    return tuple(sorted({_MULTI_PICTURE_JPEG, *(ending for ending, name in known.items() if name in FORMATS)}))


def decode_image(data: bytes | bytearray | memoryview, max_pixels: int) -> RGBArray:
    """Decode bytes to (H, W, 3) uint8 RGB, C-contiguous, writable and upright.

    max_pixels: width x height above which the image is refused without decoding.
    Raises: ImageError with reason empty, not_an_image, unsupported, truncated, too_large, out_of_memory or unreadable.
    """
    if len(data) == 0:
        raise ImageError("empty", "the file has no bytes")
    data = bytes(data)
    try:
        with open_image(data, max_pixels) as image:
            refuse_size(image.size, max_pixels)
            if orientation_of(image) == 1 and (pixels := decode_plain_jpeg(data, image)) is not None:
                return pixels
            image.load()
            refuse_size(image.size, max_pixels)  # some headers give a smaller size than the image has
            return to_rgb(_upright(image))
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("out_of_memory", "the decoded image does not fit into memory") from error
    except DECODE_ERRORS as error:
        raise decode_error(data, error) from error


def refuse_size(size: tuple[int, int], max_pixels: int) -> None:
    """Raises: ImageError if an image of this width and height has too many pixels, or can have no masks."""
    width, height = size
    if width * height > max_pixels:
        raise too_large(size, max_pixels)
    if max(size) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageError(
            "too_large",
            f"{width}x{height}: masks may have {MAX_SIDE} pixels per side, and {MAX_PIXELS} in all; cut it into "
            "smaller images",
        )


def too_large(size: tuple[int, int], max_pixels: int) -> ImageError:
    width, height = size
    return ImageError(
        "too_large",
        f"{width}x{height} is {width * height} pixels, more than input.max_pixels={max_pixels}; masks.tile labels "
        "images of up to 2^30 pixels in tiles",
    )


def is_of_size(data: bytes, width: int, height: int) -> bool:
    """Whether `decode_image` would return this width and height, from the header alone; False if that is damaged."""
    try:
        with open_image(data, width * height) as image:
            if image.size == (width, height):  # some Pillow decoders report the rotated size
                return True
            return image.size == (height, width) and orientation_of(image) in range(5, 9)
    except (ImageError, MemoryError, *DECODE_ERRORS):
        return False


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """The image with its header read. Raises ImageError if no decoder accepts it."""
    # Pillow's own limit is a global of the process: raised if the user allows more, never lowered. Pillow refuses
    # images of twice its limit, which is always above ours, too.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    directory = None
    if tiff.is_tiff(data):
        data, directory = _main_tiff_picture(data)
    elif data.startswith(b"\x89PNG"):
        data = _without_texts(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"more pixels than input.max_pixels={max_pixels}") from error
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    image.info["tiff_directory"] = directory
    return image


def _main_tiff_picture(data: bytes) -> tuple[bytes, tiff.Directory | None]:
    """Make the main picture the first one of the TIFF; returns that TIFF and the picture's tags."""
    directories = tiff.directories(data)
    # Refused before decoding: the first picture of a raw file is a thumbnail.
    if tiff.is_raw_photo(data, directories):
        raise raw_photo()
    main = tiff.main_picture(directories)
    if main is not None and main.is_misread(tiff.is_big_endian(data)):
        raise ImageError(
            "unsupported",
            f"this TIFF has {main.describe()}, in a layout that is not decoded; {USE_BANDS}",
        )
    return (data if main is None or main is directories[0] else tiff.starting_at(data, main)), main


def raw_photo() -> ImageError:
    return ImageError(
        "unsupported", "this is a raw camera file (DNG, NEF, CR2, ARW or the like); develop it to JPEG, PNG or TIFF"
    )


def _without_texts(data: bytes) -> bytes:
    """Remove texts and colour profile from a PNG, except texts that may contain the orientation.

    Pillow refuses images with large texts, which are not needed here.
    """
    # PNG chunks: length (4 bytes), type (4), body, checksum (4).
    kept, offset = [data[:8]], 8
    while offset + 8 <= len(data):
        end = offset + 12 + int.from_bytes(data[offset : offset + 4], "big")
        kind, body = data[offset + 4 : offset + 8], data[offset + 8 : min(end - 4, offset + 8 + 64)]
        if kind in _TEXT_CHUNKS and not (body.startswith(ORIENTATION_TEXT) and _is_small_text(data[offset + 4 : end])):
            # An empty part marks that something was removed; without any, `data` is returned without a copy.
            kept.append(data[offset:offset])
        else:
            kept.append(data[offset:end])
        offset = end
    return b"".join([*kept, data[offset:]]) if any(not part for part in kept) else data


def _is_small_text(chunk: bytes) -> bool:
    """Whether the text of a chunk, which starts with its type, is small, also after decompression."""
    rest = chunk[4:-4].partition(b"\0")[2]
    packed = b""
    if chunk.startswith(b"zTXt"):
        packed = rest[1:]
    elif chunk.startswith(b"iTXt") and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    if not packed:
        return len(chunk) <= _MAX_ORIENTATION_TEXT
    try:
        # Bounded: a few kilobytes of zlib can inflate to gigabytes.
        return len(zlib.decompressobj().decompress(packed, _MAX_ORIENTATION_TEXT + 1)) <= _MAX_ORIENTATION_TEXT
    except zlib.error:
        return False


def _unidentified(data: bytes) -> ImageError:
    """Why no decoder accepts the file."""
    kind = image_kinds.kind_of(data)
    if kind is None or kind not in Image.OPEN:
        return image_kinds.foreign_file(data)
    # Whether bytes are missing is more useful than the decoder's message, so it is asked first.
    if image_kinds.is_cut(data):
        return ImageError("truncated", f"this {kind} ends after {len(data)} bytes, inside its header")
    if kind == "TIFF" and (directories := tiff.directories(data)) and directories[0].num_pixels:
        return ImageError(
            "unsupported", f"this TIFF has {directories[0].describe()}, which is not decoded; {USE_BANDS}"
        )
    try:
        Image.OPEN[kind][0](io.BytesIO(data), b"")  # called directly, the decoder reports why
        reason = ""
    except DECODE_ERRORS as error:
        reason = _short_message(error)
    if kind == "PSD" or _REFUSALS.search(reason):
        return _unsupported(kind, reason)
    return ImageError("unreadable", f"the header of this {kind} is damaged ({reason}); copy it again from its source")


def _unsupported(kind: str | None, reason: str) -> ImageError:
    return ImageError("unsupported", f"this kind of {kind} is not decoded ({reason}); convert it to 8-bit JPEG or PNG")


def _short_message(error: Exception) -> str:
    """The decoder's message in one line, without the file content that some decoders quote."""
    reason = re.sub(r"""b(['"]).*?\1""", "...", " ".join(str(error).split()))
    return reason[:300] or type(error).__name__


def decode_error(data: bytes, error: Exception) -> ImageError:
    reason = _short_message(error)
    kind = image_kinds.kind_of(data)
    # A valid file of an unusual kind must not be called damaged.
    if isinstance(error, NotImplementedError) or _REFUSALS.search(reason.lower()):
        return _unsupported(kind, reason)
    is_cut = image_kinds.is_cut(data)
    if is_cut is None:
        is_cut = isinstance(error, EOFError) or "truncated" in reason.lower() or "not enough" in reason.lower()
    if is_cut:
        return ImageError("truncated", f"this {kind} ends after {len(data)} bytes, inside the picture ({reason})")
    return ImageError("unreadable", f"the data of this {kind} is damaged ({reason}); copy it again from its source")


def _upright(image: Image.Image) -> Image.Image:
    """Rotate the image according to its EXIF; damaged EXIF is ignored."""
    orientation = orientation_of(image)
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


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) if EXIF is damaged."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except DECODE_ERRORS:
        return 1
    return int(orientation) if orientation in range(2, 9) else 1


def to_rgb(image: Image.Image) -> RGBArray:
    directory: tiff.Directory | None = image.info.get("tiff_directory")
    is_signed = directory is not None and directory.sample_format == 2
    # Grey outside of 0..255 is scaled here, because Pillow's conversion does not know its range.
    if image.mode.startswith("I;16") or image.mode in ("I", "F") or (image.mode == "L" and is_signed):
        return _grey_to_rgb(_deep_grey(image, directory))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        # P with tRNS goes through RGBA, which gives each palette entry its alpha, and likewise L and RGB with a colour
        # key.
        return over_white(image if image.mode == "RGBA" else image.convert("RGBA"))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _deep_grey(image: Image.Image, directory: tiff.Directory | None) -> npt.NDArray[Any]:
    """0..255 from grey values that are not unsigned 8-bit; directory: of a TIFF."""
    values = np.asarray(image)
    if image.mode == "L":
        values = values.view(np.int8)
    elif directory is not None and directory.sample_format == 1 and values.dtype == np.int32:
        values = values.view(np.uint32)  # Pillow has only signed 32-bit
    # Pillow itself inverts images of 8 bits or fewer.
    is_inverted = directory is not None and directory.is_white_is_zero and image.mode != "L"
    return grey_to_byte(values, 12 if directory is not None and directory.bits == 12 else 16, is_inverted)


def grey_to_byte(
    values: npt.NDArray[Any], bits: int = 16, is_inverted: bool = False, span: tuple[float, float] | None = None
) -> npt.NDArray[Any]:
    """0..255 from grey values that are not unsigned 8-bit, as the module's docstring says.

    bits: 12 if integers have 12, else 16. span: minimum and maximum of the whole image if these are a part of it, as
    from `span_of`.
    """
    finite = None
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        grey: npt.NDArray[Any] = _float_to_byte(values, finite, span or span_of(values))
    elif bits == 12:
        # In 32 bits, where the product fits; + 2047 rounds to the nearest.
        grey = (values.astype(np.uint32) * 255 + 2047) // 4095
    elif values.dtype == np.uint16:
        grey = (values.astype(np.uint32) + 128) // 257
    else:
        low, high = span or span_of(values)
        if values.dtype != np.int8 and low >= 0 and high <= 65535:
            grey = (values.astype(np.uint32) + 128) // 257
        else:
            grey = _stretched(values.astype(np.float64), low, high)
    if is_inverted:
        grey = 255 - grey if finite is None else np.where(finite, 255 - grey, 0)
    return grey


def span_of(values: npt.NDArray[Any]) -> tuple[float, float]:
    """Minimum and maximum. Infinities and NaN count as 0: they would make every range wide."""
    known = np.where(np.isfinite(values), values, 0) if values.dtype.kind == "f" else values
    return float(known.min()), float(known.max())


def over_white(image: Image.Image) -> RGBArray:
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(image, mask=image.getchannel("A"))
    return np.array(canvas)


def _grey_to_rgb(grey: npt.NDArray[Any]) -> RGBArray:
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def _float_to_byte(
    values: npt.NDArray[Any], finite: npt.NDArray[np.bool_], span: tuple[float, float]
) -> npt.NDArray[np.float64]:
    known = np.where(finite, values, 0.0).astype(np.float64)
    low, high = span
    if low >= 0 and high <= 1:
        known *= 255
    elif low < 0 or high > 255:
        known = _stretched(known, low, high)
    known[~finite] = 0.0
    return known.round()


def _stretched(values: npt.NDArray[np.float64], low: float, high: float) -> npt.NDArray[np.float64]:
    if high == low:
        return np.zeros_like(values)
    stretched: npt.NDArray[np.float64] = (values - low) * (255 / (high - low))
    return stretched.round()
