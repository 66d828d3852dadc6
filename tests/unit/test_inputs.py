"""Every kind of input, on disk and on S3: which images it holds, in which order, under which names, and their bytes.

The file is long because its cases share their helpers.
"""

from __future__ import annotations

import http.server
import io
import tarfile
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from samray import storage
from samray.config import InputConfig
from samray.errors import ConfigError, ImageError, StorageError
from samray.inputs import rows
from samray.inputs import uri_list as uri_lists
from samray.inputs.listing import INPUT_SCHEMA, fetch_images, list_images
from samray.inputs.tar import list_tar
from samray.inputs.uri_rows import merge_lists, rows_of_uris
from samray.storage import reading


def write(root: str, *names: str) -> None:
    """Files whose bytes are their own names."""
    for name in names:
        storage.put(storage.join(root, *name.split("/")), name.encode())


def listed(uri: str, **settings: Any) -> pa.Table:
    table = list_images(uri, InputConfig(**settings)).images
    assert table.schema.equals(INPUT_SCHEMA)
    return table


def names_of(uri: str, **settings: Any) -> list[str]:
    return listed(uri, **settings)["file_name"].to_pylist()


def fetched(table: pa.Table, **settings: Any) -> list[bytes | str]:
    """The bytes of each row, or the reason why there are none."""
    return [d.reason if isinstance(d, ImageError) else d for d in fetch_images(table, InputConfig(**settings))]


def tar_of(members: dict[str, bytes], **options: Any) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", **options) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def parquet_of(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


# --- folders, prefixes, globs --------------------------------------------------------------------------------------


def test_a_folder_is_searched_recursively_for_image_names(storage_root: str) -> None:
    wanted = ["a.jpg", "b/a.jpg", "b/c/d.JPEG", "dir.jpg/e.webp", "f 100% #1 [x]?.PNG", "g.tif", "z.bmp", "ö/图.gif"]
    write(storage_root, *wanted)
    write(
        storage_root, "readme.txt", "b/a.json", ".hidden.jpg", ".git/x.jpg", "_samray/y.jpg", "__MACOSX/._a.jpg", "jpg"
    )
    table = listed(storage_root)
    assert table["file_name"].to_pylist() == wanted
    assert table["uri"].to_pylist() == [f"{storage_root}/{name}" for name in wanted]
    assert table["size"].to_pylist() == [len(name.encode()) for name in wanted]
    assert fetched(table) == [name.encode() for name in wanted]
    assert listed(storage_root + "/").equals(table)


def test_local_paths_in_any_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(str(tmp_path), "in/a.jpg")
    monkeypatch.chdir(tmp_path)
    for spelling in ("in", "./in/", f"file://{tmp_path}/in", str(tmp_path / "in")):
        assert listed(spelling)["uri"].to_pylist() == [f"{tmp_path}/in/a.jpg"]


def test_a_single_file_is_an_input_whatever_its_name(storage_root: str) -> None:
    write(storage_root, "x [1].jpg", "scan.data")
    assert names_of(f"{storage_root}/x [1].jpg") == ["x [1].jpg"]
    assert names_of(f"{storage_root}/scan.data") == ["scan.data"]


def test_globs_choose_files(storage_root: str) -> None:
    write(storage_root, "2023/a.jpg", "2024/a.jpg", "2024/b.png", "2024/notes.txt", "2024/raw.data")
    assert names_of(f"{storage_root}/2024/*") == ["a.jpg", "b.png"]
    assert names_of(f"{storage_root}/20*/*.jpg") == ["2023/a.jpg", "2024/a.jpg"]
    assert names_of(f"{storage_root}/20*") == ["2023/a.jpg", "2024/a.jpg", "2024/b.png"]
    assert names_of(f"{storage_root}/**/*.data") == ["2024/raw.data"]  # spelled out, so it is meant


def test_limit_takes_the_first(storage_root: str) -> None:
    write(storage_root, *(f"{i}.jpg" for i in range(5)))
    assert names_of(storage_root, limit=2) == ["0.jpg", "1.jpg"]
    assert names_of(storage_root, limit=99) == [f"{i}.jpg" for i in range(5)]


