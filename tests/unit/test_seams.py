"""A new export format, kind of input or model is one file and one row: each is added here and used through samray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from exported import ten_images
from toys import csv_format

import samray
from samray.cli.main import main
from samray.errors import ConfigError
from samray.exports.formats import FORMATS
from samray.storage.strict_json import parse_json


@pytest.fixture
def toy_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "toy-csv", csv_format.FORMAT)


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
    with pytest.raises(ConfigError, match=r"no option digit of exports; did you mean digits\?"):
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
    with pytest.raises(ConfigError, match="holds another export"):
        samray.export(plan.output, tmp_path / "maps", on_top="predicted_iou", **options)
