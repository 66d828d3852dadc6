"""Storage: the same promises on disk and on S3, and what becomes of each kind of error.

The file is long because its cases share their helpers.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import http.client
import logging
import multiprocessing
import os
import pickle
import socket
import ssl
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import botocore.exceptions
import botocore.parsers
import pytest
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from samray import storage
from samray.config import StorageConfig
from samray.errors import (
    BucketNotFoundError,
    ConfigError,
    FileError,
    NotFoundError,
    RefusedError,
    StorageError,
    UnavailableError,
)
from samray.storage import faults, filesystems, retrying, writing

HOSTILE_NAMES = [
    "a b.jpg",
    "100%.jpg",
    "%41.jpg",
    "#1.jpg",
    "what?.jpg",
    "[0-9]*.jpg",
    "ärger 图.jpg",
    "a::b.jpg",
    "~x.jpg",
]


# --- both kinds of storage -----------------------------------------------------------------------------------------


def test_put_new_creates_once_and_put_replaces(storage_root: str) -> None:
    uri = storage.join(storage_root, "deep", "er", "file")
    assert not storage.exists(uri)
    assert storage.put_new(uri, b"first")
    assert not storage.put_new(uri, b"second")
    assert storage.read_bytes(uri) == b"first"
    storage.put(uri, b"third")
    assert storage.read_bytes(uri) == b"third"
    assert storage.list_names(storage.parent(uri)) == {"file": 5}
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)
    assert storage.put_new(uri, b"")
    assert storage.read_bytes(uri) == b""


def test_of_many_writers_at_the_same_moment_one_wins(storage_root: str) -> None:
    num_writers, num_rounds = (8, 20) if storage.is_local(storage_root) else (4, 2)  # SeaweedFS takes a second for each
    for round_ in range(num_rounds):
        uri = storage.join(storage_root, f"race-{round_}")
        barrier = threading.Barrier(num_writers)
        won: list[int] = []

        def write(i: int, uri: str = uri, barrier: threading.Barrier = barrier, won: list[int] = won) -> None:
            barrier.wait()
            if storage.put_new(uri, bytes([i]) * 50_000):
                won.append(i)

        threads = [threading.Thread(target=write, args=(i,)) for i in range(num_writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert storage.read_bytes(uri) == bytes(won) * 50_000
    assert len(storage.list_names(storage_root)) == num_rounds


def test_ranges(storage_root: str) -> None:
    uri = storage.join(storage_root, "digits")
    storage.put(uri, b"0123456789")
    assert storage.read_bytes(uri, 3, 4) == b"3456"
    assert storage.read_bytes(uri, 0, 1) == b"0"
    assert storage.read_bytes(uri, 8, 100) == b"89"
    assert storage.read_bytes(uri, 7) == b"789"
    assert storage.read_bytes(uri, 10, 5) == b""
    assert storage.read_bytes(uri, 99, 5) == b""
    assert storage.read_bytes(uri, 2, 0) == b""
    assert storage.file_size(uri) == 10


def test_open_read_is_a_seekable_stream(storage_root: str) -> None:
    uri = storage.join(storage_root, "big")
    data = os.urandom(300_000)
    storage.put(uri, data)
    with storage.open_read(uri) as stream:
        assert stream.read(10) == data[:10]
        stream.seek(-5, os.SEEK_END)
        assert stream.read(100) == data[-5:]
        stream.seek(100_000)
        assert stream.read(150_000) == data[100_000:250_000]
        assert stream.tell() == 250_000
    with storage.open_read(uri) as stream:
        assert stream.read() == data


def test_hostile_names_are_literal(storage_root: str) -> None:
    uris = {storage.join(storage_root, "sub dir [x]", name) for name in HOSTILE_NAMES}
    for uri in uris:
        assert storage.put_new(uri, uri.encode())
    assert {entry.uri for entry in storage.list_files(storage_root)} == uris
    assert {entry.uri for entry in storage.list_files(storage.join(storage_root, "sub dir [x]"))} == uris
    for entry in storage.list_files(storage_root):
        assert storage.read_bytes(entry.uri) == entry.uri.encode()
        assert entry.size == len(entry.uri.encode())
        assert storage.exists(entry.uri)
        assert [listed.uri for listed in storage.list_files(entry.uri)] == [entry.uri]
    assert set(storage.list_names(storage.join(storage_root, "sub dir [x]"))) == set(HOSTILE_NAMES)
    storage.delete(storage.join(storage_root, "sub dir [x]", "[0-9]*.jpg"))
    assert len(list(storage.list_files(storage_root))) == len(uris) - 1


def test_listing_shows_what_was_written_a_moment_ago(storage_root: str) -> None:
    for i in range(4):
        assert len(storage.list_names(storage_root)) == i
        assert len(list(storage.list_files(storage_root))) == i if i or storage.is_dir_like(storage_root) else True
        storage.put(storage.join(storage_root, f"{i}"), b"x")
    assert storage.list_names(storage.join(storage_root, "nowhere")) == {}


def test_globs(storage_root: str) -> None:
    for name in ("a/1.jpg", "a/2.png", "a/deep/3.jpg", "b/4.jpg", "b/[5].jpg"):
        storage.put(storage.join(storage_root, *name.split("/")), b"x")

    def names_matching(pattern: str) -> list[str]:
        uris = (entry.uri for entry in storage.list_files(f"{storage_root}/{pattern}"))
        return sorted(uri.removeprefix(f"{storage_root}/") for uri in uris)

    assert names_matching("*/*.jpg") == ["a/1.jpg", "b/4.jpg", "b/[5].jpg"]
    assert names_matching("**/*.jpg") == ["a/1.jpg", "a/deep/3.jpg", "b/4.jpg", "b/[5].jpg"]
    assert names_matching("a/?.*") == ["a/1.jpg", "a/2.png"]
    assert names_matching("[a]") == ["a/1.jpg", "a/2.png", "a/deep/3.jpg"]  # what is below a matched folder
    assert names_matching("b/[5].jpg") == ["b/[5].jpg"]  # the literal name
    assert names_matching("c*") == []
    assert names_matching("nowhere/*.jpg") == []


def test_folders_are_no_files(storage_root: str) -> None:
    storage.put(storage.join(storage_root, "x.jpg", "y"), b"")
    folder = storage.join(storage_root, "x.jpg")
    assert storage.exists(folder)
    assert storage.is_dir_like(folder)
    assert storage.list_names(storage_root) == {}
    with pytest.raises(NotFoundError):
        storage.file_size(folder)
    with pytest.raises(FileError):
        storage.read_bytes(folder)


def test_missing_files_say_so(storage_root: str) -> None:
    uri = storage.join(storage_root, "not there")
    calls: list[Any] = [
        lambda: storage.read_bytes(uri),
        lambda: storage.read_bytes(uri, 0, 5),
        lambda: storage.file_size(uri),
        lambda: storage.open_read(uri),
        lambda: list(storage.list_files(uri)),
    ]
    for call in calls:
        with pytest.raises(NotFoundError, match="not there: it does not exist"):
            call()


def _child(uri: str, results: Any) -> None:
    results.put(storage.read_bytes(uri))


class DiesWith:
    """Ends any process but its maker's that collects it: only the garbage collector can, as it holds itself."""

    def __init__(self) -> None:
        self.maker, self.cycle = os.getpid(), self

    def __del__(self) -> None:
        if os.getpid() != self.maker:
            os._exit(7)


