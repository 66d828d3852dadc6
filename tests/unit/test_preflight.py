"""A start that cannot work says so within seconds, and leaves OUTPUT as it was."""

from __future__ import annotations

import os
import shutil
import socket
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray

from samray import storage
from samray.cluster import address, session
from samray.config import load_config
from samray.errors import ConfigError
from samray.imports.import_ import import_
from samray.output import destination
from samray.output.destination import check_apart, check_writable
from samray.pipeline import run
from samray.train.run import train
from samray.train.settings import load_train_settings
from tests.support import standin

DEAD = "127.0.0.1:1025"
"""Nobody listens there."""


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray is there yet, and none may be started."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def started(*args: object, **options: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.fixture
def source(tmp_path: Path) -> str:
    standin.write_images(str(tmp_path / "in"), 2)
    return str(tmp_path / "in")


def refused(source: str, output: Path, *overrides: str, match: str) -> None:
    """`label` raises a ConfigError, and OUTPUT is what it was."""
    before = sorted(output.rglob("*")) if output.is_dir() else output.exists()
    with pytest.raises(ConfigError, match=match):
        run.label(source, output, load_config(None, None, list(overrides)), progress=False)
    assert (sorted(output.rglob("*")) if output.is_dir() else output.exists()) == before


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ("model.device=gpu", "'gpu' is not a device of this PyTorch"),
        ("model.device=cuda:99", "PyTorch sees"),
        ("model.device=meta", "cannot compute"),
        ("model.checkpoint=nothing.pt", "the file"),
        ("cluster.num_cpus_per_actor=5000", r"an actor needs 4999\.75 CPUs"),
        ("cluster.min_actors=5000", r"5000 actors \(cluster\.min_actors\) each need"),
        ("cluster.num_gpus_per_actor=64", "and 64 GPUs"),
        (f"cluster.address={DEAD}", f"no Ray cluster responds at {DEAD}"),
        ("cluster.address=ray://127.0.0.1:1025", "no Ray cluster responds at ray://127.0.0.1:1025"),
        ("cluster.address=ray://", "not the address of a Ray cluster"),
        ("cluster.address=http://127.0.0.1:8265", "not the address of a Ray cluster"),
        ("cluster.address=head.invalid:6379", "head.invalid"),
        ("cluster.address=head", "not the address of a Ray cluster"),
    ],
)
def test_settings_that_cannot_work(source: str, tmp_path: Path, setting: str, match: str,
                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(address, "CONNECT_S", 0.5)
    refused(source, tmp_path / "out", setting, match=match)


def test_an_address_from_the_environment(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", DEAD)
    refused(source, tmp_path / "out", match=f"no Ray cluster responds at {DEAD}")
    with pytest.raises(ConfigError, match="no Ray cluster responds"):
        train("scenes", tmp_path / "weights", load_train_settings(None, ["train.steps=1"]), progress=False)
    assert not (tmp_path / "weights").exists()


def test_a_server_that_accepts_and_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "CONNECT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        for prefix in ("", "ray://"):
            with pytest.raises(ConfigError, match="no Ray cluster responds"):
                address.check_cluster(f"{prefix}127.0.0.1:{server.getsockname()[1]}")


@pytest.fixture
def answers() -> Iterator[Callable[[grpc.StatusCode], str]]:
    """answers(code): the address of a gRPC server that answers every call with this code."""
    servers = []

    def serve(code: grpc.StatusCode) -> str:
        class Refusing(grpc.GenericRpcHandler):  # type: ignore[misc]
            def service(self, details: Any) -> Any:
                return grpc.unary_unary_rpc_method_handler(lambda request, context: context.abort(code, "no"))

        server = grpc.server(futures.ThreadPoolExecutor(1))
        server.add_generic_rpc_handlers((Refusing(),))
        port = server.add_insecure_port("0.0.0.0:0")  # Ray takes 127.0.0.1 for this machine's own address
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield serve
    for server in servers:
        server.stop(None).wait()


def test_a_cluster_that_asks_for_a_token(answers: Callable[[grpc.StatusCode], str]) -> None:
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE=token"):
        address.check_cluster(answers(grpc.StatusCode.UNAUTHENTICATED))
    with pytest.raises(ConfigError, match="is not a Ray cluster of this Ray version"):
        address.check_cluster(answers(grpc.StatusCode.UNIMPLEMENTED))


@pytest.mark.parametrize(
    ("source", "output", "match"),
    [
        ("/a/photos", "/a/photos", "the same folder"),
        ("/a/photos", "/a/photos/labels", "OUTPUT is inside INPUT"),
        ("/a/labels/photos", "/a/labels", "INPUT is inside OUTPUT"),
        ("/a/labels/list.csv", "/a/labels", "INPUT is inside OUTPUT"),
        ("/a/photos/**/*.jpg", "/a/photos/labels", "OUTPUT is inside INPUT"),
        ("/a/labels/*.jpg", "/a/labels", "the same folder"),
        ("s3://bucket/photos", "s3a://bucket/photos/x/", "OUTPUT is inside INPUT"),
        ("s3://bucket", "s3://bucket/labels", "OUTPUT is inside INPUT"),
        ("/a/./x/../photos", "/a/photos/labels", "OUTPUT is inside INPUT"),
    ],
)
def test_input_and_output_inside_each_other(source: str, output: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        check_apart(source, output)


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("/a/photos", "/a/photos-labels"),
        ("/a/photos", "s3://a/photos/labels"),
        ("/a/photos/*.jpg", "/a/photos/labels"),
        ("s3://one/photos", "s3://two/photos/labels"),
        ("/a/list.csv", "/a/labels"),
    ],
)
def test_input_and_output_apart(source: str, output: str) -> None:
    check_apart(source, output)


def test_links_do_not_hide_that_they_are_one(source: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    refused(source, tmp_path / "link" / "out", match="OUTPUT is inside INPUT")


def test_output_that_is_a_file(source: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(source, tmp_path / "file", match="is a file; choose a folder")
    refused(source, tmp_path / "file" / "out", match="is a file; choose a folder")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "annotations").write_text("mine")
    refused(source, tmp_path / "out", match="annotations is a file")


def test_output_that_may_not_be_written(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid():
        (tmp_path / "locked").mkdir(mode=0o500)
    else:  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "locked")
        (tmp_path / "locked").mkdir()
    refused(source, tmp_path / "locked" / "out", match="may not write to")
    with pytest.raises(ConfigError, match="may not write to"):
        check_writable(str(tmp_path / "locked"))


def test_a_full_disk(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 2**20))
    refused(source, tmp_path / "out", match="has 1 MiB left, and a run needs at least 64 MiB")
    monkeypatch.setattr(destination, "MIN_FREE_BYTES", 1)
    stats = namedtuple("stats", "f_files f_favail")
    monkeypatch.setattr(os, "statvfs", lambda path: stats(100, 0))
    refused(source, tmp_path / "out", match="no free inodes")


def test_append_on_a_wrong_address_adds_nothing(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_run_on_ray", lambda one: None)
    output = tmp_path / "out"
    run.label(source, output, load_config(), progress=False)
    storage.put(storage.join(source, "new.png"), standin.make_image(7))
    before = sorted(output.rglob("*"))
    with pytest.raises(ConfigError, match="no Ray cluster responds"):
        run.label(source, output, load_config(None, None, [f"cluster.address={DEAD}"]), append=True, progress=False)
    assert sorted(output.rglob("*")) == before


def test_an_import_on_a_wrong_address_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "sa").mkdir()
    (tmp_path / "sa" / "sa_1.json").write_text('{"image": {"image_id": 1}, "annotations": []}')
    with pytest.raises(ConfigError, match="no Ray cluster responds"):
        import_(tmp_path / "sa", tmp_path / "out", format="sa1b", address=DEAD, progress=False)
    assert not (tmp_path / "out").exists()


def test_this_machine_has_cpus() -> None:
    assert session.this_machine()["CPU"] >= 1
