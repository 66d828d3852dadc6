"""Inputs on web servers: faults on the wire, and bodies that are not what they say."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import io
import tarfile
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from samray import storage
from samray.config import InputConfig, StorageConfig
from samray.errors import ImageError, StorageError, UnavailableError
from samray.inputs.listing import INPUT_SCHEMA, fetch_images, list_images
from samray.storage.retrying import forget_outages
from tests.support.fault_proxy import FaultProxy, running_proxy

STALL_S = 0.8
FILES = {f"{i}.png": f"{i}.png".encode() * 3000 for i in range(6)}

TRANSIENT = (
    *("408", "421", "423", "425", "429", "500", "502", "503", "504", "507", "509", "520", "530", "599"),
    *("no answer", "reset", "garbage", "stall", "stall in body", "cut", "cut chunked", "short"),
)


class _Files(http.server.BaseHTTPRequestHandler):
    """Serves FILES by whole or by range, and the odd answers of ODD."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        if name in ODD:
            ODD[name](self)
            return
        data = FILES.get(name)
        if data is None:
            self.answer(404, b"")
            return
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        if not asked or name.startswith("no-ranges"):
            self.answer(200, data)
            return
        first, _, last = asked.partition("-")
        end = min(int(last) + 1 if last else len(data), len(data))
        if int(first) >= len(data):
            self.answer(416, b"")
        else:
            span = f"bytes {first}-{end - 1}/{len(data)}"
            self.answer(206, data[int(first) : end], **{"Content-Range": span})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(OSError):  # a reader that has seen enough hangs up
                self.wfile.write(body)

    def pour(self, piece: bytes, first: bytes = b"x", **headers: str) -> None:
        """Send the piece again and again, in chunks, until nobody listens or 300 MB are through."""
        self.answer(200, b"", **{"Content-Length": "", "Transfer-Encoding": "chunked", **headers})
        if self.command == "GET":
            with contextlib.suppress(OSError):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(first), first))
                for _ in range(300_000_000 // len(piece)):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


BOMB = gzip.compress(bytes(200_000_000), 1)
BOMB_DEFLATE = zlib.compress(bytes(200_000_000), 1)
"""A million bytes that are two hundred as decoded."""

COMPLETE = {
    "webp": b"RIFF\x58\0\0\0WEBP" + b"x" * 84,
    "avif": b"\0\0\0\x10ftypavif\0\0\0\0" + b"\0\0\0\x01mdat\0\0\0\0\0\0\0\x50" + b"x" * 64,
}
"""Whole by the lengths that they hold."""

ODD: dict[str, Callable[[_Files], None]] = {
    "endless": lambda h: h.pour(bytes(100_000)),
    "endless-gzip": lambda h: h.pour(_STORED_BLOCK, first=b"\x1f\x8b\x08\0\0\0\0\0\0\3", **_GZIP),
    "bomb": lambda h: h.answer(200, BOMB, **_GZIP),
    "bomb-deflate": lambda h: h.answer(200, BOMB_DEFLATE, **{"Content-Encoding": "deflate"}),
    "said-to-be-huge": lambda h: h.answer(200, b"x", **{"Content-Length": str(10**15)}),
    "gzip.png": lambda h: h.answer(200, gzip.compress(b"picture" * 100), **_GZIP),
    "zlib.png": lambda h: h.answer(200, zlib.compress(b"picture" * 100), **{"Content-Encoding": "deflate"}),
    "cut-gzip": lambda h: h.answer(200, gzip.compress(b"picture" * 100)[:-20], **_GZIP),
    "brotli": lambda h: h.answer(200, b"x" * 50, **{"Content-Encoding": "br"}),
    "until-close": lambda h: h.answer(200, b"picture" * 100, **_CLOSE),
    "cut-until-close": lambda h: h.answer(
        200, b"picture" * (50 if h.command == "GET" else 100), **(_CLOSE if h.command == "GET" else {})
    ),
    **{
        f"{which}.{name}": lambda h, body=body: h.answer(
            200, body if h.command == "GET" else bytes(900), **(_CLOSE if h.command == "GET" else {})
        )
        for name, whole in COMPLETE.items()
        for which, body in (("other-form", whole), ("cut-other-form", whole[:-3]))
    },
    "wrong-range": lambda h: h.answer(206, b"x" * 10, **{"Content-Range": "bytes 0-9/100"}),
}
_STORED_BLOCK = b"\0\xff\xff\0\0" + bytes(65535)
_GZIP = {"Content-Encoding": "gzip"}
_CLOSE = {"Content-Length": "", "Connection": "close"}


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Files) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def module_proxy(web: str) -> Iterator[FaultProxy]:
    with running_proxy(web.removeprefix("http://")) as proxy:
        yield proxy
    storage.configure(StorageConfig())
    storage.reset()