def test_a_forked_child_does_not_finalize_what_its_parent_left() -> None:
    """A reference of Ray's among it waited for a lock that no thread of the child would release."""
    gc.collect()
    gc.disable()
    try:
        DiesWith()
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
        child.join()
    finally:
        gc.enable()
    assert child.exitcode == 0


def test_a_forked_child_makes_its_own_connections(storage_root: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "samray.storage")
    uri = storage.join(storage_root, "file")
    storage.put(uri, b"hello")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_child, args=(uri, results))
    child.start()
    try:
        assert results.get(timeout=60) == b"hello"
    finally:
        child.join(60)
        if child.is_alive():
            child.kill()
    assert storage.read_bytes(uri) == b"hello"
    assert not caplog.records  # the parent's connections were left alone: nothing had to be tried again


# --- names ---------------------------------------------------------------------------------------------------------


def test_normalize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.normalize("x/../y z%20") == f"{tmp_path}/y z%20"
    assert storage.normalize("file:///a/b/") == "/a/b"
    assert storage.normalize("~/a") == os.path.expanduser("~/a")
    assert storage.normalize("S3://Bucket/Key//x/") == "s3://Bucket/Key//x"
    assert storage.normalize("/") == "/"
    assert storage.is_local("file:///x")
    assert not storage.is_local("gs://x/y")


