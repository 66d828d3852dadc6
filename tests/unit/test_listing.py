"""Nothing in an INPUT is passed over silently: endings, tars, Parquet of any writer, lists, and what is refused.

The file is long because its cases share their helpers.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from samray.config import InputConfig
from samray.errors import ConfigError, ImageError
from samray.inputs import tar as tars
from samray.inputs.decode import decode_image
from samray.inputs.listing import IMAGE_EXTENSIONS, check_readable, fetch_images, list_images
from samray.inputs.skipped import UNUSABLE, Skipped
from samray.inputs.tar import index_tar


def listed(uri: object, **settings: Any) -> tuple[pa.Table, Skipped]:
    return list_images(str(uri), InputConfig(**settings))


def names_of(uri: object, **settings: Any) -> list[str]:
    return listed(uri, **settings)[0]["file_name"].to_pylist()


def fetched(uri: object, **settings: Any) -> list[bytes | str]:
    """The bytes of each image, or the error in words."""
    rows, _ = listed(uri, **settings)
    return [str(d) if isinstance(d, ImageError) else d for d in fetch_images(rows, InputConfig(**settings))]


def png(color: Any = "red", size: tuple[int, int] = (9, 9)) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", size, color).save(sink, "PNG")
    return sink.getvalue()


def make_tar(path: Path, *members: tuple[str, bytes | str], form: int = tarfile.PAX_FORMAT) -> Path:
    """Members are bytes, or for a symbolic link its target."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


# --- endings -------------------------------------------------------------------------------------------------------


def test_whatever_the_decoders_read_is_listed_and_the_rest_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for ending in IMAGE_EXTENSIONS:
        (folder / f"a{ending}").write_bytes(b"")
        (folder / f"B{ending.upper()}").write_bytes(b"")
    for name in ("notes.txt", "more.TXT", "noending", ".DS_Store", "b.json"):
        (folder / name).write_bytes(b"")
    make_tar(tmp_path / "x.tar", *((f"a{ending}", b"") for ending in (*IMAGE_EXTENSIONS, ".txt")), ("._a.jpg", b""))
    assert {".jpg", ".jfif", ".jpe", ".avif", ".jp2", ".ppm", ".heic", ".mpo"} <= set(IMAGE_EXTENSIONS)
    for source in (folder, folder / "*"):
        rows, skipped = listed(source)
        assert rows.num_rows == 2 * len(IMAGE_EXTENSIONS)
        assert skipped.counts == {
            "hidden": {".ds_store": 1},
            "not images by their ending": {".txt": 2, ".json": 1, "without ending": 1},
        }
    rows, skipped = listed(tmp_path / "x.tar")
    assert rows.num_rows == len(IMAGE_EXTENSIONS)
    assert skipped.lines() == ["1 .txt: not images by their ending", "1 .jpg: hidden"]


def test_counts_of_hostile_endings_are_bounded() -> None:
    skipped = Skipped()
    skipped.add_names("hidden", pa.chunked_array([[f"x.{i}" for i in range(5000)] + ["y." + "z" * 5000]]))
    assert len(skipped.counts["hidden"]) <= 51
    assert sum(skipped.counts["hidden"].values()) == 5001


# --- tars ----------------------------------------------------------------------------------------------------------

SPARSE = (
    ["--format=gnu"],
    ["--format=pax", "--sparse-version=0.0"],
    ["--format=pax", "--sparse-version=0.1"],
    ["--format=pax", "--sparse-version=1.0"],
)