@pytest.mark.parametrize(
    ("files", "pattern", "message"),
    [
        ([], "nowhere", "does not exist"),
        ([], "nowhere/*.jpg", "no file was found"),
        (["a.txt", "b.doc"], "", r"no image found; looked for names ending in \.jpg.*2 files \(1 \.txt, 1 \.doc\)"),
        (["a.tar", "b.json"], "", r"1 \.tar, 1 \.json\); name them, as in '.*/\*\.tar'"),
        (["a.tar.gz"], "a.tar.gz", "compressed tar"),
        (["a.tgz"], "*.tgz", "compressed tar"),
    ],
)
def test_nothing_found_says_what_was_looked_for(
    storage_root: str, files: list[str], pattern: str, message: str
) -> None:
    write(storage_root, *files)
    with pytest.raises(ConfigError, match=message):
        listed(f"{storage_root}/{pattern}")


# --- tars ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_read_in_place(storage_root: str, form: int) -> None:
    long = "/".join(["deep" * 5] * 6) + "/ü.png"
    members = {"b/1.jpg": b"one", "./a/1.jpg": b"two" * 1000, "1.json": b"{}", "._b.jpg": b"", long: b"3", "e.JPG": b""}
    if form == tarfile.USTAR_FORMAT:
        members[long.replace("ü", "u")] = members.pop(long)
        long = long.replace("ü", "u")
    uri = f"{storage_root}/x y.tar"
    storage.put(uri, tar_of(members, format=form))
    table = listed(uri)
    names = ["b/1.jpg", "a/1.jpg", long, "e.JPG"]
    assert sorted(table["file_name"].to_pylist()) == sorted(names)
    assert table["file_name"].to_pylist()[:2] == names[:2]  # in the archive's order
    assert table["uri"][0].as_py() == f"tar://b/1.jpg::{uri}"
    by_name = dict(zip(table["file_name"].to_pylist(), fetched(table), strict=True))
    assert by_name == {"b/1.jpg": b"one", "a/1.jpg": b"two" * 1000, long: b"3", "e.JPG": b""}


def test_the_uri_of_a_member_is_what_fsspec_opens(tmp_path: Path) -> None:
    import fsspec

    (tmp_path / "x.tar").write_bytes(tar_of({"b/1.jpg": b"one"}))
    (uri,) = listed(str(tmp_path / "x.tar"))["uri"].to_pylist()
    with fsspec.open(uri) as file:
        assert file.read() == b"one"


def test_many_tars_keep_equal_names_apart(storage_root: str) -> None:
    for name in ("b/2.tar", "a/1.tar"):
        storage.put(f"{storage_root}/{name}", tar_of({"x.jpg": name.encode(), "y.jpg": b"y"}))
    for pattern in ("*/*.tar", ""):
        table = listed(f"{storage_root}/{pattern}")
        assert table["file_name"].to_pylist() == ["a/1/x.jpg", "a/1/y.jpg", "b/2/x.jpg", "b/2/y.jpg"]
        assert fetched(table) == [b"a/1.tar", b"y", b"b/2.tar", b"y"]


def test_links_within_a_tar_count_as_what_they_point_to(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        info = tarfile.TarInfo("data/blob.jpg")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"real"))
        for name, kind, target in (
            ("hard.jpg", tarfile.LNKTYPE, "data/blob.jpg"),
            ("x/s.jpg", tarfile.SYMTYPE, "../hard.jpg"),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)
    (tmp_path / "x.tar").write_bytes(sink.getvalue())
    table = listed(str(tmp_path / "x.tar"))
    assert table["file_name"].to_pylist() == ["data/blob.jpg", "hard.jpg", "x/s.jpg"]
    assert fetched(table) == [b"real"] * 3


