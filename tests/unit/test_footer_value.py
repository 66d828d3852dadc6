"""Metadata found at the end of a Parquet file, without parsing its footer."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from samray.storage.tables import footer_value

KEYS = st.sampled_from([b"samray", b"samray.sha256", b"a", b"k" * 100])


def file_with(metadata: dict[bytes, bytes]) -> bytes:
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, pa.schema([("n", pa.int64())]), store_schema=False) as writer:
        writer.add_key_value_metadata(metadata)
    return sink.getvalue()


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, st.text(max_size=3).map(str.encode) | st.integers(0, 40_000).map(lambda n: b"v" * n)))
def test_values_are_those_of_the_parsed_footer(metadata: dict[bytes, bytes]) -> None:
    data = file_with(metadata)
    parsed = pq.read_metadata(io.BytesIO(data)).metadata or {}
    for key in (b"samray", b"samray.sha256", b"a", b"k" * 100, b"absent"):
        assert footer_value(data, key) == parsed.get(key)


def test_bytes_that_are_not_the_end_of_a_parquet_file_have_no_value() -> None:
    data = file_with({b"samray": b"{}"})
    assert footer_value(data, b"samray") == b"{}"
    assert footer_value(data[:-1], b"samray") is None
    assert footer_value(b"", b"samray") is None
    mark = b"\x18\x06samray\x18"
    for end in (b"", b"\xff", b"\xff" * 9, b"\x7f{}"):  # a length that is missing, endless, or beyond the end
        assert footer_value(mark + end + b"PAR1", b"samray") is None