@pytest.mark.skipif(shutil.which("tar") is None, reason="GNU tar is not installed, so sparse members are NOT tested")
@pytest.mark.parametrize("form", SPARSE, ids=" ".join)
@pytest.mark.parametrize("num_pieces", [1, 3, 40])
def test_sparse_members_are_read_as_they_were(tmp_path: Path, form: list[str], num_pieces: int) -> None:
    picture = np.zeros((40 * num_pieces, 256, 3), np.uint8)
    picture[:: 40 if num_pieces > 1 else 200] = [200, 30, 30]
    Image.fromarray(picture).save(tmp_path / "a.bmp")
    data = (tmp_path / "a.bmp").read_bytes()
    with open(tmp_path / "a.bmp", "wb") as file:
        for start in range(0, len(data), 4096):
            if data[start : start + 4096].strip(b"\0"):
                file.seek(start)
                file.write(data[start : start + 4096])
        file.truncate(len(data))
    with open(tmp_path / "hole.png", "wb") as file:
        file.truncate(2**20)
    (tmp_path / "b.png").write_bytes(png())
    command = ["tar", *form, "-S", "-cf", "t.tar", "a.bmp", "hole.png", "b.png"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert fetched(tmp_path / "t.tar") == [data, bytes(2**20), png()]
    assert (decode_image(data, 10**8) == picture).all()
    assert "more than input.max_bytes" in str(fetched(tmp_path / "t.tar", max_bytes=2**20 - 1)[1])
    start = listed(tmp_path / "t.tar")[0]["offset"][0].as_py()
    (tmp_path / "t.tar").write_bytes((tmp_path / "t.tar").read_bytes()[: start + 600])  # cut inside the first member
    cut = fetched(tmp_path / "t.tar")[0]
    assert isinstance(cut, bytes)
    assert len(cut) < len(data)


@pytest.mark.parametrize("extents", ["0+20", "15+5", "5+2 3+1", "0+9", "-1+2"])
def test_a_map_of_holes_that_lies_is_a_failed_row(tmp_path: Path, extents: str) -> None:
    pieces = [piece.split("+") for piece in extents.split()]
    info = tarfile.TarInfo("a.png")
    info.size = 8
    info.pax_headers = {
        "GNU.sparse.map": ",".join(",".join(piece) for piece in pieces),
        "GNU.sparse.realsize": "16",
        "GNU.sparse.size": "16",
    }
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(b"x" * 8))
        for name in ("b.png",):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"bbb"))
    first, second = fetched(tmp_path / "t.tar")
    assert second == b"bbb"
    if extents == "0+9":  # more than the 8 that are stored, but within the same block: still nothing of another file
        assert first == b"x" * 8 + bytes(8)
    else:
        assert first == "unreadable: its sparse map in the tar is damaged"


def test_links_resolve_forwards_and_dangling_ones_are_failed_rows(tmp_path: Path) -> None:
    members = [("a.png", "z.png"), ("dangling.png", "gone.png"), ("loop.png", "loop.png"), ("l1.png", "d/l2.png")]
    members += [("d/l2.png", "../a.png"), ("out.png", "../../etc/x.png"), ("z.png", b"z")]
    make_tar(tmp_path / "x.tar", *members)
    assert names_of(tmp_path / "x.tar") == [name for name, _ in members]
    assert fetched(tmp_path / "x.tar") == [
        b"z",
        "missing: a link to 'gone.png', which is not a file of the tar",
        "missing: a link that leads back to itself",
        b"z",
        b"z",
        "missing: a link to '../../etc/x.png', which is not a file of the tar",
        b"z",
    ]


def test_names_from_a_tar_stay_below_the_input(tmp_path: Path) -> None:
    path = make_tar(
        tmp_path / "t.tar", ("a.png", b"1"), ("/a.png", b"2"), ("../../a.png", b"3"), ("x/../../b.png", b"4")
    )
    assert names_of(path) == ["a.png", "a~2.png", "a~3.png", "b.png"]
    assert fetched(path) == [b"1", b"2", b"3", b"4"]


def test_of_members_of_one_name_the_last_counts(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "t.tar", ("a.png", b"old"), ("b.png", b"b"), ("./a.png", b"new"), ("c.png", "a.png"))
    rows, skipped = listed(path)
    assert rows["file_name"].to_pylist() == ["b.png", "a.png", "c.png"]
    assert fetched(path) == [b"b", b"new", b"new"]
    assert skipped.lines() == ["1 .png: replaced by a later tar member of the same name"]


@pytest.mark.parametrize("zeros", [0, 512, 2**20 + 512])
def test_archives_joined_end_to_end_are_all_read(tmp_path: Path, zeros: int) -> None:
    one, two = (make_tar(tmp_path / f"{n}.tar", (f"{n}.png", n.encode())).read_bytes() for n in ("one", "two"))
    (tmp_path / "joined.tar").write_bytes(one + bytes(zeros) + two + two)
    assert fetched(tmp_path / "joined.tar") == [b"one", b"two"]
    (tmp_path / "junk.tar").write_bytes(one + b"left on the tape " * 100)
    rows, skipped = listed(tmp_path / "junk.tar")
    assert rows.num_rows == 1
    assert "after its end mark" in skipped.lines()[0]