@pytest.fixture
def proxy(module_proxy: FaultProxy) -> FaultProxy:
    """A proxy before the server, with nothing spoilt."""
    module_proxy.heal()
    forget_outages()
    storage.configure(StorageConfig(timeout_s=30, stall_timeout_s=STALL_S))
    return module_proxy


def short_patience() -> None:
    storage.configure(StorageConfig(timeout_s=0.5, stall_timeout_s=STALL_S))


def rows_of(*uris: str) -> pa.Table:
    return pa.Table.from_pylist([{"uri": uri} for uri in uris], INPUT_SCHEMA)


def fetched(rows: pa.Table, sample: list[str] | None = None, **settings: Any) -> list[bytes | str]:
    data = fetch_images(rows, InputConfig(**settings), None if sample is None else lambda: sample)
    return [d.reason if isinstance(d, ImageError) else d for d in data]


# --- on the wire ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_fault_that_passes_costs_nothing(proxy: FaultProxy, fault: str) -> None:
    uris = [f"{proxy.url}/{name}" for name in FILES]
    proxy.spoil(fault, "GET", times=3)
    assert fetched(rows_of(*uris), uris) == list(FILES.values())
    assert proxy.num_spoilt == 3


@pytest.mark.slow  # each waits for time limits
@pytest.mark.parametrize("fault", [*TRANSIENT, "AccessDenied"])
@pytest.mark.parametrize("after", [0, 4])
def test_a_fault_that_stays_ends_the_run_and_blames_nobody(proxy: FaultProxy, fault: str, after: int) -> None:
    short_patience()
    uris = [f"{proxy.url}/{name}" for name in FILES]
    proxy.spoil(fault, "GET", after=after)
    with pytest.raises(StorageError):
        fetched(rows_of(*uris), uris)


@pytest.mark.parametrize("fault", ["503", "reset", "cut", "stall in body", "AccessDenied"])
def test_one_file_that_always_fails_is_that_images_fault(proxy: FaultProxy, fault: str) -> None:
    short_patience()
    uris = [f"{proxy.url}/{name}" for name in FILES]
    proxy.spoil(fault, "GET", only="3.png")
    wanted = [data if name != "3.png" else "unreadable" for name, data in FILES.items()]
    assert fetched(rows_of(*uris), uris) == wanted
    assert fetched(rows_of(uris[3]), uris) == ["unreadable"]  # alone in its slice: others of the input are asked for


def test_a_storage_that_comes_back_in_the_last_moment_costs_nothing(proxy: FaultProxy) -> None:
    short_patience()
    uris = [f"{proxy.url}/{name}" for name in FILES]

    def sample() -> list[str]:
        proxy.heal()
        return uris

    proxy.spoil("503", "GET")
    assert fetch_images(rows_of(*uris[:2]), InputConfig(), sample) == list(FILES.values())[:2]


def test_a_dead_host_among_others_is_its_images_fault(proxy: FaultProxy) -> None:
    short_patience()
    dead = [f"http://127.0.0.1:9/{name}" for name in FILES]
    alive = f"{proxy.url}/0.png"
    assert fetched(rows_of(*dead), [*dead, alive]) == ["unreadable"] * 6
    with pytest.raises(UnavailableError):
        fetched(rows_of(*dead), dead)


