"""The report: what it counts, draws and shows. What the page does is tested in a browser (test_report_page.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import samray.report.output
from samray import storage
from samray.cli.main import main
from samray.errors import ConfigError, StorageError
from samray.output import sample
from samray.output.plan import Plan
from samray.output.shards import shard_uri
from samray.report.figures import bar_chart, heat_map, histogram
from samray.report.output import open_page, write_report
from samray.report.overlays import scaled_counts
from samray.rle.runs import run_lengths
from tests.support.report_outputs import (
    HEIGHT,
    NAMES,
    WIDTH,
    annotation,
    block,
    named_masks,
    nested_masks,
    write_output,
)


def page_of(plan: Plan, **options: Any) -> str:
    return storage.read_bytes(write_report(plan.output, **options)).decode()


def text_of(page: str) -> str:
    """The page as read: without markup, style, script and white space."""
    body = re.sub(r"<(style|script|noscript).*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def images_of(page: str) -> list[dict[str, Any]]:
    """What the page hands to its script."""
    return list(
        json.loads(re.findall(r'<script type="application/json" id="images">(.*?)</script>', page, re.DOTALL)[0])
    )


def varied_masks(index: int) -> list[dict[str, Any]]:
    return nested_masks(index)[: index % 4]


# --- the page as a whole ---


def test_page_tells_what_was_found(storage_root: str) -> None:
    plan = write_output(storage_root)
    page = page_of(plan)
    text = text_of(page)
    for words in (
        "complete",
        "6 images",
        "18 masks",
        "3.0 masks per image median 3",
        "0 failed images",
        "750 ms per image device time; 4.50 s in total",  # 3 shards of 1.5 s on 6 images
        "Every figure here is exact: all 6 images were read.",
        "mask decoder 3.00 s 67%",
        "image encoder 1.50 s 33%",
        "None: every image was labelled.",
        "masks.points_per_side 8 24",  # setting, value, default of the model
        "masks.crop_nms_thresh 0.7",
    ):
        assert words in text
    changed = text[text.index("Changed settings") : text.index("Model and run")]
    assert "crop_nms_thresh" not in changed
    assert [image["name"] for image in images_of(page)] == [f"photo {i}.png" for i in range(6)]
    assert storage.exists(storage.join(plan.output, "_samray", "report.html"))


def test_page_names_the_adapter(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path))
    assert "adapter" not in text_of(page_of(plan)).partition("Model and run")[2].partition("All settings")[0]
    run = Path(plan.output) / "_samray" / "run.json"
    content = json.loads(run.read_text())
    content["identity"]["model"]["adapter_sha256"] = "ab" * 32
    run.write_text(json.dumps(content))
    assert f"adapter SHA-256 {'ab' * 32}" in text_of(page_of(plan))


def test_page_is_self_contained(tmp_path: Path) -> None:
    page = page_of(write_output(str(tmp_path)))
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert not re.search(r"<link(?! rel=\"icon\" href=\"data:,\")|@import|url\(|https?://", page)
    assert "default-src 'none'" in page


def test_masks_are_handed_over_largest_first_as_they_lie_in_the_output(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), num_images=2)
    (image, _) = images_of(page_of(plan))
    assert image["size"] == image["original"] == [WIDTH, HEIGHT]
    whole, apart, part = nested_masks(0)[1], nested_masks(0)[2], nested_masks(0)[0]
    for index, (page_mask, mask) in enumerate(zip(image["masks"], (whole, apart, part), strict=True)):
        assert page_mask["area"] == mask["area"]
        assert page_mask["iou"] == mask["predicted_iou"]
        assert page_mask["point"] == mask["point_coords"][0]
        assert page_mask["counts"] == mask["segmentation"]["counts"]  # the image is small: nothing is brought down
        assert page_mask["id"] == str([1, 2, 0][index])


def test_figures_say_what_they_rest_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_output(str(tmp_path), num_images=12, masks=varied_masks)
    monkeypatch.setattr(sample, "MAX_GROUPS", 2)
    text = text_of(page_of(plan))
    assert "12 images 18 masks 1.5 masks per image" in text
    assert "Counts and times are exact, from the footers of all 6 shards." in text
    assert "estimated from a random sample of 4 of 12 images" in text
    assert re.search(r"≈ 0\.\d\d mean predicted IoU", text)
    monkeypatch.setattr(sample, "MAX_FOOTERS", 3)
    text = text_of(page_of(plan))
    assert "are estimates ( ≈ ) from the footers of a random 50% of 6 shards" in text
    assert re.search(r" 12 images ≈ \d+ masks ≈ 1\.\d masks per image", text)


def test_counts_are_exact_also_where_footers_hold_none(tmp_path: Path) -> None:
    errors = {3: "truncated: it ends", 4: "truncated: it ends", 7: "missing: it is gone"}
    plan = write_output(str(tmp_path), 8, errors=errors, masks=varied_masks, with_stats=False)
    text = text_of(page_of(plan))
    assert "8 images 6 masks 1.2 masks per image" in text  # places 1, 2, 5 and 6 have 1, 2, 1 and 2 masks
    assert "3 failed images 38%" in text
    assert "Time by stage" not in text


def test_failures_by_reason_with_examples_escaped(tmp_path: Path) -> None:
    errors = {0: "truncated: the file ends early", 1: "truncated: <b>bold</b>", 4: "missing: it is gone"}
    page = page_of(write_output(str(tmp_path), errors=errors))
    text = text_of(page)
    assert "3 failed images 50%" in text
    assert text.index("truncated 2") < text.index("missing 1")
    assert f"{tmp_path}/in/photo 0.png the file ends early" in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert len(images_of(page)) == 3


def test_rare_reasons_have_an_example_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "MAX_GROUPS", 2)
    errors = dict.fromkeys(range(20), "missing: it is gone") | {13: "quarantined: it kills"}
    text = text_of(page_of(write_output(str(tmp_path), 20, errors=errors)))
    assert "missing 19" in text
    assert f"quarantined 1 {tmp_path}/in/photo " in text
    assert "No images to show: none could be labelled." in text


def test_missing_shards_are_reported(tmp_path: Path) -> None:
    text = text_of(page_of(write_output(str(tmp_path), missing_shards=(1,))))
    assert "incomplete: 1 of 3 shards missing" in text
    assert "4 images of 6 planned" in text


def test_output_without_any_mask(tmp_path: Path) -> None:
    page = page_of(write_output(str(tmp_path), num_images=2, masks=lambda index: []))
    assert "0 masks" in text_of(page)
    assert "Predicted IoU no values" in text_of(page)
    assert len(images_of(page)) == 2


def test_nothing_to_report_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = write_output(str(tmp_path), num_images=2, missing_shards=(0,))
    with pytest.raises(ConfigError, match="no finished shards yet"):
        write_report(plan.output)
    assert main(["report", str(tmp_path / "in")]) == 2
    assert "is not the output of a samray run" in capsys.readouterr().err
    Path(shard_uri(plan.output, 0)).parent.mkdir(exist_ok=True)
    Path(shard_uri(plan.output, 0)).write_bytes(b"PAR1 and no more")
    assert main(["report", plan.output]) == 3
    assert "shard-000000.parquet is damaged" in capsys.readouterr().err


# --- the gallery ---


def test_gallery_goes_from_few_masks_to_many(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), num_images=16, masks=varied_masks)
    shown = images_of(page_of(plan, num_images=4))
    assert sorted(len(image["masks"]) for image in shown) == [0, 1, 2, 3]
    assert images_of(page_of(plan, num_images=0)) == []
    assert images_of(page_of(plan, num_images=4)) == shown


def test_gallery_begins_with_the_images_that_are_asked_for(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), num_images=16, masks=varied_masks)
    by_name = [image["name"] for image in images_of(page_of(plan))]
    for num_images in (5, 6, 9):
        shown = [image["name"] for image in images_of(page_of(plan, num_images=num_images, num_first=5))]
        assert shown[:5] == by_name[:5]
        assert len(set(shown)) == num_images
    assert [image["name"] for image in images_of(page_of(plan, num_images=2, num_first=5))] == by_name[:2]


def test_gallery_ends_before_the_page_gets_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_output(str(tmp_path))
    monkeypatch.setattr(samray.report.output, "MAX_GALLERY_BYTES", 4000)
    assert 1 <= len(images_of(page_of(plan))) < 6


def test_image_that_is_gone_or_another_now_shows_its_masks_on_grey(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), num_images=4)
    (tmp_path / "in" / "photo 0.png").unlink()
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "photo 1.png")
    page = page_of(plan)
    assert page.count("The image cannot be read now: ") == 2
    assert "its size has changed to 5 x 5 pixels" in page
    assert page.count('src="data:image/jpeg') == 2
    assert [len(image["masks"]) for image in images_of(page)] == [3, 3, 3, 3]


def test_images_that_cannot_be_reached_are_not_tried_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = write_output(str(tmp_path), num_images=20)
    tried = []

    def fetch(rows: Any, config: Any) -> list[bytes]:
        tried.append(rows)
        raise StorageError("s3://elsewhere does not answer")

    monkeypatch.setattr(samray.report.output, "fetch_images", fetch)
    page = page_of(plan)
    assert page.count("The image cannot be read now: s3://elsewhere does not answer") == len(images_of(page)) == 20
    assert len(tried) <= samray.report.output._PHOTO_THREADS


def test_names_are_handed_over_and_counted(tmp_path: Path) -> None:
    page = page_of(write_output(str(tmp_path), masks=named_masks, categories=NAMES))
    names = json.loads(re.findall(r'id="names">(.*?)</script>', page, re.DOTALL)[0])
    assert names == ["part", "whole", None]
    shown = [(mask["label"], mask["label_score"]) for mask in images_of(page)[0]["masks"]]
    assert shown == [("whole", 0.25), (None, None), ("part", 0.5)]
    assert "Masks per name 2 names, the most frequent is part; 6 masks without a name" in text_of(page)
    assert re.findall(r'data-tip="((?:part|whole)[^"]*)"', page) == ["part: 6", "whole: 6"]


def test_an_output_without_names_has_nothing_about_them(tmp_path: Path) -> None:
    page = page_of(write_output(str(tmp_path)))
    assert 'id="name' not in page
    assert "Masks per name" not in page
    assert "label" not in images_of(page)[0]["masks"][0]


def test_bars_of_many_names_share_the_last_one() -> None:
    chart = bar_chart("", "", [(str(i), 100 - i) for i in range(60)])
    assert len(chart.bars) == 40
    assert chart.bars[-1].words == f"21 other names: {sum(range(41, 62)):,}"
    assert chart.ticks == []
    assert bar_chart("", "", []).bars == []


def test_damaged_mask_costs_its_image_only(tmp_path: Path) -> None:
    damaged = annotation(block(0, 0, 9, 9), segmentation={"size": [HEIGHT, WIDTH], "counts": "no mask"})
    plan = write_output(str(tmp_path), num_images=2, masks=lambda index: [damaged] if index else nested_masks(0))
    page = page_of(plan)
    assert [len(image["masks"]) for image in images_of(page)] == [3, 0]
    assert "annotation 0 does not fit its image" in text_of(page)


def test_masks_without_scores_or_points(tmp_path: Path) -> None:
    """As imported ones may be; NaN would be no JSON."""
    bare = [annotation(block(0, 0, 9, 9), predicted_iou=None, stability_score=float("nan"), point_coords=[])]
    page = page_of(write_output(str(tmp_path), num_images=2, masks=lambda index: bare))
    mask = images_of(page)[0]["masks"][0]
    assert (mask["iou"], mask["stability"], mask["point"]) == (None, None, None)
    assert "Click points" not in text_of(page)


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_output(str(tmp_path))
    out = tmp_path / "page.html"
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda uri: opened.append(uri) or True)
    assert main(["report", plan.output, "--out", str(out), "--images", "2", "--open"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(out)
    assert "no display" in said.err
    assert len(images_of(out.read_text())) == 2
    assert opened == []
    monkeypatch.setenv("DISPLAY", ":0")
    assert open_page(str(out))
    assert opened == [out.as_uri()]
    assert not open_page("s3://bucket/report.html")


# --- its parts ---


def test_draw_is_spread_over_all_and_the_same_each_time() -> None:
    drawn = sample.spread(range(1000), 10)
    assert [item // 100 for item in drawn] == list(range(10))
    assert drawn == sample.spread(range(1000), 10)
    assert drawn != list(range(0, 1000, 100))
    assert sample.spread("abc", 5) == ["a", "b", "c"]


def test_as_many_row_groups_are_drawn_as_hold_the_images_asked_for() -> None:
    footers = [sample.Footer(shard, (64,) * 50, (False,) * 50, 0, {}, {}) for shard in range(20)]
    drawn = sample.draw_groups(footers, 640)
    assert len(drawn) == 10
    assert [shard // 2 for shard, _ in drawn] == list(range(10))
    assert len(sample.draw_groups(footers, 10**6)) == sample.MAX_GROUPS
    assert len(sample.draw_groups(footers[:1], 10**6)) == 50


@pytest.mark.parametrize("target", [(37, 50), (12, 9), (60, 80)])
def test_masks_are_brought_down_to_the_nearest_pixels(target: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    masks = [rng.random((HEIGHT, WIDTH)) < 0.5, block(0, 0, HEIGHT, WIDTH), block(3, 0, 50, 77)]
    strings = [annotation(mask)["segmentation"]["counts"] for mask in masks]
    runs = [run for text in strings if (run := run_lengths(text)) is not None]
    rows = ((np.arange(target[0]) + 0.5) * HEIGHT / target[0]).astype(int)
    columns = ((np.arange(target[1]) + 0.5) * WIDTH / target[1]).astype(int)
    for mask, counts in zip(masks, scaled_counts(runs, (HEIGHT, WIDTH), target), strict=True):
        decoded = coco_mask.decode({"size": list(target), "counts": counts.encode()})
        assert (decoded == mask[rows][:, columns]).all()


def test_mask_between_the_pixels_keeps_one() -> None:
    specks = [block(y, x, y + 1, x + 1) for y, x in ((0, 0), (59, 79), (31, 40))] + [block(0, 0, 0, 0)]
    runs = [run for m in specks if (run := run_lengths(annotation(m)["segmentation"]["counts"])) is not None]
    shares = [
        coco_mask.decode({"size": [6, 8], "counts": counts.encode()})
        for counts in scaled_counts(runs, (HEIGHT, WIDTH), (6, 8))
    ]
    assert [mask.sum() for mask in shares] == [1, 1, 1, 0]
    assert shares[0][0, 0]
    assert shares[1][5, 7]


def test_histogram_counts_every_value_once() -> None:
    values = np.random.default_rng(0).uniform(0.3, 0.9, 500)
    chart = histogram("t", "n", values)
    assert sum(int(bar.words.rpartition(": ")[2]) for bar in chart.bars) == 500
    assert len(chart.bars) <= 41
    assert max(bar.height for bar in chart.bars) == 40
    assert all(bar.x >= 0 and bar.x + bar.width <= 100 + 1e-9 for bar in chart.bars)
    one = histogram("t", "n", np.full(7, 0.25))
    assert sum(bar.height > 0 for bar in one.bars) == 1
    assert histogram("t", "n", np.zeros(0)).bars == []


def test_histogram_shows_the_threshold_where_it_lies() -> None:
    chart = histogram("t", "n", np.linspace(0.9, 0.99, 50), marker=0.88)
    assert chart.marker is not None
    assert 0 <= chart.marker[0] < min(bar.x for bar in chart.bars if bar.height)


def test_histogram_of_whole_numbers_labels_them() -> None:
    chart = histogram("t", "n", np.array([3, 3, 5]), show="{:.0f}".format, whole_numbers=True)
    assert [bar.words for bar in chart.bars] == ["3: 2", "4: 0", "5: 1"]
    assert [label for _, label in chart.ticks] == ["3", "4", "5"]
    wide = histogram("t", "n", np.arange(100), show="{:.0f}".format, whole_numbers=True)
    assert wide.bars[0].words == "0 to 2: 3"
    assert wide.bars[-1].words == "99 to 101: 1"


def test_heat_map_counts_points_in_cells_of_the_grid() -> None:
    grid = (np.arange(16) + 0.5) / 16
    points = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    even = heat_map(np.repeat(points, 12, axis=0), 16)
    assert (even.num_cells, even.most) == (16, 12)
    assert {strength for _, _, strength, _ in even.cells} == {1.0}
    corner = heat_map(np.array([[1.0, 0.0]]), 32)
    assert corner.cells == [(corner.num_cells - 1, 0, 1.0, "1 mask")]
