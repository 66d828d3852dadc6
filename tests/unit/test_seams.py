"""A new export format, kind of input or model is one file and one row: each is added here and used through samray."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import samray
from samray.cli.main import main
from samray.config import InputConfig, MaskConfig, load_config
from samray.config.models import MODELS
from samray.errors import ConfigError
from samray.exports.formats import FORMATS
from samray.inputs.listing import fetch_images, list_images
from samray.inputs.readers import READERS
from samray.masks.generator import MaskGenerator
from samray.sam.frames import SquareFrame
from samray.sam.sam import Sam
from samray.storage.strict_json import parse_json
from samray.train.optimizer import layer_of
from tests.support.exported import ten_images
from tests.toys import base64_input, csv_format, patch_model


@pytest.fixture
def toy_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "toy-csv", csv_format.FORMAT)


@pytest.fixture
def toy_reader() -> Iterator[None]:
    # A test in the same process may have left it: once is enough.
    if base64_input.READER not in READERS:
        READERS.append(base64_input.READER)
    yield
    READERS.remove(base64_input.READER)


@pytest.fixture
def toy_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "toy", patch_model.SPEC)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, without line breaks and the frames of tables."""
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).replace("│", " ").split())


def test_a_format_is_a_file_and_a_row(toy_format: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ten_images(str(tmp_path))
    assert main(["export", "--help"]) == 0
    help_text = said(capsys)
    assert "--decimal-comma" in help_text
    assert "CSV with one line per mask" in help_text
    command = ["export", plan.output, str(tmp_path / "csv"), "--format", "toy-csv", "--no-ray", "--no-progress"]
    assert main([*command, "--decimal-comma", "--digits", "2"]) == 0
    lines = (tmp_path / "csv" / "masks.csv").read_text().splitlines()
    report = samray.export(plan.output, tmp_path / "2", format="toy-csv", digits=2, ray=False, progress=False)
    assert len(lines) == report.num_masks
    assert ",".join(lines[0].split(";")[1].split(".")) in (tmp_path / "2" / "masks.csv").read_text().replace(".", ",")
    capsys.readouterr()
    assert main([*command, "--digits", "9"]) == 2
    assert "--digits=9 is not allowed; it takes a whole number from 0 to 6" in said(capsys)
    assert main([*command[:4], "yolo", "--digits", "2"]) == 2
    assert "--digits is an option of toy-csv, not of yolo" in said(capsys)
    with pytest.raises(ConfigError, match=r"unknown option digit; did you mean digits\?"):
        samray.export(plan.output, tmp_path / "3", format="toy-csv", digit=2)


def test_an_export_of_before_goes_on_though_its_format_has_an_option_more(toy_format: None, tmp_path: Path) -> None:
    plan = ten_images(str(tmp_path))
    options: dict[str, Any] = {"format": "label-map", "progress": False}
    samray.export(plan.output, tmp_path / "maps", **options)
    identity = tmp_path / "maps" / "_export" / "export.json"
    begun = parse_json(identity.read_bytes())
    assert begun["options"] == {}
    identity.write_text(json.dumps(begun | {"options": {"on_top": "area"}}))  # as samray 0.1 wrote the default
    assert samray.export(plan.output, tmp_path / "maps", **options).num_pieces_skipped == 1
    with pytest.raises(ConfigError, match="has a different export"):
        samray.export(plan.output, tmp_path / "maps", on_top="predicted_iou", **options)


def test_a_kind_of_input_is_a_file_and_a_row(
    toy_reader: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [f"not an image, but bytes: {i}".encode() for i in range(3)]
    file = tmp_path / "three.b64"
    file.write_bytes(b"\n".join(map(base64.b64encode, images)))
    rows = list_images(str(file), InputConfig()).images
    assert rows["file_name"].to_pylist() == [f"line-{i}.png" for i in range(3)]
    assert fetch_images(rows.take([2, 0]), InputConfig()) == [images[2], images[0]]
    assert main(["label", str(file), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "3, to be cut into 1 shard" in said(capsys)
    file.write_bytes(b"")
    assert main(["label", str(file), str(tmp_path / "out"), "--dry-run"]) == 2
    assert "no line in the base64 file" in said(capsys)
    assert main(["label", str(tmp_path / "nowhere"), str(tmp_path / "out"), "--dry-run"]) == 2
    assert "give a folder, glob, tar, list of URIs, Parquet file or base64 file" in said(capsys)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.b64").touch()
    (tmp_path / "folder" / "x.xyz").touch()
    assert main(["label", str(tmp_path / "folder"), str(tmp_path / "out"), "--dry-run"]) == 2
    assert "name them, as in" in said(capsys)


def test_a_model_is_a_file_and_a_row(toy_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert re.search(r"toy .* MIT", said(capsys))
    assert main(["label", "--help"]) == 0
    assert "sam3, toy" in said(capsys)
    with pytest.raises(ConfigError, match=r"one of tiny, vit_t, .*sam3, toy"):
        load_config(None, None, ["model.name=to"])
    assert load_config(None, None, ["model.name=toy"]).identity()["model"]["name"] == "toy"
    (tmp_path / "in").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "in" / "a.png")
    assert main(["label", str(tmp_path / "in"), str(tmp_path / "out"), "model.name=toy", "--dry-run"]) == 0
    assert "roughly" not in said(capsys)  # how long it takes was not measured


@torch.inference_mode()
def test_a_model_in_a_square_frame_finds_whole_images(toy_model: None) -> None:
    """Points and masks go through the frame: a mask of everything covers a wide image as it covers a high one."""
    torch.manual_seed(0)
    model = Sam(MODELS["toy"]).eval()
    assert isinstance(model.frame, SquareFrame)
    everything = torch.full((1, 16, 16), 5.0)
    for hw in ((20, 200), (200, 20), (64, 64)):
        pixels, [input_hw] = model.preprocess([np.zeros((*hw, 3), np.uint8)])
        assert input_hw == tuple(pixels.shape[2:]) == (64, 64)
        assert (model.postprocess(everything, input_hw, hw) == 5).all()
        assert model.frame.points_in(np.array([hw[::-1]], float), hw).tolist() == [[64, 64]]
        settings = MaskConfig(points_per_side=2, pred_iou_thresh=0, stability_score_thresh=0)
        for mask in MaskGenerator(model, settings).generate([np.zeros((*hw, 3), np.uint8)])[0]:
            assert mask["segmentation"]["size"] == list(hw)


def test_layers_of_a_toy_encoder_are_named(toy_model: None) -> None:
    layers = layer_of(Sam(MODELS["toy"]))
    assert layers["image_encoder.blocks.0.weight"] == 1
    assert layers["image_encoder.neck.weight"] == layers["mask_decoder.iou_token.weight"] == 2