def test_only_headers_of_a_remote_tar_are_read(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {f"{i}.jpg": bytes([i]) * 400_000 for i in range(12)}
    uri = f"{s3_root}/x.tar"
    storage.put(uri, tar_of(members))
    num_bytes = 0
    original = reading.read_bytes

    def counting(uri: str, offset: int | None = None, length: int | None = None, **options: Any) -> bytes:
        nonlocal num_bytes
        data = original(uri, offset, length, **options)
        num_bytes += len(data)
        return data

    monkeypatch.setattr(reading, "read_bytes", counting)
    assert [m.name for m in list_tar(uri, (".jpg",))] == list(members)
    assert num_bytes < 400_000 * 12 / 3


def test_a_tar_cut_inside_its_last_image_lists_it(tmp_path: Path) -> None:
    data = tar_of({"a.jpg": b"a" * 600, "b.jpg": b"b" * 5000})
    start = data.index(b"b" * 100)
    (tmp_path / "x.tar").write_bytes(data[: start + 1000])
    table = listed(str(tmp_path / "x.tar"))
    assert table["file_name"].to_pylist() == ["a.jpg", "b.jpg"]
    assert fetched(table) == [b"a" * 600, b"b" * 1000]  # short: decoding will say "truncated"


def test_a_tar_without_its_end_marks_is_whole(tmp_path: Path) -> None:
    data = tar_of({"a.jpg": b"a" * 512, "b.jpg": b"b" * 512})
    (tmp_path / "x.tar").write_bytes(data[: 4 * 512])
    assert names_of(str(tmp_path / "x.tar")) == ["a.jpg", "b.jpg"]


def test_a_tar_damaged_in_the_middle_is_refused(tmp_path: Path) -> None:
    data = bytearray(tar_of({"a.jpg": b"a" * 512, "b.jpg": b"b" * 512, "c.jpg": b"c"}))
    data[2 * 512 : 2 * 512 + 300] = b"\x99" * 300
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(ConfigError, match=r"x\.tar is damaged after a\.jpg \(byte 1024\)"):
        listed(str(tmp_path / "x.tar"))
    for name, content in (("text.tar", b"hello " * 500), ("empty.tar", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match="not a"):
            listed(str(tmp_path / name))
    (tmp_path / "none.tar").write_bytes(tar_of({"a.txt": b"x"}))
    with pytest.raises(ConfigError, match="no image in the tar"):
        listed(str(tmp_path / "none.tar"))


# --- manifests -----------------------------------------------------------------------------------------------------

MANIFEST_URIS = ["imgs/b 100%.jpg", "imgs/a,1.jpg", "./other/#c?.img", 'imgs/q"uote.jpg', "imgs/ü.jpg"]


def manifest(kind: str, uris: list[str], column: str = "uri") -> bytes:
    import csv
    import json

    if kind == "parquet":
        return parquet_of(pa.table({"label": list(range(len(uris))), column: uris}))
    if kind == "jsonl":
        return "".join(json.dumps({"extra": [1], column: uri}) + "\n" for uri in uris).encode()
    if kind == "txt":
        return ("\r\n".join([*uris, "", " "])).encode()
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["label", column])
    writer.writerows([[i, uri] for i, uri in enumerate(uris)])
    return b"\xef\xbb\xbf" + text.getvalue().encode()


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "txt"])
def test_manifests(storage_root: str, kind: str) -> None:
    for uri in MANIFEST_URIS:
        storage.put(storage.resolve(f"{storage_root}/lists", uri), uri.encode())
    list_uri = f"{storage_root}/lists/all.{kind}"
    storage.put(list_uri, manifest(kind, [*MANIFEST_URIS, "imgs/gone.jpg"]))
    table = listed(list_uri)
    assert table["file_name"].to_pylist() == [u.removeprefix("./") for u in MANIFEST_URIS] + ["imgs/gone.jpg"]
    assert table["uri"][0].as_py() == f"{storage_root}/lists/imgs/b 100%.jpg"
    assert fetched(table) == [*(uri.encode() for uri in MANIFEST_URIS), "missing"]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_the_manifests_column_has_a_name(tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / f"x.{kind}")
    storage.put(path, manifest(kind, ["a.jpg"], column="path"))
    assert names_of(path, uri_column="path") == ["a.jpg"]
    with pytest.raises(ConfigError, match="uri"):
        listed(path)


def test_absolute_uris_are_named_from_their_common_folder(storage_root: str, tmp_path: Path) -> None:
    uris = [f"{storage_root}/{name}" for name in ("2023/a/x.jpg", "2023/b/x.jpg", "2023/a/y.jpg")]
    (tmp_path / "x.txt").write_text("uri\n" + "\n".join(uris))
    table = listed(str(tmp_path / "x.txt"))
    assert table["uri"].to_pylist() == uris
    assert table["file_name"].to_pylist() == ["a/x.jpg", "b/x.jpg", "a/y.jpg"]


ODD_URIS = [
    *("a.jpg", "a/b c.jpg", "./a.jpg", "././a.jpg", "a/../b.jpg", "../a.jpg", "a//b.jpg", "a/", "..a", "a/..b/.c.jpg"),
    *("/a/b.jpg", "/a//b.jpg", "//a/b.jpg", "/a/./b.jpg", "/a/..", "/", "~/a.jpg", "~", "~a/b.jpg", "a/~/b.jpg"),
    *("s3://b/a.jpg", "s3://b/a/", "S3://b/a.jpg", "s3://b//a/../x.jpg", "gs://b/a?b#c", "s3a://b/100%.jpg", "s3://"),
    *(
        "file:///a/b.jpg",
        "local:///a/../b.jpg",
        "File:///a.jpg",
        "a\nb.jpg",
        "s3://b/a\nb.jpg",
        "x:/a.jpg",
        "ä/ö.jpg",
        " ",
    ),
]


