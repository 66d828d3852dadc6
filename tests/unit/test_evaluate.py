"""`samray evaluate`: its figures against values worked out by hand, what it reads, and what it says to wrong input."""

from __future__ import annotations

import io
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import labelled
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import standin
import torch
from handmade import annotation
from PIL import Image

from samray import storage
from samray.cli import main
from samray.errors import ConfigError, ImageError, StorageError
from samray.evaluate import points as points_module
from samray.evaluate.pictures import Sheet, click_sheet, offer_clicks, offer_masks, picture_format, proposal_sheet
from samray.evaluate.points import answer_clicks, evaluate_points
from samray.evaluate.proposals import Marked, average_recall, evaluate_proposals
from samray.evaluate.regions import RegionData, RegionImage, Rle, RleMasks, large_enough

ROOT = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH = 40, 60


def box(top: int, bottom: int, left: int, right: int, hw: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    mask = np.zeros(hw, bool)
    mask[top:bottom, left:right] = True
    return mask


def rle(mask: np.ndarray) -> Rle:
    return annotation(mask)["segmentation"]


def bsds_row(name: str, annotators: list[list[np.ndarray]], data: bytes | None = None) -> dict[str, Any]:
    """A row as BSDS500's Parquet has it, of an image of WIDTH x HEIGHT."""
    regions = [[rle(mask)["counts"] for mask in masks] for masks in annotators]
    return {
        "image_id": len(name),
        "file_name": name,
        "width": WIDTH,
        "height": HEIGHT,
        "jpeg": standin.make_image(1, (WIDTH, HEIGHT)) if data is None else data,
        "annotators": [{"annotator": i, "boundary": "", "regions": found} for i, found in enumerate(regions)],
    }


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def region_image(annotators: list[list[np.ndarray]]) -> RegionImage:
    pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    return RegionImage("an image", pixels, [[rle(mask) for mask in masks] for masks in annotators])


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
    assert "bad.jpg holds a region that cannot be decoded" in str(bad)
    assert isinstance(image, RegionImage)
    assert [type(one) for one in data] == [type(one) for one in (broken, large, bad, image)], "it can be read again"


@pytest.mark.parametrize("kind", ["files", "tar", "parquet"])
def test_an_output_gives_its_images_from_where_they_lie(tmp_path: Path, kind: str) -> None:
    plan = labelled.make_output(str(tmp_path), kind)
    data = RegionData(plan.output)
    found = list(data)
    assert (len(found), data.layout) == (10, "sa1b")
    (failed,) = [image for image in found if isinstance(image, ImageError)]
    assert failed.reason == "not_an_image"
    for image in found:
        if isinstance(image, RegionImage):
            wanted = [mask["segmentation"] for mask in standin.masks_of(image.pixels)]
            assert image.annotators == [wanted], "the regions are the stand-in's of just these pixels"
    sizes = sorted(image.pixels.shape[1] for image in found if isinstance(image, RegionImage))
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


def test_large_enough_also_leaves_out_what_is_empty() -> None:
    regions = [rle(box(0, 2, 0, 5)), rle(box(0, 3, 0, 3)), rle(box(0, 0, 0, 0))]
    assert large_enough(regions, 10) == regions[:1]
    assert large_enough(regions, 0) == regions[:2]
    assert large_enough([], 0) == []


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
    return plan.output


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: str(folder / "absent"), "does not exist; give an OUTPUT of samray, or Parquet with regions"),
        (no_parquet, "holds no .parquet file, among 1"),
        (other_columns, "annotators.regions (bsds500); found are uri string, masks.counts string"),
        (other_columns, "wanted are image.width, image.height, annotations.segmentation.size"),
        (no_rows, "holds no image"),
        (broken_parquet, "is no Parquet file that can be read"),
        (unfinished, "holds no labelled image yet"),
    ],
)
def test_wrong_data_is_refused_in_a_sentence(tmp_path: Path, make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        RegionData(make(tmp_path))


def test_a_column_of_the_right_name_and_the_wrong_type_is_no_layout(tmp_path: Path) -> None:
    row = bsds_row("a.jpg", [[box(0, 4, 0, 4)]]) | {"jpeg": "text"}
    with pytest.raises(ConfigError, match="jpeg string"):
        RegionData(write_parquet(tmp_path / "a.parquet", [row]))


# --- single clicks ---------------------------------------------------------------------------------------------------


class KnownSam:
    """Answers a click as a Sam of a square of 120 pixels would: with the masks that it was told, click by click."""

    device = torch.device("cpu")
    image_size = 120

    def __init__(self, answers: list[list[np.ndarray]], scores: list[list[float]]) -> None:
        self.answers, self.scores = answers, scores
        self.num_encoded = 0
        self.clicks: list[list[float]] = []

    def preprocess(self, images: list[np.ndarray]) -> Any:
        height, width = images[0].shape[:2]
        return torch.zeros(1), [(2 * height, 2 * width)]

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.num_encoded += 1
        return pixels

    def prepare_decoder(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings

    def decode_points(self, context: Any, points: torch.Tensor, labels: torch.Tensor) -> Any:
        assert labels.shape == points.shape[:2] == (len(points), 1)
        assert (labels == 1).all()
        few = slice(len(self.clicks), len(self.clicks) + len(points))
        self.clicks += points[:, 0].tolist()
        logits = torch.tensor(np.array(self.answers[few])).float().flatten(0, 1) - 0.5
        return type("Decoded", (), {"logits": logits, "all_iou": torch.tensor(self.scores[few])})()

    def postprocess(self, logits: torch.Tensor, input_hw: Any, original_hw: Any) -> torch.Tensor:
        assert input_hw == (2 * original_hw[0], 2 * original_hw[1])
        return logits


TALL, WIDE, SMALL = box(0, 40, 0, 21), box(10, 31, 22, 60), box(0, 3, 30, 33)
NOTHING, HALF = box(0, 0, 0, 0), box(0, 20, 0, 21)
QUARTER = box(10, 31, 22, 60) & (np.arange(WIDTH) < 22 + 38 // 2)


def known_sam() -> KnownSam:
    """IoUs 1, 0.5, 0 with TALL, of which 0.5 is scored best; 0, 0, 0.5 with WIDE, and 0.5 is scored best."""
    return KnownSam(
        [[TALL, HALF, NOTHING], [NOTHING, TALL, QUARTER]],
        [[0.2, 0.9, 0.1], [0.3, 0.2, 0.4]],
    )


@pytest.mark.parametrize("chunk_bytes", [1, 2**25])
def test_points_are_the_means_over_regions_worked_out_by_hand(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(points_module, "_CPU_CHUNK_BYTES", chunk_bytes)
    model = known_sam()
    image = region_image([[TALL, SMALL], [WIDE]])
    figures = evaluate_points(model, [image], min_area=500)  # type: ignore[arg-type]
    assert figures == {
        "miou": pytest.approx(0.5),
        "miou_oracle": pytest.approx(0.75),
        "num_regions": 2,
        "num_images": 1,
        "num_failed": 0,
        "failures": {},
    }
    assert model.num_encoded == 1
    # The centres are (10, 19 or 20) and (x, 20); in the frame of the model each pixel is two wide.
    assert model.clicks[0][0] == 2 * (10 + 0.5) - 0.5
    assert model.clicks[1][1] == 2 * (20 + 0.5) - 0.5


def test_a_click_lies_at_the_centre_and_the_best_scored_mask_is_said() -> None:
    (answers,) = answer_clicks(known_sam(), np.zeros((HEIGHT, WIDTH, 3), np.uint8), np.stack([TALL, WIDE]))  # type: ignore[arg-type]
    assert answers.clicks[0][0] == 10
    assert answers.clicks[1][1] == 20
    assert answers.best.tolist() == [1, 2]
    np.testing.assert_allclose(answers.iou, [[1, 0.5, 0], [0, 0, 0.5]])
    assert answers.pairs == [(0.5, 1.0), (0.5, 0.5)]


def test_failed_images_are_counted_and_the_others_go_on() -> None:
    calls = []
    broken = [ImageError("missing", "a.jpg is gone"), ImageError("missing", "b.jpg"), ImageError("empty", "c.jpg")]
    images = [broken[0], region_image([[TALL, WIDE]]), *broken[1:]]
    figures = evaluate_points(known_sam(), images, on_image=lambda failures: calls.append(len(failures)))  # type: ignore[arg-type]
    assert (figures["num_images"], figures["num_regions"], figures["num_failed"]) == (1, 2, 3)
    assert figures["failures"] == {"missing": 2, "empty": 1}
    assert calls == [1, 1, 2, 3]


def test_points_without_a_region_are_no_number() -> None:
    figures = evaluate_points(known_sam(), [region_image([[SMALL]])])  # type: ignore[arg-type]
    assert (figures["num_regions"], figures["num_images"]) == (0, 1)
    assert math.isnan(figures["miou"])
    assert math.isnan(figures["miou_oracle"])


def test_an_image_that_does_not_fit_into_memory_fails_alone_and_counts_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(points_module, "_CPU_CHUNK_BYTES", 1)
    model = known_sam()
    decode, num_calls = model.decode_points, 0

    def short_of_memory(*args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:  # the second region of the first image
            model.clicks.clear()
            raise MemoryError
        return decode(*args)

    monkeypatch.setattr(model, "decode_points", short_of_memory)
    image = region_image([[TALL, WIDE]])
    figures = evaluate_points(model, [image, image])  # type: ignore[arg-type]
    assert (figures["num_images"], figures["num_regions"]) == (1, 2)
    assert figures["failures"] == {"out_of_memory": 1}
    model.answers = []
    with pytest.raises(IndexError):  # anything else is a fault of ours, and told
        evaluate_points(model, [image])  # type: ignore[arg-type]


# --- proposals -------------------------------------------------------------------------------------------------------


def square(row: int, column: int, side: int = 10, pixels: int | None = None) -> Rle:
    """A square of an image of 200 x 200, or its first `pixels`, row by row."""
    mask = np.zeros((200, 200), bool)
    inside = np.arange(side * side).reshape(side, side) < (side * side if pixels is None else pixels)
    mask[row : row + side, column : column + side] = inside
    return rle(mask)


def test_average_recall_is_the_one_worked_out_by_hand() -> None:
    """Of two regions one is found exactly, by the best-scored mask; the other at IoU 0.62 by the eleventh of eleven."""
    wrong = [square(150, 10 * i) for i in range(9)]
    masks = [square(0, 0), *wrong, square(50, 50, pixels=62)]
    scores = [0.99, *(0.9 - 0.01 * i for i in range(9)), 0.3]
    order = random.Random(3).sample(range(len(masks)), len(masks))  # scores rank them, not their order
    found = average_recall(
        [Marked([square(0, 0), square(50, 50)], [masks[i] for i in order], [scores[i] for i in order])]
    )
    assert found["ar_10"] == pytest.approx(0.5)
    assert found["ar_100"] == found["ar_1000"] == pytest.approx((1 + 3 / 10) / 2)  # at 0.50, 0.55 and 0.60
    assert found["num_regions"] == 2
    assert found["ar_1000_small"] == pytest.approx(found["ar_1000"])
    assert math.isnan(found["ar_1000_medium"])
    assert math.isnan(found["ar_1000_large"])


def test_average_recall_by_size() -> None:
    regions = [square(0, 0, 20), square(0, 40, 40), square(60, 60, 120), square(100, 0, 50)]
    found = average_recall([Marked(regions, [regions[1], square(60, 60, 120, pixels=120 * 90)], [0.5, 0.6])])
    assert found["ar_1000_small"] == 0
    assert found["ar_1000_medium"] == pytest.approx(0.5)
    assert found["ar_1000_large"] == pytest.approx(0.6)  # IoU 0.75: at 0.50 to 0.75
    assert found["ar_1000"] == pytest.approx((0 + 1 + 0.6 + 0) / 4)


def test_a_mask_covers_one_region_of_each_annotator() -> None:
    region = square(0, 0)
    assert average_recall([Marked([region, region], [region], [0.9])])["ar_1000"] == pytest.approx(0.5)
    one_each = average_recall([Marked([region], [region], [0.9])] * 3)
    assert (one_each["ar_1000"], one_each["num_regions"]) == (pytest.approx(1), 3)


def test_average_recall_of_no_masks_is_zero_and_of_no_regions_no_number() -> None:
    assert average_recall([Marked([square(0, 0)], [], [])])["ar_1000"] == 0
    without = average_recall([Marked([], [square(0, 0)], [0.5])])
    assert without["num_regions"] == 0
    assert all(math.isnan(value) for name, value in without.items() if name != "num_regions")


class Found:
    """A mask generator that finds what it was told, image by image; an error is raised."""

    def __init__(self, *found: list[dict[str, Any]] | Exception) -> None:
        self.found = iter(found)

    def generate(self, images: list[np.ndarray]) -> list[list[dict[str, Any]]]:
        (masks,) = [next(self.found) for _ in images]
        if isinstance(masks, Exception):
            raise masks
        return [masks]


def test_proposals_rank_by_predicted_iou_and_count_every_annotator() -> None:
    """TALL is found first, WIDE only by a mask below ten others, so that AR@10 misses it for both who marked it."""
    masks = [annotation(WIDE, predicted_iou=0.1)]
    masks += [annotation(SMALL, predicted_iou=0.5)] * 9 + [annotation(TALL, predicted_iou=0.9)]
    shown = []
    images = [region_image([[TALL, WIDE], [WIDE], []]), ImageError("empty", "no bytes"), region_image([[TALL]])]
    figures = evaluate_proposals(
        Found(masks, MemoryError()), images, min_area=500, on_masks=lambda image, masks: shown.append(len(masks))
    )
    assert figures["ar_10"] == pytest.approx(1 / 3)
    assert figures["ar_1000"] == pytest.approx(1)
    assert (figures["num_regions"], figures["num_masks"], figures["num_images"]) == (3, 11, 1)
    assert figures["failures"] == {"empty": 1, "out_of_memory": 1}
    assert shown == [11]
    with pytest.raises(RuntimeError, match="ours"):
        evaluate_proposals(Found(RuntimeError("ours")), [region_image([[TALL]])])


def test_proposals_of_the_labeller_itself_recall_everything(tmp_path: Path) -> None:
    plan = labelled.make_output(str(tmp_path))
    figures = evaluate_proposals(standin.StandIn(), RegionData(plan.output))
    assert figures["ar_1000"] == pytest.approx(1)
    assert figures["num_images"] == 9
    assert figures["num_regions"] == figures["num_masks"] == 3 * 8  # one image is black
    assert figures["failures"] == {"not_an_image": 1}


# --- pictures --------------------------------------------------------------------------------------------------------


def test_a_sheet_draws_few_of_many_and_lays_them_out_by_score() -> None:
    drawn: list[int] = []

    def tile(shade: int) -> Image.Image:
        drawn.append(shade)
        return Image.new("RGB", (10, 10), (shade, 0, 0))

    sheet = Sheet("tiles", 6, 3)
    for shade in random.Random(1).sample(range(60, 260), 200):
        sheet.offer(shade, lambda shade=shade: tile(shade))
    assert 6 < len(drawn) < 60
    picture = np.asarray(Image.open(io.BytesIO(sheet.encode("PNG"))).convert("RGB"))
    reds = picture[(picture[..., 1] == 0) & (picture[..., 0] > 30)][:, 0]
    kept = list(dict.fromkeys(reds.tolist()))
    assert len(kept) == 6
    assert kept == sorted(kept), "worst to best"
    assert kept != drawn[:6], "not just the first"
    assert "of 200" in sheet.caption()


def test_a_sheet_without_a_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="tile"):
        Sheet("nothing", 3, 3).encode("PNG")


def has_colour(picture: bytes, colour: tuple[int, int, int], least: int) -> bool:
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
    return int((np.abs(pixels - colour).max(axis=2) < 3).sum()) >= least


def test_the_sheet_of_clicks_shows_region_and_mask() -> None:
    sheet = click_sheet()
    image = region_image([[TALL, WIDE]])
    evaluate_points(known_sam(), [image], on_answers=lambda image, answers: offer_clicks(sheet, image, answers))  # type: ignore[arg-type]
    assert sheet.num_offered == 2
    picture = sheet.encode("PNG")
    assert has_colour(picture, (255, 214, 10), 500)
    assert has_colour(picture, (56, 135, 255), 100)
    assert has_colour(picture, (255, 255, 255), 20)


def test_the_sheet_of_proposals_tints_regions_by_how_well_they_are_found() -> None:
    sheet = proposal_sheet()
    offer_masks(sheet, region_image([[], [TALL, WIDE]]), [annotation(TALL)])
    offer_masks(sheet, region_image([[]]), [annotation(TALL)])
    assert sheet.num_offered == 1, "an image without a region has nothing to show"
    picture = sheet.encode("PNG")
    assert has_colour(picture, (0, 200, 40), 200), "TALL is found"
    assert has_colour(picture, (255, 0, 40), 200), "WIDE is missed"


def test_pictures_are_png_or_jpeg() -> None:
    assert (picture_format("a/b.PNG"), picture_format("s3://b/c.jpg")) == ("PNG", "JPEG")
    with pytest.raises(ConfigError, match=re.escape("--picture sheet.gif must end in .png, .jpg, .jpeg")):
        picture_format("sheet.gif")


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bsds(tmp_path: Path) -> str:
    rows = [bsds_row("a.jpg", [[TALL, WIDE], [SMALL, TALL]]), bsds_row("b.jpg", [[TALL]], b"no image")]
    return write_parquet(tmp_path / "val.parquet", rows)


SHARED_KEYS = {"num_regions", "num_images", "num_failed", "failures", "min_area", "model", "checkpoint",
               "checkpoint_sha256", "data", "layout", "device", "dtype", "seconds", "versions"}  # fmt: skip


def test_points_from_the_command_line(bsds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, sheet = tmp_path / "points.json", tmp_path / "sheet.png"
    argv = ["evaluate", "points", "model.device=cpu", bsds, "--json", str(file), "--picture", str(sheet)]
    assert main(argv) == 0
    figures = json.loads(file.read_text())
    assert set(figures) == {"miou", "miou_oracle", *SHARED_KEYS}
    assert (figures["num_regions"], figures["num_images"], figures["num_failed"]) == (3, 1, 1)
    assert figures["failures"] == {"not_an_image": 1}
    assert 0 <= figures["miou"] <= figures["miou_oracle"] <= 1
    assert (figures["model"], figures["checkpoint"], figures["layout"]) == ("tiny", None, "bsds500")
    assert (figures["data"], figures["min_area"], figures["device"]) == (bsds, 500, "cpu")
    assert figures["versions"]["torch"] == torch.__version__
    said = " ".join(capsys.readouterr().out.split())
    assert f"mean IoU {figures['miou']:.4f} of the mask that the model scores best" in said
    assert "regions 3 of at least 500 pixels, a click each" in said
    assert "failed images 1: 1 not_an_image (" in said
    assert Image.open(sheet).format == "PNG"


def test_proposals_from_the_command_line(bsds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.jpg"
    argv = ["evaluate", "proposals", bsds, "masks.points_per_side=2", "--preset", "tiny", "--limit", "1"]
    assert main([*argv, "--json", "-", "--picture", str(sheet)]) == 0
    figures = json.loads(capsys.readouterr().out)  # and nothing else
    sizes = {f"ar_1000_{size}" for size in ("small", "medium", "large")}
    assert set(figures) == {"ar_10", "ar_100", "ar_1000", "num_masks", "masks", *sizes, *SHARED_KEYS}
    assert figures["masks"]["points_per_side"] == 2
    assert (figures["num_regions"], figures["num_failed"], figures["min_area"]) == (4, 0, 0)
    assert figures["ar_1000_large"] is None, "no region is that large, and JSON has no NaN"
    assert Image.open(sheet).format == "JPEG"
    assert main([*argv, "--min-area", "500"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"AR@10 [\d.]+ AR@100 [\d.]+ AR@1000 [\d.]+; small [\d.]+, medium -, large - regions 3 ", said)


@pytest.mark.parametrize(
    ("argv", "exit_code", "words"),
    [
        (["points"], 2, "Missing argument 'DATA'"),
        (["points", "model.name=tiny"], 2, "Missing argument 'DATA'"),
        (["points", "absent"], 2, "absent does not exist"),
        (["points", "{bsds}", "masks.points_per_side=4"], 2, "masks.points_per_side=4 has no part in this"),
        (["points", "{bsds}", "cluster.address=auto"], 2, "it takes settings of model"),
        (["proposals", "{bsds}", "output.images_per_shard=4"], 2, "it takes settings of model and masks"),
        (["proposals", "{bsds}", "masks.points_per_sid=4"], 2, "did you mean masks.points_per_side?"),
        (["proposals", "{bsds}", "--preset", "sa1"], 2, "did you mean sa1b?"),
        (["points", "{bsds}", "more"], 2, "'more' is not of the form section.key=value"),
        (["points", "{bsds}", "--picture", "sheet.gif"], 2, "must end in .png"),
        (["points", "{bsds}", "--limit", "0"], 2, "--limit"),
        (["points", "{bsds}", "model.checkpoint=absent.pth"], 2, "model.checkpoint: there is no file"),
        (["points", "{bsds}", "--min-area", "2000"], 1, "has no region of at least 2,000 pixels"),
        (["points", "{broken}"], 1, "none of 1 image could be used: 1 not_an_image"),
        (["edges", "{bsds}"], 2, "edges"),
    ],
)
def test_wrong_usage_is_one_sentence(
    bsds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], exit_code: int, words: str
) -> None:
    broken = write_parquet(tmp_path / "broken.parquet", [bsds_row("b.jpg", [[TALL]], b"no image")])
    assert main(["evaluate", *(word.format(bsds=bsds, broken=broken) for word in argv)]) == exit_code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("samray: ")
    assert words in said.err
    assert said.err.count("\n") == 1


def test_help_lists_the_settings_that_have_a_part(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["evaluate", "points", "--help"]) == 0
    text = capsys.readouterr().out
    assert "model.checkpoint" in text
    assert "masks.points_per_side" not in text
    assert main(["evaluate", "proposals", "--help"]) == 0
    text = capsys.readouterr().out
    assert "masks.points_per_side" in text
    assert "cluster.address" not in text


def test_the_job_is_the_command(tmp_path: Path) -> None:
    argv = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), "proposals", str(tmp_path / "absent")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "absent does not exist" in done.stderr


def test_storage_that_fails_as_a_whole_is_no_image_fault(bsds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = RegionData(bsds)
    Path(bsds).write_bytes(Path(bsds).read_bytes()[:-9])  # replaced while it is read
    with pytest.raises(StorageError, match="damaged"):
        list(data)
