"""What a plan says of the cost of a run, and of images that it did not look for."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

from samray.cli.main import main
from samray.cli.plan_view import cost_rows, embedding_rows, work_per_image
from samray.config import Config, MaskConfig, load_config
from samray.config.model_specs import ModelSpec
from samray.progress import ProgressView
from samray.sam.sam import Sam
from tests.support.micro import FAMILIES, MICRO


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("settings", "passes", "prompts"),
    [
        ({}, 1, 1024),
        ({"points_per_side": 16}, 1, 256),
        ({"crop_n_layers": 2, "crop_n_points_downscale_factor": 2}, 21, 3072),
        ({"points_per_side": 256, "crop_n_layers": 4}, 341, 341 * 65536),
        ({"point_grids": [[[0.5, 0.5]] * 3, [[0.5, 0.5]]], "crop_n_layers": 1}, 5, 7),
    ],
)
def test_work_per_image(settings: dict[str, object], passes: int, prompts: int) -> None:
    assert work_per_image(MaskConfig(**settings)) == (passes, prompts)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", [MICRO, *FAMILIES], ids=lambda spec: spec.name)
def test_the_size_of_an_embedding_is_that_of_the_encoders_output(spec: ModelSpec) -> None:
    with torch.inference_mode():
        embedding = Sam(spec).eval().encode_images(torch.zeros(1, 3, spec.image_size, spec.image_size))
    assert spec.embedding_values == embedding.numel()


def test_the_plan_says_what_embeddings_take(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    config = load_config(overrides=["model.name=vit_h", "output.embeddings=float16"])
    assert embedding_rows(config, output, 1000) == [
        ("embeddings", "stored as float16, 2.1 MB per image, 2.1 GB in all")
    ]
    (_, stored), (title, warning) = embedding_rows(config, output, 10**12)
    assert stored.endswith("2,097 PB in all")
    assert title == "WARNING"
    assert warning.startswith(f"the disk of {tmp_path} has ")
    assert embedding_rows(config, "s3://bucket/out", 10**12) == [("embeddings", stored)]


def test_settings_that_take_days_are_warned_of() -> None:
    cpu = ["model.device=cpu"]
    rows = dict(cost_rows(load_config(overrides=["masks.points_per_side=256", "masks.crop_n_layers=4", *cpu]), 12))
    assert rows["work"].startswith("22,347,776 prompts per image, image encoder run 341 times")
    assert rows["time"].startswith("WARNING: roughly ")
    assert "WARNING" in dict(cost_rows(load_config("sa1b", overrides=cpu), 10_000))["time"]
    assert "WARNING" not in str(cost_rows(Config(), 12))
    far = load_config(overrides=["masks.points_per_side=256", "masks.crop_n_layers=4", "cluster.address=h:6379"])
    assert "SA-1B used 3,072" in dict(cost_rows(far, 12))["WARNING"]


def test_a_system_without_affinity_has_a_plan_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on macOS, where the plan ended in an AttributeError.
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert main(["label", str(tmp_path), str(tmp_path / "out"), "--dry-run", "model.device=cpu"]) == 0
    assert "this machine: 7 CPU cores" in " ".join(capsys.readouterr().err.split())


def test_dry_run_states_prompts_and_download(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    assert main(["label", str(tmp_path / "in"), str(tmp_path / "out"), "--dry-run", "model.name=vit_h"]) == 0
    text = " ".join(capsys.readouterr().err.split())
    assert "work 1,024 prompts per image, image encoder run 1 time" in text
    assert "download 2,565 MB of weights" in text
    assert main(["label", str(tmp_path / "in"), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "download" not in capsys.readouterr().err


def test_a_rerun_says_that_input_was_not_listed_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from samray.output.plan import make_plan

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    identity = Config().identity()
    identity["model"]["checkpoint_sha256"] = "ab" * 32
    make_plan(str(tmp_path / "in"), str(tmp_path / "out"), Config(), identity)
    (tmp_path / "in" / "b.jpg").write_bytes(b"x")
    argv = ["label", str(tmp_path / "in"), str(tmp_path / "out"), "--dry-run"]
    assert main(argv) == 0
    assert "INPUT was not listed again; --append adds new images" in capsys.readouterr().err
    assert main([*argv, "--append"]) == 0
    said = capsys.readouterr().err
    assert "not listed again" not in said
    assert "1, added" in said


def test_an_output_that_is_a_file_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert main(["verify", str(tmp_path / "out")]) in (2, 3)
    assert f"{tmp_path / 'out'} is a file; expected a folder" in capsys.readouterr().err


def test_the_last_progress_line_is_where_the_run_came_to() -> None:
    file = io.StringIO()
    with ProgressView(12, 0, file=file) as view:
        view.update(num_done=11, note="labelling")
        view.update(num_done=12)
    assert file.getvalue().splitlines()[-1].startswith("samray: labelling, 12/12 images (100%)")
