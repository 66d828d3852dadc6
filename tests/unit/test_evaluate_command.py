"""`samray evaluate` from the command line, and its contact sheets."""

from __future__ import annotations

import inspect
import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from samray.cli import evaluate as cli_evaluate
from samray.cli import evaluate_edges
from samray.cli.main import main
from samray.config.edges import load_edges_config
from samray.errors import ConfigError
from samray.evaluate.edge_model import ModelMaps
from samray.evaluate.pictures import Sheet, click_sheet, offer_clicks, offer_masks, picture_format, proposal_sheet
from samray.evaluate.points import evaluate_points
from samray.evaluate.proposals import evaluate_proposals
from samray.sam.adapter import metadata
from samray.sam.checkpoints import load_model
from samray.sam.weights_file import WeightsFile
from tests.support import REPOSITORY
from tests.support.handmade import annotation
from tests.support.marked import (
    SMALL,
    TALL,
    WIDE,
    bsds_row,
    known_sam,
    region_image,
    write_parquet,
)

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


def test_the_sheet_of_proposals_leaves_out_the_regions_that_the_figures_do() -> None:
    class FindsTall:
        def generate(self, images: list[np.ndarray]) -> list[list[dict[str, Any]]]:
            return [[annotation(TALL)] for _ in images]

    def scores(min_area: int) -> list[float]:
        sheet = proposal_sheet()
        images = [region_image([[SMALL], [TALL, SMALL]]), region_image([[SMALL]])]
        evaluate_proposals(
            FindsTall(), images, min_area=min_area, on_masks=lambda *arguments: offer_masks(sheet, *arguments)
        )
        assert has_colour(sheet.encode("PNG"), (255, 0, 40), 10) == (min_area == 0), "SMALL, which is missed"
        return [score for score, _, _ in sheet._kept]

    assert scores(min_area=0) == [0, 0]
    assert scores(min_area=500) == [1], "TALL, of the annotator who marked it; the other image has nothing to show"


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
               "adapter", "checkpoint_sha256", "data", "layout", "device", "dtype", "seconds", "versions"}  # fmt: skip


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
    assert f"mean IoU {figures['miou']:.4f} of the mask with the highest predicted IoU" in said
    assert "regions 3 of at least 500 pixels, one click each" in said
    assert "failed images 1: 1 not_an_image (this is text" in said
    assert Image.open(sheet).format == "PNG"