def test_an_archive_that_cannot_be_read_is_reported_among_others(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_tar(tmp_path / f"{name}.tar", (f"{name}.png", b"x"))
    whole = make_tar(tmp_path / "z.tar", ("a.png", b"a" * 512), ("b.png", b"b"), ("c.png", b"c")).read_bytes()
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_bytes(b"hello " * 500)
    (tmp_path / "z.tar").write_bytes(whole[:1024] + b"\x99" * 512 + whole[1536:])
    rows, skipped = listed(tmp_path / "*.tar")
    assert rows["file_name"].to_pylist() == ["one/one.png", "two/two.png", "z/a.png"]
    sentences = sorted(skipped.counts[UNUSABLE])
    assert [s.partition(" is ")[2][:12] for s in sentences] == ["empty (0 byt", "not an uncom", "damaged afte"]
    with pytest.raises(ConfigError, match=r"empty\.tar is empty \(0 bytes\), not a tar"):
        listed(tmp_path / "empty.tar")


def header(name: bytes, size: int | bytes, kind: bytes = b"0") -> bytes:
    """A tar header, with a size that tarfile would not write."""
    sizes = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + sizes + b"00000000000\0" + b" " * 8)
    block += kind + bytes(100) + b"ustar\00000" + bytes(247)
    block[148:156] = b"%06o\0 " % sum(block)
    assert len(block) == 512
    return bytes(block)


def base256(number: int) -> bytes:
    return (number + (1 << 96 if number < 0 else 1 << 95)).to_bytes(12, "big")


def pax(records: bytes) -> bytes:
    return header(b"pax", len(records), b"x") + records + bytes(-len(records) % 512)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    total = length + len(str(length))
    total = length + len(str(total))
    return b"%d %s=%s\n" % (total, key, value)


