"""SAM 2: its files, its frame, its presets, and how its encoder and decoder differ from SAM's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d

from samray.config import MaskConfig, load_config
from samray.errors import ConfigError
from samray.masks import MaskGenerator
from samray.masks.prompted import PromptedGenerator
from samray.prompts import Prompt
from samray.sam.checkpoints import check_checkpoint, list_models, load_model
from samray.sam.pyramid import composed
from samray.sam.sam import Sam
from samray.sam.spec import MODELS, ModelSpec
from tests.support.micro import MICRO_SAM2, MICRO_VIT
from tests.support.sam2_files import VIDEO, meta_state, random_state

OLDER = replace(MICRO_SAM2, name="micro_sam2_0", family="SAM 2")


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (MICRO_SAM2, OLDER, replace(MICRO_VIT, name="micro_vit")):
        monkeypatch.setitem(MODELS, spec.name, spec)


@pytest.fixture
def sam() -> Sam:
    model = Sam(MICRO_SAM2).eval().requires_grad_(False)
    model.load_state_dict(random_state(MICRO_SAM2))
    return model


# --- files ---------------------------------------------------------------------------------------------------------


def test_metas_file_loads_without_its_parts_for_video(tmp_path: Path) -> None:
    state = random_state(MICRO_SAM2)
    torch.save({"model": meta_state(state)}, tmp_path / "sam2.1.pt")
    loaded = load_model("micro_sam2", tmp_path / "sam2.1.pt").state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_any_other_key_is_an_error(tmp_path: Path) -> None:
    torch.save({"model": meta_state(random_state(MICRO_SAM2)) | {"memory_bank.x": torch.zeros(1)}}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"does not fit micro_sam2: 1 unexpected key: memory_bank\.x\."):
        check_checkpoint("micro_sam2", tmp_path / "a.pt")


@pytest.mark.parametrize("name", VIDEO)
def test_parts_for_video_are_known_only_in_sam_2s_layout(name: str, tmp_path: Path) -> None:
    torch.save(random_state(MICRO_SAM2) | {name: torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="1 unexpected key"):
        check_checkpoint("micro_sam2", tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("name", "spec", "version", "words"),
    [
        ("micro_sam2", OLDER, "2", "has weights of SAM 2 (micro_sam2_0), not of SAM 2.1 (micro_sam2): set model.name="),
        ("micro_sam2_0", MICRO_SAM2, "2.1", "has weights of SAM 2.1 (micro_sam2), not of SAM 2 (micro_sam2_0): set"),
        (
            "micro_vit",
            MICRO_SAM2,
            "2.1",
            "has weights of SAM 2.1 (micro_sam2), not of SAM (micro_vit): set model",
        ),
        ("sam2.1_l", MICRO_SAM2, "2.1", "does not fit sam2.1_l: "),
        (
            "vit_b",
            replace(MICRO_SAM2, embed_dim=16),
            "2.1",
            "has weights of SAM 2.1, not of SAM (vit_b): set model.",
        ),
    ],
)
def test_another_familys_file_is_one_sentence(
    name: str, spec: ModelSpec, version: str, words: str, tmp_path: Path
) -> None:
    torch.save({"model": meta_state(random_state(spec), version=version)}, tmp_path / "a.pt")
    with pytest.raises(ConfigError) as caught:
        check_checkpoint(name, tmp_path / "a.pt")
    assert words in str(caught.value)


def test_sams_file_is_named_for_sam_2(tmp_path: Path) -> None:
    torch.save(random_state(MODELS["micro_vit"]), tmp_path / "a.pth")
    words = r"a\.pth has weights of SAM \(micro_vit\), not of SAM 2\.1 \(micro_sam2\): set model\.name=micro_vit, or"
    with pytest.raises(ConfigError, match=words):
        check_checkpoint("micro_sam2", tmp_path / "a.pth")


def test_every_row_has_url_licence_size_and_digest() -> None:
    rows = {row.name: row for row in list_models() if row.name.startswith(("sam2_", "sam2.1_"))}
    assert len(rows) == 8
    assert len({MODELS[name].sha256 for name in rows}) == 8
    for name, row in rows.items():
        assert row.licence == "Apache-2.0"
        assert row.url is not None
        assert row.url.endswith(f"/{MODELS[name].file_name}")
        # The file has float32 weights, and 7.4 to 7.7 M more for video.
        assert 7.2 < row.size_mb / 4 - row.parameters / 1e6 < 7.8, name


# --- settings ------------------------------------------------------------------------------------------------------


def test_mask_settings_follow_the_family() -> None:
    for name in ("sam2.1_t", "sam2_l"):
        masks = load_config(None, None, [f"model.name={name}"]).masks
        assert (masks.pred_iou_thresh, masks.stability_score_thresh) == (0.8, 0.95)
    assert load_config("sam2").model.name == "sam2.1_l"
    assert load_config(None, None, ["model.name=vit_b"]).masks.pred_iou_thresh == 0.88
    config = load_config(None, None, ["model.name=sam2.1_t", "masks.pred_iou_thresh=0.7"]).masks
    assert config.pred_iou_thresh == 0.7


# --- networks ------------------------------------------------------------------------------------------------------


def test_two_convolutions_as_one(sam: Sam) -> None:
    first, second = sam.image_encoder.neck[3], sam.image_encoder.fine.conv_s0  # type: ignore[index, union-attr]
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(composed(first, second, x), second(conv2d(x, first.weight, first.bias)))


def test_a_stage_halves_the_grid_and_blocks_are_named(sam: Sam) -> None:
    features = sam.image_encoder.features(torch.randn(2, 3, 64, 64))
    assert features.embedding.shape == (2, 32, 4, 4)
    assert features.high_res is not None
    assert [tuple(maps.shape) for maps in features.high_res] == [(2, 4, 16, 16), (2, 8, 8, 8)]
    assert len(sam.image_encoder.blocks_in_order()) == 5


@pytest.mark.parametrize("image_hw", [(40, 90), (90, 40)])
def test_both_generators_work_in_the_square_frame(sam: Sam, image_hw: tuple[int, int]) -> None:
    """Crops, small regions, clicks, boxes and both together, on images that are not square."""
    image = np.random.default_rng(0).integers(0, 256, (*image_hw, 3), dtype=np.uint8)
    settings = MaskConfig(
        points_per_side=4, crop_n_layers=1, pred_iou_thresh=0, stability_score_thresh=0, min_mask_region_area=4
    )
    (masks,) = MaskGenerator(sam, settings).generate([image])
    assert masks
    assert {tuple(mask["segmentation"]["size"]) for mask in masks} == {image_hw}
    height, width = image_hw
    prompts = [
        Prompt(points=((width / 2, height / 2),), labels=(1,)),
        Prompt(box=(2, 3, width - 9, height - 8)),
        Prompt(points=((width / 3, height / 2),), labels=(1,), box=(2, 3, width - 9, height - 8)),
    ]
    (records,) = PromptedGenerator(sam, MaskConfig()).generate([image], [prompts])
    assert len(records) == 3


def test_the_image_side_in_bfloat16(sam: Sam) -> None:
    """Masks stay near those of float32."""
    pixels = torch.randn(1, 3, 64, 64)
    points, labels = torch.rand(5, 1, 2) * 64, torch.ones(5, 1, dtype=torch.int64)
    exact, _ = sam.predict(sam.encode_images(pixels), points, labels)
    half = sam.cast_image_side(torch.bfloat16)
    rounded, _ = half.predict(half.encode_images(pixels.bfloat16()), points, labels)
    assert (rounded - exact).abs().max() < 0.1 * exact.abs().max()
