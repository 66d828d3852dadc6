"""Verify finds every kind of damage to the files of an output, and says it in a sentence."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from samray import storage
from samray.cli import output as cli_output
from samray.cli.main import main
from samray.errors import SamrayError, StorageError
from samray.output import manifests as generations
from samray.output import seals, shards
from samray.output.lookup import read_image
from samray.output.plan import Plan, load_plan
from samray.output.sample import read_footers
from samray.output.schema import SCHEMA, records_to_table, with_stats
from samray.output.verify import verify
from samray.storage.tables import open_parquet
from tests.support.planned import finished_output, records_for

NUM_FLIPS = 200


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return finished_output(str(tmp_path))


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def flips(data: bytes, number: int) -> list[int]:
    """Bits to flip: at random, and each of a few places that checksums of pages do not cover."""
    rng = random.Random(0)
    key = data.rfind(b"samray.sha256")
    special = [8 * key + i for i in range(0, 8 * 15, 11)] + [8 * (len(data) - 8) + i for i in range(0, 64, 5)]
    return special + rng.sample(range(8 * len(data)), number - len(special))


def problems_of(output: str, deep: bool = True) -> list[str]:
    """What verify says, be it that it cannot go on."""
    try:
        return verify(output, deep=deep).problems
    except SamrayError as error:
        return [str(error)]


def with_short_bounds(data: bytes, value: int, num_bytes: int) -> bytes:
    """A Parquet file in whose statistics this number has two bytes instead of num_bytes, without samray's checksum."""
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") : -8]
    whole, short = value.to_bytes(num_bytes, "little"), value.to_bytes(2, "little")
    changed = footer.replace(bytes([num_bytes]) + whole, b"\x02" + short)
    changed = changed.replace(b"samray.sha256", b"samray.nothing"[:13]).replace(b"samray.sealed", b"samray.nothin")
    assert len(changed) < len(footer)
    return data[: -8 - len(footer)] + changed + len(changed).to_bytes(4, "little") + b"PAR1"


def test_a_number_of_the_wrong_length_in_a_footer_does_not_end_the_process(plan: Plan) -> None:
    """pyarrow calls abort() when such statistics are read."""
    shard, manifest = shards.shard_uri(plan.output, 1), storage.join(plan.output, "_samray", "manifest.parquet")
    images = [row["image"]["image_id"] for row in shards.read_shard(plan.output, 1).to_pylist()]
    whole = storage.read_bytes(shard)
    storage.put(shard, with_short_bounds(whole, max(images), 8))
    with pytest.raises(StorageError, match="the statistics in the footer are damaged"):
        read_image(plan.output, images[0])
    assert any("shard-000001" in problem for problem in problems_of(plan.output)), problems_of(plan.output)
    storage.put(shard, whole)
    assert read_image(plan.output, images[0])["image"]["image_id"] == images[0]
    whole = storage.read_bytes(manifest)
    storage.put(manifest, with_short_bounds(whole, plan.num_shards - 1, 4))
    with pytest.raises(StorageError, match="the statistics in the footer are damaged"):
        read_image(plan.output, images[0])


def with_short_histogram(data: bytes) -> bytes:
    """A Parquet file in which the statistics of sizes of the texts in `status` count one level instead of two."""
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") : -8]
    # The path [status], then up to the histogram of its levels: a list (0x19, 0x29 or 0x39) of two numbers of 64 bits.
    start = footer.index(b"\x19\x18\x06status")
    at = start + re.search(rb"[\x19\x29\x39]\x26", footer[start:]).start()
    short = footer[: at + 1] + b"\x16" + footer[at + 3 :]
    short = short.replace(b"samray.sha256", b"samray.nothin").replace(b"samray.sealed", b"samray.nothin")
    return data[: -8 - len(footer)] + short + len(short).to_bytes(4, "little") + b"PAR1"


def test_a_histogram_of_the_wrong_length_in_a_footer_does_not_end_the_process(plan: Plan) -> None:
    """pyarrow calls abort() when Python asks for such a column's statistics."""
    shard = shards.shard_uri(plan.output, 1)
    storage.put(shard, with_short_histogram(storage.read_bytes(shard)))
    read_footers(plan.output, [1])
    with pytest.raises(StorageError, match="histogram"):
        shards.read_shard(plan.output, 1)
    assert any("shard-000001" in problem for problem in problems_of(plan.output)), problems_of(plan.output)


# --- bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_flipped_bit_of_a_shard_is_found(plan: Plan) -> None:
    uri = shards.shard_uri(plan.output, 1)
    data = storage.read_bytes(uri)
    for bit in flips(data, NUM_FLIPS):
        storage.put(uri, flipped(data, bit))
        problems = problems_of(plan.output)
        assert any("shard-000001.parquet" in problem for problem in problems), (bit, problems)
    storage.put(uri, data)
    assert problems_of(plan.output) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["_samray/manifest.parquet", "_samray/run.json", "_SUCCESS"])
