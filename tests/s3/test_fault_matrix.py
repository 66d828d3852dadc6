"""Every fault that a network, a server or its administrator can make, once and for good, before a real server.

A fault that passes costs no image; one that stays ends the run and blames no image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.benchmarks.s3_server import BUCKET, S3Server
from samray import storage
from samray.config import InputConfig, StorageConfig, load_config
from samray.errors import ConfigError, ImageError, StorageError
from samray.inputs.listing import INPUT_SCHEMA, fetch_images, list_images
from samray.pipeline.run import label_with
from samray.storage.retrying import forget_outages
from tests.support import standin
from tests.support.fault_proxy import FaultProxy, running_proxy

TRANSIENT = (
    *("408", "421", "423", "425", "429", "500", "502", "503", "504", "507", "509", "520", "530", "599"),
    *("SlowDown", "ServiceUnavailable", "RequestTimeout", "KMS.ThrottlingException", "InternalError"),
    *("no answer", "reset", "garbage", "stall", "stall in body", "cut", "cut chunked"),
)
OF_PUT = ("BadDigest", "IncompleteBody", "lost answer")
PERMANENT = (
    *("AccessDenied", "InvalidClientTokenId", "InvalidAccessKeyId", "RequestTimeTooSkewed", "SignatureDoesNotMatch"),
    *("ExpiredToken", "NoSuchBucket"),
)
STALL_S = 0.8
NAMES = [f"{i}.png" for i in range(6)]
DATA = {name: name.encode() * 3000 for name in NAMES}


def picture(name: str) -> bytes:
    return DATA[name]


# --- S3 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with running_proxy(s3_server.endpoint.removeprefix("http://")) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def s3_input(s3_server: S3Server) -> str:
    for name, data in DATA.items():
        storage.put(f"s3://{BUCKET}/fault-matrix/in/{name}", data)
    return f"s3://{BUCKET}/fault-matrix/in"


@pytest.fixture(scope="module")
def through_the_proxy(s3_proxy: FaultProxy, s3_input: str) -> Iterator[FaultProxy]:
    """One set of connections for all tests: making them takes longer than most tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3_proxy.url)
        storage.reset()
        yield s3_proxy
    storage.configure(StorageConfig())
    storage.reset()


@pytest.fixture
def s3(through_the_proxy: FaultProxy) -> FaultProxy:
    """The proxy, with nothing spoilt; requests of this test go through it."""
    through_the_proxy.heal()
    forget_outages()
    storage.configure(StorageConfig(timeout_s=30, stall_timeout_s=STALL_S))
    return through_the_proxy


def table_of(uri: str) -> pa.Table:
    return list_images(uri, InputConfig()).images


def fetched(table: pa.Table, **options: Any) -> list[bytes | str]:
    data = fetch_images(table, InputConfig(), lambda: table["uri"].to_pylist(), **options)
    return [d.reason if isinstance(d, ImageError) else d for d in data]


def _get(uri: str) -> None:
    sizes = [len(data) for data in DATA.values()]
    rows = [{"uri": f"{uri}/{name}", "size": size} for name, size in zip(NAMES, sizes, strict=True)]
    assert fetched(pa.Table.from_pylist(rows, INPUT_SCHEMA)) == list(DATA.values())


def _head(uri: str) -> None:
    assert storage.file_size(f"{uri}/0.png") == len(DATA["0.png"])


def _list(uri: str) -> None:
    assert table_of(uri)["file_name"].to_pylist() == NAMES


def _put(uri: str) -> None:
    target = f"{uri.rpartition('/')[0]}/out/{os.urandom(6).hex()}"
    storage.put_new(target, b"shard" * 1000)
    assert storage.read_bytes(target) == b"shard" * 1000
    storage.put(target, b"other" * 1000)
    assert storage.read_bytes(target) == b"other" * 1000


ASK: dict[str, Callable[[str], None]] = {"GET": _get, "HEAD": _head, "LIST": _list, "PUT": _put}
OF_BODIES = ("cut", "cut chunked", "stall in body", "RequestTimeout", "KMS.ThrottlingException")
OF_ONE_KIND = {"PUT": OF_PUT, "GET": ("short",), "LIST": ("short",), "HEAD": ()}
S3_CASES = [
    (kind, fault)
    for kind in ASK
    for fault in (*TRANSIENT, *OF_ONE_KIND[kind])
    if not (kind == "HEAD" and fault in OF_BODIES)  # what it says has no place in the answer to a HEAD
]
STAYS = [(kind, fault) for kind, fault in S3_CASES if kind == "GET" or fault in ("503", "reset", "stall", "short")]


@pytest.mark.parametrize(("kind", "fault"), S3_CASES)
def test_s3_a_fault_that_passes_costs_nothing(s3: FaultProxy, s3_input: str, kind: str, fault: str) -> None:
    s3.spoil(fault, kind, times=1)
    ASK[kind](s3_input)
    assert s3.num_spoilt == 1


@pytest.mark.parametrize(("kind", "fault"), [*STAYS, *((kind, fault) for kind in ASK for fault in PERMANENT)])
def test_s3_a_fault_that_stays_ends_the_run(s3: FaultProxy, s3_input: str, kind: str, fault: str) -> None:
    storage.configure(StorageConfig(timeout_s=0.5, stall_timeout_s=STALL_S))
    s3.spoil(fault, kind)
    with pytest.raises(StorageError):
        ASK[kind](s3_input)


def test_a_store_that_creates_a_key_twice_is_no_output(s3: FaultProxy, s3_input: str, tmp_path: Path) -> None:
    output = f"s3://{BUCKET}/fault-matrix/{os.urandom(6).hex()}"
    storage.check_output(output)
    s3.ignores_conditions = True
    with pytest.raises(ConfigError, match="conditional writes"):
        storage.check_output(output)
    (tmp_path / "weights").write_bytes(b"none")
    config = load_config(None, None, [f"model.checkpoint={tmp_path / 'weights'}"])
    with pytest.raises(ConfigError, match="conditional writes"):
        label_with(s3_input, output, config, progress=False, make_labeler=standin.make_labeler)
    assert storage.list_names(output) == {}
