"""A proxy that spoils answers of a real server, on the wire: the client sees broken sockets, not exceptions."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Answer = tuple[int, list[tuple[str, str]], bytes]


@dataclass
class FaultProxy:
    """Forwards to `upstream` (host:port). spoil: the fault of the next requests of a kind, `times` of them."""

    upstream: str
    url: str = ""
    fault: Callable[[_Handler, Answer], None] | None = None
    kind: str = ""
    times: float = 0
    only: str = ""
    """Part of the path of the requests that are spoilt."""
    ignores_conditions: bool = False
    """Says that all is well where the server refused a conditional write, as a store does that knows no conditions."""
    num_spoilt: int = 0
    num_requests: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def spoil(self, fault: str, kind: str, times: float = float("inf"), only: str = "", after: int = 0) -> None:
        """kind: GET, HEAD, LIST or PUT. after: so many requests of the kind are let through before."""
        self.fault, self.kind, self.times, self.only = FAULTS[fault], kind, times, only
        self.after = after
        self.num_spoilt = self.num_requests = 0

    def heal(self) -> None:
        self.times, self.ignores_conditions = 0, False

    def take(self, kind: str, path: str) -> Callable[[_Handler, Answer], None] | None:
        with self.lock:
            if kind != self.kind or self.only not in path:
                return None
            self.num_requests += 1
            if self.num_requests <= self.after or self.num_spoilt >= self.times:
                return None
            self.num_spoilt += 1
            return self.fault

    after: int = 0


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def _relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Expect", "").lower() == "100-continue":  # http.server has answered it
            del self.headers["Expect"]
        is_list = self.command == "GET" and "list-type=2" in self.path
        fault = self.proxy.take("LIST" if is_list else self.command, self.path)
        self.answer_first = fault in (_lost_answer,) or (fault is not None and fault not in WITHOUT_UPSTREAM)
        answer = (200, [], b"") if fault is not None and not self.answer_first else self._ask(body)
        if self.proxy.ignores_conditions and answer[0] == 412:
            answer = (200, [], b"")
        if fault is None:
            self.send(answer)
        else:
            fault(self, answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _relay

    def _ask(self, body: bytes) -> Answer:
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            connection.putheader(name, value)
        connection.endheaders(body or None)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        headers = [(n, v) for n, v in response.getheaders() if n.lower() not in ("transfer-encoding", "connection")]
        return response.status, headers, data

    def send(self, answer: Answer, length: int | None = None, end: bool = False) -> None:
        """length: what Content-Length says, if not the truth. end: close the connection afterwards."""
        status, headers, data = answer
        self.send_response(status)
        names = [name.lower() for name, _ in headers]
        for name, value in headers:
            if name.lower() != "content-length" or (self.command == "HEAD" and length is None):
                self.send_header(name, value)
        if self.command != "HEAD" or length is not None or "content-length" not in names:
            self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        if end:
            self.hang_up()

    def hang_up(self, reset: bool = False) -> None:
        with contextlib.suppress(OSError):
            self.wfile.flush()
            if reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                self.connection.shutdown(socket.SHUT_RDWR)
            self.connection.close()
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


def _status(status: int, code: str = "") -> Callable[[_Handler, Answer], None]:
    """An error as S3 words it; a HEAD has no body."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode() if code else b""

    def fault(handler: _Handler, answer: Answer) -> None:
        handler.send((status, [("Content-Type", "application/xml")], body))

    return fault


def _no_answer(handler: _Handler, answer: Answer) -> None:
    handler.hang_up()


def _reset(handler: _Handler, answer: Answer) -> None:
    handler.hang_up(reset=True)


def _garbage(handler: _Handler, answer: Answer) -> None:
    handler.wfile.write(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
    handler.hang_up()


def _stall(handler: _Handler, answer: Answer) -> None:
    handler.proxy_stalled.wait(30)  # type: ignore[attr-defined]
    handler.close_connection = True


def _stall_in_body(handler: _Handler, answer: Answer) -> None:
    status, headers, data = answer
    handler.send((status, headers, data[: len(data) // 2]), length=max(len(data), 10))
    handler.wfile.flush()
    _stall(handler, answer)


def _cut(handler: _Handler, answer: Answer) -> None:
    """The connection ends in the middle of the body."""
    status, headers, data = answer
    handler.send((status, headers, data[: len(data) // 2]), length=max(len(data), 10), end=True)


def _cut_chunked(handler: _Handler, answer: Answer) -> None:
    status, headers, data = answer
    handler.send_response(status)
    for name, value in headers:
        if name.lower() != "content-length":
            handler.send_header(name, value)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    half = data[: len(data) // 2] or b"x"
    handler.wfile.write(b"%x\r\n%s\r\n" % (len(half), half))
    handler.hang_up()


def _short(handler: _Handler, answer: Answer) -> None:
    """A complete answer with status 200, of which half of the body is missing."""
    status, headers, data = answer
    handler.send((status, headers, data[: len(data) // 2]))


def _lost_answer(handler: _Handler, answer: Answer) -> None:
    """What was asked for is done, but nobody hears of it."""
    handler.hang_up()


FAULTS: dict[str, Callable[[_Handler, Answer], None]] = {
    **{
        str(status): _status(status)
        for status in (408, 421, 423, 425, 429, 500, 502, 503, 504, 507, 509, 520, 530, 599)
    },
    **{code: _status(503, code) for code in ("SlowDown", "ServiceUnavailable")},
    **{
        code: _status(400, code)
        for code in ("RequestTimeout", "BadDigest", "IncompleteBody", "KMS.ThrottlingException")
    },
    **{code: _status(500, code) for code in ("InternalError",)},
    "no answer": _no_answer,
    "reset": _reset,
    "garbage": _garbage,
    "stall": _stall,
    "stall in body": _stall_in_body,
    "cut": _cut,
    "cut chunked": _cut_chunked,
    "short": _short,
    "lost answer": _lost_answer,
    **{code: _status(403, code) for code in ("AccessDenied", "InvalidClientTokenId", "InvalidAccessKeyId")},
    **{code: _status(403, code) for code in ("RequestTimeTooSkewed", "SignatureDoesNotMatch")},
    "ExpiredToken": _status(400, "ExpiredToken"),
    "NoSuchBucket": _status(404, "NoSuchBucket"),
}
WITH_UPSTREAM = (_stall_in_body, _cut, _cut_chunked, _short, _lost_answer)
WITHOUT_UPSTREAM = tuple(fault for fault in FAULTS.values() if fault not in WITH_UPSTREAM)


@contextlib.contextmanager
def running_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A proxy before `upstream` (host:port), ended on leaving."""
    proxy = FaultProxy(upstream)
    stalled = threading.Event()
    handler = type("Handler", (_Handler,), {"proxy": proxy, "proxy_stalled": stalled})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        proxy.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield proxy
        finally:
            stalled.set()
            server.shutdown()
            thread.join()