def test_a_flipped_bit_of_the_plan_never_ends_in_anything_but_a_sentence(plan: Plan, name: str) -> None:
    uri = storage.join(plan.output, name)
    data = storage.read_bytes(uri)
    rng = random.Random(1)
    for bit in rng.sample(range(8 * len(data)), 60):
        storage.put(uri, flipped(data, bit))
        problems = problems_of(plan.output, deep=False)
        assert problems or not name.endswith(".parquet"), bit


def test_old_shards_without_checksum_are_read_and_their_damage_is_a_sentence(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    uris = [shards.shard_uri(plan.output, shard) for shard in range(plan.num_shards)]
    for uri in uris:
        storage.put(uri, unsealed(open_parquet(storage.read_bytes(uri)).read()))
    storage.put(storage.join(plan.output, "_SUCCESS"), b'{"num_shards": 3}')
    report = verify(plan.output, deep=True)
    assert (report.problems, report.num_without_checksum) == ([], 3)
    assert cli_output.verify(plan.output, deep=True) == 0
    assert "3 shards" in " ".join(capsys.readouterr().out.split())
    data = storage.read_bytes(uris[1])
    rng = random.Random(2)
    for bit in rng.sample(range(8 * len(data)), 100):
        storage.put(uris[1], flipped(data, bit))
        verify(plan.output, deep=True)  # whatever it finds, it does not crash


def unsealed(table: pa.Table) -> bytes:
    """A shard as samray 0.1 wrote it."""
    sink = pa.BufferOutputStream()
    pq.write_table(seals.unsealed(table), sink, compression="zstd")
    return bytes(sink.getvalue())


def test_a_seal_names_the_file() -> None:
    tables = [pa.table({"x": [i]}) for i in range(2)]
    files = []
    for table in tables:
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, table.schema) as writer:
            seals.leave_room(writer)
            writer.write_table(table)
        files.append(seals.seal(sink.getvalue()))
    assert all(seals.is_intact(data) for data in files)
    assert len({seals.seal_of(open_parquet(data).metadata) for data in files}) == 2
    assert seals.is_intact(unsealed(tables[0])) is None
    assert seals.is_intact(b"") is None


# --- whole files ----------------------------------------------------------------------------------------------------


def test_a_shard_that_is_not_the_one_that_success_names(plan: Plan) -> None:
    table = shards.read_shard(plan.output, 1)
    rows = table.to_pylist()
    rows[0]["annotations"][0]["predicted_iou"] = 0.91  # plausible in every way
    other = pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata(table.schema.metadata)
    shards.replace_shard(plan.output, 1, other)
    (problem,) = verify(plan.output).problems
    assert problem.startswith("shard-000001.parquet was replaced after _SUCCESS was written")


def test_statistics_that_are_false(plan: Plan) -> None:
    """Found even if the checksum was made to fit."""
    uri = shards.shard_uri(plan.output, 1)
    data = storage.read_bytes(uri)
    true = (4).to_bytes(8, "little")  # image_id, as a plain value and as a bound
    at = data.rfind(true, 0, len(data) - 8)
    edited = data[:at] + (9).to_bytes(8, "little") + data[at + 8 :]
    start = edited.rfind(b"samray.sha256") + 15
    storage.put(uri, seals.seal(edited[:start] + b"0" * 64 + edited[start + 64 :]))
    shards.mark_success(plan.output)
    assert any("the statistics of image.image_id in row group 0 are wrong" in p for p in verify(plan.output).problems)


def test_counts_in_a_footer_that_are_false(plan: Plan) -> None:
    table = shards.read_shard(plan.output, 2)
    stats = {"num_images": 2, "num_masks": 5, "failures": {"missing": 1}, "shard": 1}
    shards.replace_shard(plan.output, 2, with_stats(table, stats))
    shards.mark_success(plan.output)
    problems = "\n".join(verify(plan.output).problems)
    assert "shard-000002.parquet: its footer has num_masks 5, its rows give 4" in problems
    assert "shard-000002.parquet: its footer has failures {'missing': 1}, its rows give {}" in problems
    assert "shard-000002.parquet was written as shard-000001.parquet" in problems


@pytest.mark.parametrize("column", ["image_id", "uri"])
def test_an_image_in_two_shards(column: str, tmp_path: Path) -> None:
    """Plan and shards agree: only a look at all shards finds it."""
    plan = finished_output(str(tmp_path))
    uri = generations.manifest_uri(plan.output, 0)
    metadata = open_parquet(storage.read_bytes(uri)).schema_arrow.metadata
    rows = plan.read_images(generations.MANIFEST_SCHEMA.names).to_pylist()
    rows[9][column] = rows[1][column]
    storage.delete(uri)
    table = pa.Table.from_pylist(rows, generations.MANIFEST_SCHEMA)
    first = generations.Generation(0, json.loads(metadata[b"samray"])["identity"], 10, 4)
    assert generations.create_generation(plan.output, first, table)
    plan = load_plan(plan.output)
    shards.replace_shard(plan.output, 2, records_to_table(records_for(plan, 2), plan.run))
    shards.mark_success(plan.output)
    (problem,) = verify(plan.output).problems
    which = "image 1" if column == "image_id" else f"the URI {rows[1]['uri']!r}"
    assert problem == f"{which} is in shard-000000.parquet and in shard-000002.parquet"


