"""The command line: what it says, and the exit code it ends with. The pipeline itself is tested in tests/pipeline."""

from __future__ import annotations

import importlib
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from samray.cli.help import EXIT_CODES
from samray.cli.main import main
from samray.config import SECTIONS, Config, setting_rows
from samray.errors import ConfigError, SamrayError, StorageError


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("SAMRAY_DEBUG", raising=False)


@pytest.fixture
def label_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Instead of the pipeline: keeps what `samray label` would have run."""
    calls: list[dict[str, Any]] = []

    def label_with(input: str, output: str, config: Config, **rest: Any) -> Any:
        calls.append({"input": input, "output": output, "config": config, **rest})
        return types.SimpleNamespace(exit_code=0)

    importlib.import_module("samray.cli.plan_view")  # it needs the real report, which is replaced below
    monkeypatch.setitem(sys.modules, "samray.pipeline.run", types.SimpleNamespace(label_with=label_with))
    monkeypatch.setitem(sys.modules, "samray.pipeline.report", types.SimpleNamespace(print_report=lambda report: None))
    return calls


def fails(capsys: pytest.CaptureFixture[str], argv: list[str], exit_code: int) -> str:
    """What the command says on stderr; holds that it is one sentence and no traceback."""
    assert main(argv) == exit_code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("samray: ")
    assert "Traceback" not in said.err
    return said.err.strip()


def test_help_of_the_whole_names_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("label", "demo", "verify", "report", "models"):
        assert re.search(rf"│ {command} ", text)
    for code, meaning in EXIT_CODES.items():
        assert re.search(rf"^ {code} +{re.escape(meaning)}", text, re.MULTILINE)


@pytest.mark.parametrize("command", ["label", "demo"])
def test_help_lists_every_setting_with_its_description(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for section in SECTIONS:
        for row in setting_rows(section):
            assert f"{row.name} {row.description}" in text
    assert "masks.points_per_side" in text
    assert "[0.47 for tiny, 0.8 for sam2, else 0.88]" in text
    assert "[100_000_000]" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_no_command_shows_help_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr()
    assert "Usage: samray" in said.out + said.err


def test_label_hands_over_what_was_typed(label_calls: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("masks:\n  max_masks: 7\n")
    argv = ["label", "in/", "--preset", "sa1b", "s3://b/out", "--config", str(file), "masks.points_per_side=16"]
    assert main([*argv, "model.name=vit_b", "--retry-failed", "--address", "auto", "--no-progress"]) == 0
    (call,) = label_calls
    config = call["config"]
    assert (call["input"], call["output"]) == ("in/", "s3://b/out")
    assert (call["retry_failed"], call["progress"]) == (True, False)
    assert (config.model.name, config.cluster.address) == ("vit_b", "auto")
    assert (config.masks.points_per_side, config.masks.max_masks, config.masks.crop_n_layers) == (16, 7, 2)


def test_settings_may_stand_before_the_paths_and_paths_may_hold_equal_signs(label_calls: list[dict[str, Any]]) -> None:
    assert main(["label", "masks.max_masks=3", "day=1/in", "model.name=vit_b", "day=1/out"]) == 0
    (call,) = label_calls
    assert (call["input"], call["output"]) == ("day=1/in", "day=1/out")
    assert (call["config"].masks.max_masks, call["config"].model.name) == (3, "vit_b")


def test_label_ends_with_the_runs_exit_code(label_calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (1, 130, 143):
        ended = types.SimpleNamespace(exit_code=code)
        monkeypatch.setattr(
            sys.modules["samray.pipeline.run"], "label_with", lambda *a, _r=ended, **k: _r, raising=False
        )
        assert main(["label", "a", "b"]) == code


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["label"], ["Missing argument", "INPUT"]),
        (["label", "a"], ["Missing argument", "OUTPUT"]),
        (["label", "a", "masks.max_masks=3"], ["Missing argument", "OUTPUT"]),
        (["lable", "a", "b"], ["lable", "label"]),
        (["label", "a", "b", "--prest", "tiny"], ["--prest", "--preset"]),
        (["label", "a", "b", "--preset", "sa1"], ["unknown preset 'sa1'", "did you mean sa1b?"]),
        (["label", "a", "b", "masks.points_per_side"], ["section.key=value"]),
        (["label", "a", "b", "points_per_side=8"], ["did you mean masks.points_per_side?"]),
        (["label", "a", "b", "masks.points_per_sides=8"], ["did you mean masks.points_per_side?"]),
        (["label", "a", "b", "masks.pred_iou_thresh=88"], ["masks.pred_iou_thresh = 88", "from 0 to 1"]),
        (["label", "a", "b", "masks.point_grids=[[[2, 2]]]"], ["outside 0..1"]),
        (["label", "a", "b", "--config", "absent.yaml"], ["absent.yaml", "No such file"]),
        (["report", "a", "--images", "1000"], ["--images"]),
        (["train", "labels", "weights", "steps=5"], ["did you mean train.steps?"]),
        (["train", "labels", "weights", "tran.steps=5"], ["did you mean train?"]),
        (["train", "labels", "weights", "masks.points_per_side=8"], ["unknown section masks"]),
        (["train", "labels"], ["Missing argument", "OUTPUT"]),
    ],
)
def test_wrong_usage_is_one_sentence_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], label_calls: list[dict[str, Any]], argv: list[str], words: list[str]
) -> None:
    said = fails(capsys, argv, 2)
    for word in words:
        assert word in said
    assert "\n" not in said
    assert label_calls == []


@pytest.mark.parametrize(
    ("error", "exit_code", "words"),
    [
        (ConfigError("no [images] in here"), 2, "no [images] in here"),
        (StorageError("s3://b: no such bucket"), 3, "s3://b: no such bucket"),
        (SamrayError("something"), 1, "something"),
        (RuntimeError("two\nlines"), 1, "unexpected RuntimeError: two lines (set SAMRAY_DEBUG=1 for a traceback)"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command to resume"),
    ],
)
def test_errors_become_a_sentence_and_an_exit_code(
    capsys: pytest.CaptureFixture[str],
    label_calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    exit_code: int,
    words: str,
) -> None:
    def raising(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(sys.modules["samray.pipeline.run"], "label_with", raising)
    assert fails(capsys, ["label", "a", "b"], exit_code) == f"samray: {words}"
    monkeypatch.setenv("SAMRAY_DEBUG", "1")
    assert main(["label", "a", "b"]) == exit_code
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
def test_models_lists_all_and_where_they_come_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    for name in ("tiny", "vit_t", "vit_b", "vit_l", "vit_h"):
        assert re.search(rf"^{name} ", text, re.MULTILINE)
    assert "641.1 M" in text
    assert "Apache-2.0" in text
    assert "sam_vit_h_4b8939.pth" in text


def test_dry_run_prints_the_plan_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(5):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(b"x")
    argv = ["label", str(tmp_path / "in"), str(tmp_path / "out"), "--dry-run", "output.images_per_shard=2"]
    assert main([*argv, "model.name=vit_h"]) == 0  # with no weights of it here, and none fetched
    text = " ".join(capsys.readouterr().err.split())
    assert "images 5, to be cut into 3 shards of up to 2" in text
    assert "32 x 32 points, predicted IoU > 0.88, stability >= 0.95" in text
    assert not (tmp_path / "out").exists()
    assert "does not exist" in fails(capsys, ["label", str(tmp_path / "absent"), "out", "--dry-run"], 2)


def test_dry_run_on_an_output_that_is_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from samray.config import load_config
    from samray.output.plan import make_plan

    (tmp_path / "in").mkdir()
    for i in range(5):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(b"x")
    config = load_config("default", overrides=["output.images_per_shard=2"])
    identity = config.identity()
    identity["model"]["checkpoint_sha256"] = "ab" * 32
    make_plan(str(tmp_path / "in"), str(tmp_path / "out"), config, identity)
    argv = ["label", str(tmp_path / "in"), str(tmp_path / "out"), "--dry-run", "output.images_per_shard=2"]
    assert main([*argv, "--preset", "default"]) == 0
    text = " ".join(capsys.readouterr().err.split())
    assert "images 5 in 3 shards of up to 2" in text
    assert "SHA-256 abababababab..." in text
    assert "masks.points_per_side: 24 there, 8 now" in fails(
        capsys, [*argv, "--preset", "default", "masks.points_per_side=8"], 2
    )


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["in/a.jpg", "in/b.jpg", "labels"], "in/*.jpg"),
        (["in/a.jpg", "in/b.jpg", "in/c.png", "labels", "masks.max_masks=3"], "in/*"),
        (["in/a.jpg", "in/b.jpg", "in/d/x.jpg"], "in/*.jpg"),
        (["in/a.jpg", "in/d", "labels"], "in/*.jpg"),
    ],
)
def test_a_pattern_that_the_shell_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], pattern: str
) -> None:
    (tmp_path / "in" / "d").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "c.png", "d/x.jpg"):
        (tmp_path / "in" / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert main(["label", *words]) == 2
    error = capsys.readouterr().err
    assert "expected INPUT and OUTPUT" in error
    assert f"quote it: '{pattern}'" in error
    assert not (tmp_path / "labels").exists()


def test_a_dry_run_says_what_is_left_out_and_what_will_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b.svg", "c.svg", ".hidden.jpg"):
        (tmp_path / "in" / name).write_bytes(b"")
    (tmp_path / "in" / "list.txt").write_text("a.jpg\n../x.jpg\n./a.jpg\n")
    assert main(["label", str(tmp_path / "in"), str(tmp_path / "out"), "--dry-run"]) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "left out 1 .jpg: hidden" in error
    assert "2 .svg, 1 .txt: not images by their ending" in error
    assert main(["label", str(tmp_path / "in" / "list.txt"), str(tmp_path / "out"), "--dry-run"]) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "left out 1 .jpg: listed more than once" in error
    assert "will fail 1 image; the first: not_allowed: a list may name local files only below" in error
