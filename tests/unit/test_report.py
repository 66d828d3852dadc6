"""The report page and what it draws, on outputs written by hand: no model, no Ray."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import samray.report
from samray.cli import main
from samray.config import load_config
from samray.dataset.manifest import Plan, make_plan
from samray.dataset.schema import ImageRecord, records_to_table
from samray.dataset.shards import commit_shard, mark_success, shard_uri
from samray.errors import ConfigError
from samray.figures import Histogram, mask_overlay
from samray.report import write_report

HEIGHT, WIDTH = 60, 80


def annotation(mask: np.ndarray, **scores: float) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "segmentation": {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()},
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(coco_mask.area(rle)),
        "predicted_iou": scores.get("predicted_iou", 0.9),
        "stability_score": scores.get("stability_score", 0.96),
        "point_coords": [[1.0, 2.0]],
        "crop_box": [0.0, 0.0, float(mask.shape[1]), float(mask.shape[0])],
    }


def block(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


BLOCKS = [annotation(block(0, 0, 30, 40)), annotation(block(5, 5, 15, 15), predicted_iou=0.75)]


def write_output(
    folder: Path,
    num_images: int = 6,
    errors: dict[int, str] | None = None,
    masks: Callable[[int], list[dict[str, Any]]] = lambda image: BLOCKS,
    missing_shards: tuple[int, ...] = (),
) -> Plan:
    """An output of two images a shard under folder/out, its images in folder/in."""
    (folder / "in").mkdir()
    for i in range(num_images):
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 40 * i % 256, np.uint8)).save(folder / "in" / f"photo {i}.png")
    config = load_config("default", overrides=["output.images_per_shard=2", "masks.points_per_side=8"])
    plan = make_plan(str(folder / "in"), str(folder / "out"), config, config.identity())
    for shard in set(range(plan.num_shards)) - set(missing_shards):
        records = []
        for place, row in enumerate(plan.read_shard(shard).to_pylist(), start=2 * shard):
            error = (errors or {}).get(place)
            records.append(
                ImageRecord(
                    image_id=row["image_id"],
                    width=0 if error else WIDTH,
                    height=0 if error else HEIGHT,
                    file_name=row["file_name"],
                    uri=row["uri"],
                    annotations=[] if error else masks(place),
                    error=error,
                )
            )
        stats = {"device_seconds": 1.5, "stage_seconds": {"encode": 0.5, "decode": 1.0}}
        commit_shard(plan.output, shard, records_to_table(records, plan.run), stats)
    if not missing_shards:
        mark_success(plan.output)
    return plan


def page_of(plan: Plan, **options: Any) -> str:
    return Path(write_report(plan.output, **options)).read_text()


def text_of(page: str) -> str:
    """The page as read: without markup, style and white space."""
    body = re.sub(r"<(style|script).*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_page_tells_what_was_found(tmp_path: Path) -> None:
    plan = write_output(tmp_path)
    page = page_of(plan)
    text = text_of(page)
    for words in (
        "6 images",
        "12 masks",
        "2.0 masks an image",
        "0 failed images",
        "complete",
        "every image was labelled",
    ):
        assert words in text
    assert "750 ms time an image" in text  # 3 shards of 1.5 s on 6 images
    assert re.search(r"mask decoder 3\.00 s, 67%.*image encoder 1\.50 s, 33%", text)
    assert "points_per_side 8" in text
    assert re.search(r'class="own"[^>]*><td[^>]*>points_per_side', page)
    assert not re.search(r'class="own"[^>]*><td[^>]*>pred_iou_thresh', page)
    assert page.count('<img class="masks"') == 6
    assert (tmp_path / "out" / "_samray" / "report.html").is_file()


def test_page_is_self_contained(tmp_path: Path) -> None:
    page = page_of(write_output(tmp_path))
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert not re.search(r"<link|<script|@import|url\(", page)


def test_failures_by_reason_with_examples_escaped(tmp_path: Path) -> None:
    errors = {0: "truncated: the file ends early", 1: "truncated: <b>bold</b>", 4: "missing: it is gone"}
    page = page_of(write_output(tmp_path, errors=errors))
    text = text_of(page)
    assert "3 failed images 50.0%" in text
    assert text.index("truncated 2") < text.index("missing 1")
    assert "photo 0.png" in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert page.count('<img class="masks"') == 3


def test_image_that_is_gone_or_another_now_is_shown_as_such(tmp_path: Path) -> None:
    plan = write_output(tmp_path, num_images=4)
    (tmp_path / "in" / "photo 0.png").unlink()
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "photo 1.png")
    page = page_of(plan)
    assert page.count("The image cannot be read now.") == 2
    assert "it is 5 x 5 now" in page
    assert page.count('<img class="masks"') == 2


def test_missing_shards_are_told(tmp_path: Path) -> None:
    text = text_of(page_of(write_output(tmp_path, missing_shards=(1,))))
    assert "incomplete: 1 of 3 shards missing" in text
    assert "4 read here" in text


def test_gallery_is_spread_over_the_output(tmp_path: Path) -> None:
    plan = write_output(tmp_path, num_images=12)
    page = page_of(plan, num_images=3)
    shown = [int(number) for number in re.findall(r'alt="photo (\d+)\.png"', page)]
    assert len(shown) == 3
    order = [row["file_name"] for shard in range(6) for row in plan.read_shard(shard).to_pylist()]
    places = sorted(order.index(f"photo {number}.png") for number in shown)
    assert places[0] < 4 <= places[1] < 8 <= places[2]
    assert 'class="gallery"' not in page_of(plan, num_images=0)


def test_many_shards_are_sampled_and_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samray.report, "MAX_SHARDS_READ", 2)
    text = text_of(page_of(write_output(tmp_path, num_images=12)))
    assert "Figures are from 2 of 6 shards, spread evenly." in text
    assert "12 images 4 read here" in text


def test_output_without_any_mask(tmp_path: Path) -> None:
    text = text_of(page_of(write_output(tmp_path, num_images=2, masks=lambda image: [])))
    assert "0 masks" in text
    assert "Predicted IoU no values" in text


def test_nothing_to_report_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = write_output(tmp_path, num_images=2, missing_shards=(0,))
    with pytest.raises(ConfigError, match="no finished shard yet"):
        write_report(plan.output)
    assert main(["report", str(tmp_path / "in")]) == 2
    assert "holds no samray run" in capsys.readouterr().err


def test_report_and_verify_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = write_output(tmp_path, errors={3: "empty: no bytes"})
    out = tmp_path / "page.html"
    assert main(["report", plan.output, "--out", str(out), "--images", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert out.read_text().count('<img class="masks"') == 2
    assert main(["verify", plan.output, "--deep"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "images 6 masks 10 failed images 1" in text
    assert "result sound" in text
    Path(shard_uri(plan.output, 1)).unlink()
    assert main(["verify", plan.output]) == 1
    assert "shard" in capsys.readouterr().out


def test_histogram_counts_every_value_once() -> None:
    histogram = Histogram(0, 1, 200)
    values = np.random.default_rng(0).uniform(0.3, 0.9, 500)
    histogram.add(values[:200])
    histogram.add(values[200:])
    histogram.add([-1.0, 2.0])
    chart = histogram.chart("t", "n")
    assert sum(int(bar.title.rpartition(": ")[2]) for bar in chart.bars) == 502
    assert len(chart.bars) <= 40
    assert max(bar.height for bar in chart.bars) == 40
    assert all(bar.x >= 0 and bar.x + bar.width <= 100 + 1e-9 for bar in chart.bars)
    assert abs(histogram.quantile(0.5) - np.median(values)) < 0.02


def test_histogram_shows_the_threshold_where_it_lies() -> None:
    histogram = Histogram(0, 1, 200)
    histogram.add(np.linspace(0.9, 0.99, 50))
    chart = histogram.chart("t", "n", marker=0.88)
    assert chart.marker is not None
    left = chart.bars[0]
    assert 0 <= chart.marker[0] <= 100
    assert chart.marker[0] < min(bar.x for bar in chart.bars if bar.height) + left.width


def test_histogram_of_whole_numbers_labels_them() -> None:
    histogram = Histogram(0, 100, 100)
    histogram.add([3, 3, 5])
    chart = histogram.chart("t", "n", show="{:.0f}".format, whole_numbers=True)
    assert [bar.title for bar in chart.bars] == ["3: 2", "4: 0", "5: 1"]
    assert [label for _, label in chart.ticks] == ["3", "4", "5"]


def test_overlay_paints_parts_over_wholes_and_nothing_outside() -> None:
    small, large = BLOCKS[1], BLOCKS[0]
    overlay = np.asarray(mask_overlay([small, large], (WIDTH, HEIGHT)))
    assert overlay[45, 60] == 0
    whole, part = overlay[20, 20], overlay[10, 10]
    assert 0 < whole != part > 0
    assert overlay[5, 10] not in (0, whole, part)  # the part's edge
    assert overlay[0, 20] == whole  # the image's border is no edge
    half = np.asarray(mask_overlay([large], (WIDTH // 2, HEIGHT // 2)))
    assert half.shape == (HEIGHT // 2, WIDTH // 2)
    assert abs(int((half > 0).sum()) * 4 - large["area"]) < 200