GOOD = header(b"good.png", 4) + b"good" + bytes(508)
HOSTILE = {
    "2^60 bytes": header(b"a.png", base256(2**60)),
    "2^90 bytes": header(b"a.png", base256(2**90)),
    "2^60 bytes by pax": pax(record(b"size", str(2**60).encode())) + header(b"a.png", 3),
    "10^400 bytes by pax": pax(record(b"size", b"9" * 400)) + header(b"a.png", 3),
    "negative": header(b"a.png", base256(-512)) + bytes(512),
    "negative by pax": pax(record(b"size", b"-1024")) + header(b"a.png", 3) + b"abc" + bytes(509),
    "a pax header of 2^60": header(b"p", base256(2**60), b"x"),
    "a pax header of -512": header(b"p", base256(-512), b"x") + GOOD,
    "a long name of 2^60": header(b"p", base256(2**60), b"L"),
    "nested pax": pax(record(b"path", b"a.png")) * 5000 + header(b"b.png", 3) + b"abc" + bytes(509),
    "nested long names": (header(b"L", 4, b"L") + b"name" + bytes(508)) * 5000,
    "a sparse map without end": header(b"s", 2**20, b"S")[:-30] + b"\1" + bytes(29) + (b"0" * 504 + b"\1" * 8) * 20000,
    "a sparse map of 10^18": pax(
        record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0") + record(b"GNU.sparse.realsize", b"9")
    )
    + header(b"a.png", 2**22)
    + b"999999999999999999\n"
    + b"0\n" * 2**21,
    "a number of a million digits": pax(b"9" * 500_000),
    "many global headers": header(b"g", 512, b"g") + b"".join(record(b"k%05d" % i, b"v") for i in range(36))[:512],
    "a name with NUL": pax(record(b"path", b"a\0b.png")) + header(b"a.png", 3) + b"abc" + bytes(509),
    "a name that is not UTF-8": pax(record(b"path", b"a\xff\xed\xa0\x80.png"))
    + header(b"a.png", 3)
    + b"abc"
    + bytes(509),
    "a name of 50,000 folders": pax(record(b"path", b"d/" * 50_000 + b".png"))
    + header(b"a.png", 3)
    + b"abc"
    + bytes(509),
    "a name that leads out": pax(record(b"path", b"../../../etc/a.png")) + header(b"a.png", 3) + b"abc" + bytes(509),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.timeout(60)
def test_hostile_tars_are_failed_rows_or_a_sentence(tmp_path: Path, case: str) -> None:
    (tmp_path / "good.tar").write_bytes(GOOD + bytes(1024))
    (tmp_path / "hostile.tar").write_bytes(GOOD + HOSTILE[case] + bytes(1024))
    rows, skipped = listed(tmp_path / "*.tar")
    assert rows["file_name"].to_pylist()[:2] == ["good/good.png", "hostile/good.png"]
    rows = rows.slice(2)
    assert rows.num_rows <= 1
    for data in fetch_images(rows, InputConfig(max_bytes=2**20)):
        assert data == b"abc" if isinstance(data, bytes) else data.reason in ("too_large", "unreadable", "missing")
    for line in [*skipped.lines(), *rows["problem"].drop_null().to_pylist()]:
        assert len(line) < 800
        line.encode()
    pa.ipc.new_stream(io.BytesIO(), rows.schema).write_table(rows)  # text that can be written


def test_headers_are_read_with_bounded_memory(tmp_path: Path) -> None:
    """A sparse file of 8 GiB is nothing to a disk, but was read whole where it claims to be one header."""
    path = tmp_path / "x.tar"
    path.write_bytes(GOOD + header(b"p", base256(2**33), b"x"))
    with open(path, "r+b") as file:
        file.truncate(2**33)
    index = index_tar(str(path), (".png",))
    assert [member.name for member in index.members] == ["good.png"]
    assert index.damage is not None
    assert f"more than {tars._MAX_READ_BYTES} bytes" in index.damage


# --- Parquet -------------------------------------------------------------------------------------------------------

TEXT = {
    "string": pa.string(),
    "large": pa.large_string(),
    "view": pa.string_view(),
    "binary": pa.binary(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of large": pa.dictionary(pa.int8(), pa.large_string()),
}
BYTES = {
    "binary": pa.binary(),
    "large": pa.large_binary(),
    "view": pa.binary_view(),
    "fixed": pa.binary(7),
    "dictionary": pa.dictionary(pa.int32(), pa.binary()),
}


@pytest.mark.parametrize("text", TEXT.values(), ids=TEXT)
@pytest.mark.parametrize("data", BYTES.values(), ids=BYTES)
@pytest.mark.parametrize("in_struct", [False, True])
def test_parquet_of_any_writer(tmp_path: Path, text: pa.DataType, data: pa.DataType, in_struct: bool) -> None:
    def column(values: list[Any], kind: pa.DataType) -> pa.Array:
        if pa.types.is_dictionary(kind):
            return pa.array(values, kind.value_type).dictionary_encode().cast(kind)
        return pa.array(values, kind)

    images, names = column([b"picture", b"another"], data), column(["cat.png", "dog.png"], text)
    if in_struct:
        table = pa.table({"image": pa.StructArray.from_arrays([images, names], ["bytes", "path"])})
    else:
        table = pa.table({"image": images, "file_name": names})
    pq.write_table(table, tmp_path / "x.parquet")
    assert names_of(tmp_path / "x.parquet") == ["cat.png", "dog.png"]
    assert fetched(tmp_path / "x.parquet") == [b"picture", b"another"]
    pq.write_table(pa.table({"uri": names}), tmp_path / "list.parquet")
    assert names_of(tmp_path / "list.parquet") == ["cat.png", "dog.png"]


def test_parquet_of_pandas_and_polars(tmp_path: Path) -> None:
    flat = {"image": [png("red"), png("blue")], "file_name": ["cat.png", "dog.png"]}
    pandas.DataFrame(flat).to_parquet(tmp_path / "pandas.parquet")
    polars.DataFrame(flat).write_parquet(tmp_path / "polars.parquet")
    categories = pandas.Categorical(flat["file_name"])
    pandas.DataFrame({**flat, "file_name": categories}).to_parquet(tmp_path / "categories.parquet")
    structs = [{"bytes": data, "path": "same.png"} for data in flat["image"]]
    polars.DataFrame({"image": structs}).write_parquet(tmp_path / "struct.parquet")
    for name in ("pandas", "polars", "categories"):
        assert names_of(tmp_path / f"{name}.parquet") == flat["file_name"]
        assert fetched(tmp_path / f"{name}.parquet") == flat["image"]
    assert names_of(tmp_path / "struct.parquet") == ["row-0/same.png", "row-1/same.png"]
    assert fetched(tmp_path / "struct.parquet") == flat["image"]


def test_a_parquet_file_that_cannot_be_read_is_reported_among_others(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png()]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"uri": ["x.png"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"url": ["x.png"]}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 not really")
    rows, skipped = listed(tmp_path / "*.parquet")
    assert rows["file_name"].to_pylist() == ["a/row-0", "x.png"]
    first, second = sorted(skipped.counts[UNUSABLE])
    assert "input.uri_column=url" in first
    assert "d.parquet cannot be read as Parquet" in second


# --- lists ---------------------------------------------------------------------------------------------------------


def test_equal_names_in_lists_of_several_folders_stay_apart(tmp_path: Path) -> None:
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "img.png").write_bytes(part.encode())
        pq.write_table(pa.table({"uri": ["img.png"]}), tmp_path / part / "list.parquet")
        (tmp_path / part / "list.csv").write_text("uri\nimg.png\n")
        (tmp_path / part / "abs.txt").write_text(f"{tmp_path}/{part}/img.png\n")
    for pattern in ("*/list.parquet", "*/list.csv", "*/abs.txt"):
        assert names_of(tmp_path / pattern) == ["a/img.png", "b/img.png"], pattern
        assert fetched(tmp_path / pattern) == [b"a", b"b"]


def test_equal_uris_are_merged_and_counted(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"uri\na/img.png\n./a/img.png\nb/../a/img.png\n{tmp_path}/a/img.png\na/2.png\n")
    rows, skipped = listed(tmp_path / "list.csv")
    assert rows["uri"].to_pylist() == [f"{tmp_path}/a/img.png", f"{tmp_path}/a/2.png"]
    assert skipped.lines() == ["3 .png: listed more than once"]
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name}.png\nboth.png\n")
    rows, skipped = listed(tmp_path / "*.txt")
    assert rows["file_name"].to_pylist() == ["one.png", "both.png", "two.png"]
    assert skipped.lines() == ["1 .png: listed more than once"]
    pq.write_table(pa.table({"uri": ["", None, ""]}), tmp_path / "empty.parquet")
    assert len(names_of(tmp_path / "empty.parquet")) == 3  # rows without an image are no copies of each other


