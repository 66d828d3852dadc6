"""Parquet files that are small, and would take any amount of memory, are refused before Arrow decodes them."""

from __future__ import annotations

import contextlib
import io
import itertools
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samray.config import InputConfig
from samray.errors import ConfigError
from samray.inputs.listing import list_images
from samray.storage import page_headers, page_values, pages
from samray.storage.page_headers import columns_of
from samray.storage.pages import Budget, CheckedStream
from samray.storage.tables import open_parquet

CODECS = ("NONE", "ZSTD", "SNAPPY", "GZIP", "BROTLI", "LZ4")
LONG = "s3://bucket/" + "x" * 100_000


def written(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def expanded(data: bytes) -> int:
    """What the headers of all pages say."""
    budget = Budget(len(data))
    footer = pq.read_metadata(io.BytesIO(data))
    for group in range(footer.num_row_groups):
        for column in columns_of(footer, group):
            budget.spend(memoryview(data)[column.start : column.end], column)
    return budget._expanded


def repeated(value: Any, number: int) -> pa.Table:
    return pa.table({"uri": pa.repeat(pa.scalar(value), number)})


BOMBS = {
    "a long string in a dictionary": lambda: written(repeated(LONG, 1000), compression="zstd"),
    "the same, not compressed": lambda: written(repeated(LONG, 1000), compression="none"),
    "the same, in a list": lambda: written(pa.table({"uri": [[LONG] * 1000]}), data_page_version="2.0"),
    "a page that compresses well": lambda: written(repeated(LONG, 200), use_dictionary=False, compression="zstd"),
    "shared prefixes": lambda: written(
        repeated(LONG, 1000), use_dictionary=False, column_encoding="DELTA_BYTE_ARRAY", compression="zstd"
    ),
    "a run of equal numbers": lambda: written(repeated(7, 10_000_000)),
    "nothing but nulls": lambda: written(repeated(pa.scalar(None, pa.int64()), 10_000_000)),
    "bytes of a fixed length": lambda: written(repeated(pa.scalar(b"x" * 100_000, pa.binary(100_000)), 1000)),
    "many columns": lambda: written(pa.table({str(i): pa.repeat(i, 200_000) for i in range(20)})),
    "many row groups": lambda: written(repeated(7, 4_000_000), row_group_size=100_000),
}


@pytest.mark.parametrize("of_bytes", [True, False], ids=["bytes", "stream"])
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused(name: str, of_bytes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAX_EXPANDED_BYTES", 16 * 2**20)
    data = BOMBS[name]()
    assert len(data) < 200_000
    with pytest.raises(ValueError, match=r"would expand to more than 0\.0 GiB"):
        open_parquet(data if of_bytes else io.BytesIO(data)).read()


@pytest.mark.parametrize("of_bytes", [True, False], ids=["bytes", "stream"])
def test_every_way_to_read_is_checked(of_bytes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAX_EXPANDED_BYTES", 16 * 2**20)
    data = written(pa.concat_tables([repeated("short", 1000), repeated(LONG, 1000)]), row_group_size=1000)

    def opened() -> Any:
        return open_parquet(data if of_bytes else io.BytesIO(data))

    assert opened().read_row_group(0).num_rows == 1000
    assert sum(batch.num_rows for batch in opened().iter_batches(row_groups=[0])) == 1000
    for read in (
        lambda: opened().read_row_group(1, columns=["uri"]),
        lambda: opened().read_row_groups([0, 1]),
        lambda: list(opened().iter_batches(10)),
        lambda: list(opened().iter_batches(10, row_groups=[1], use_threads=False)),
    ):
        with pytest.raises(ValueError, match="with the column uri, "):
            read()


@pytest.mark.parametrize(("codec", "version"), list(itertools.product(CODECS, ["1.0", "2.0"])))
def test_what_really_is_large_passes(codec: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAX_EXPANDED_BYTES", 2**16)
    texts = [f"s3://bucket/{i * 7919 % 10_007:05d}/{'y' * (i % 50)}" for i in range(20_000)]
    shared = {"use_dictionary": False, "column_encoding": {"uri": "DELTA_BYTE_ARRAY"}}
    for options in ({}, {"use_dictionary": False}, shared):
        table = pa.table({"uri": texts, "n": range(20_000), "few": [text[:14] for text in texts]})
        data = written(table, compression=codec, data_page_version=version, **options)
        assert open_parquet(data).read().equals(table)


def test_empty_row_groups_pass() -> None:
    table = pa.table({"uri": ["a"], "n": [1]})
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema) as writer:
        for part in (table[:0], table, table[:0]):
            writer.write_table(part)
    for source in (sink.getvalue(), io.BytesIO(sink.getvalue())):
        assert open_parquet(source).read().equals(table)


VALUES = st.one_of(
    st.lists(st.none() | st.text(max_size=40), min_size=1, max_size=60).map(lambda x: pa.array(x, pa.string())),
    st.lists(st.lists(st.sampled_from(["a", "bb" * 50, ""]), max_size=4), min_size=1, max_size=60).map(
        lambda x: pa.array(x, pa.list_(pa.string()))
    ),
    st.lists(st.none() | st.integers(-(2**40), 2**40), min_size=1, max_size=200).map(lambda x: pa.array(x, pa.int64())),
)


@settings(max_examples=150, deadline=None)
@given(
    VALUES,
    st.sampled_from(CODECS),
    st.sampled_from(["1.0", "2.0"]),
    st.booleans(),
    st.integers(1, 100),
    st.sampled_from([None, 64]),
)
def test_the_headers_tell_at_least_what_the_values_take(
    values: pa.Array, codec: str, version: str, dictionary: bool, rows: int, page: int | None
) -> None:
    data = written(
        pa.table({"v": values}),
        compression=codec,
        data_page_version=version,
        use_dictionary=dictionary,
        row_group_size=rows,
        data_page_size=page,
        write_page_checksum=True,
    )
    leaf = values.flatten() if pa.types.is_list(values.type) else values
    taken = sum(len(v.encode()) for v in leaf.to_pylist() if v) if leaf.type == pa.string() else 8 * len(leaf)
    assert expanded(data) >= taken
    assert open_parquet(data).read()["v"].combine_chunks().equals(values)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 400))
def test_damaged_headers_raise_what_readers_expect(noise: bytes, position: int) -> None:
    data = written(pa.table({"uri": ["a", "bb", "a"] * 20, "n": range(60)}), compression="zstd")
    data = data[:position] + noise + data[position + len(noise) :]
    with contextlib.suppress(pa.ArrowException, ValueError, OSError):
        open_parquet(data).read()


def test_a_list_of_images_that_is_a_bomb_ends_in_a_sentence_with_little_memory(tmp_path: Path) -> None:
    bomb = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), ["x" * 2**22])
    (tmp_path / "list.parquet").write_bytes(written(pa.table({"uri": bomb}), compression="zstd"))
    code = (
        "import sys; from samray.cli.main import main;"
        f"code = main(['label', {str(tmp_path / 'list.parquet')!r}, {str(tmp_path / 'out')!r}, '--dry-run']);"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "list.parquet cannot be read as Parquet: with the column uri, " in done.stderr
    assert int(done.stdout) < 1_000_000  # kB; what its strings say is 400 GB


def test_bytes_that_several_columns_share_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAX_EXPANDED_BYTES", 2**20)
    numbers = np.random.default_rng(0).integers(0, 2, 500_000, np.int32)
    data = written(pa.table({"n": numbers}))
    (column,) = columns_of(pq.read_metadata(io.BytesIO(data)), 0)
    part = memoryview(data)[column.start : column.end]
    budget = Budget(len(data))
    budget.spend(part, column)  # 33 times its bytes in the file
    budget.spend(part, column)
    with pytest.raises(ValueError, match="would expand"):
        budget.spend(part, column)


def test_columns_at_one_place_are_all_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAX_EXPANDED_BYTES", 16 * 2**20)
    data = BOMBS["a long string in a dictionary"]()
    (bomb,) = columns_of(pq.read_metadata(io.BytesIO(data)), 0)
    stream = CheckedStream(io.BytesIO(data))
    stream.expect(lambda: [bomb, replace(bomb, name="harmless", is_text=False)], Budget(len(data)))
    stream.seek(bomb.start)
    with pytest.raises(ValueError, match="with the column uri, "):
        stream.read(bomb.end - bomb.start)


def test_a_column_that_is_not_read_may_have_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAX_EXPANDED_BYTES", 2**20)
    text = LONG[:10_000]
    rows = [{"uri": text, "n": i, "s": {"n": i, "t": text}} for i in range(1000)]
    data = written(pa.Table.from_pylist(rows))
    for source in (data, io.BytesIO(data)):
        file = open_parquet(source)
        assert file.read(["n"]).num_rows == 1000
        assert sum(batch.num_rows for batch in file.iter_batches(columns=["n", "s.n"])) == 1000
        for columns in (["uri"], ["s"]):
            with pytest.raises(ValueError, match="would expand"):
                open_parquet(source).read(columns=columns)


def test_what_follows_the_last_value_is_not_read() -> None:
    data = written(pa.table({"n": range(100)}))
    (column,) = columns_of(pq.read_metadata(io.BytesIO(data)), 0)
    Budget(len(data)).spend(memoryview(data[column.start : column.end] + bytes(50)), column)


def varint(number: int) -> bytes:
    low, number = number & 127, number >> 7
    return bytes([low | 128]) + varint(number) if number else bytes([low])


def field(delta: int, kind: int, value: bytes = b"") -> bytes:
    """A field of Thrift's compact protocol; delta: of its number."""
    return bytes([delta << 4 | kind]) + value


def int32(delta: int, value: int) -> bytes:
    return field(delta, 5, varint(value << 1))


def data_page(delta: int, num_values: int) -> bytes:
    """The field with details of a data page, of version 1 or 2."""
    return field(delta, 12, int32(1, num_values) + int32(1, 0) * 5 + b"\0")


SIZES = int32(1, 40) + int32(1, 20)


def page_of(header: bytes) -> Any:
    return page_headers.read_page(memoryview(header + b"\0" * 100), 0)


def test_headers_are_read_as_arrow_reads_them() -> None:
    plain = int32(1, 0) + SIZES + data_page(2, 7)
    assert (page_of(plain).num_values, page_of(plain).end) == (7, len(plain) + 1 + 20)
    # The type decides which details count.
    assert page_of(int32(1, 3) + SIZES + data_page(2, 7) + data_page(3, 10**9)).num_values == 10**9
    # A second size of another type is not one.
    for kind in (4, 6):
        other = bytes([kind]) + varint(3 << 1) + varint(10**6 << 1)
        assert page_of(int32(1, 0) + SIZES + other + data_page(2, 7)).end < 100


@pytest.mark.parametrize(
    "header",
    {
        "a size that 32 bits would cut": int32(1, 0) + int32(1, 40) + int32(1, 2**33 + 20) + data_page(2, 7),
        "a field number that 16 bits would cut": int32(1, 0) + SIZES + b"\x05" + varint(2**17 + 6) + b"\0",
        "a list that never ends": int32(1, 0) + SIZES + field(6, 9, b"\xf1" + varint(2**40)),
        "lists in lists": int32(1, 0) + SIZES + field(6, 9, b"\x19" * 3000),
        "more levels than bytes": int32(1, 3) + SIZES + field(5, 12, int32(5, 41) + b"\0"),
    }.values(),
)
def test_headers_that_mislead_are_refused(header: bytes) -> None:
    with pytest.raises(pa.ArrowInvalid, match="a page"):
        page_of(header)


def test_lengths_of_prefixes_cannot_be_any_number() -> None:
    zero, many = varint(0), varint(2**40)
    for values in (
        many + varint(1) + varint(5) + zero + zero + b"\0",  # differences of no bits
        varint(128) + varint(4) + many + zero + zero + b"\0" * 4,  # values
        varint(128) + varint(4) + varint(5) + varint(9) + varint(2 * 100 - 1) + b"\0" * 4,  # below zero
    ):
        with pytest.raises(pa.ArrowInvalid, match="damaged"):
            page_values.shared_prefixes(values, 1000)


def test_lz4_as_hadoop_writes_it_is_no_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"uri": ["short"] * 5000 + ["long" * 500]})
    data = written(table, compression="lz4")
    # In the footer: the column's path, then its codec, LZ4_RAW; and LZ4, of which there are two kinds.
    assert data.count(b"\x03uri\x15\x0e") == 1
    data = data.replace(b"\x03uri\x15\x0e", b"\x03uri\x15\x0a")
    # Enough for the longest value of the dictionary in each row, not for all of them.
    monkeypatch.setattr(pages, "MAX_EXPANDED_BYTES", 10_075_000)
    assert open_parquet(data).read().equals(table)
    texts = [b"a" * 1000, b"b" * 77]
    packed = [bytes(pa.compress(text, codec="lz4_raw")) for text in texts]
    raw = b"".join(struct.pack(">II", len(a), len(b)) + b for a, b in zip(texts, packed, strict=True))
    assert page_values._lz4_of_hadoop(raw, 1077) == b"".join(texts)
    assert page_values._lz4_of_hadoop(packed[0], 1000) == texts[0]
    with pytest.raises(pa.ArrowInvalid, match="LZ4"):
        page_values._lz4_of_hadoop(raw[:-1], 1077)