def test_join_parent_resolve() -> None:
    assert storage.join("s3://b", "k", "x y") == "s3://b/k/x y"
    assert storage.join("/", "etc") == "/etc"
    assert storage.join("/a/", "b") == "/a/b"
    assert storage.parent("s3://b/k/x") == "s3://b/k"
    assert storage.parent("s3://b/k") == "s3://b"
    assert storage.parent("/a/b") == "/a"
    assert storage.resolve("/data/lists", "../img/1.jpg") == "/data/img/1.jpg"
    assert storage.resolve("/data", "/abs.jpg") == "/abs.jpg"
    assert storage.resolve("/data", "s3://b/k") == "s3://b/k"
    assert storage.resolve("s3://b/lists", "../img//1.jpg") == "s3://b/img/1.jpg"
    assert storage.resolve("s3://b/lists", "img//1 [x].jpg") == "s3://b/lists/img//1 [x].jpg"
    assert storage.resolve("s3://b/lists", "/mnt/abs.jpg") == "/mnt/abs.jpg"


def test_redact_hides_credentials_and_nothing_else() -> None:
    assert storage.redact("sftp://me:secret@host/x") == "sftp://***@host/x"
    signed = "https://h/x.jpg?X-Amz-Credential=AKIA1%2F2&X-Amz-Signature=abc&v=7"
    assert storage.redact(signed) == "https://h/x.jpg?X-Amz-Credential=***&X-Amz-Signature=***&v=7"
    assert storage.redact("https://h/x?sig=abc%3D&se=2030") == "https://h/x?sig=***&se=***"
    for name in ("X-Goog-Signature", "X-Goog-Credential", "access_token", "api_key", "X-Amz-Security-Token", "apikey"):
        shown = storage.redact(f"https://h/x?{name}=abc&monkey=7&keyframe=3")
        assert shown == f"https://h/x?{name}=***&monkey=7&keyframe=3", name
    assert storage.redact("s3://b/user@example/x.jpg") == "s3://b/user@example/x.jpg"
    assert storage.redact("/home/a@b/c?d=e") == "/home/a@b/c?d=e"


# --- local disks ---------------------------------------------------------------------------------------------------


def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    for write in (storage.put_new, storage.put):
        with pytest.raises(StorageError, match="free some space"):
            write(str(tmp_path / "shard"), b"x" * 1000)
    assert list(tmp_path.iterdir()) == []


def test_without_hard_links_a_rename_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    uri = str(tmp_path / "shard")
    assert storage.put_new(uri, b"first")
    assert not storage.put_new(uri, b"second")
    assert storage.read_bytes(uri) == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["shard"]


