"""Read from web servers. Nothing they claim is trusted: lengths, encodings, or that a body ever ends."""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final

from samray.errors import FileError, TooLargeError
from samray.storage.faults import DamagedBodyError
from samray.storage.filesystems import filesystem
from samray.storage.redaction import redact
from samray.storage.retrying import attempt_options

_PIECE_BYTES: Final = 256 * 1024
_MOST_SKIPPED_BYTES: Final = 64 * 2**20
"""Maximum bytes read and discarded to reach an offset, if the server sends the whole file instead of a range."""

_MOST_BOXES: Final = 1000
_HEAD_ATTEMPTS: Final = 3
_LATER: Final = frozenset({408, 429, *range(500, 600)} - {501})
"""Status codes of faults that pass; 501 says that the server has no HEAD."""

_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")

Decode = Callable[[bytes], Iterator[bytes]]


def read_whole_once(uri: str, max_bytes: int) -> bytes:
    """The decoded body, in little more than max_bytes of memory. Raises: TooLargeError, FileError, aiohttp's errors."""
    return _run(uri, None, _read_whole, uri, max_bytes)


def read_range_once(uri: str, offset: int, length: int | None) -> bytes:
    """`length` bytes from `offset`, fewer at the end of the file. Raises: FileError, aiohttp's errors."""
    return _run(uri, length, _read_range, uri, offset, length)


def _run(uri: str, num_bytes: int | None, coroutine: Callable[..., Any], *args: Any) -> bytes:
    from fsspec.asyn import sync

    fs = filesystem(uri)
    # In fsspec's event loop, whose thread owns the session.
    data: bytes = sync(fs.loop, coroutine, fs, *args, **attempt_options(fs, num_bytes))
    return data


def _ask(fs: Any, method: Callable[..., Any], uri: str, headers: dict[str, str]) -> Any:
    options = {**fs.kwargs, "allow_redirects": True, "auto_decompress": False}  # aiohttp's would have no limit
    # Neither the length nor a range of a compressed body would be the file's.
    options["headers"] = {**options.get("headers", {}), "Accept-Encoding": "identity", **headers}
    return method(fs.encode_url(uri), **options)


async def _read_whole(fs: Any, uri: str, max_bytes: int) -> bytes:
    session = await fs.set_session()
    async with _ask(fs, session.get, uri, {}) as response:
        # fsspec's own check: FileNotFoundError for 404, else aiohttp's error with the status.
        fs._raise_not_found_for_status(response, uri)
        coding = response.headers.get("Content-Encoding", "").strip().lower()
        # The promised length only serves to refuse early; what arrives is counted below.
        length = response.content_length
        if length is not None and length > max_bytes:
            response.close()
            raise TooLargeError(length, f"{redact(uri)} has {length} bytes")
        body = bytearray()
        decode = _decoder(coding, uri)
        async for chunk in response.content.iter_chunked(_PIECE_BYTES):
            for piece in decode(chunk):
                body += piece
                if len(body) > max_bytes:
                    response.close()
                    raise TooLargeError(len(body), f"{redact(uri)} has more than {max_bytes} bytes")
        for piece in decode(b""):
            body += piece
    # A proxy may truncate a body and end it properly: only the file's own end or HEAD can tell.
    if coding in ("", "identity") and not _ends_as_picture(body):
        await _compare_with_head(fs, session, uri, len(body))
    return bytes(body)


def _ends_as_picture(body: bytearray) -> bool:
    """Whether this is a complete JPEG, PNG, WebP, AVIF or HEIC file, by its own end marks.

    Then no HEAD is sent, which may describe another version: some servers send WebP or AVIF instead of a larger file.
    """
    end = bytes(body[-64:])
    if body[:2] == b"\xff\xd8":
        # Near the end, because some files have padding after the mark.
        return b"\xff\xd9" in end
    if body[:4] == b"\x89PNG":
        return b"IEND" in end
    if body[:4] == b"RIFF":
        return len(body) - 8 == int.from_bytes(body[4:8], "little")
    return body[4:8] == b"ftyp" and _ends_with_box(body)


