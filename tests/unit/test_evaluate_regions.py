"""What `samray evaluate` reads: images and their regions, in two layouts, and what it says to other data."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from samray import storage
from samray.errors import ConfigError, ImageError, StorageError
from samray.evaluate.regions import RegionData, RegionImage, RleMasks, large_enough
from tests.support import labelled, standin
from tests.support.handmade import annotation
from tests.support.marked import (
    HEIGHT,
    WIDTH,
    box,
    bsds_row,
    rle,
    write_parquet,
)

# --- what is read ----------------------------------------------------------------------------------------------------


def test_bsds500_gives_each_annotators_regions(tmp_path: Path) -> None:
    masks = [box(0, 40, 0, 30), box(0, 40, 30, 60), box(5, 9, 7, 30)]
    data = RegionData(write_parquet(tmp_path / "val.parquet", [bsds_row("a.jpg", [masks[:2], masks[2:]])]))
    assert (len(data), data.layout) == (1, "bsds500")
    (image,) = data
    assert isinstance(image, RegionImage)
    assert (image.name, image.pixels.shape) == ("a.jpg", (HEIGHT, WIDTH, 3))
    assert [len(regions) for regions in image.annotators] == [2, 1]
    np.testing.assert_array_equal(RleMasks(image.regions)[:], masks)
    np.testing.assert_array_equal(RleMasks(image.regions)[1:2], masks[1:2])


def test_images_that_cannot_be_used_stand_in_their_place_with_a_reason(tmp_path: Path) -> None:
    good = bsds_row("good.jpg", [[box(0, 4, 0, 4)]])
    other_size = bsds_row("large.jpg", [[box(0, 4, 0, 4)]], standin.make_image(1, (WIDTH + 1, HEIGHT)))
    bad_region = bsds_row("bad.jpg", [[box(0, 4, 0, 4)]])
    bad_region["annotators"][0]["regions"] = [rle(box(0, 4, 0, 4, (HEIGHT, WIDTH - 1)))["counts"]]
    rows = [bsds_row("broken.jpg", [[box(0, 4, 0, 4)]], b"no image"), other_size, bad_region, good]
    data = RegionData(write_parquet(tmp_path / "val.parquet", rows))
    broken, large, bad, image = data
    assert isinstance(broken, ImageError)
    assert broken.reason == "not_an_image"
    assert "large.jpg is 61x40 pixels, but its regions are for 60x40" in str(large)
    assert "bad.jpg has a region that cannot be decoded" in str(bad)
    assert isinstance(image, RegionImage)
    assert [type(one) for one in data] == [type(one) for one in (broken, large, bad, image)], "it can be read again"


@pytest.mark.parametrize("kind", ["files", "tar", "parquet"])
@pytest.mark.parametrize("part", ["", "annotations", "annotations/*.parquet", "../labels*"])
def test_an_output_gives_its_images_from_where_they_lie(tmp_path: Path, kind: str, part: str) -> None:
    plan = labelled.make_output(str(tmp_path), kind)
    data = RegionData(f"{plan.output}/{part}")
    images = list(data)
    assert (len(images), data.layout) == (10, "sa1b")
    (failed,) = [image for image in images if isinstance(image, ImageError)]
    assert failed.reason == "not_an_image"
    for image in images:
        if isinstance(image, RegionImage):
            wanted = [mask["segmentation"] for mask in standin.masks_of(image.pixels)]
            assert image.annotators == [wanted], "the regions are the stand-in's of just these pixels"
    sizes = sorted(image.pixels.shape[1] for image in images if isinstance(image, RegionImage))
    assert sizes == [24 + number for number in range(10) if number != labelled.BROKEN]


def test_parquet_in_the_layout_of_sa1b_needs_no_plan_and_resolves_relative_uris(storage_root: str) -> None:
    storage.put(storage.join(storage_root, "photos", "a.png"), standin.make_image(3, (WIDTH, HEIGHT)))
    row = {
        "image": {"image_id": 1, "width": WIDTH, "height": HEIGHT, "file_name": "a.png"},
        "annotations": [annotation(box(2, 9, 3, 30))],
        "uri": "photos/a.png",
    }
    gone = {**row, "uri": "photos/gone.png"}
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row, gone]), sink)
    storage.put(storage.join(storage_root, "part-0.parquet"), sink.getvalue())
    storage.put(storage.join(storage_root, "part-1.parquet"), sink.getvalue())
    image, missing = RegionData(storage.join(storage_root, "part-0.parquet"))
    assert isinstance(image, RegionImage)
    np.testing.assert_array_equal(RleMasks(image.regions)[:], [box(2, 9, 3, 30)])
    assert isinstance(missing, ImageError)
    assert missing.reason == "missing"
    assert len(RegionData(storage_root)) == len(RegionData(storage.join(storage_root, "part-*.parquet"))) == 4
    limited = RegionData(storage_root, limit=3)
    assert len(limited) == len(list(limited)) == 3


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"image": None}, "lacks its size or part of a region"),
        ({"annotations": [None]}, "lacks its size or part of a region"),
        ({"annotations": [{"segmentation": {"size": [HEIGHT, WIDTH], "counts": None}}]}, "lacks its size"),
        ({"annotations": [annotation(box(0, 9, 0, 9, (WIDTH, HEIGHT)))]}, "has a region that is not 60x40 pixels"),
        ({"uri": None}, "missing: "),
        ({"status": "failed", "error": "truncated: the file ends"}, "truncated: the file ends"),
        ({"status": "failed", "error": "who knows"}, "unreadable: failed in DATA"),
    ],
)
def test_a_row_that_makes_no_sense_is_a_failed_image(tmp_path: Path, wrong: dict[str, Any], words: str) -> None:
    (tmp_path / "a.png").write_bytes(standin.make_image(3, (WIDTH, HEIGHT)))
    size = {"image_id": 1, "width": WIDTH, "height": HEIGHT, "file_name": "a.png"}
    whole = {"image": size, "annotations": [annotation(box(2, 9, 3, 30))], "uri": "a.png", "status": "ok", "error": ""}
    failed, image = RegionData(write_parquet(tmp_path / "x.parquet", [whole | wrong, whole]))
    assert words in str(failed)
    assert isinstance(image, RegionImage)


def test_no_name_or_message_holds_the_credentials_of_a_uri(tmp_path: Path) -> None:
    name, shown = "a.png?X-Amz-Signature=secret", "a.png?X-Amz-Signature=***"
    (tmp_path / name).write_bytes(standin.make_image(3, (WIDTH, HEIGHT)))
    size = {"image_id": 1, "width": WIDTH, "height": HEIGHT, "file_name": name}
    whole = {"image": size, "annotations": [annotation(box(2, 9, 3, 30))], "uri": name, "status": "ok", "error": ""}
    wrong: list[dict[str, Any]] = [
        {"image": None},
        {"image": {**size, "width": 7}},
        {"annotations": [annotation(box(0, 9, 0, 9, (WIDTH, HEIGHT)))]},
        {"annotations": [{"segmentation": {"size": [HEIGHT, WIDTH], "counts": "0"}}]},
        {"status": "failed", "error": f"missing: https://host/{name} is gone"},
    ]
    *failed, image = RegionData(write_parquet(tmp_path / "x.parquet", [whole | one for one in [*wrong, {}]]))
    assert isinstance(image, RegionImage)
    assert image.name == shown
    for error in failed:
        assert shown in str(error)
    rows = [bsds_row(name, [[box(0, 4, 0, 4)]]), bsds_row(name, [[box(0, 4, 0, 4)]]) | {"width": 7}]
    image, error = RegionData(write_parquet(tmp_path / "val.parquet", rows))
    assert isinstance(image, RegionImage)
    assert image.name == shown
    assert f"{shown} is 60x40 pixels" in str(error)


def test_a_shard_that_no_longer_fits_its_plan_is_read_by_its_uris(tmp_path: Path) -> None:
    plan = labelled.make_output(str(tmp_path))
    shard = Path(plan.output) / "annotations" / "shard-000001.parquet"
    pq.write_table(pq.read_table(shard).slice(1), shard)
    shard.with_name("shard-000007.parquet").write_bytes(shard.read_bytes())
    images = list(RegionData(plan.output))
    assert len(images) == 9 + 3
    assert sum(isinstance(image, RegionImage) for image in images) == 11


def test_large_enough_also_leaves_out_what_is_empty() -> None:
    regions = [rle(box(0, 2, 0, 5)), rle(box(0, 3, 0, 3)), rle(box(0, 0, 0, 0))]
    assert large_enough(regions, 10) == regions[:1]
    assert large_enough(regions, 0) == regions[:2]
    assert large_enough([], 0) == []
    assert large_enough(regions * 200, 10) == regions[:1] * 200


def other_columns(folder: Path) -> str:
    return write_parquet(folder / "o.parquet", [{"uri": "a", "masks": [{"counts": "1"}]}])


def no_parquet(folder: Path) -> str:
    (folder / "notes.txt").write_text("x")
    return str(folder)


def no_rows(folder: Path) -> str:
    table = pa.Table.from_pylist([bsds_row("a.jpg", [[box(0, 4, 0, 4)]])])
    pq.write_table(table.slice(0, 0), folder / "e.parquet")
    return str(folder / "e.parquet")


def broken_parquet(folder: Path) -> str:
    (folder / "b.parquet").write_bytes(b"PAR1 and no more")
    return str(folder / "b.parquet")


def unfinished(folder: Path) -> str:
    plan = labelled.make_output(str(folder))
    for name in storage.list_names(storage.join(plan.output, "annotations")):
        storage.delete(storage.join(plan.output, "annotations", name))
    (Path(plan.output) / "annotations").rmdir()
    return plan.output


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: str(folder / "absent"), "does not exist; give an OUTPUT of samray, or Parquet with regions"),
        (no_parquet, "has no .parquet file among its 1"),
        (other_columns, "annotators.regions (bsds500); found uri string, masks.counts string"),
        (other_columns, "expected image.width, image.height, annotations.segmentation.size"),
        (no_rows, "has no images"),
        (broken_parquet, "cannot be read as Parquet"),
        (unfinished, "has no labelled images yet"),
    ],
)
def test_wrong_data_is_refused_in_a_sentence(tmp_path: Path, make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        RegionData(make(tmp_path))


def test_a_column_of_the_right_name_and_the_wrong_type_is_no_layout(tmp_path: Path) -> None:
    row = bsds_row("a.jpg", [[box(0, 4, 0, 4)]]) | {"jpeg": "text"}
    with pytest.raises(ConfigError, match="jpeg string"):
        RegionData(write_parquet(tmp_path / "a.parquet", [row]))


def test_storage_that_fails_as_a_whole_is_no_image_fault(tmp_path: Path) -> None:
    file = tmp_path / "val.parquet"
    data = RegionData(write_parquet(file, [bsds_row("a.jpg", [[box(0, 4, 0, 4)]])]))
    file.write_bytes(file.read_bytes()[:-9])  # replaced while it is read
    with pytest.raises(StorageError, match="damaged"):
        list(data)