def test_a_file_in_the_way_of_a_folder_is_not_taken_for_done(tmp_path: Path) -> None:
    (tmp_path / "annotations").write_bytes(b"")
    for below in ("annotations/shard", "annotations/deep/shard"):
        with pytest.raises(StorageError):
            storage.put_new(str(tmp_path / below), b"x")


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_bytes(b"")
    storage.put_new(str(tmp_path / "ours"), b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.jpg").write_bytes(b"b")
    (tmp_path / "in" / "sub" / "a.jpg").write_bytes(b"a")
    (tmp_path / "in" / "sub" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "in" / "dangling.jpg").symlink_to(tmp_path / "gone")
    names = {entry.uri.removeprefix(f"{tmp_path}/in/") for entry in storage.list_files(str(tmp_path / "in"))}
    assert names == {"sub/a.jpg", "linked/b.jpg", "dangling.jpg"}


def test_names_that_are_no_utf8_are_listed_as_text(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/bad-\xff.jpg", "wb"):
        pass
    (entry,) = storage.list_files(str(tmp_path))
    assert entry.uri == f"{tmp_path}/bad-\\udcff.jpg"
    entry.uri.encode("utf-8")


def test_impossible_names_are_one_files_fault(tmp_path: Path) -> None:
    for name in ("x\0y", "x" * 300):
        with pytest.raises(FileError):
            storage.read_bytes(f"{tmp_path}/{name}")


@contextlib.contextmanager
def _nobody() -> Iterator[None]:
    """Root may read everything, so a refusal can be provoked only as somebody else."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"")
    path.chmod(0)
    with _nobody(), pytest.raises(FileError, match="permission"):
        storage.read_bytes(str(path))


# --- errors and retries --------------------------------------------------------------------------------------------


class FlakyFilesystem:
    """Raises the given errors, one a call, then works."""

    def __init__(self, *failures: BaseException) -> None:
        self.failures = list(failures)
        self.num_calls = 0
        self.stored: dict[str, bytes] = {}
        self.stores_before_failing = False

    def _maybe_fail(self) -> None:
        self.num_calls += 1
        if self.failures:
            raise self.failures.pop(0)

    def cat_file(self, uri: str, **options: Any) -> bytes:
        self._maybe_fail()
        return b"data"

    def pipe_file(self, uri: str, data: bytes, mode: str) -> None:
        if mode == "create" and uri in self.stored:
            raise FileExistsError(uri)
        if self.stores_before_failing:
            self.stored[uri] = data
        self._maybe_fail()
        self.stored[uri] = data


class ServerError(OSError):
    """Carries the server's answer as botocore's errors do."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(errno.EIO, f"the server said {code}")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A filesystem that fails as asked, and a clock that only waiting moves."""
    waits: list[float] = []
    monkeypatch.setattr(retrying.time, "sleep", waits.append)
    monkeypatch.setattr(retrying.time, "monotonic", lambda: 1000.0 + sum(waits))
    monkeypatch.setattr(writing, "_OBJECT_STORES", {"flaky"})
    retrying.forget_outages()

    def install(*failures: BaseException) -> FlakyFilesystem:
        fs = FlakyFilesystem(*failures)
        monkeypatch.setitem(filesystems._filesystems, "flaky", fs)
        return fs

    install.waits = waits  # type: ignore[attr-defined]
    return install


def test_transient_errors_are_retried_with_growing_bounded_waits(flaky: Any) -> None:
    fs = flaky(*[TimeoutError("read timed out")] * 9)
    assert storage.read_bytes("flaky://x/y") == b"data"
    assert fs.num_calls == 10
    limits = [min(retrying.MAX_BACKOFF_S, retrying.FIRST_BACKOFF_S * 2**i) for i in range(9)]
    assert all(0 <= wait <= limit for wait, limit in zip(flaky.waits, limits, strict=True))
    assert len(set(flaky.waits)) > 1  # jitter


def test_a_storm_is_waited_out_for_as_long_as_the_setting_says(flaky: Any, storage_limits: Any) -> None:
    storage_limits(timeout_s=600.0)
    flaky(*[ServerError("SlowDown", 503)] * 60)
    assert storage.read_bytes("flaky://x/y") == b"data"
    assert 60 < sum(flaky.waits) < 600  # many waits of 0 to 10 s


def test_at_some_point_it_gives_up_with_a_sentence(flaky: Any) -> None:
    flaky(*[TimeoutError("read timed out")] * 999)
    with pytest.raises(
        UnavailableError, match=r"cannot read flaky://x/y after \d+ attempts in 7[45] s: read timed out; check"
    ) as caught:
        storage.read_bytes("flaky://x/y")
    assert sum(flaky.waits) == pytest.approx(StorageConfig().timeout_s, abs=1.0)
    assert not isinstance(caught.value, FileError)  # the storage's fault, not the file's
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_number_of_attempts_can_be_limited(flaky: Any, storage_limits: Any) -> None:
    storage_limits(max_attempts=4)
    fs = flaky(*[TimeoutError()] * 99)
    with pytest.raises(UnavailableError, match=r"after 4 attempts .*: no response in time"):
        storage.read_bytes("flaky://x/y")
    assert fs.num_calls == 4


def test_a_storage_that_is_gone_is_waited_for_once_not_by_every_request(flaky: Any) -> None:
    fs = flaky(*[TimeoutError()] * 999)
    for _ in range(3):
        with pytest.raises(UnavailableError):
            storage.read_bytes("flaky://x/y")
    assert sum(flaky.waits) == pytest.approx(StorageConfig().timeout_s, abs=1.0)
    fs.failures.clear()
    assert storage.read_bytes("flaky://x/z") == b"data"
    fs.failures[:] = [TimeoutError()] * 3
    assert storage.read_bytes("flaky://x/y") == b"data"  # it has come back, so it is waited for again


def test_a_time_limit_bounds_all_requests_of_a_block(flaky: Any) -> None:
    flaky(*[TimeoutError()] * 999)
    with storage.time_limit(5.0), pytest.raises(UnavailableError):
        storage.read_bytes("flaky://x/y")
    assert 3.0 < sum(flaky.waits) < 5.0


def _raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def _web_answer(status: int) -> Exception:
    request = aiohttp.RequestInfo(URL("http://host/x"), "GET", CIMultiDictProxy(CIMultiDict()), URL("http://host/x"))
    return aiohttp.ClientResponseError(request, (), status=status)


def _google_answer(status: int, message: str) -> Exception:
    """As gcsfs raises it."""
    error = Exception(f"{message}, {status}")
    vars(error).update(code=status, message=message)
    return error


RETRIED: list[Exception] = [
    *(OSError(getattr(errno, name), name) for name in ("EMFILE", "ENFILE", "EIO", "ENOTCONN", "ESTALE", "ENETUNREACH")),
    *(OSError(getattr(errno, name), name) for name in ("EADDRNOTAVAIL", "ENOBUFS", "EHOSTDOWN", "EREMOTEIO")),
    ConnectionResetError(errno.ECONNRESET, "reset by peer"),
    socket.gaierror(-3, "Temporary failure in name resolution"),
    ssl.SSLError(1, "decryption failed or bad record mac"),
    EOFError(),
    http.client.IncompleteRead(b"x", 5),
    zlib.error("incorrect data check"),
    faults.DamagedBodyError("the body has 3 bytes, the file 5"),
    *(ServerError(code, 503) for code in ("SlowDown", "SlowDownRead", "ServiceUnavailable", "")),
    *(ServerError(code, 400) for code in ("RequestTimeout", "BadDigest", "IncompleteBody", "Throttling")),
    *(ServerError(code, 400) for code in ("KMS.ThrottlingException", "ThrottlingException", "RequestTimeoutException")),
    *(
        ServerError(code, 400)
        for code in ("XAmzContentSHA256Mismatch", "RequestLimitExceeded", "KMS.InternalException")
    ),
    *(ServerError(code, 500) for code in ("InternalError", "InternalFailure", "InternalServerError")),
    ServerError("ConditionalRequestConflict", 409),
    *(ServerError(code, status) for code, status in (("NoSuchUpload", 404), ("InvalidPart", 400))),  # it starts again
    *(ServerError(str(status), status) for status in (500, 502, 503, 504, 507, 509)),  # of a HEAD: there is no body
    *(_web_answer(status) for status in (408, 421, 423, 425, 429, 500, 502, 503, 504, 507, 509, 520, 530, 598, 599)),
    _raised_from(aiohttp.ClientPayloadError("not completed"), aiohttp.http_exceptions.ContentLengthError("not enough")),
    _raised_from(_web_answer(400), aiohttp.http_exceptions.BadHttpMessage("no header")),  # never said by the server
    aiohttp.ServerDisconnectedError(),
    _google_answer(403, "Rate limit: userRateLimitExceeded"),
    botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"),
    botocore.exceptions.FlexibleChecksumError(error_msg="expected a, got b"),
    botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"),
    botocore.parsers.ResponseParserError("no element found"),
]

REFUSED: list[tuple[Exception, type[StorageError]]] = [
    (FileNotFoundError("x"), NotFoundError),
    (ServerError("NoSuchKey", 404), NotFoundError),
    (ServerError("404", 404), NotFoundError),
    (_web_answer(404), NotFoundError),
    (_web_answer(410), NotFoundError),
    (ServerError("NoSuchBucket", 404), BucketNotFoundError),
    (PermissionError("Access Denied"), RefusedError),
    (PermissionError(errno.EACCES, "Permission denied"), RefusedError),
    (ServerError("AccessDenied", 403), RefusedError),
    (ServerError("InvalidRequest", 400), RefusedError),
    (ServerError("NotImplemented", 501), RefusedError),
    (_web_answer(403), RefusedError),
    (_web_answer(302), RefusedError),
    (ValueError("bad name"), FileError),
    (OSError(errno.ENAMETOOLONG, "File name too long"), FileError),
    (aiohttp.InvalidURL("http://["), FileError),
    # A certificate, a device, a ticket or a client of another library: every other file may fail the same way.
    (ssl.SSLCertVerificationError("certificate has expired"), RefusedError),
    (ssl.SSLCertVerificationError(1, "certificate has expired"), RefusedError),
    *((OSError(getattr(errno, name), name), RefusedError) for name in ("ENODEV", "EKEYEXPIRED", "ENOKEY", "EUCLEAN")),
    (RuntimeError("session closed"), RefusedError),
    *((ServerError(code, 403), StorageError) for code in ("InvalidAccessKeyId", "InvalidClientTokenId")),
    *((ServerError(code, 403), StorageError) for code in ("SignatureDoesNotMatch", "RequestTimeTooSkewed")),
    *((ServerError(code, 400), StorageError) for code in ("ExpiredToken", "ExpiredTokenException", "InvalidToken")),
    (botocore.exceptions.NoCredentialsError(), StorageError),
    *((OSError(getattr(errno, name), name), StorageError) for name in ("ENOSPC", "EDQUOT", "EROFS")),
]


@pytest.mark.parametrize("error", RETRIED, ids=repr)
def test_what_may_succeed_next_time_is_tried_again(flaky: Any, error: Exception) -> None:
    fs = flaky(error)
    assert storage.read_bytes("flaky://x/y") == b"data"
    assert fs.num_calls == 2
    wrapped = flaky(_raised_from(OSError(errno.EIO, "as s3fs passes it on"), error))
    assert storage.put_new("flaky://x/y", b"x")
    assert wrapped.num_calls == 2


@pytest.mark.parametrize(("error", "kind"), REFUSED, ids=repr)
def test_other_errors_are_not_retried(flaky: Any, error: Exception, kind: type[StorageError]) -> None:
    fs = flaky(error)
    with pytest.raises(StorageError) as caught:
        storage.read_bytes("flaky://x/y")
    assert type(caught.value) is kind
    assert fs.num_calls == 1


def test_programming_errors_of_ours_are_not_dressed_up(flaky: Any) -> None:
    flaky(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        storage.read_bytes("flaky://x/y")


def test_a_lost_answer_to_put_new_counts_as_already_there(flaky: Any) -> None:
    fs = flaky(ConnectionResetError(errno.ECONNRESET, "reset by peer"))
    fs.stores_before_failing = True
    assert storage.put_new("flaky://x/y", b"mine") is False
    assert fs.stored == {"flaky://x/y": b"mine"}


@pytest.mark.parametrize(
    "error", [FileExistsError("x"), ServerError("PreconditionFailed", 412), ServerError("", 412)], ids=repr
)
def test_a_failed_precondition_means_already_there(flaky: Any, error: BaseException) -> None:
    fs = flaky(error)
    assert storage.put_new("flaky://x/y", b"mine") is False
    assert fs.num_calls == 1


def test_messages_hold_no_credentials(flaky: Any) -> None:
    flaky(ValueError("cannot open flaky://me:secret@x/y?sig=secret"))
    with pytest.raises(FileError) as caught:
        storage.read_bytes("flaky://me:secret@x/y?sig=secret")
    assert "secret" not in str(caught.value)


def test_unknown_schemes_are_reported() -> None:
    with pytest.raises(ConfigError, match="nosuch:// is not an fsspec filesystem"):
        storage.read_bytes("nosuch://x/y")


def test_other_fsspec_filesystems_work_too() -> None:
    uri = "memory:///samray-test/a b/[x].bin"
    with contextlib.suppress(StorageError):
        storage.delete(uri)
    assert storage.put_new(uri, b"first")
    assert not storage.put_new(uri, b"second")
    assert storage.read_bytes(uri, 1, 2) == b"ir"
    assert [entry.uri for entry in storage.list_files("memory:///samray-test/a b")] == [uri]
    storage.delete(uri)