def test_a_list_of_images_without_images_is_not_a_plan_of_any_length(tmp_path: Path) -> None:
    (tmp_path / "images.parquet").write_bytes(written(pa.table({"image": pa.nulls(2_000_000, pa.binary())})))
    with pytest.raises(ConfigError, match=r"images\.parquet has 2,000,000 rows of images in [0-9,]+ bytes"):
        list_images(str(tmp_path / "images.parquet"), InputConfig())


def test_a_damaged_footer_does_not_end_the_process() -> None:
    data = written(repeated(LONG, 10), compression="zstd", use_dictionary=False)
    # In the footer: the column's path, then its codec. Python's part of Arrow does not catch what C++ throws here.
    assert data.count(b"\x03uri\x15\x0c") == 1
    for source in (data, io.BytesIO(data)):
        assert open_parquet(source).read().num_rows == 10
    damaged = data.replace(b"\x03uri\x15\x0c", b"\x03uri\x15\x7e")
    for source in (damaged, io.BytesIO(damaged)):
        with pytest.raises(OSError, match="codec"):
            open_parquet(source).read()


def test_many_small_pages_and_row_groups_do_not_add_up_to_a_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAX_EXPANDED_BYTES", 2**20)
    monkeypatch.setattr(pages, "MAX_EXPANSION", 1)
    # Texts of 300 kB in all, in dictionaries of 5 kB each, of which a page has few.
    table = pa.table({"uri": [f"s3://bucket/{i * 7919 % 6007:05d}/{'y' * (i % 50)}" for i in range(6000)]})
    for options in ({"row_group_size": 100}, {"data_page_size": 64, "write_batch_size": 10}):
        data = written(table, compression="snappy", **options)
        for source in (data, io.BytesIO(data)):
            assert open_parquet(source).read().equals(table)