@pytest.mark.parametrize("fault", ["503", "reset", "cut", "stall in body"])
@pytest.mark.parametrize("kind", ["GET", "HEAD"])
def test_a_tar_on_the_web(proxy: FaultProxy, tmp_path: Path, kind: str, fault: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in list(FILES.items())[:6]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    FILES["x.tar"] = buffer.getvalue()
    try:
        if not (kind == "HEAD" and fault in ("cut", "stall in body")):
            proxy.spoil(fault, kind, times=1)
        rows, _ = list_images(f"{proxy.url}/x.tar", InputConfig())
        proxy.spoil(fault, "GET", times=2)
        assert fetched(rows) == [FILES[f"{i}.png"] for i in range(6)]
    finally:
        del FILES["x.tar"]


def test_a_server_without_ranges_gives_the_right_bytes(proxy: FaultProxy) -> None:
    FILES["no-ranges.bin"] = bytes(range(256)) * 10_000
    try:
        assert storage.read_bytes(f"{proxy.url}/no-ranges.bin", 300_003, 5) == bytes([227, 228, 229, 230, 231])
    finally:
        del FILES["no-ranges.bin"]


# --- bodies that are not what they say -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["endless", "endless-gzip", "bomb", "bomb-deflate", "said-to-be-huge"])
def test_max_bytes_bounds_every_body(proxy: FaultProxy, web: str, name: str) -> None:
    tracemalloc.start()
    try:
        assert fetched(rows_of(f"{web}/{name}"), max_bytes=2_000_000) == ["too_large"]
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_compressed_bodies_are_decoded(proxy: FaultProxy, web: str) -> None:
    whole = b"picture" * 100
    assert fetched(rows_of(f"{web}/gzip.png", f"{web}/zlib.png", f"{web}/until-close")) == [whole] * 3


@pytest.mark.parametrize("name", COMPLETE)
def test_a_picture_in_a_smaller_form_than_head_speaks_of_is_whole(proxy: FaultProxy, web: str, name: str) -> None:
    short_patience()
    assert fetched(rows_of(f"{web}/other-form.{name}")) == [COMPLETE[name]]
    assert fetched(rows_of(f"{web}/cut-other-form.{name}"), [f"{web}/0.png"]) == ["unreadable"]


@pytest.mark.parametrize(
    ("name", "said"), [("cut-gzip", "cut"), ("brotli", "'br'"), ("cut-until-close", "350 of 700 bytes")]
)
def test_what_cannot_be_right_is_said(proxy: FaultProxy, web: str, name: str, said: str) -> None:
    short_patience()
    (data,) = fetch_images(rows_of(f"{web}/{name}"), InputConfig(), lambda: [f"{web}/0.png"])
    assert isinstance(data, ImageError)
    assert said in data.message


@pytest.mark.parametrize("fault", ["reset", "no answer", "stall", "503", "429"])
def test_a_head_that_fails_once_does_not_make_a_cut_body_whole(proxy: FaultProxy, fault: str) -> None:
    """A failed HEAD counted as one that the server does not support: half of the body was the image."""
    short_patience()
    proxy.spoil(fault, "HEAD", times=1)
    (data,) = fetch_images(rows_of(f"{proxy.url}/cut-until-close"), InputConfig(), lambda: [f"{proxy.url}/0.png"])
    assert proxy.num_spoilt == 1
    assert isinstance(data, ImageError)
    assert "350 of 700 bytes" in data.message


def test_another_range_than_asked_for_is_not_taken(proxy: FaultProxy, web: str) -> None:
    short_patience()
    with pytest.raises(UnavailableError, match="asked for bytes from 50"):
        storage.read_bytes(f"{web}/wrong-range", 50, 10)


def test_a_stalled_server_holds_an_image_no_longer_than_the_setting_says(proxy: FaultProxy) -> None:
    storage.configure(StorageConfig(timeout_s=30, max_attempts=2, stall_timeout_s=STALL_S))
    proxy.spoil("stall in body", "GET", only="3.png")
    assert fetched(rows_of(f"{proxy.url}/3.png"), [f"{proxy.url}/0.png"]) == ["unreadable"]
    assert proxy.num_spoilt <= 4  # two attempts, and a last try once another file was read
