"""Counters of the bytes that reading takes."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from samray import storage


@dataclass
class Count:
    """Bytes so far."""

    num_bytes: int = 0
    num_requests: int = 0
    endpoint: str = ""


@contextlib.contextmanager
def count_reads() -> Iterator[Count]:
    """What samray's storage layer hands out, whatever the storage."""
    count = Count()
    original = storage.reading._read_once

    def counting(uri: str, offset: int | None, length: int | None) -> bytes:
        data = original(uri, offset, length)
        count.num_bytes += len(data)
        count.num_requests += 1
        return data

    storage.reading._read_once = counting
    try:
        yield count
    finally:
        storage.reading._read_once = original


@contextlib.contextmanager
def count_on_the_wire(endpoint: str) -> Iterator[Count]:
    """Everything a server sends, headers included, to clients that use `count.endpoint` in the place of its own.

    Signatures hold: they cover the name by which a client knows the server, and that is passed on as it is.
    """
    target = urlsplit(endpoint)
    count = Count()
    lock = threading.Lock()

    def pump(source: socket.socket, sink: socket.socket, *, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if counted:
                    with lock:
                        count.num_bytes += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((str(target.hostname), int(target.port or 80)))
                for source, sink, counted in ((client, server, False), (server, client, True)):
                    threading.Thread(target=pump, args=(source, sink), kwargs={"counted": counted}, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        count.endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=accept, daemon=True).start()
        yield count