@pytest.mark.parametrize("folder", ["/", "/data/lists", "s3://bucket", "s3://bucket/lists"])
def test_uris_of_any_spelling_mean_what_storage_takes_them_for(folder: str) -> None:
    uris = pa.chunked_array([ODD_URIS[:7], ODD_URIS[7:], [None, ""], []], pa.string())
    table = rows_of_uris(uris, folder, folder).rows
    assert table["uri"].to_pylist() == [*(storage.resolve(folder, uri) for uri in ODD_URIS), "", ""]


def test_a_long_list_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uri_lists, "_TXT_BYTES", 3)
    lines = ["uri", "ä.jpg", "", "  ", "b.jpg\r", "cc.jpg", "\r", "d.jpg"]
    (tmp_path / "x.txt").write_bytes("\n".join(lines).encode())
    assert names_of(str(tmp_path / "x.txt")) == ["ä.jpg", "b.jpg", "cc.jpg", "d.jpg"]


def test_a_listing_takes_the_memory_of_its_uris_alone() -> None:
    uris = pa.chunked_array([pa.array([f"s3://bucket/{i}.jpg" for i in range(400_000)])])
    before = pa.total_allocated_bytes()
    table, _ = merge_lists([rows_of_uris(uris, "/lists", "/lists")], "/lists")
    assert pa.total_allocated_bytes() - before < 2 * uris.nbytes
    assert table["file_name"][-1].as_py() == "399999.jpg"


def test_rows_without_a_usable_uri_stay_rows(tmp_path: Path) -> None:
    storage.put(str(tmp_path / "x.parquet"), parquet_of(pa.table({"uri": ["a.jpg", None, "", "nosuch://b/c.jpg"]})))
    (tmp_path / "a.jpg").write_bytes(b"a")
    assert fetched(listed(str(tmp_path / "x.parquet"))) == [b"a", "missing", "missing", "unreadable"]


def test_a_remote_manifest_names_local_paths_only_if_it_is_trusted(s3_root: str, tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_bytes(b"b")
    storage.put(f"{s3_root}/x.txt", f"{tmp_path}/b.jpg\na.jpg".encode())
    storage.put(f"{s3_root}/a.jpg", b"a")
    assert fetched(listed(f"{s3_root}/x.txt")) == ["not_allowed", b"a"]
    assert fetched(listed(f"{s3_root}/x.txt", allow_outside=True)) == [b"b", b"a"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", b""),
        ("x.csv", b"uri\n"),
        ("x.txt", b"\n\n"),
        ("x.txt", b"\xff\xfe\x00a"),
        ("x.jsonl", b"{not json"),
        ("x.parquet", b"PAR1 not really"),
        ("x.parquet", parquet_of(pa.table({"a": [1]}))),
    ],
)
def test_manifests_that_cannot_be_read_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\."):
        listed(str(tmp_path / name))


# --- Parquet with image bytes --------------------------------------------------------------------------------------

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def test_hugging_face_images_are_fetched_by_row(storage_root: str) -> None:
    images = [{"bytes": f"image {i}".encode(), "path": f"train/{i}.jpg"} for i in range(10)]
    images[7] = {"bytes": None, "path": "side file.jpg"}
    images[8] = {"bytes": None, "path": None}
    table = pa.table({"image": pa.array([*images, None], IMAGE), "label": range(11)})
    uri = f"{storage_root}/data.parquet"
    storage.put(uri, parquet_of(table, row_group_size=3))
    storage.put(f"{storage_root}/side file.jpg", b"from the file")
    rows = listed(uri)
    assert rows["file_name"][3].as_py() == "row-3/train/3.jpg"  # some have no name, so all are numbered
    assert rows["uri"][3].as_py() == f"{uri}#row=3"
    want: list[bytes | str] = [f"image {i}".encode() for i in range(7)]
    want += [b"from the file", "missing", b"image 9", "missing"]
    assert fetched(rows) == want
    assert fetched(rows.take([9, 2, 0])) == [b"image 9", b"image 2", b"image 0"]


