"""Identify a file by its bytes, to explain why it is not labelled. Messages never quote file content."""

from __future__ import annotations

from typing import Final

from samray.errors import ImageError
from samray.inputs import tiff

_MAGIC: Final = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"\0\0\0\x0cjP  ", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\x01\0", "ICO"),
    (b"8BPS", "PSD"),
    *((b"P" + digit, "PPM") for digit in (b"1", b"2", b"3", b"4", b"5", b"6", b"f", b"F")),
)
"""The formats that are decoded, by Pillow's names."""

_HEIF_BRANDS: Final = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")

_CONVERT: Final = "convert it to JPEG or PNG"
_UNPACK: Final = "unpack it and use the folder, or a plain .tar, as INPUT"
_NO_IMAGE: Final = "remove it from the input"

_UNSUPPORTED: Final = (
    (b"%PDF", "a PDF document", _CONVERT),
    (b"%!PS", "a PostScript file", _CONVERT),
    (b"FUJIFILMCCD-RAW", "a raw camera file (RAF)", "develop it to JPEG, PNG or TIFF"),
    (b"IIRO", "a raw camera file (ORF)", "develop it to JPEG, PNG or TIFF"),
    (b"IIRS", "a raw camera file (ORF)", "develop it to JPEG, PNG or TIFF"),
    (b"MMOR", "a raw camera file (ORF)", "develop it to JPEG, PNG or TIFF"),
    (b"IIU\0", "a raw camera file (RW2)", "develop it to JPEG, PNG or TIFF"),
    (b"FOVb", "a raw camera file (X3F)", "develop it to JPEG, PNG or TIFF"),
    (b"\0MRM", "a raw camera file (MRW)", "develop it to JPEG, PNG or TIFF"),
    (b"\xff\x0a", "a JPEG XL image", _CONVERT),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image", _CONVERT),
    (b"II\xbc", "a JPEG XR image", _CONVERT),
    (b"\x76\x2f\x31\x01", "an OpenEXR image", _CONVERT),
    (b"#?RADIANCE", "a Radiance HDR image", _CONVERT),
    (b"DDS ", "a DirectDraw texture (DDS)", _CONVERT),
    (b"qoif", "a QOI image", _CONVERT),
    (b"SIMPLE  =", "a FITS image", _CONVERT),
    (b"gimp xcf", "a GIMP file", _CONVERT),
    (b"AT&TFORM", "a DjVu document", _CONVERT),
    (b"BPG\xfb", "a BPG image", _CONVERT),
    (b"icns", "a macOS icon", _CONVERT),
    (b"\x1aE\xdf\xa3", "a video (Matroska or WebM)", "extract its frames as images"),
    (b"\0\0\x01\xba", "a video (MPEG)", "extract its frames as images"),
    (b"\0\0\x01\xb3", "a video (MPEG)", "extract its frames as images"),
    (b"FLV\x01", "a video (FLV)", "extract its frames as images"),
    (b"\x89HDF", "an HDF5 file", "export its images as files"),
    (b"\x93NUMPY", "a NumPy array", "save it as PNG"),
    (b"PAR1", "a Parquet file", "use it as INPUT, or remove it from the list"),
)