def edited_manifest(plan: Plan, change: Any) -> None:
    uri = generations.manifest_uri(plan.output, 0)
    table = open_parquet(storage.read_bytes(uri)).read()
    rows = table.to_pylist()
    change(rows)
    edited = pa.Table.from_pylist(rows, table.schema)
    sink = pa.BufferOutputStream()
    pq.write_table(edited, sink)
    storage.put(uri, bytes(sink.getvalue()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[5].update(uri="/else"), "image 5 has uri"),
        (lambda rows: rows[5].update(image_id=77), "image 77 is missing"),
        (lambda rows: rows[5].update(image_id=None), "image None is missing"),
        (lambda rows: rows[5].update(shard=0), "its rows of shard 1 differ from the plan"),
        (lambda rows: rows.pop(), "its rows of shard 2 differ from the plan"),
        (lambda rows: rows.clear(), "cannot be compared with the plan"),
    ],
)
def test_edited_manifests(plan: Plan, change: Any, said: str) -> None:
    edited_manifest(plan, change)
    problems = "\n".join(problems_of(plan.output))
    assert said in problems


@pytest.mark.parametrize(
    "metadata",
    [
        {"num_images": 10},
        {"identity": {}, "num_images": "10", "images_per_shard": 4},
        {"identity": {}, "num_images": 10, "images_per_shard": 0},
        {"identity": [], "num_images": 10, "images_per_shard": 4},
        {"identity": {}, "num_images": -1, "images_per_shard": 4},
    ],
)
def test_manifests_that_say_what_cannot_be(plan: Plan, metadata: dict[str, Any]) -> None:
    uri = generations.manifest_uri(plan.output, 0)
    table = (
        open_parquet(storage.read_bytes(uri)).read().replace_schema_metadata({b"samray": json.dumps(metadata).encode()})
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.put(uri, bytes(sink.getvalue()))
    assert problems_of(plan.output)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[" * 100_000,
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"identity": [], "num_images": 10, "images_per_shard": 4}',
        b'{"identity": {}, "num_images": "many", "images_per_shard": 4}',
    ],
)
def test_run_json_that_is_none(plan: Plan, text: bytes) -> None:
    storage.put(storage.join(plan.output, "_samray", "run.json"), text)
    assert any("run.json" in problem for problem in problems_of(plan.output))


@pytest.mark.parametrize("section", ["cluster", "masks", "output"])
def test_a_section_of_run_json_that_is_no_object(plan: Plan, section: str, capsys: pytest.CaptureFixture[str]) -> None:
    uri = storage.join(plan.output, "_samray", "run.json")
    run = json.loads(storage.read_bytes(uri))
    storage.put(uri, json.dumps({**run, "config": {**run["config"], section: None}}).encode())
    assert main(["status", plan.output]) == 2
    assert "run.json is not valid: its settings are not an object" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "text", [b"", b"[" * 100_000, b"[]", b"\xff", b'{"num_shards": {}}', b'{"num_shards": 3, "shards": 7}']
)
def test_success_that_says_nothing(plan: Plan, text: bytes) -> None:
    storage.put(storage.join(plan.output, "_SUCCESS"), text)
    assert any("_SUCCESS names" in problem for problem in verify(plan.output).problems)


@pytest.mark.parametrize(
    "metadata", [b"[" * 100_000, b"[]", b"\xff", b'{"generation": "x"}', b'{"stats": 5}', b'{"stats": {"shard": "x"}}']
)
def test_shards_whose_metadata_are_damaged(plan: Plan, metadata: bytes) -> None:
    table = shards.read_shard(plan.output, 1).replace_schema_metadata({b"samray": metadata})
    shards.replace_shard(plan.output, 1, table)
    assert any("shard-000001.parquet" in problem for problem in problems_of(plan.output))


def test_shards_of_another_output(tmp_path: Path) -> None:
    """They have the same images and settings, but in another order: each row is sound by itself."""
    plan = finished_output(str(tmp_path / "a"))
    other = finished_output(str(tmp_path / "b"))
    storage.put(shards.shard_uri(plan.output, 1), storage.read_bytes(shards.shard_uri(other.output, 1)))
    problems = "\n".join(verify(plan.output).problems)
    assert "shard-000001.parquet was written by a run with other settings" in problems
    storage.put(shards.shard_uri(plan.output, 1), storage.read_bytes(shards.shard_uri(plan.output, 0)))
    assert any("image 0 is not in the plan of this shard" in problem for problem in verify(plan.output).problems)


def test_manifests_of_older_versions_lack_columns(plan: Plan) -> None:
    uri = generations.manifest_uri(plan.output, 0)
    table = open_parquet(storage.read_bytes(uri)).read()
    later = [name for name in table.schema.names if name not in ("image_id", "shard", "uri", "file_name", "size")]
    sink = pa.BufferOutputStream()
    pq.write_table(seals.unsealed(table.drop_columns(later)), sink)
    storage.put(uri, bytes(sink.getvalue()))
    assert verify(plan.output).problems == []
    assert verify(plan.output, deep=True).ok