def test_binary_columns_and_names(tmp_path: Path) -> None:
    for kind in (pa.binary(), pa.large_binary()):
        table = pa.table({"jpeg": pa.array([b"a", b"b"], kind), "file_name": ["1.jpg", "2.jpg"], "uri": ["x", "y"]})
        (tmp_path / "x.parquet").write_bytes(parquet_of(table))
        rows = listed(str(tmp_path / "x.parquet"))
        assert rows["file_name"].to_pylist() == ["1.jpg", "2.jpg"]
        assert fetched(rows) == [b"a", b"b"]
    (tmp_path / "y.parquet").write_bytes(parquet_of(pa.table({"pixels": pa.array([b"a"])})))
    assert names_of(str(tmp_path / "y.parquet"), image_column="pixels") == ["row-0"]


def test_several_parquet_files_keep_equal_names_apart(storage_root: str) -> None:
    for part in ("a", "b"):
        images = [{"bytes": part.encode(), "path": "same.jpg"}, {"bytes": b"2", "path": "same.jpg"}]
        storage.put(f"{storage_root}/{part}.parquet", parquet_of(pa.table({"image": pa.array(images, IMAGE)})))
    rows = listed(f"{storage_root}/*.parquet")
    assert rows["file_name"].to_pylist() == [f"{p}/row-{i}/same.jpg" for p in "ab" for i in range(2)]
    assert fetched(rows) == [b"a", b"2", b"b", b"2"]


def test_a_struct_of_other_things_is_no_image(tmp_path: Path) -> None:
    """samray's own output has a column `image`, too."""
    table = pa.table({"image": [{"image_id": 1, "width": 2}], "uri": ["a.jpg"]})
    (tmp_path / "x.parquet").write_bytes(parquet_of(table))
    assert names_of(str(tmp_path / "x.parquet")) == ["a.jpg"]


# --- fetching ------------------------------------------------------------------------------------------------------


def test_what_is_wrong_with_one_file_is_its_own_fault(storage_root: str) -> None:
    write(storage_root, "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    table = listed(storage_root)
    storage.delete(f"{storage_root}/2.jpg")
    storage.put(f"{storage_root}/3.jpg", b"it has grown" * 9)
    assert fetched(table, max_bytes=50) == [b"1.jpg", "missing", "too_large", b"4.jpg"]
    assert fetched(table, max_bytes=4) == ["too_large"] * 4
    assert fetched(table.slice(0, 0)) == []


def test_sizes_count_in_containers_and_manifests_too(storage_root: str) -> None:
    storage.put(f"{storage_root}/x.tar", tar_of({"a.jpg": b"12345", "b.jpg": b"123456"}))
    assert fetched(listed(f"{storage_root}/x.tar"), max_bytes=5) == [b"12345", "too_large"]
    storage.put(f"{storage_root}/x.parquet", parquet_of(pa.table({"image": [b"12345", b"123456"]})))
    assert fetched(listed(f"{storage_root}/x.parquet"), max_bytes=5) == [b"12345", "too_large"]
    write(storage_root, "12345", "123456")
    storage.put(f"{storage_root}/x.txt", b"12345\n123456\nfolder")
    storage.put(f"{storage_root}/folder/x", b"")
    assert fetched(listed(f"{storage_root}/x.txt"), max_bytes=5) == [b"12345", "too_large", "missing"]


def test_containers_that_vanish_or_shrink(storage_root: str) -> None:
    uri = f"{storage_root}/x.parquet"
    storage.put(uri, parquet_of(pa.table({"image": [b"1", b"2", b"3"]})))
    table = listed(uri)
    storage.put(uri, parquet_of(pa.table({"image": [b"1"]})))
    assert fetched(table) == [b"1", "missing", "missing"]
    storage.put(uri, b"no longer Parquet")
    assert fetched(table) == ["unreadable"] * 3
    storage.delete(uri)
    assert fetched(table) == ["missing"] * 3


def test_when_the_storage_fails_no_image_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(str(tmp_path), "1.jpg", "2.jpg")
    table = listed(str(tmp_path))

    def down(uri: str, max_bytes: int, size: int | None = None) -> bytes:
        raise StorageError("the storage is down")

    monkeypatch.setattr(storage, "read_whole", down)
    with pytest.raises(StorageError, match="is down"):
        fetch_images(table, InputConfig())


def test_names_that_are_no_utf8_become_failed_rows(tmp_path: Path) -> None:
    import os

    with open(os.fsencode(tmp_path) + b"/bad-\xff.jpg", "wb"):
        pass
    table = listed(str(tmp_path))
    assert table["file_name"].to_pylist() == ["bad-\\udcff.jpg"]
    assert fetched(table) == ["unreadable"]
    assert "not UTF-8" in str(fetch_images(table, InputConfig())[0])


def test_a_disk_that_is_not_mounted_is_no_images_fault(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    write(str(folder), *(f"{i}.jpg" for i in range(6)))
    table = listed(str(folder))
    uris = table["uri"].to_pylist()
    for i in range(4):
        (folder / f"{i}.jpg").unlink()
    images = fetch_images(table.slice(0, 4), InputConfig(), lambda: uris)
    assert [data.reason for data in images if isinstance(data, ImageError)] == ["missing"] * 4  # others are there
    folder.rename(tmp_path / "unmounted")
    with pytest.raises(StorageError, match="check that the disk is mounted"):
        fetch_images(table, InputConfig(), lambda: uris)


class _Web(http.server.BaseHTTPRequestHandler):
    """Serves a picture, and fails where that is in the name."""

    def do_GET(self) -> None:
        if "redirect" in self.path:
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/latest/meta-data/x.png")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(503 if "fails" in self.path else 200)
        self.send_header("Content-Length", "7")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"picture")

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def test_a_web_server_that_fails_is_one_images_fault(tmp_path: Path, storage_limits: Any) -> None:
    storage_limits(timeout_s=0.3)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_port}"
        (tmp_path / "x.txt").write_text(f"{web}/a.png\n{web}/fails.png\nhttp://127.0.0.1:9/nobody-listens.png\n")
        rows = listed(str(tmp_path / "x.txt"))
        assert fetched(rows) == [b"picture", "unreadable", "unreadable"]
        assert "run the same command" not in str(fetch_images(rows, InputConfig())[1])  # that would skip the row
        server.shutdown()