_OTHER: Final = (
    (b"PK\x03\x04", "a ZIP archive", _UNPACK),
    (b"\x1f\x8b", "a gzip file", _UNPACK),
    (b"BZh", "a bzip2 file", _UNPACK),
    (b"\xfd7zXZ\0", "an xz file", _UNPACK),
    (b"(\xb5/\xfd", "a Zstandard file", _UNPACK),
    (b"7z\xbc\xaf'\x1c", "a 7-Zip archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"\0\x05\x16\x07", "metadata that macOS keeps next to a file (AppleDouble)", _NO_IMAGE),
    (b"\x7fELF", "a program", _NO_IMAGE),
    (b"MZ", "a program", _NO_IMAGE),
    (b"\xd0\xcf\x11\xe0", "a Microsoft Office file or a thumbnail cache", _NO_IMAGE),
    (b"SQLite format 3\0", "an SQLite database", _NO_IMAGE),
)


def kind_of(data: bytes) -> str | None:
    """Pillow's name of the decoded format with this file header; None for all other files."""
    if tiff.is_tiff(data):
        return "TIFF"
    # A WebP that was truncated after its first bytes is still one.
    if data[:4] == b"RIFF" and data[8:12] in (b"WEBP", b""):
        return "WEBP"
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        return "AVIF" if brand in (b"avif", b"avis") else "HEIF" if brand in _HEIF_BRANDS else None
    return next((name for magic, name in _MAGIC if data.startswith(magic)), None)


def foreign_file(data: bytes) -> ImageError:
    """Why a file that no decoder accepts is not an image, or not a readable one, and what to do."""
    # Byte order mark and white space come before the markup of many XML and HTML files.
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(b"<") and b"<svg" in head.lower():
        return ImageError("unsupported", f"this is an SVG drawing; {_CONVERT}")
    for magic, name, advice in _UNSUPPORTED:
        if head.startswith(magic):
            return ImageError("unsupported", f"this is {name}; {advice}")
    if data[128:132] == b"DICM":
        return ImageError("unsupported", "this is a DICOM file; export its pixels as PNG or 16-bit TIFF")
    if data[4:8] == b"ftyp":
        if data[8:12] == b"crx ":
            return ImageError("unsupported", "this is a raw camera file (CR3); develop it to JPEG, PNG or TIFF")
        return ImageError("unsupported", "this is a video (MP4 or QuickTime); extract its frames as images")
    if data[:4] == b"RIFF":
        return ImageError("unsupported", "this is an AVI video or a sound file; extract its frames as images")
    for magic, name, advice in _OTHER:
        if data.startswith(magic):
            return ImageError("not_an_image", f"this is {name}; {advice}")
    if data[257:262] == b"ustar":
        return ImageError("not_an_image", "this is a tar archive; rename it to .tar and use it as INPUT")
    return ImageError("not_an_image", _text_file(head) or _shapeless(data))


def _text_file(head: bytes) -> str | None:
    """Identify a file that starts like text."""
    lower = head.lower()
    if head.startswith(b"version https://git-lfs.github.com/"):
        return "this is a Git LFS pointer, not the image itself; run `git lfs pull` in its repository, then label again"
    if lower.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in lower:
        return (
            "this is an HTML page, such as a login or an error page, instead of an image;"
            " open its URI in a browser, and check the URI and your access to it"
        )
    if lower.startswith((b"<?xml", b"<error")):
        if b"<error" in lower and b"<code>" in lower:
            return (
                "this is an XML error message of a storage service, instead of an image;"
                " check the URI and the permissions, and copy the image again"
            )
        return f"this is an XML document; {_NO_IMAGE}"
    if head.startswith((b"{", b"[")):
        return f"this is JSON text, such as an error message of a web service; check the URI, or {_NO_IMAGE}"
    # No control characters other than those of text files.
    if head and all(byte >= 32 or byte in b"\t\r\n\f\x1b" for byte in head):
        return f"this is text; {_NO_IMAGE}"
    return None


def _shapeless(data: bytes) -> str:
    if not data.strip(b"\0"):
        return f"all {len(data)} bytes are zero, as after an interrupted copy; copy the image again"
    return f"no image format starts like this file; check that it is an image, or {_NO_IMAGE}"


def is_cut(data: bytes) -> bool | None:
    """Whether bytes are missing at the end, by the format's end mark or lengths; None if they do not tell."""
    kind = kind_of(data)
    if kind == "JPEG":
        # Near the end, because padding may follow the mark.
        return b"\xff\xd9" not in data[-64:]
    if kind == "PNG":
        return b"IEND" not in data[-64:]
    if kind == "GIF":
        return b"\0;" not in data[-64:]
    if kind == "WEBP":
        return len(data) < 12 or len(data) < 8 + int.from_bytes(data[4:8], "little")
    if kind == "BMP":
        return len(data) < 54 or len(data) < int.from_bytes(data[2:6], "little")
    if kind in ("AVIF", "HEIF") or data[4:8] == b"jP  ":
        return _ends_inside_box(data)
    if kind == "JPEG2000":
        return b"\xff\xd9" not in data[-64:]
    if kind == "TIFF":
        return tiff.is_cut(data)
    if kind == "ICO":
        return _ico_is_cut(data)
    return True if kind == "PSD" and len(data) < 26 else None


def _ends_inside_box(data: bytes) -> bool:
    """Whether a file made of ISO base media boxes ends before its last box does."""
    offset = 0
    while offset + 8 <= len(data):
        size = int.from_bytes(data[offset : offset + 4], "big")
        if size == 0:  # up to the end of the file
            return data[offset + 4 : offset + 8] == b"jp2c" and b"\xff\xd9" not in data[-64:]
        if size < 8:  # 1 means a 64-bit size, which no image has
            return False
        offset += size
    return offset != len(data)


def _ico_is_cut(data: bytes) -> bool:
    """Whether an icon's directory refers to images after the end of the file."""
    number = int.from_bytes(data[4:6], "little")
    entries = [data[6 + 16 * i : 22 + 16 * i] for i in range(number)]
    return any(
        len(entry) < 16 or int.from_bytes(entry[8:12], "little") + int.from_bytes(entry[12:16], "little") > len(data)
        for entry in entries
    )
