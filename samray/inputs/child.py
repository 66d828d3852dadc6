"""A child process that an image may crash: the crash identifies the image and affects no other.

The child calls one function per request, over a socket pair. It is started as a fresh interpreter, because a fork of a
process with Ray's and torch's threads may hang. It ends with its parent, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Final

from samray.errors import SamrayError

Answer = tuple[bytes, int | None]
"""A child's answer: bytes, and a file descriptor or None."""

Buffer = bytes | bytearray | memoryview

CRASHES_TO_BLAME: Final = 2
"""Crashes on one image, processed alone, before the image is blamed."""

KILLS_TO_BLAME: Final = 5
"""The same for kills (SIGKILL), which the kernel's OOM killer and people also do without the image's fault."""

_CRASHES: Final = {-s for s in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)}


class ChildDied(Exception):
    """The child ended, or was killed after a timeout, before it answered.

    returncode: as in subprocess: minus the signal, or the exit status.
    """

    def __init__(self, returncode: int) -> None:
        super().__init__(f"the process ended with {how_it_ended(returncode)}")
        self.returncode = returncode

    @property
    def is_crash(self) -> bool:
        """Whether it crashed by itself."""
        return self.returncode in _CRASHES or self.returncode > 0


class ChildNotStarted(SamrayError):
    """A process could not be started, or ended before it was ready. No image is at fault."""


def how_it_ended(returncode: int) -> str:
    """`signal 11 (SIGSEGV)`, `exit status 1`."""
    if returncode >= 0:
        return f"exit status {returncode}"
    with contextlib.suppress(ValueError):
        return f"signal {-returncode} ({signal.Signals(-returncode).name})"
    return f"signal {-returncode}"


def is_to_blame(deaths: Sequence[ChildDied]) -> bool:
    """Whether these deaths on one image, processed alone, prove that the image is the cause."""
    return sum(death.is_crash for death in deaths) >= CRASHES_TO_BLAME or len(deaths) >= KILLS_TO_BLAME


class Child:
    """The parent's side. target: `module:function`, which takes setup and returns the function for requests."""

    def __init__(self, target: str, setup: bytes, start_timeout_s: float = 120.0) -> None:
        """Start the process and wait until it is ready. Raises ChildNotStarted."""
        # Requests go over the first pair; the second has no traffic and only shows the child that its parent is alive.
        self._socket, child_socket = socket.socketpair()
        self._lifeline, their_lifeline = socket.socketpair()
        code = (
            "from samray.inputs.child import serve;"
            f"serve({child_socket.fileno()}, {their_lifeline.fileno()}, {os.getpid()}, {target!r})"
        )
        # The child imports from the same places as its parent; -P keeps the current folder out of the path.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                pass_fds=(child_socket.fileno(), their_lifeline.fileno()),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError as error:
            raise ChildNotStarted(f"could not start a process of its own for an image: {error}") from error
        finally:
            # If the parent kept the child's end open, too, it would not notice the child's death.
            child_socket.close()
            their_lifeline.close()
        try:
            self.ask(setup, timeout_s=start_timeout_s)
        except ChildDied as death:
            raise ChildNotStarted(f"a process of its own for an image did not start: {death}") from death

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, *parts: Buffer, timeout_s: float) -> Answer:
        """Send one request and return its answer. Raises ChildDied; after that the child is gone."""
        try:
            self._socket.settimeout(timeout_s)
            _send(self._socket, parts)
            return _receive(self._socket)
        except (OSError, EOFError) as error:
            if isinstance(error, TimeoutError):
                # A child that does not answer in time may be inside a decoder, which only a kill ends.
                self._process.kill()
            raise ChildDied(self.close()) from error

    def close(self) -> int:
        """End the process; returns how it ended."""
        self._socket.close()
        self._lifeline.close()
        return self._process.wait()


def serve(socket_fd: int, lifeline_fd: int, parent: int, target: str) -> None:
    """The child's side: answer requests until the parent closes the socket or is gone."""
    # The parent may ignore or block these signals, which a new process inherits.
    for number in (signal.SIGIO, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGIO, signal.SIGXCPU))
    # When the parent's end of this is closed, the kernel sends SIGIO, which ends the process even inside a decoder.
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, fcntl.fcntl(lifeline_fd, fcntl.F_GETFL) | os.O_ASYNC)
    # The parent may have died before SIGIO was set up.
    if os.getppid() != parent:
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole process group; the parent handles it
    with contextlib.suppress(EOFError, OSError), socket.socket(fileno=socket_fd) as stream:
        setup, _ = _receive(stream)
        module, _, name = target.partition(":")
        answer: Callable[[bytes], Answer] = getattr(importlib.import_module(module), name)(setup)
        _send(stream, ())
        while True:
            request, _ = _receive(stream)
            reply, fd = answer(request)
            # The request is a whole image file: freed before the child waits for the next one.
            del request
            _send(stream, (reply,), fd)
            if fd is not None:
                os.close(fd)
    # Not an ordinary exit: nothing in this process needs cleaning up, and finalizers could hang.
    os._exit(0)


def _send(stream: socket.socket, parts: Sequence[Buffer], fd: int | None = None) -> None:
    header = struct.pack("<Q", sum(len(part) for part in parts))
    if fd is None:
        stream.sendall(header)
    else:
        socket.send_fds(stream, [header], [fd])
    for part in parts:
        stream.sendall(part)


def _receive(stream: socket.socket) -> Answer:
    header, fds, _, _ = socket.recv_fds(stream, 8, 1)
    if len(header) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", header)
    data = bytearray(size)
    # A read may return any part of what is missing.
    view = memoryview(data)
    while view:
        number = stream.recv_into(view)
        if not number:
            raise EOFError
        view = view[number:]
    return bytes(data), fds[0] if fds else None