def _ends_with_box(body: bytearray) -> bool:
    """Whether the last ISO box (length, name, content) ends exactly where the body does."""
    offset = 0
    for _ in range(_MOST_BOXES):
        if len(body) - offset < 8:
            break
        length = int.from_bytes(body[offset : offset + 4], "big")
        if length == 1:  # a length of 8 bytes follows
            length = int.from_bytes(body[offset + 8 : offset + 16], "big")
        # 0 means until the end of the file, which proves nothing; 2 to 7 are damage.
        if length < 8:
            return False
        offset += length
    return offset == len(body)


async def _compare_with_head(fs: Any, session: Any, uri: str, num_bytes: int) -> None:
    """Raises: DamagedBodyError if HEAD reports more bytes than came; a truncated body may claim to be complete."""
    promised = await _promised_by_head(fs, session, uri)
    if promised.isdigit() and int(promised) > num_bytes:
        raise DamagedBodyError(f"the body ended after {num_bytes} of {promised} bytes")


async def _promised_by_head(fs: Any, session: Any, uri: str) -> str:
    """The length in the answer to HEAD; empty if it says none, or the server supports only GET, as many do."""
    from aiohttp import ClientError

    # A fault that passes must not look like such a server: a truncated body would then count as whole.
    for _ in range(_HEAD_ATTEMPTS):
        with contextlib.suppress(ClientError, TimeoutError):
            async with _ask(fs, session.head, uri, {}) as head:
                if head.status in _LATER:
                    continue
                coded = head.headers.get("Content-Encoding", "identity") != "identity"
                return head.headers.get("Content-Length", "") if head.status == 200 and not coded else ""
    return ""


async def _read_range(fs: Any, uri: str, offset: int, length: int | None) -> bytes:
    session = await fs.set_session()
    last = "" if length is None else str(offset + length - 1)
    async with _ask(fs, session.get, uri, {"Range": f"bytes={offset}-{last}"}) as response:
        if response.status == 416:  # starts at or past the end
            return b""
        fs._raise_not_found_for_status(response, uri)
        if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            raise FileError(f"{redact(uri)}: the server sends a compressed range, which is not a range of the file")
        skip = offset
        # Servers may send another range than asked for, or the whole file with status 200.
        if response.status == 206:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != offset:
                raise DamagedBodyError(f"asked for bytes from {offset}, got {response.headers.get('Content-Range')}")
            skip = 0
        elif skip > _MOST_SKIPPED_BYTES:
            response.close()
            raise FileError(
                f"{redact(uri)}: the server does not support range requests; copy the file to another storage"
            )
        body = bytearray()
        async for chunk in response.content.iter_chunked(_PIECE_BYTES):
            body += chunk[skip:]
            skip = max(0, skip - len(chunk))
            if length is not None and len(body) >= length:
                # Closing is the only way to stop the rest of a whole file.
                if response.status != 206 or len(body) > length:
                    response.close()
                break
    return bytes(body if length is None else body[:length])


def _decoder(coding: str, uri: str) -> Decode:
    """Returns a function from received chunks to pieces of the body, each of limited size; an empty chunk ends it."""
    if coding in ("", "identity"):
        return lambda chunk: iter((chunk,))
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise FileError(
            f"{redact(uri)}: the server sends the body as {coding!r}, although the request asked for no compression"
        )
    # 32: gzip or zlib, whichever the header says.
    inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)

    def decode(chunk: bytes) -> Iterator[bytes]:
        if not chunk:
            if not inflate.eof:
                raise DamagedBodyError("the compressed body was truncated")
            return
        while chunk and not inflate.eof:
            # In pieces of limited size: a few kilobytes can inflate to gigabytes.
            yield inflate.decompress(chunk, _PIECE_BYTES)
            chunk = inflate.unconsumed_tail

    return decode
