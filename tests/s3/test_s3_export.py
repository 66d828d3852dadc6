"""Exports and imports on a real S3 server; what is larger than one part of an upload appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import samray
from samray import storage
from samray.errors import ConfigError
from samray.labels.networks import WEIGHTS, find_network, opened
from samray.output.verify import verify
from tests.support.handmade import write_output
from tests.support.networks import write_hashed

NAMES = [f"photo {i}.png" for i in range(7)]


def test_a_file_of_many_parts_appears_whole_or_not_at_all(s3_root: str) -> None:
    uri = f"{s3_root}/large"
    chunk = bytes(range(256)) * 4096

    def chunks(torn: bool) -> Iterator[bytes]:
        for _ in range(60):  # MiB; s3fs uploads 50 at a time
            yield chunk
        if torn:
            raise ValueError("torn")

    with pytest.raises(ValueError, match="torn"):
        storage.put_chunks(uri, chunks(torn=True))
    assert not storage.exists(uri)
    storage.put_chunks(uri, chunks(torn=False))
    assert storage.file_size(uri) == 60 * 2**20
    assert storage.read_bytes(uri, 55 * 2**20 + 5, 3) == bytes([5, 6, 7])


def test_a_network_on_s3_is_the_same_as_on_disk(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMRAY_CACHE", str(tmp_path / "cache"))
    leftovers = [
        find_network(write_hashed(folder, "clip"), ("clip",), "clip")
        for folder in (f"{s3_root}/net", f"{tmp_path}/net")
    ]
    assert leftovers[0].sha256 == leftovers[1].sha256
    assert leftovers[0].checkpoint == f"{s3_root}/net"
    with opened(leftovers[0]) as folder:
        assert (folder / WEIGHTS).read_bytes() == (tmp_path / "net" / WEIGHTS).read_bytes()
    storage.put(f"{s3_root}/net/{WEIGHTS}", b"others")
    monkeypatch.setenv("SAMRAY_CACHE", str(tmp_path / "another machine's"))
    with pytest.raises(ConfigError, match="is not this run's network"), opened(leftovers[0]):
        pass


@pytest.mark.parametrize("format", ["sa1b", "coco"])
def test_there_and_back_on_s3(s3_root: str, format: str) -> None:
    plan = write_output(s3_root, NAMES, failed=(2,))
    dest, back = f"{s3_root}/there", f"{s3_root}/back"
    for skipped in (0, 1):
        report = samray.export(plan.output, dest, format=format, progress=False)
        assert (report.num_images, report.num_pieces_skipped) == (6, skipped)
    assert samray.import_(dest, back, images=f"{s3_root}/in", progress=False).num_masks == report.num_masks
    verified = verify(back, deep=True)
    assert verified.ok, verified.problems
    (victim,) = [e.uri for e in storage.list_files(dest) if e.uri.endswith(("photo 1.json", "instances.json"))]
    before = storage.read_bytes(victim)
    storage.delete(victim)
    samray.export(plan.output, dest, format=format, progress=False)
    assert storage.read_bytes(victim) == before