def test_a_redirect_to_a_link_local_address_is_not_followed(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_port}"
        (tmp_path / "x.txt").write_text(f"{web}/redirect.png\n{web}/a.png\n")
        redirected, good = fetch_images(listed(str(tmp_path / "x.txt")), InputConfig())
        server.shutdown()
    assert good == b"picture"
    assert str(redirected).startswith("unreadable: samray never connects to 169.254.169.254")


def test_damage_to_a_row_group_is_that_of_its_images_alone(tmp_path: Path) -> None:
    images = pa.array([b"%d" % i * 50 for i in range(6)], pa.binary())
    data = bytearray(
        parquet_of(pa.table({"image": images}), row_group_size=2, compression="none", use_dictionary=False)
    )
    at = pq.ParquetFile(pa.BufferReader(bytes(data))).metadata.row_group(1).column(0).data_page_offset
    data[at : at + 40] = b"\xff" * 40
    (tmp_path / "x.parquet").write_bytes(data)
    contents = fetched(listed(str(tmp_path / "x.parquet")))
    assert contents == [b"0" * 50, b"1" * 50, "unreadable", "unreadable", b"4" * 50, b"5" * 50]


def test_signatures_are_no_part_of_a_name(tmp_path: Path) -> None:
    signed = "X-Amz-Credential=AKIA1&X-Amz-Signature=abc"
    name_of = {
        f"https://h/a/1.jpg?{signed}": "1.jpg",
        f"https://h/a/b/2.JPEG?{signed}": "b/2.JPEG",
        "https://h/a/show?id=3&key=abc": "show?id=3&key=***",
        "https://h/a/get.jpg?id=1": "get.jpg?id=1",  # what tells it from the next one
        "https://h/a/get.jpg?id=2": "get.jpg?id=2",
        "https://h/a/4.png": "4.png",
    }
    (tmp_path / "x.txt").write_text("\n".join(name_of))
    rows = listed(str(tmp_path / "x.txt"))
    assert rows["uri"].to_pylist() == list(name_of)
    assert rows["file_name"].to_pylist() == list(name_of.values())


def test_more_text_than_pyarrow_takes_from_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"uri": pa.chunked_array([["a", None], ["b"], ["c", "d"]]), "size": [1, 2, 3, 4, 5]})
    places = pa.array([4, 1, 0, 0, 2])
    expected = table.take(places)
    monkeypatch.setattr(rows, "_MOST_TEXT_BYTES", 0)
    monkeypatch.setattr(rows, "_ROWS_AT_ONCE", 2)
    assert rows.take(table, places).equals(expected)
    assert rows.take(table["uri"], places).num_chunks > 1
    assert rows.take(table, places[:0]).equals(table.slice(0, 0))
    assert rows.indices_of(["d", None, "x"], table["uri"]) == {0: [4]}
