"""Outputs on filesystems that write in place, and on stores that keep no promise."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from samray import storage
from samray.errors import ConfigError, NotFoundError
from samray.output.compact import compact
from samray.output.plan import write_plan
from samray.storage.filesystems import filesystem
from tests.support import REPOSITORY
from tests.support.exported import export, ten_images


class InPlace(LocalFileSystem):
    """A local folder as fsspec's default writes it: opened, written, closed."""

    protocol = "inplace"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        with open(self._strip_protocol(path), "wb") as file:
            file.write(value[: len(value) // 2])
            file.flush()
            if value.startswith(b"dies"):
                os._exit(9)
            file.write(value[len(value) // 2 :])

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("inplace://").lstrip("/")

    def unstrip_protocol(self, name: str) -> str:
        return f"inplace:/{name}"


class CannotRename(InPlace):
    """As most filesystems of fsspec: renaming is copying and deleting."""

    protocol = "norename"
    mv = AbstractFileSystem.mv


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    for kind in (InPlace, CannotRename):
        fsspec.register_implementation(kind.protocol, kind, clobber=True)
    yield
    storage.reset()


@pytest.fixture(scope="module")
def ftp_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real FTP server."""
    from pyftpdlib.authorizers import DummyAuthorizer
    from pyftpdlib.handlers import FTPHandler
    from pyftpdlib.servers import FTPServer

    folder = tmp_path_factory.mktemp("ftp")
    authorizer = DummyAuthorizer()
    authorizer.add_user("me", "secret", str(folder), perm="elradfmwMT")
    handler = type("Handler", (FTPHandler,), {"authorizer": authorizer})
    server = FTPServer(("127.0.0.1", 0), handler)
    port = server.address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"timeout": 0.05, "handle_exit": False}, daemon=True)
    thread.start()
    yield f"ftp://me:secret@127.0.0.1:{port}/out"
    storage.reset()
    server.close_all()
    thread.join(5)


@pytest.fixture(params=["inplace", "ftp"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"inplace:/{tmp_path}/out" if request.param == "inplace" else request.getfixturevalue("ftp_root")


def test_files_are_created_once_and_replaced_whole(root: str) -> None:
    storage.check_output(root)
    uri = storage.join(root, "annotations", "shard-000000.parquet")
    assert storage.put_new(uri, b"first" * 1000)
    assert not storage.put_new(uri, b"second")
    assert storage.read_bytes(uri) == b"first" * 1000
    storage.put(uri, b"third")
    assert storage.read_bytes(uri) == b"third"
    storage.put_chunks(storage.join(root, "annotations", "x"), iter([b"a", b"b"]))
    assert storage.list_names(storage.parent(uri)) == {"shard-000000.parquet": 5, "x": 2}
    storage.delete(uri)
    with pytest.raises(NotFoundError):
        storage.read_bytes(uri)


def test_ftp_serves_many_threads_and_reconnects(ftp_root: str) -> None:
    uris = [storage.join(ftp_root, f"{i}.bin") for i in range(12)]
    for i, uri in enumerate(uris):
        storage.put(uri, bytes([i]) * 1000)
    filesystem(ftp_root).ftp.sock.shutdown(socket.SHUT_RDWR)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(storage.read_bytes, uris)) == [bytes([i]) * 1000 for i in range(12)]
    assert {entry.uri for entry in storage.list_files(ftp_root)} >= set(uris)


@pytest.mark.slow
@pytest.mark.parametrize("write", ["put", "put_new"])
def test_a_process_that_is_killed_leaves_no_torn_file(tmp_path: Path, write: str) -> None:
    uri = f"inplace:/{tmp_path}/annotations/shard-000000.parquet"
    code = f"""
import fsspec
from tests.unit import test_storage_in_place as here
from samray import storage
fsspec.register_implementation("inplace", here.InPlace)
storage.{write}({uri!r}, b"dies" * 100)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 9
    assert [name for name in os.listdir(tmp_path / "annotations") if not name.endswith(".tmp")] == []
    assert storage.put_new(uri, b"whole")
    assert storage.read_bytes(uri) == b"whole"


def test_what_can_be_neither_is_no_output(tmp_path: Path) -> None:
    uri = f"norename:/{tmp_path}/x"
    for write in (
        lambda: storage.check_output(uri),
        lambda: storage.put(uri, b"x"),
        lambda: storage.put_new(uri, b"x"),
        lambda: storage.put_chunks(uri, iter([b"x"])),
    ):
        with pytest.raises(ConfigError, match="written in place and cannot be renamed"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_export_compact_and_import_probe_their_storage_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ten_images(str(tmp_path))
    pipe_file = MemoryFileSystem.pipe_file
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda fs, path, data, mode, **_: pipe_file(fs, path, data))
    writers: dict[str, Callable[[str], object]] = {
        "export": lambda dest: export(plan, dest, "coco"),
        "compact": lambda dest: compact(plan.output, dest, 10**6),
        "import": lambda dest: write_plan(dest, plan.read_images(["uri"]), 10, plan.run),
    }
    for name, write in writers.items():
        with pytest.raises(ConfigError, match="conditional writes"):
            write(f"memory://unconditional/{name}")
    assert storage.list_names("memory://unconditional") == {}
