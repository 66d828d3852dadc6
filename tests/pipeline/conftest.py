"""One small Ray for all tests of the pipeline that run in this process."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmarks.s3_server import weed_binary
from samray.cluster.session import local_ray as running_local_ray
from samray.config import Config, load_config
from samray.pipeline.report import LabelReport
from samray.pipeline.run import label_with
from tests.support import standin


@pytest.fixture(scope="session")
def local_ray(request: pytest.FixtureRequest) -> Iterator[None]:
    """A local Ray of two CPUs."""
    if weed_binary() is not None:
        request.getfixturevalue("s3_server")  # first: workers have the environment that Ray was started with
    with running_local_ray(num_cpus=2, object_store_memory=200 * 2**20):
        yield


@pytest.fixture(params=["s3", "local"] if "SAMRAY_CHAOS_ROUNDS" in os.environ else ["s3"])
def storage_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty prefix on S3: on Ray each run costs seconds, and the other tests here are on disk; with
    SAMRAY_CHAOS_ROUNDS an empty folder as well."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_root"))
    (tmp_path / "root").mkdir()
    return str(tmp_path / "root")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that stands for a checkpoint where no model is loaded: only its hash matters."""
    path = tmp_path_factory.mktemp("weights") / "none.safetensors"
    path.write_bytes(b"no weights")
    return path


@pytest.fixture
def config(weights: Path) -> Callable[..., Config]:
    """Settings for small runs: config("output.images_per_shard=2")."""

    def make(*overrides: str) -> Config:
        base = [f"model.checkpoint={weights}", "output.images_per_shard=4", "output.max_failed_fraction=1.0"]
        return load_config(None, None, [*base, "cluster.max_actors=1", *overrides])

    return make


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this test are not spread over Ray: each stage is called in this process."""
    from tests.support.here import use_no_ray

    use_no_ray(monkeypatch)


@pytest.fixture
def label_here(here: None, config: Callable[..., Config]) -> Callable[..., LabelReport]:
    """As label, in this process: for what a run does, not for how it is spread."""
    return _label(config)


@pytest.fixture
def label(local_ray: None, config: Callable[..., Config]) -> Callable[..., LabelReport]:
    """label(input, output, *overrides, retry_failed=, make_labeler=): the stand-in labeler on the session's Ray."""
    return _label(config)


def _label(config: Callable[..., Config]) -> Callable[..., LabelReport]:
    def run(input: object, output: object, *overrides: str, **options: Any) -> LabelReport:
        options.setdefault("make_labeler", functools.partial(standin.make_labeler))
        options.setdefault("progress", False)
        return label_with(str(input), str(output), config(*overrides), **options)

    return run
