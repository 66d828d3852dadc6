"""Settings: what is laid over what, and the words of every refusal."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import samray
from samray.config import (
    SECTIONS,
    Config,
    MaskConfig,
    ModelConfig,
    load_config,
    preset_names,
    preset_path,
    setting_rows,
)
from samray.config.yaml import load_yaml_file, parse_value
from samray.errors import ConfigError


def refusal(**sources: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(**sources)  # type: ignore[arg-type]
    return str(caught.value)


def test_mask_defaults_are_the_references() -> None:
    """segment-anything 1.0, SamAutomaticMaskGenerator.__init__; points_per_batch is a memory setting here."""
    masks = MaskConfig()
    assert (masks.points_per_side, masks.pred_iou_thresh, masks.stability_score_thresh) == (32, 0.88, 0.95)
    assert (masks.stability_score_offset, masks.box_nms_thresh, masks.crop_nms_thresh) == (1.0, 0.7, 0.7)
    assert (masks.crop_n_layers, masks.crop_n_points_downscale_factor, masks.min_mask_region_area) == (0, 1, 0)
    assert masks.crop_overlap_ratio == 512 / 1500
    assert masks.point_grids is None


def test_default_preset_is_the_reference_and_sa1b_is_the_paper() -> None:
    assert load_config("default", overrides=["model.name=vit_b"]).masks == MaskConfig()
    sa1b = load_config("sa1b")
    assert sa1b.model.name == "vit_h"
    layers = range(sa1b.masks.crop_n_layers + 1)
    grids = [sa1b.masks.points_per_side // sa1b.masks.crop_n_points_downscale_factor**i for i in layers]
    assert grids == [32, 16, 8]
    assert (sa1b.masks.min_mask_region_area, sa1b.masks.max_mask_area_fraction) == (100, 0.95)


def test_every_preset_loads_and_is_found() -> None:
    assert preset_names() == ["default", "fast", "sa1b", "sam2", "sam_hq", "tiny"]
    for name in preset_names():
        assert isinstance(load_config(name), Config)
        assert preset_path(name).is_file()


def test_presets_are_found_in_an_installed_package_too(tmp_path: Path) -> None:
    """A wheel carries configs/presets as samray/_presets; here it is laid out by hand."""
    source = Path(samray.__file__).resolve().parent
    shutil.copytree(source, tmp_path / "samray", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    shutil.copytree(source.parent / "configs" / "presets", tmp_path / "samray" / "_presets")
    code = "from samray.config import load_config, preset_path; load_config('sa1b'); print(preset_path('fast'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == str(tmp_path / "samray" / "_presets" / "fast.yaml")


def test_mask_settings_follow_the_model_unless_given() -> None:
    assert load_config().masks == load_config("tiny").masks == load_config("default").masks
    assert load_config(overrides=["model.name=vit_b"]).masks == MaskConfig()
    assert load_config("tiny", overrides=["model.name=vit_b"]).masks == load_config("tiny").masks


@pytest.mark.parametrize("name", ["vit_t", "vit_b", "vit_l", "vit_h"])
def test_published_models_have_the_references_defaults(name: str) -> None:
    assert Config(model=ModelConfig(name=name)).masks == MaskConfig()  # type: ignore[arg-type]


def test_defaults_are_the_same_from_python_yaml_and_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("cluster:\n  max_actors: 2\n")
    tiny = load_config("tiny").identity()
    assert tiny["masks"]["pred_iou_thresh"] == 0.47
    for config in (Config(), Config(masks=MaskConfig()), load_config(), load_config(file=tmp_path / "run.yaml")):
        assert config.identity() == tiny


def test_given_settings_win_over_the_models_own_and_are_not_changed_by_another_model() -> None:
    config = Config(masks=MaskConfig(points_per_side=16, pred_iou_thresh=0.88))
    assert (config.masks.points_per_side, config.masks.pred_iou_thresh) == (16, 0.88)
    assert (config.masks.stability_score_thresh, config.masks.max_mask_area_fraction) == (0.75, 0.95)
    assert config.masks.for_model("vit_b") == MaskConfig(points_per_side=16)
    assert pickle.loads(pickle.dumps(config)).masks.for_model("vit_b") == MaskConfig(points_per_side=16)
    assert Config(masks=MaskConfig(max_mask_area_fraction=None)).masks.max_mask_area_fraction is None


def test_a_given_setting_that_does_not_fit_the_models_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="points_per_side=24 in crop layer 3"):
        Config(masks=MaskConfig(crop_n_layers=3, crop_n_points_downscale_factor=3))


def test_a_run_begun_with_the_references_thresholds_goes_on_with_them() -> None:
    """Older versions began runs from Python so, whatever the model."""
    begun = {**Config().identity(), "masks": MaskConfig().model_dump(mode="json")}
    assert Config().as_begun(begun).masks == MaskConfig()
    assert Config().as_begun(Config().identity()) == Config()
    asked = Config(masks=MaskConfig(points_per_side=16))
    assert asked.as_begun(begun).masks == MaskConfig(points_per_side=16)
    chosen = Config(masks=MaskConfig(pred_iou_thresh=0.5))
    assert chosen.as_begun(begun).masks.pred_iou_thresh == 0.5


def test_overrides_over_file_over_preset_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("masks:\n  points_per_side: 8\n  pred_iou_thresh: 0.5\ncluster:\n")
    config = load_config("sa1b", file, ["masks.points_per_side=16"])
    assert config.masks.points_per_side == 16
    assert config.masks.pred_iou_thresh == 0.5
    assert config.masks.crop_n_layers == 2
    assert config.masks.box_nms_thresh == 0.7


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16", 16),
        ("1_000", 1000),
        ("010", 10),
        ("-3", -3),
        ("0.5", 0.5),
        (".5", 0.5),
        ("1e-3", 0.001),
        ("true", True),
        ("null", None),
        ("", None),
        ("no", "no"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("s3://bucket/a b#1.pth: x", "s3://bucket/a b#1.pth: x"),
        ("@home", "@home"),
        ('"16"', "16"),
        ("[[[0.5, 1]]]", [[[0.5, 1]]]),
    ],
)
def test_values_are_yaml_scalars_without_surprises(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("masks.points_per_sid=3", ["unknown setting masks.points_per_sid", "did you mean masks.points_per_side?"]),
        ("mask.points_per_side=3", ["unknown section mask", "did you mean masks?"]),
        ("points_per_side=16", ["section.key=value", "did you mean masks.points_per_side?"]),
        ("masks.points_per_side", ["section.key=value"]),
        ("masks.points_per_side=big", ["masks.points_per_side = 'big'", "a whole number from 1 to 256"]),
        ("masks.points_per_side=true", ["masks.points_per_side = true", "a whole number"]),
        ("masks.points_per_side=1.5", ["masks.points_per_side = 1.5", "a whole number"]),
        ('masks.points_per_side="16"', ["masks.points_per_side = '16'", "a whole number"]),
        ("masks.pred_iou_thresh=88", ["masks.pred_iou_thresh = 88", "from 0 to 1"]),
        ("masks.pred_iou_thresh=.nan", ["masks.pred_iou_thresh = nan", "a number"]),
        ("masks.crop_overlap_ratio=1", ["to below 1"]),
        ("masks.non_overlapping=1", ["true or false"]),
        ("masks.max_mask_area_fraction=0", ["above 0", "or null"]),
        ("masks.bbox_convention=voc", ["one of coco, sam"]),
        ("model.name=vit_x", ["model.name = 'vit_x'", "tiny, vit_t, vit_b, vit_l, vit_h"]),
        ("masks.point_grids=[[[0.5, 2]]]", ["outside 0..1"]),
        ("masks.point_grids=[[]]", ["has no points"]),
        (f"masks.points_per_side={'9' * 5000}", ["masks.points_per_side", "too long"]),
        ("masks.point_grids=[[1, 2]]", ["masks.point_grids", "[x, y]"]),
        ("masks.point_grids=[[[0.5", ["masks.point_grids", "not closed"]),
    ],
)
def test_refusals_name_field_value_range_and_nearest_name(override: str, words: list[str]) -> None:
    message = refusal(overrides=[override])
    for word in words:
        assert word in message
    assert "\n" not in message


def test_all_problems_are_told_at_once() -> None:
    message = refusal(overrides=["masks.crop_n_layer=1", "masks.max_masks=0", "output.images_per_shard=0", "nonsense"])
    assert message.startswith("4 settings are wrong:")
    for word in ("masks.crop_n_layers?", "masks.max_masks = 0", "output.images_per_shard = 0", "'nonsense'"):
        assert word in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["masks.crop_n_layers=2", "masks.point_grids=[[[0.5, 0.5]]]"], "needs 3"),
        (["masks.points_per_side=4", "masks.crop_n_layers=3", "masks.crop_n_points_downscale_factor=2"], "no point"),
        (["cluster.min_actors=3", "cluster.max_actors=2"], "below cluster.min_actors=3"),
    ],
)
def test_settings_that_contradict_each_other(overrides: list[str], words: str) -> None:
    assert words in refusal(overrides=overrides)


def test_unknown_preset_names_the_nearest() -> None:
    message = refusal(preset="sa1")
    assert "'sa1'" in message
    assert "did you mean sa1b?" in message
    assert "default, fast, sa1b, sam2, sam_hq, tiny" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("masks:\n  points_per_side: 8\n  points_per_side: 9\n", ["line 3", "'points_per_side' is given twice"]),
        ("masks: {a: 1\n", ["run.yaml, line"]),
        ("- 1\n", ["must contain sections"]),
        ("masks: 3\n", ["masks = 3"]),
        ("1: 2\n", ["1 is not text"]),
        ("a: !!python/object:os.system x\n", ["run.yaml, line 1"]),
    ],
)
def test_yaml_files_are_read_strictly(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    message = refusal(file=file)
    for word in words:
        assert word in message


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnopqrstuvwxyz")
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "line 2, column 8: aliases (*a) are not allowed"),
        ("masks: &m {max_masks: 3}\noutput: *m\n", "aliases (*m) are not allowed"),
        ("a: &a [*a]\n", "aliases (*a) are not allowed"),
        ("masks: " + "[" * 100_000, "nested deeper than 16 levels"),
        ("masks: " + "{a: " * 100_000, "nested deeper than 16 levels"),
        ("\n".join("  " * i + "a:" for i in range(2_000)), "nested deeper than 16 levels"),
        ("#" * (17 * 2**20), "more than 16 MiB"),
    ],
)
def test_yaml_bombs_are_refused_in_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    message = refusal(file=tmp_path / "run.yaml")
    assert words in message
    assert len(message) < 500
    assert "nested deeper" in refusal(overrides=[f"masks.point_grids={'[' * 10_000}"])
    assert "aliases" in refusal(overrides=["masks.point_grids=[&a [1], *a]"])


def test_a_configuration_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        assert "a folder, a pipe or a device" in refusal(file=path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in refusal(file=tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\xfe")
    assert "not UTF-8" in refusal(file=tmp_path / "latin.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_yaml_file(tmp_path / "empty.yaml") == {}


def test_sections_alone_refuse_in_the_same_words() -> None:
    with pytest.raises(ConfigError, match=r"masks\.points_per_side = 0 .* from 1 to 256"):
        MaskConfig(points_per_side=0)
    with pytest.raises(ConfigError, match=r"masks\.points_per_side"):
        Config(masks={"points_per_side": 0})  # type: ignore[arg-type]


def test_point_grids_may_be_arrays() -> None:
    grid = np.array([[0.25, 0.5], [0.75, 0.5]])
    assert MaskConfig(point_grids=[grid]).point_grids == (((0.25, 0.5), (0.75, 0.5)),)  # type: ignore[arg-type]


def test_config_is_frozen_and_travels() -> None:
    config = load_config("sa1b", overrides=["model.checkpoint=s3://b/w.pth"])
    with pytest.raises(ValueError, match="frozen"):
        config.masks.points_per_side = 1  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config
    assert Config(**json.loads(config.model_dump_json())) == config


def test_identity_holds_what_determines_the_output_and_nothing_else() -> None:
    base = load_config("default").identity()
    json.dumps(base)
    for same in ("cluster.max_actors=3", "masks.points_per_batch=8", "output.compression_level=9", "model.device=cpu"):
        assert load_config("default", overrides=[same]).identity() == base
    for other in ("masks.points_per_side=8", "input.max_pixels=9", "output.images_per_shard=8", "model.name=vit_b"):
        assert load_config("default", overrides=[other]).identity() != base


def test_every_setting_is_described() -> None:
    for section in SECTIONS:
        for row in setting_rows(section):
            assert row.description
            assert row.allowed
            assert len(row.description) <= 130


@pytest.mark.parametrize("preset", [None, "tiny"])
@pytest.mark.parametrize("former", [(0.62, 0.8), (0.5, 0.8)])
def test_a_run_of_an_older_version_keeps_the_thresholds_that_were_the_models_own(
    preset: str | None, former: tuple[float, float]
) -> None:
    def thresholds_of(masks: MaskConfig) -> tuple[float, float]:
        return masks.pred_iou_thresh, masks.stability_score_thresh

    config = load_config(preset)
    begun = config.identity()
    begun["masks"] |= dict(zip(("pred_iou_thresh", "stability_score_thresh"), former, strict=True))
    assert thresholds_of(config.as_begun(begun).masks) == former
    assert config.as_begun(begun).identity() == begun
    assert load_config(preset, None, ["masks.pred_iou_thresh=0.4"]).as_begun(begun).masks.pred_iou_thresh == 0.4
    begun["masks"]["pred_iou_thresh"] = 0.61  # somebody chose that
    assert thresholds_of(config.as_begun(begun).masks) == thresholds_of(config.masks)