def test_no_two_images_have_one_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    make_tar(tmp_path / "a.tar", ("b/x.png", b"1"), ("x.png", b"2"))
    make_tar(tmp_path / "a" / "b.tar", ("x.png", b"3"))
    make_tar(tmp_path / "a.TAR", ("x.png", b"4"))
    names = names_of(tmp_path)
    assert len(set(names)) == 4
    assert set(names) == {"a/b/x.png", "a/b/x~2.png", "a/x.png", "a/x~2.png"}
    signed = [f"https://h/photo.jpg?X-Amz-Signature=f00d{i}" for i in range(3)]
    (tmp_path / "x.txt").write_text("\n".join(signed))
    assert names_of(tmp_path / "x.txt") == ["photo.jpg", "photo~2.jpg", "photo~3.jpg"]


def test_samrays_own_uris_are_an_input(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png("red"), png("blue")]}), tmp_path / "x.parquet")
    make_tar(tmp_path / "t.tar", ("d/a.png", b"a"), ("b.png", b"b"), ("c.png", "b.png"))
    (tmp_path / "plain.png").write_bytes(b"plain")
    uris = [*listed(tmp_path / "x.parquet")[0]["uri"].to_pylist(), *listed(tmp_path / "t.tar")[0]["uri"].to_pylist()]
    pq.write_table(pa.table({"uri": [*uris, "plain.png"]}), tmp_path / "again.parquet")
    rows, _ = listed(tmp_path / "again.parquet")
    assert rows["uri"].to_pylist() == [*uris, f"{tmp_path}/plain.png"]
    wanted = [png("red"), png("blue"), b"a", b"b", b"b", b"plain"]
    assert fetched(tmp_path / "again.parquet") == wanted
    names = ["x/row-0", "x/row-1", "t/d/a.png", "t/b.png", "t/c.png", "plain.png"]
    assert rows["file_name"].to_pylist() == names
    (tmp_path / "relative.txt").write_text("tar://b.png::t.tar\nx.parquet#row=1\ntar://gone.png::t.tar\nx.parquet#row=7\n"
                                           "tar://a.png::gone.tar\ngone.parquet#row=0\n")  # fmt: skip
    first, second, *others = fetched(tmp_path / "relative.txt")
    assert (first, second) == (b"b", png("blue"))
    assert [str(error).partition(":")[0] for error in others] == ["missing"] * 4
    assert fetched(uris[1]) == [png("blue")]  # one of them as INPUT
    assert fetched(uris[2]) == [b"a"]


