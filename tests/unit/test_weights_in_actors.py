"""The weights that are loaded are those of the run: checked by SHA-256 as they are loaded, whole as they are cached."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from safetensors.torch import load_file, save_file

from samray.config import load_config
from samray.errors import ConfigError, StorageError
from samray.pipeline.labeler import build_labeler
from samray.sam import checkpoints, fetch
from samray.sam.checkpoints import load_model, resolve_checkpoint

URI = "memory://weights-in-actors/sam.pth"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMRAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The embedded weights, as a file that can be replaced."""
    path = tmp_path / "tiny.safetensors"
    save_file(load_file(resolve_checkpoint()), path)
    return path


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def replace(path: Path, *, keep_times: bool = False) -> None:
    """Other weights of the same size under the same name."""
    times = path.stat()
    state = load_file(path)
    save_file({name: tensor + 1 for name, tensor in state.items()}, path)
    if keep_times:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_labeler_refuses_weights_that_were_replaced(
    weights: Path, keep_times: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_SMALL_FILE_BYTES", 0)  # the digest is remembered, as that of a large file is
    config = load_config(None, None, [f"model.checkpoint={weights}", "model.device=cpu"])
    sha256 = fetch.file_sha256(weights)
    assert sha256 == sha256_of(weights)
    build_labeler(config, 1, sha256)
    replace(weights, keep_times=keep_times)
    with pytest.raises(ConfigError, match=f"does not have this run's weights: their SHA-256 is {sha256}"):
        build_labeler(config, 1, sha256)


def test_a_file_that_is_replaced_while_it_is_read(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = checkpoints.read_state_dict

    def read_and_replace(path: Path) -> object:
        state = read(path)
        replace(weights, keep_times=True)
        return state

    monkeypatch.setattr(checkpoints, "read_state_dict", read_and_replace)
    with pytest.raises(ConfigError, match="was replaced while it was loaded"):
        load_model("tiny", weights, "cpu", sha256=sha256_of(weights))


@pytest.fixture
def replaced_during(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[bytes]]:
    """replaced_during(n): the object at URI is replaced in the middle of its first n downloads, by the same size.

    Returns the contents that it had, the first one included; the list grows.
    """
    memory = fsspec.filesystem("memory")
    contents = [bytes([0]) * 64]
    memory.pipe_file(URI, contents[0])
    monkeypatch.setattr(fetch, "_PIECE_BYTES", 32)
    read = fetch.storage.read_bytes

    def replaced(times: int) -> list[bytes]:
        def read_bytes(uri: str, offset: int | None = None, length: int | None = None) -> bytes:
            data = read(uri, offset, length)
            if offset == 0 and len(contents) <= times:
                contents.append(bytes([len(contents)]) * 64)
                memory.pipe_file(URI, contents[-1])
            return data

        monkeypatch.setattr(fetch.storage, "read_bytes", read_bytes)
        return contents

    return replaced


@pytest.mark.parametrize("with_version", [False, True])
def test_a_checkpoint_replaced_during_its_download_is_cached_whole(
    replaced_during: Callable[[int], list[bytes]], with_version: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = replaced_during(1)
    if with_version:
        monkeypatch.setattr(fetch.storage, "file_version", lambda uri: f"64 etag-{len(contents)}")
    assert resolve_checkpoint("tiny", URI).read_bytes() == contents[-1]
    assert len(contents) == 2
    assert [path.suffix for path in (fetch.cache_dir() / "checkpoints").iterdir() if path.suffix != ".lock"] == [".pth"]


def test_a_checkpoint_that_is_replaced_all_the_time_is_not_cached(
    replaced_during: Callable[[int], list[bytes]],
) -> None:
    replaced_during(1000)
    with pytest.raises(StorageError, match="was replaced each time it was downloaded"):
        resolve_checkpoint("tiny", URI)
    assert list((fetch.cache_dir() / "checkpoints").glob("*.pth*")) == list(
        (fetch.cache_dir() / "checkpoints").glob("*.lock")
    )
