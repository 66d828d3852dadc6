"""Properties that hold for every tar, list and plan: made up by hypothesis, the same ones on every run."""

from __future__ import annotations

import io
import posixpath
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samray import storage
from samray.config import InputConfig
from samray.errors import ConfigError, ImageError
from samray.inputs.listing import fetch_images, list_images
from samray.inputs.skipped import Skipped
from samray.inputs.tar import index_tar
from samray.inputs.uri_rows import later_copies, merge_lists, rows_of_uris, with_distinct_names
from samray.output.manifests import build_manifest

pytestmark = pytest.mark.slow

FAST = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

PART = st.sampled_from(["a", "b", ".", "..", "c.png", "d.JPG", "ü", "x y", "#?*", "~"])
PATH = st.builds("/".join, st.lists(PART, min_size=1, max_size=4))
URI = st.one_of(
    PATH,
    PATH.map("/lists/{}".format),
    PATH.map("/{}".format),
    PATH.map("s3://bucket/{}".format),
    PATH.map("https://example.org/{}".format),
    st.sampled_from(["", "file:///lists/a", "tar://a.png::t.tar", "x.parquet#row=3", "s3://", "::", "a::b"]),
    st.text(max_size=12).filter(lambda text: "\0" not in text and "tar" not in text),
)


def table_of(uris: list[str | None]) -> tuple[pa.Table, Skipped]:
    written = pa.chunked_array([pa.array(uris, pa.string())])
    rows, skipped = merge_lists([rows_of_uris(written, "/lists", "/lists")], "/lists")
    return with_distinct_names(rows), skipped


@FAST
@given(st.lists(st.one_of(st.none(), URI), min_size=1, max_size=12))
def test_lists(uris: list[str | None]) -> None:
    """Every URI is a row or counted as a copy, URIs and names are distinct, and nothing outside may be read."""
    rows, skipped = table_of(uris)
    assert rows.num_rows + sum(sum(kinds.values()) for kinds in skipped.counts.values()) == len(uris)
    listed = [uri for uri in rows["uri"].to_pylist() if uri]
    assert len(listed) == len(set(listed))
    assert set(listed) >= {
        storage.resolve("/lists", uri) for uri in uris if uri and "::" not in uri and "#row" not in uri
    }
    names = [name for name in rows["file_name"].to_pylist() if name]
    assert len(names) == len(set(names))
    for uri, container, problem in zip(*(rows[c].to_pylist() for c in ("uri", "container", "problem")), strict=True):
        location = container or uri
        inside = location == "" or location.startswith(("/lists/", "s3://", "https://")) or "://" in location
        assert inside or problem is not None, (uri, problem)
    again, _ = table_of(uris)
    assert again.equals(rows)


@FAST
@given(st.lists(st.text(alphabet="ab.~/2", max_size=5), max_size=20))
def test_distinct_names(names: list[str]) -> None:
    uris = pa.chunked_array([pa.array([str(i) for i in range(len(names))], pa.string())])
    table = pa.table({"uri": uris, "file_name": pa.chunked_array([pa.array(names, pa.string())])})
    expected = [i for i, name in enumerate(names) if name and name in names[:i]]
    assert later_copies(table["file_name"]).tolist() == expected
    distinct = [name for name in with_distinct_names(table)["file_name"].to_pylist() if name]
    assert len(set(distinct)) == len(distinct)


@FAST
@given(st.lists(PATH, min_size=1, max_size=30, unique=True), st.integers(1, 7))
def test_plans(names: list[str], per_shard: int) -> None:
    """Each image is in one shard, in order, with an id of its own."""
    rows, _ = table_of([*names])
    plan = build_manifest(rows, per_shard)
    assert plan["uri"].to_pylist() == rows["uri"].to_pylist()
    ids, shards = plan["image_id"].to_pylist(), plan["shard"].to_pylist()
    assert len(set(ids)) == len(ids)
    assert shards == [i // per_shard for i in range(len(ids))]


MEMBER = st.tuples(PATH, st.one_of(st.binary(max_size=1500), PATH, st.none()))
"""Bytes are a file, text is a symbolic link, None is a folder."""
FLIPS = st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), max_size=6)


def write_tar(members: list[tuple[str, Any]], form: int) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            else:
                info.type = tarfile.DIRTYPE if content is None else tarfile.SYMTYPE
                info.linkname = content or ""
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return sink.getvalue()


@FAST
@given(st.lists(MEMBER, min_size=1, max_size=8), st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_tars(members: list[tuple[str, Any]], form: int) -> None:
    """The last member of each name counts, with the bytes that were put in, or those of what it links to."""
    last: dict[str, Any] = {posixpath.normpath(name): content for name, content in members if content is not None}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.tar")
        path.write_bytes(write_tar(members, form))
        index = index_tar(str(path), (".png", ".jpg"))
        assert index.damage is None
        shown = {name for name in last if name.lower().endswith((".png", ".jpg"))}  # no part of PATH is hidden
        assert {member.name for member in index.members} == shown
        data = path.read_bytes()
        for member in index.members:
            content = last[member.name]
            target, steps = member.name, 0
            while isinstance(content, str) and steps < 40:
                target, steps = posixpath.normpath(posixpath.join(posixpath.dirname(target), content)), steps + 1
                content = last.get(target)
            if isinstance(content, bytes):
                assert member.problem is None
                assert data[member.offset : member.offset + member.size] == content
            else:
                assert member.problem is not None
                assert member.problem.startswith("missing: ")


@FAST
@given(st.lists(MEMBER, min_size=1, max_size=4), FLIPS, st.integers(0, 9000))
def test_damaged_tars(members: list[tuple[str, Any]], flips: list[tuple[int, int]], length: int) -> None:
    """Any damage is a sentence or rows; whatever is listed can be fetched or fails by itself."""
    data = bytearray(write_tar(members, tarfile.PAX_FORMAT))
    for at, value in flips:
        if at < len(data):
            data[at] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.tar")
        path.write_bytes(data[:length])
        try:
            rows = list_images(str(path), InputConfig()).images
        except ConfigError:
            return
        for fetched in fetch_images(rows, InputConfig(max_bytes=2**20)):
            assert isinstance(fetched, bytes | ImageError)


@pytest.mark.parametrize("text", ["ü\n.png", "a\tb.png", " .png", "\u202e.png", "a" * 300 + ".png"])
def test_odd_names_are_names(text: str) -> None:
    rows, _ = table_of([text])
    assert rows["uri"].to_pylist() == [f"/lists/{text}"]