def test_the_adapter_is_named(bsds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "mask_decoder.transformer.final_attn_token_to_image.k_proj"
    rows, columns = load_model("tiny", device="cpu").get_parameter(f"{name}.weight").shape
    adapter, weights = tmp_path / "adapter.safetensors", WeightsFile("tiny")
    pair = {f"{name}.lora_A.weight": torch.ones(1, columns), f"{name}.lora_B.weight": torch.zeros(rows, 1)}
    save_file(pair, adapter, metadata("tiny", weights.sha256, 2))
    file = tmp_path / "points.json"
    settings = ["model.device=cpu", f"model.adapter={adapter}"]
    assert main(["evaluate", "points", bsds, *settings, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["adapter"] == str(adapter)
    assert figures["adapter_sha256"] == WeightsFile("tiny", None, adapter).adapter_sha256
    # Without spaces, because a long path is wrapped.
    assert f"modeltiny,itsownweightswiththeadapter{adapter}" in "".join(capsys.readouterr().out.split())
    described = ModelMaps(load_edges_config(None, settings)).figures()
    assert described["adapter"] == str(adapter)
    scores = dict.fromkeys(("ods", "ods_threshold", "ods_recall", "ods_precision", "ois", "ap", "r50", "seconds"), 0.0)
    evaluate_edges._print({**scores, "num_images": 1, "thresholds": 1, "num_failed": 0, "maps": None, **described})
    assert f"modeltinywiththeadapter{adapter}" in "".join(capsys.readouterr().out.split())


def test_the_default_of_points_is_the_functions() -> None:
    options = (cli_evaluate.points, evaluate_points)
    command, function = (inspect.signature(one).parameters["min_area"].default for one in options)
    assert command is function  # not just of the same value


def test_proposals_from_the_command_line(bsds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.jpg"
    argv = ["evaluate", "proposals", bsds, "masks.points_per_side=2", "--preset", "tiny", "--limit", "1"]
    assert main([*argv, "--json", "-", "--picture", str(sheet)]) == 0
    figures = json.loads(capsys.readouterr().out)  # and nothing else
    sizes = {f"ar_1000_{size}" for size in ("small", "medium", "large")}
    largest = {"largest_found_50", "largest_found_70"}
    common = {"ar_10", "ar_100", "ar_1000", "num_masks", "masks", "protocol"}
    assert set(figures) == {*common, *sizes, *largest, *SHARED_KEYS}
    assert figures["masks"]["points_per_side"] == 2
    assert (figures["num_regions"], figures["num_failed"], figures["min_area"]) == (4, 0, 0)
    assert figures["ar_1000_large"] is None, "no region is that large, and JSON has no NaN"
    assert Image.open(sheet).format == "JPEG"
    assert main([*argv, "--min-area", "500"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"AR@10 [\d.]+ AR@100 [\d.]+ AR@1000 [\d.]+; small [\d.]+, medium -, large - largest region found in \d+% ",
        said,
    )
    assert " regions 3 " in said


def test_the_papers_protocol_sets_what_the_command_line_does_not(bsds: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["evaluate", "proposals", bsds, "--protocol", "paper", "--limit", "1", "--json", "-"]
    assert main([*argv, "masks.points_per_side=3"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["protocol"] == "paper"
    masks = figures["masks"]
    assert (masks["points_per_side"], masks["box_nms_thresh"], masks["crop_n_layers"]) == (3, 0.9, 0)


def test_proposals_by_frequency_of_the_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = bsds_row("a.jpg", [[TALL, WIDE]])
    row["annotators"][0]["names"] = ["hot dog", "okapi"]
    data = write_parquet(tmp_path / "lvis.parquet", [row])
    lvis = tmp_path / "lvis.json"
    lvis.write_text(
        json.dumps({"categories": [{"name": "hot_dog", "frequency": "f"}, {"name": "okapi", "frequency": "r"}]})
    )
    argv = ["evaluate", "proposals", data, "masks.points_per_side=2", "--frequencies"]
    assert main([*argv, str(lvis), "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [figures[f"num_regions_{group}"] for group in ("frequent", "common", "rare")] == [1, 0, 1]
    assert figures["ar_1000_common"] is None
    assert main([*argv, str(lvis)]) == 0
    assert "AR@1000, rare" in capsys.readouterr().out
    for wrong in (
        "[]",
        "{",
        '{"categories": [{"name": "okapi"}]}',
        '{"categories": [{"name": "a", "frequency": "x"}]}',
    ):
        lvis.write_text(wrong)
        assert main([*argv, str(lvis)]) == 2
        assert "expected JSON with LVIS's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "exit_code", "words"),
    [
        (["points"], 2, "Missing argument 'DATA'"),
        (["points", "model.name=tiny"], 2, "Missing argument 'DATA'"),
        (["points", "absent"], 2, "absent does not exist"),
        (["points", "{bsds}", "masks.points_per_side=4"], 2, "masks.points_per_side=4 does not apply here"),
        (["points", "{bsds}", "cluster.address=auto"], 2, "this command takes settings of model"),
        (["proposals", "{bsds}", "output.images_per_shard=4"], 2, "this command takes settings of model and masks"),
        (["proposals", "{bsds}", "masks.points_per_sid=4"], 2, "did you mean masks.points_per_side?"),
        (["proposals", "{bsds}", "--preset", "sa1"], 2, "did you mean sa1b?"),
        (["points", "{bsds}", "more"], 2, "'more' is not of the form section.key=value"),
        (["points", "{bsds}", "--picture", "sheet.gif"], 2, "must end in .png"),
        (["points", "{bsds}", "--limit", "0"], 2, "--limit"),
        (["points", "{bsds}", "model.checkpoint=absent.pth"], 2, "model.checkpoint: the file "),
        (["points", "{bsds}", "--min-area", "2000"], 1, "has no region of at least 2,000 pixels"),
        (["points", "{broken}"], 1, "none of 1 image could be used: 1 not_an_image"),
        (["contours", "{bsds}"], 2, "contours"),
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


@pytest.mark.slow
def test_the_job_is_the_command(tmp_path: Path) -> None:
    argv = [sys.executable, str(REPOSITORY / "jobs" / "evaluate.py"), "proposals", str(tmp_path / "absent")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "absent does not exist" in done.stderr
