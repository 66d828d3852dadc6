"""What only a real S3 server shows: credentials, endpoints, large objects, and a server that goes away."""

from __future__ import annotations

import os
import pickle
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.benchmarks import s3_server
from jobs.benchmarks.s3_server import S3Server, free_ports
from samray import storage
from samray.errors import StorageError
from tests.support import REPOSITORY


@pytest.fixture
def fresh_connections() -> object:
    """Forget connections before and after, as the environment is changed in between."""
    storage.reset()
    yield
    storage.reset()


def test_the_server_asks_for_keys(
    s3_root: str, weed: S3Server, monkeypatch: pytest.MonkeyPatch, fresh_connections: object
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-key")
    with pytest.raises(StorageError) as caught:
        storage.put_new(f"{s3_root}/x", b"x")
    assert "credentials" in str(caught.value)
    for secret in ("wrong-secret-key", weed.access_key, weed.secret_key):
        assert secret not in str(caught.value)


def test_the_endpoint_and_keys_may_come_through_fsspec(s3_root: str, weed: S3Server) -> None:
    storage.put(f"{s3_root}/x", b"hello")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {
        "FSSPEC_S3_ENDPOINT_URL": weed.endpoint,
        "FSSPEC_S3_KEY": weed.access_key,
        "FSSPEC_S3_SECRET": weed.secret_key,
    }
    code = f"from samray import storage; print(storage.read_bytes({s3_root + '/x'!r}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "b'hello'", done.stderr


def test_an_endpoint_where_nobody_answers(
    monkeypatch: pytest.MonkeyPatch, fresh_connections: object, storage_limits: Callable[..., None]
) -> None:
    storage_limits(timeout_s=30, max_attempts=3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    with pytest.raises(StorageError, match=r"after 3 attempts.*endpoint can be reached"):
        storage.put_new("s3://bucket/x", b"x")


class _SpeaksGrpc(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(bytes.fromhex("000012040000000000000400400000000500400000000600004000fe0300000001"))


def test_a_server_of_the_tests_gives_way_to_a_program_that_took_its_port(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _SpeaksGrpc) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        tries = [[*free_ports(3), other.server_address[1]], free_ports(4)]
        free = tries[-1][-1]
        monkeypatch.setattr(s3_server, "free_ports", lambda number: tries.pop(0))
        with s3_server.running_s3(tmp_path) as server:
            assert server.endpoint == f"http://127.0.0.1:{free}"
        other.shutdown()


def test_a_large_object_is_one_conditional_put(s3_root: str) -> None:
    """Above 100 MB s3fs would turn to a multipart upload by default."""
    uri = f"{s3_root}/large"
    data = bytes(110 * 2**20)
    assert storage.put_new(uri, data)
    assert not storage.put_new(uri, data)
    assert storage.file_size(uri) == len(data)
    assert storage.read_bytes(uri, len(data) - 2, 10) == b"\0\0"


def test_more_files_than_one_page_of_a_listing(s3_root: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: storage.put(f"{s3_root}/many/{i:05d}", b""), range(1100)))
    assert len(storage.list_names(f"{s3_root}/many")) == 1100
    assert len(list(storage.list_files(s3_root))) == 1100


def test_buckets_that_do_not_exist(weed: S3Server) -> None:
    assert storage.list_names("s3://no-such-bucket/x") == {}
    assert not storage.exists("s3://no-such-bucket/x")
    with pytest.raises(StorageError, match="does not exist"):
        storage.read_bytes("s3://no-such-bucket/x")


def test_another_name_of_the_protocol_stays_what_it_is(s3_root: str) -> None:
    other = s3_root.replace("s3://", "s3a://")
    for name in ("a.png", "b/sa_7.png"):
        storage.put(f"{s3_root}/in/{name}", b"x")
    expected = [f"{other}/in/a.png", f"{other}/in/b/sa_7.png"]
    assert sorted(entry.uri for entry in storage.list_files(f"{other}/in")) == expected
    assert [entry.uri for entry in storage.list_files(f"{other}/in/*/*.png")] == expected[1:]
    assert storage.read_bytes(f"{other}/in/a.png") == b"x"


def test_arrow_gets_the_filesystem_that_samray_has(s3_root: str) -> None:
    assert storage.for_arrow("/a b/c") == (None, "/a b/c")
    filesystem, path = storage.for_arrow(f"{s3_root}/a b%20c")
    with pickle.loads(pickle.dumps(filesystem)).open_output_stream(f"{path}/x") as stream:  # Ray sends it to its actors
        stream.write(b"notes")
    assert storage.read_bytes(f"{s3_root}/a b%20c/x") == b"notes"