def test_a_lone_surrogate_in_a_list_is_one_failed_row(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "x.jsonl").write_text('{"uri": "a.png"}\n{"uri": "\\ud800.png"}\n{"uri": "a\\u0000.png"}\n')
    first, second, third = fetched(tmp_path / "x.jsonl")
    assert first == b"a"
    assert str(second).startswith("missing")
    assert str(third).startswith("unreadable")


# --- what a list may name ------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A picture outside of the folder `in`."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes(b"good")
    (tmp_path / "secret.png").write_bytes(b"secret")
    make_tar(tmp_path / "secret.tar", ("a.png", b"secret"))
    pq.write_table(pa.table({"image": [b"secret"]}), tmp_path / "secret.parquet")
    return tmp_path


OUTSIDE = [
    *("/etc/passwd", "{0}/secret.png", "../secret.png", "x/../../secret.png", "file://{0}/secret.png", "~/secret.png"),
    *("local://{0}/secret.png", "FILE://{0}/in/../secret.png", "tar://a.png::{0}/secret.tar", "tar://a.png::../secret.tar"),
    *("{0}/secret.parquet#row=0", "../secret.parquet#row=0", "generic://file://{0}/secret.png", "zip://a::{0}/x.zip"),
    *("simplecache://{0}/secret.png", "dir://{0}/secret.png", "git://{0}:secret.png", "{0}/in-other/x.png"),
    *("http://169.254.169.254/latest/x.png", "http://[fe80::1]/a.png", "http://2852039166/x", "http://metadata.google.internal/a"),
    *("http://[::ffff:169.254.169.254]/a.png", "https://user@169.254.1.1:80/a.png", "http://100.100.100.200/a"),
]  # fmt: skip


@pytest.mark.parametrize("uri", OUTSIDE)
def test_a_list_names_nothing_outside_of_its_folder(secret: Path, uri: str) -> None:
    (secret / "in" / "x.txt").write_text(f"{uri.format(secret)}\ngood.png\n")
    outside, good = fetched(secret / "in" / "x.txt")
    assert good == b"good"
    assert str(outside).startswith("not_allowed: ")
    assert "secret" not in str(outside).replace(str(secret), "")
    (secret / "in" / "x.txt").write_text(f"{uri.format(secret)}\n")
    with pytest.raises(ConfigError, match="none of its 1 images can be read"):
        check_readable(listed(secret / "in" / "x.txt")[0], str(secret / "in" / "x.txt"))


def test_a_trusted_list_names_what_it_wants(secret: Path) -> None:
    lines = [uri.format(secret) for uri in OUTSIDE if "secret." in uri and "{0}" in uri][:5]
    (secret / "in" / "x.txt").write_text("\n".join(lines))
    assert set(fetched(secret / "in" / "x.txt", allow_outside=True)) == {b"secret"}
    (secret / "in" / "x.txt").write_text("http://169.254.169.254/x.png\ngood.png\n")
    assert str(fetched(secret / "in" / "x.txt", allow_outside=True)[0]).startswith("not_allowed")


