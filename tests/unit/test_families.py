"""What holds for every model family, each with a micro variant: files, generators, edges, evaluation, training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from samray.config import MaskConfig, load_config
from samray.config.edges import EdgeConfig
from samray.errors import ConfigError
from samray.evaluate.points import answer_clicks
from samray.exports.images import LabelledImage
from samray.exports.label_map import label_map
from samray.masks.edges import EdgeGenerator
from samray.masks.generator import MaskGenerator
from samray.masks.prompted import PromptedGenerator
from samray.prompts import Prompt
from samray.sam.checkpoints import check_checkpoint, list_models, load_model, resolve_checkpoint
from samray.sam.rope_vit import rotation
from samray.sam.sam import Sam
from samray.sam.spec import MODELS, ModelSpec
from samray.train.examples import Frame
from tests.support.family_files import UNUSED, published
from tests.support.micro import FAMILIES, MICRO_VIT, batches_of, learner_of, settings_of
from tests.support.sam2_files import random_state

NAMES = [spec.name for spec in FAMILIES]
HW = (40, 90)


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (*FAMILIES, replace(MICRO_VIT, name="micro_vit")):
        monkeypatch.setitem(MODELS, spec.name, spec)


@pytest.fixture(params=FAMILIES, ids=NAMES)
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    row: ModelSpec = request.param
    return row


@pytest.fixture
def sam(spec: ModelSpec) -> Sam:
    model = Sam(spec).eval().requires_grad_(False)
    model.load_state_dict(
        random_state(spec, seed=0 if spec.name == "micro_sam_hq" else 1)
    )  # under which it finds masks
    return model


def test_its_own_file_loads(spec: ModelSpec, tmp_path: Path) -> None:
    """Without what only video or a detector needs."""
    state = random_state(spec)
    file = published(spec.family, state)
    torch.save({"model": file} if spec.family in ("SAM 2.1", "EdgeTAM") else file, tmp_path / "a.pt")
    loaded = load_model(spec.name, tmp_path / "a.pt").state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert file.keys() != state.keys(), "its names are not samray's"

    torch.save(file | {"memory_bank.x": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=rf"does not fit {spec.name}: 1 unexpected key: memory_bank\.x\."):
        check_checkpoint(spec.name, tmp_path / "a.pt")


@pytest.mark.parametrize("asked", [*NAMES, "micro_vit"])
def test_a_file_of_another_family_is_one_sentence_that_names_both(asked: str, spec: ModelSpec, tmp_path: Path) -> None:
    wanted = MODELS[asked].family
    torch.save(published(spec.family, random_state(spec)), tmp_path / "a.pt")
    if wanted == spec.family:
        words = rf"does not fit {asked}: .* It fits {spec.name}: set model\.name={spec.name}\."
        if asked == spec.name:
            return check_checkpoint(asked, tmp_path / "a.pt")
    else:
        words = rf"has weights of {spec.family} \({spec.name}\), not of {wanted} \({asked}\): set model\.name="
    with pytest.raises(ConfigError, match=words):
        check_checkpoint(asked, tmp_path / "a.pt")


def test_a_family_is_known_by_its_names_if_no_row_has_its_shapes(spec: ModelSpec, tmp_path: Path) -> None:
    torch.save(published(spec.family, random_state(replace(spec, decoder_mlp_dim=48))), tmp_path / "a.pt")
    with pytest.raises(
        ConfigError, match=rf"has weights of {spec.family}, not of SAM \(vit_b\): set model\.checkpoint"
    ):
        check_checkpoint("vit_b", tmp_path / "a.pt")


@pytest.mark.parametrize("family", UNUSED)
def test_what_is_left_out_is_known_only_in_its_layout(family: str, tmp_path: Path) -> None:
    family_row = next(row for row in FAMILIES if row.family == family)
    for name in UNUSED[family]:
        torch.save(random_state(family_row) | {name.removeprefix("tracker."): torch.zeros(1)}, tmp_path / "a.pt")
        with pytest.raises(ConfigError):
            check_checkpoint(family_row.name, tmp_path / "a.pt")


def test_masks_prompts_edges_evaluation_and_label_maps(sam: Sam) -> None:
    """Crops, small regions, a second look, clicks and boxes, on an image that is not square."""
    image = np.random.default_rng(0).integers(0, 256, (*HW, 3), dtype=np.uint8)
    height, width = HW
    settings = MaskConfig(
        points_per_side=3, crop_n_layers=1, pred_iou_thresh=0, stability_score_thresh=0, min_mask_region_area=4
    )
    (masks,) = MaskGenerator(sam, settings).generate([image])
    (refined,) = MaskGenerator(sam, settings.model_copy(update={"refine": "m2m"})).generate([image])
    assert masks
    assert refined
    assert {tuple(mask["segmentation"]["size"]) for mask in (*masks, *refined)} == {HW}
    prompts = [
        Prompt(points=((width / 2, height / 2),), labels=(1,)),
        Prompt(box=(2, 3, width - 9, height - 8)),
        Prompt(points=((width / 3, height / 2),), labels=(1,), box=(2, 3, width - 9, height - 8)),
    ]
    (records,) = PromptedGenerator(sam, MaskConfig()).generate([image], [prompts])
    assert len(records) == 3
    (edges,) = EdgeGenerator(sam, EdgeConfig(points_per_side=3)).generate([image])
    assert edges.shape == HW
    assert edges.max() > 0
    regions = np.zeros((2, *HW), dtype=bool)
    regions[0, 5:30, 5:40] = regions[1, 10:30, 50:80] = True
    (answers,) = answer_clicks(sam, image, regions)  # type: ignore[arg-type]
    assert answers.iou.shape == (2, 1 if sam.spec.decoder.hq_dim else 3)
    assert 0 < answers.iou.max() <= 1

    labelled = LabelledImage(
        image_id=0, width=width, height=height, file_name="a.png", uri="a.png", ids=list(range(len(masks))),
        counts=[mask["segmentation"]["counts"] for mask in masks], bbox=[list(mask["bbox"]) for mask in masks],
        area=[mask["area"] for mask in masks], predicted_iou=[mask["predicted_iou"] for mask in masks],
        stability_score=[mask["stability_score"] for mask in masks], point_coords=[], crop_box=[],
    )  # fmt: skip
    assert len(np.unique(label_map(labelled, "area"))) > 1


def test_an_ambiguous_prompt_of_sam_hq_has_the_best_of_its_masks() -> None:
    spec = next(row for row in FAMILIES if row.name == "micro_sam_hq")
    sam = Sam(spec).eval().requires_grad_(False)
    sam.load_state_dict(random_state(spec))
    embedding = sam.encode_images(torch.randn(1, 3, 64, 64))
    points, labels = torch.rand(9, 1, 2) * 64, torch.ones(9, 1, dtype=torch.int64)
    tokens = sam.prompt_encoder.encode_points(points, labels)[None]
    head = sam.mask_decoder.iou_prediction_head.layers[-1]
    assert isinstance(head, torch.nn.Linear)
    head.bias.sub_(sam.decode_batch(embedding, tokens)[1].mean(dim=(0, 1)))  # then each mask is the best of some
    logits, iou = (x[0] for x in sam.decode_batch(embedding, tokens))
    best = iou[:, 1:].argmax(dim=1) + 1
    assert len(best.unique()) > 1
    threshold = float(iou[:, 1:].amax(dim=1).sort().values[4:6].mean())
    decoded = sam.decode_points(sam.prepare_decoder(embedding), points, labels, min_iou=threshold)
    assert len(decoded.iou) == 4
    expected = logits[decoded.prompt_index, best[decoded.prompt_index]]
    torch.testing.assert_close(decoded.logits, expected)


def test_images_of_which_no_mask_is_kept(sam: Sam) -> None:
    """Several at once, as crops with few points are."""
    size = sam.image_size
    context = sam.prepare_decoder(sam.encode_images(torch.randn(2, 3, size, size)))
    points, labels = torch.rand(6, 1, 2) * size, torch.ones(6, 1, dtype=torch.int64)
    whole = sam.decode_points(context, points, labels)
    none = sam.decode_points(context, points, labels, min_iou=float(whole.all_iou.max()))
    assert none.logits.shape == (0, *whole.logits.shape[1:])
    assert len(none.iou) == len(none.prompt_index) == len(none.mask_index) == 0
    torch.testing.assert_close(none.all_iou, whole.all_iou)


def test_the_image_side_in_bfloat16(sam: Sam) -> None:
    """Masks stay near those of float32."""
    size = sam.image_size
    pixels = torch.randn(1, 3, size, size)
    points, labels = torch.rand(5, 1, 2) * size, torch.ones(5, 1, dtype=torch.int64)
    exact, _ = sam.predict(sam.encode_images(pixels), points, labels, multimask=False)
    half = sam.cast_image_side(torch.bfloat16)
    rounded, _ = half.predict(half.encode_images(pixels.bfloat16()), points, labels, multimask=False)
    close = (rounded - exact).abs().amax(dim=(1, 2, 3)) < 0.15 * exact.abs().max()
    assert close.float().mean() >= 0.6  # another mask may be taken where the single one is not stable


@pytest.mark.usefixtures("micro_model")
def test_its_decoder_learns(spec: ModelSpec) -> None:
    overrides = ("train.trainable=decoder", "train.interaction_steps=2", "train.warmup_steps=1")
    learner = learner_of(*overrides, spec=spec)
    before = {name: value.clone() for name, value in learner.sam.state_dict().items()}
    frame = Frame(spec.image_size, 4 * spec.grid, spec.frame == "pad")
    for batch in batches_of(settings_of(*overrides), frame, count=2):
        assert all(np.isfinite(value) for value in learner.step(batch).values())
    changed = {name for name, value in learner.sam.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.partition(".")[0] for name in changed} == {"mask_decoder"}
    if spec.decoder.hq_dim:
        parts = {name.split(".")[2] for name in changed if name.startswith("mask_decoder.hq.")}
        assert parts == {"hf_token", "hf_mlp", "compress_vit_feat", "embedding_encoder", "embedding_maskfeature"}


@pytest.mark.usefixtures("micro_model")
def test_all_of_it_learns_after_an_evaluation(spec: ModelSpec) -> None:
    """Whose inference mode must leave nothing behind."""
    rotation.cache_clear()
    learner = learner_of("train.warmup_steps=1", spec=spec)
    assert learner.average is not None
    with torch.inference_mode():
        learner.average.encode_images(torch.zeros(1, 3, spec.image_size, spec.image_size))
    frame = Frame(spec.image_size, 4 * spec.grid, spec.frame == "pad")
    learner.step(next(batches_of(settings_of(), frame)))
    assert not [name for name, parameter in learner.sam.image_encoder.named_parameters() if parameter.grad is None]


# --- rows ----------------------------------------------------------------------------------------------------------


def test_settings_follow_the_family() -> None:
    for name, thresh in (("sam_hq_vit_b", 0.88), ("edgetam", 0.8), ("sam3", 0.8)):
        masks = load_config(None, None, [f"model.name={name}"]).masks
        assert (masks.pred_iou_thresh, masks.stability_score_thresh) == (thresh, 0.95)
    assert load_config("sam_hq").model.name == "sam_hq_vit_h"


def test_a_model_without_a_digest_says_how_it_is_verified() -> None:
    rows = {row.name: row for row in list_models()}
    assert rows["sam_hq_vit_b"].verified_by == rows["sam_hq_vit_l"].verified_by == "size and keys"
    assert rows["sam_hq_vit_h"].verified_by == rows["edgetam"].verified_by == "SHA-256"
    assert (rows["sam3"].verified_by, rows["sam3"].licence) == ("keys", "SAM License")
    assert rows["tiny"].verified_by == ""
    for name in ("sam_hq_vit_t", "sam_hq_vit_b", "sam_hq_vit_l", "sam_hq_vit_h", "edgetam"):
        # Files have float32 weights; EdgeTAM's also its parts for video, TinyViT's a classifier.
        millions = rows[name].parameters / 1e6
        assert 0.99 * millions < rows[name].size_mb / 4 < millions + 6, name


def test_a_gated_file_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMRAY_CACHE", str(tmp_path))
    words = r"the weights of sam3 are gated, .* get sam3\.pt from https://huggingface\.co/facebook/sam3, and set model"
    with pytest.raises(ConfigError, match=words):
        resolve_checkpoint("sam3")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "sam3.pt").write_bytes(b"weights")
    assert resolve_checkpoint("sam3") == tmp_path / "checkpoints" / "sam3.pt"