def test_side_files_of_parquet_images_are_below_its_folder(secret: Path) -> None:
    images = [{"bytes": None, "path": path} for path in ("good.png", "../secret.png", str(secret / "secret.png"))]
    pq.write_table(pa.table({"image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}),
                   secret / "in" / "x.parquet")  # fmt: skip
    good, *others = fetched(secret / "in" / "x.parquet")
    assert good == b"good"
    assert all(str(error).startswith("not_allowed") for error in others)


def test_ordinary_places_may_be_named(tmp_path: Path) -> None:
    uris = ["s3://b/a.png", "gs://b/a.png", "https://example.org/a.png", "http://192.168.1.5/a.png", "nosuch://x/a.png"]
    uris += ["http://127.0.0.1:8000/a.png", "hf://datasets/a/b.png", "abfs://c/a.png", f"{tmp_path}/x/a.png"]
    (tmp_path / "x.txt").write_text("\n".join(uris))
    assert listed(tmp_path / "x.txt")[0]["problem"].null_count == len(uris)


def test_a_list_may_spell_its_folder_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real" / "in" / "sub").mkdir(parents=True)
    (tmp_path / "real" / "in" / "sub" / "a.png").write_bytes(b"a")
    (tmp_path / "real" / "b.png").write_bytes(b"b")
    (tmp_path / "home").symlink_to("real")
    (tmp_path / "real" / "in" / "x.txt").write_text(
        f"{tmp_path}/home/in/sub/a.png\n{tmp_path}/home/b.png\n/x\0/c.png\n"
    )
    for folder in ("real", "home"):
        inside, *outside = fetched(tmp_path / folder / "in" / "x.txt")
        assert inside == b"a"
        assert all(str(error).startswith("not_allowed") for error in outside)


def test_a_list_from_elsewhere_names_no_private_server() -> None:
    from samray.inputs.outside import location_problem

    for location in ("http://127.0.0.1/a", "http://10.0.0.1/a", "http://localhost:80/a", "http://nas/a", "http://[::1]/a",
                  "http://0x7f.1/a", "http://printer.local/a", "sftp://192.168.0.1/a", "/etc/passwd"):  # fmt: skip
        for folder in ("s3://bucket/lists", "https://example.org"):
            assert location_problem(location, folder, allow_outside=False), location
            assert not location_problem(location, folder, allow_outside=True)
    for location in (
        "http://127.0.0.1:8000/a.png",
        "s3://other/a.png",
        "https://example.org/a.png",
        "https://8.8.8.8/a",
    ):
        assert not location_problem(location, "http://127.0.0.1:8000/lists", allow_outside=False)


def test_fifos_sockets_and_devices_are_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    (tmp_path / "good.png").write_bytes(b"good")
    os.symlink("loop.png", tmp_path / "loop.png")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s.png"))
        fifo, good, loop, unix_socket, zero = fetched(tmp_path)
    assert good == b"good"
    assert "is a FIFO" in str(fifo)
    assert "is a device" in str(zero)
    assert "is a socket" in str(unix_socket)
    assert isinstance(loop, str)
    (tmp_path / "x.txt").write_text("fifo.png\nzero.png\ngood.png\n")
    assert [str(d).partition(":")[0] for d in fetched(tmp_path / "x.txt")] == ["unreadable", "unreadable", "b'good'"]
    os.mkfifo(tmp_path / "list.csv")
    for name in ("fifo.png", "list.csv"):
        with pytest.raises(ConfigError, match="is a FIFO"):
            listed(tmp_path / name)


@pytest.mark.slow
def test_folders_may_be_nested_more_deeply_than_calls(tmp_path: Path) -> None:
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        Path("a.png").write_bytes(b"a")
        os.chdir(here)
        assert names_of(tmp_path) == ["d/" * 1200 + "a.png"]
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-r", str(tmp_path)], check=True)  # shutil.rmtree calls itself for each folder


# --- messages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["x.ndjson", "x.tsv", "x.json", "x.zip", "x.csv.gz", "x.7z", "x.tar.xz", "x.MP4", "x.npz"]
)
def test_files_that_are_no_image_are_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ConfigError, match=name):
        listed(tmp_path / name)
    with pytest.raises(ConfigError, match=r"\*"):
        listed(tmp_path / f"*{os.path.splitext(name)[1]}")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://bk*/x", "a bucket name cannot be a glob"),
        ("gs://b[ab]/x/*.jpg", "a bucket name cannot be a glob"),
        ("zip://*.png::photos.zip", "chains filesystems"),
        ("simplecache::s3://b/x", "does not exist"),
        ("bad-\udcff", "its name is not UTF-8"),
        ("", "INPUT is ''"),
        ("a\0b", "INPUT is 'a"),
    ],
)
def test_inputs_that_cannot_be(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        listed(uri)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"uri;label\na.png;1\n", "separated by ';'.*expected commas"),
        ("x.csv", b"label\turi\n1\ta.png\n", r"separated by '\\t'.*expected commas"),
        ("x.csv", b"label,url\n1,a.png\n", "no column 'uri'.*columns are label, url;.*input.uri_column=url"),
        ("x.jsonl", b'{"label": 1, "file_name": "a.png"}\n', "no column 'uri'.*input.uri_column=file_name"),
        ("two.parquet", None, "several of its columns have the same name: uri"),
        ("x.parquet", None, "no column 'uri'.*columns are caption, url;.*input.uri_column=url"),
    ],
)
def test_lists_without_the_column_say_which_they_have(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if name == "two.parquet":
        pq.write_table(pa.Table.from_arrays([["a.png"], ["b.png"]], ["uri", "uri"]), tmp_path / name)
    elif content is None:
        pq.write_table(pa.table({"caption": ["x"], "url": ["a.png"]}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        listed(tmp_path / name)


@pytest.mark.parametrize(
    ("files", "typed", "pattern"),
    [
        (["data/train.parquet", "README.md"], "", "data/*.parquet"),
        (["data/train.parquet", "README.md"], "*.parquet", "data/*.parquet"),
        (["a/1.tar", "b/2.tar"], "*.tar", "**/*.tar"),
        (["1.TAR", "x.json"], "", "*.TAR"),
        (["a/b/1.png"], "*.jpg", "a/b/*.png"),
        (["lists/1.csv", "lists/2.csv"], "", "lists/*.csv"),
        (["0.json", "0.parquet", "0.tar"], "", "*.tar"),
    ],
)
def test_the_pattern_that_is_suggested_finds_the_files(
    tmp_path: Path, files: list[str], typed: str, pattern: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        listed(tmp_path / typed)
    assert f"name them, as in '{tmp_path / pattern}'" in str(caught.value)
    assert list(tmp_path.glob(pattern))


# --- what was left out stays with the output -----------------------------------------------------------------------


def test_plan_and_summary_keep_what_was_left_out(tmp_path: Path) -> None:
    from rich.console import Console

    from samray.config import Config
    from samray.output.append import join_images
    from samray.output.plan import load_plan, make_plan
    from samray.pipeline.report import LabelReport, print_report

    folder, out = tmp_path / "in", str(tmp_path / "out")
    folder.mkdir()
    for name in ("a.jpg", "notes.txt"):
        (folder / name).write_bytes(b"x")
    config = Config()
    make_plan(str(folder), out, config, config.identity())
    plan = load_plan(out)
    assert plan.skipped.lines() == ["1 .txt: not images by their ending"]
    for name in ("b.jpg", "more.txt"):
        (folder / name).write_bytes(b"x")
    plan, changes = join_images(plan, str(folder), config, config.identity(), append=True, redo_changed=False)
    assert changes.skipped is not None
    assert changes.skipped.lines() == ["2 .txt: not images by their ending"]
    assert load_plan(out).skipped.lines() == ["2 .txt: not images by their ending"]
    sink = io.StringIO()
    print_report(LabelReport(out, 2, 1, skipped=plan.skipped.redacted()), Console(file=sink, width=100))
    assert "left out" in sink.getvalue()
    assert "2 .txt: not images by their ending" in sink.getvalue()


def test_an_image_that_a_setting_lets_in_has_changed(tmp_path: Path) -> None:
    """So `--redo-changed input.allow_outside=true` labels what was refused before, without another OUTPUT."""
    from samray.config import Config
    from samray.output.append import join_images
    from samray.output.plan import make_plan

    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "in" / "x.txt").write_text("../secret.png\na.png\n")
    source, out, config = str(tmp_path / "in" / "x.txt"), str(tmp_path / "out"), Config()
    plan = make_plan(source, out, config, config.identity())
    assert str(fetch_images(plan.read_shard(0), config.input)[0]).startswith("not_allowed")
    trusting = Config(input=InputConfig(allow_outside=True))
    plan, changes = join_images(plan, source, trusting, trusting.identity(), append=False, redo_changed=True)
    assert changes.num_changed == 1
    assert fetch_images(plan.read_shard(0), trusting.input)[0] == b"secret"
