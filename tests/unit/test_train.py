"""The trainer's pieces against values worked out by hand, and one short run that learns, stops and goes on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from samray.errors import ConfigError
from samray.evaluate.points import centre
from samray.evaluate.scenes import evaluate_clicks
from samray.sam.sam import Sam
from samray.sam.spec import MODELS, TinyVitSpec
from samray.scenes import Scene, make_scene
from samray.train.clicks import SceneExamples, area_downsample, corrective_clicks, make_example
from samray.train.losses import actual_iou, mask_losses, sam_loss
from samray.train.trainer import METRICS_FILE, STATE_FILE, WEIGHTS_FILE, TrainConfig, Trainer

MICRO = replace(
    MODELS["tiny"],
    name="micro",
    image_size=64,
    encoder=TinyVitSpec(dims=(8, 16, 32), depths=(1, 1, 1), num_heads=(1, 1, 2), windows=(8, 8, 4), strides=(2, 2)),
    embed_dim=32,
    decoder_heads=2,
    decoder_mlp_dim=32,
    iou_hidden_dim=32,
)
CONFIG = TrainConfig(
    model="micro",
    steps=4,
    batch_size=2,
    prompts_per_scene=4,
    first_image_size=64,
    num_workers=0,
    validation_scenes=2,
    bfloat16=False,
)


@pytest.fixture(autouse=True)
def _micro(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MODELS, "micro", MICRO)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- clicks ----------------------------------------------------------------------------------------------------------


def test_centre_is_farthest_from_the_outside_and_the_edge_counts_as_outside():
    mask = np.zeros((40, 60), bool)
    mask[10:21, 30:51] = True
    x, y = centre(mask)
    assert y == 15
    assert 35 <= x <= 45
    assert centre(np.ones((11, 11), bool)) == (5, 5)


@pytest.mark.parametrize("max_side", [None, 8])
def test_centre_lies_in_the_mask_also_of_a_ring(max_side: int | None):
    ys, xs = np.mgrid[:81, :81]
    radius = np.hypot(ys - 40, xs - 40)
    ring = (radius < 38) & (radius > 28)
    x, y = centre(ring, max_side)
    assert ring[y, x]


def test_centre_of_nothing_is_refused():
    with pytest.raises(ValueError, match="empty"):
        centre(np.zeros((4, 4), bool))


def test_every_click_lies_in_its_mask_and_box():
    example = make_example(make_scene(2, (48, 64)), 64, 50, np.random.default_rng(0))
    assert example.masks.shape == (50, 64, 64)
    assert not example.masks[:, 48:].any(), "what is padded belongs to no mask"
    for (x, y), mask in zip(example.points.astype(int), example.masks, strict=True):
        assert mask[y, x]
    assert (example.boxes_xyxy[:, 2:] > example.boxes_xyxy[:, :2]).mean() > 0.9


def test_examples_repeat_by_seed():
    examples = SceneExamples(None, 64, 16, 4)
    first, again, other = examples[7], examples[7], examples[8]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["image"], other["image"])


def test_area_downsample_gives_the_covered_share():
    masks = np.zeros((1, 8, 8), bool)
    masks[0, :4, :4] = True
    masks[0, 4:6, 4:8] = True
    assert area_downsample(masks, 2).tolist() == [[[255, 0], [0, 127]]]


def test_corrective_clicks_fall_on_the_error_with_the_right_label():
    target = torch.zeros(2, 8, 8)
    target[:, 2:6, 2:6] = 1
    logits = torch.where(target > 0, 5.0, -5.0)
    logits[0, 3, 4] = -5  # missed: a foreground click is due
    logits[1, 7, 0] = 5  # exceeded: a background click
    points, labels = corrective_clicks(logits, target, 4.0, torch.Generator().manual_seed(0))
    assert labels.tolist() == [[1], [0]]
    assert points.tolist() == [[[4 * 4 + 1.5, 3 * 4 + 1.5]], [[1.5, 7 * 4 + 1.5]]]


# --- losses ----------------------------------------------------------------------------------------------------------


def test_mask_loss_of_undecided_logits_by_hand():
    target = torch.zeros(1, 4, 4)
    target[0, :2] = 1
    # p = 1/2 everywhere: focal 1/4 ln 2; dice 1 - (2 * 4 + 1) / (8 + 8 + 1).
    expected = 20 * 0.25 * np.log(2) + 1 - 9 / 17
    assert mask_losses(torch.zeros(1, 4, 4), target).item() == pytest.approx(expected, rel=1e-5)


def test_mask_loss_vanishes_for_a_perfect_mask_and_is_large_for_its_inverse():
    target = (torch.rand(3, 8, 8) > 0.5).float()
    sure = (target * 2 - 1) * 20
    assert mask_losses(sure, target).max() < 1e-3
    assert mask_losses(-sure, target).min() > 100


def test_actual_iou_by_hand():
    target = torch.zeros(4, 4)
    target[:2] = 1
    logits = torch.full((4, 4), -1.0)
    logits[1:3] = 1
    assert actual_iou(logits, target).item() == pytest.approx(1 / 3)
    assert actual_iou(-torch.ones(4, 4), torch.zeros(4, 4)).item() == 0


def test_only_the_best_of_the_three_and_the_single_mask_get_a_gradient():
    target = torch.zeros(1, 4, 4)
    target[0, :2] = 1
    logits = torch.zeros(1, 4, 4, 4)
    logits[0, 2] = target[0] * 2 - 1  # mask 2 is the best
    logits.requires_grad_()
    score = torch.full((1, 4), 0.5, requires_grad=True)
    losses = sam_loss(logits, score, target, single_weight=0.5)
    losses.total.backward()
    assert logits.grad is not None
    assert score.grad is not None
    assert logits.grad.abs().sum(dim=(2, 3)).gt(0).tolist() == [[True, False, True, False]]
    # Actual IoUs are 0 (nothing above 0) but for mask 2, whose is 1: d/ds (s - iou)^2 = 2 (s - iou).
    assert score.grad.tolist() == [[1.0, 1.0, -1.0, 1.0]]
    assert losses.iou_oracle.item() == 1


def test_the_scored_iou_is_that_of_the_highest_score():
    target = torch.zeros(1, 4, 4)
    target[0, :2] = 1
    logits = torch.full((1, 4, 4, 4), -1.0)
    logits[0, 3] = target[0] * 2 - 1
    right = sam_loss(logits, torch.tensor([[0.9, 0.1, 0.2, 0.3]]), target, single_weight=0.0)
    wrong = sam_loss(logits, torch.tensor([[0.0, 0.8, 0.2, 0.3]]), target, single_weight=0.0)
    assert (right.iou_scored.item(), wrong.iou_scored.item()) == (1, 0)
    assert right.iou_oracle.item() == wrong.iou_oracle.item() == 1


# --- evaluation ------------------------------------------------------------------------------------------------------


class _Oracle:
    """Answers a click as a Sam would, with the scene's own masks: whole, wrong, and everything."""

    device = torch.device("cpu")
    image_size = 96

    def __init__(self, scene: Scene, scores: tuple[float, float, float]) -> None:
        self.scene, self.scores = scene, scores

    def preprocess(self, images):
        return torch.zeros(1), [images[0].shape[:2]]

    def encode_images(self, pixels):
        return pixels

    def prepare_decoder(self, embeddings):
        return embeddings

    def decode_points(self, context, points, labels):
        assert (labels == 1).all()
        logits = []
        for x, y in points[:, 0].round().long().tolist():
            masks = torch.from_numpy(self.scene.masks)
            mask = next(m for m in masks if m[y, x])
            logits += [mask.float() - 0.5, torch.full(mask.shape, -1.0), torch.full(mask.shape, 1.0)]
        n = len(points)
        scores = torch.tensor([self.scores]).expand(n, -1)
        return type("Decoded", (), {"logits": torch.stack(logits), "all_iou": scores})()

    def postprocess(self, logits, input_hw, original_hw):
        return logits


@pytest.mark.parametrize(("scores", "miou"), [((0.9, 0.1, 0.1), 1.0), ((0.1, 0.9, 0.1), 0.0)])
def test_evaluation_takes_the_mask_that_the_model_scores_best(scores: tuple[float, float, float], miou: float):
    scene = make_scene(4, 96)
    scene = Scene(image=scene.image, masks=scene.masks[:1], kinds=["object"])
    figures = evaluate_clicks(_Oracle(scene, scores), [scene])  # type: ignore[arg-type]
    assert figures["miou"] == pytest.approx(miou)
    assert figures["miou_oracle"] == pytest.approx(1)
    assert figures["num_regions"] == 1


def test_evaluation_counts_by_kind_and_survives_a_scene_without_targets():
    empty = Scene(image=np.zeros((64, 64, 3), np.uint8), masks=np.zeros((0, 64, 64), bool), kinds=[])
    scenes = [make_scene(seed, (48, 64)) for seed in range(4)] + [empty]
    figures = evaluate_clicks(Sam(MICRO).eval(), scenes)
    counted = {kind: f["num_regions"] for kind, f in figures["by_kind"].items()}
    assert counted["object"] == figures["num_regions"] == sum(s.kinds.count("object") for s in scenes)
    assert counted.get("part", 0) == sum(s.kinds.count("part") for s in scenes)
    assert 0 <= figures["miou"] <= figures["miou_oracle"] <= 1
    assert np.isnan(evaluate_clicks(Sam(MICRO).eval(), [empty])["miou"])


# --- the run ---------------------------------------------------------------------------------------------------------


def test_repeating_one_batch_drives_its_loss_down(tmp_path: Path):
    """Real learning: on the same few clicks the best-scored mask must come to fit."""
    trainer = Trainer(tmp_path, replace(CONFIG, steps=10_000, warmup_steps=5, box_fraction=0, refine_fraction=0))
    examples = SceneExamples(None, 64, trainer.low_res, 4)
    batch = torch.utils.data.default_collate([examples[i] for i in range(2)])
    history = []
    for trainer.step in range(60):
        losses, _ = trainer._train_step(batch)
        history.append((float(losses.mask), float(losses.iou_scored)))
    assert np.mean(history[-5:], axis=0)[0] < 0.5 * history[0][0]
    assert np.mean(history[-5:], axis=0)[1] > history[0][1] + 0.15


@pytest.mark.parametrize("prompts", ["box", "refine"])
def test_boxes_and_corrective_clicks_train_their_parts_of_the_prompt_encoder(tmp_path: Path, prompts: str):
    fractions = {"box_fraction": float(prompts == "box"), "refine_fraction": float(prompts == "refine")}
    trainer = Trainer(tmp_path, replace(CONFIG, **fractions))
    examples = SceneExamples(None, 64, trainer.low_res, 4)
    trainer._train_step(torch.utils.data.default_collate([examples[0], examples[1]]))
    encoder = trainer.model.prompt_encoder
    corner, mask = encoder.point_embeddings[2].weight.grad, encoder.mask_downscaling[0].weight.grad
    assert (corner is not None) == (prompts == "box")
    assert (mask is not None) == (prompts == "refine")


def test_a_run_writes_weights_that_load_and_metrics(tmp_path: Path):
    Trainer(tmp_path, CONFIG).fit()
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata()["model"] == "micro"
    Sam(MICRO).load_state_dict(weights, strict=True)
    assert weights["mask_decoder.iou_token.weight"].dtype == torch.float16
    assert all(torch.isfinite(w.float()).all() for w in weights.values())
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert lines[-1]["kind"] == "validation"
    assert lines[-1]["step"] == CONFIG.steps
    assert not list(tmp_path.glob("*.tmp"))


def test_a_stopped_run_goes_on_where_it_was_and_ends_as_an_undisturbed_one(tmp_path: Path):
    config = replace(CONFIG, minutes=1e9)  # the schedule by steps alone, so that both runs anneal alike
    whole = Trainer(tmp_path / "whole", config)
    whole.fit()
    first = Trainer(tmp_path / "parts", config)
    step = first._train_step
    first._train_step = lambda batch: (first._request_stop(2, None), step(batch))[1]  # type: ignore[method-assign]
    first.fit()
    assert first.step == 1
    second = Trainer(tmp_path / "parts", config)
    assert second.step == 1
    second.fit()
    assert second.step == config.steps
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_small_scenes_come_first_and_what_they_taught_is_kept(tmp_path: Path):
    config = replace(CONFIG, minutes=1e9, first_image_size=32, first_fraction=0.5, learning_rate=1e-9)
    trainer = Trainer(tmp_path, config)
    step, sizes = trainer._train_step, []
    trainer._train_step = lambda batch: (sizes.append(batch["image"].shape[1]), step(batch))[1]  # type: ignore[method-assign]
    before = trainer.model.mask_decoder.iou_token.weight.detach().clone()
    trainer.fit()
    assert sizes == [32, 32, 64, 64]
    assert trainer.model.image_size == MICRO.image_size
    # A learning rate of nearly nothing: had the second part begun anew, these would be other numbers altogether.
    torch.testing.assert_close(trainer.model.mask_decoder.iou_token.weight.detach(), before, atol=1e-4, rtol=0)


def test_a_run_can_begin_with_weights(tmp_path: Path):
    Trainer(tmp_path / "first", CONFIG).fit()
    weights = tmp_path / "first" / WEIGHTS_FILE
    second = Trainer(tmp_path / "second", replace(CONFIG, init=str(weights), seed=1))
    begun = Trainer(tmp_path / "first", CONFIG).ema.state_dict()
    for state in (second.model.state_dict(), second.ema.state_dict()):
        for name, value in state.items():
            torch.testing.assert_close(value, begun[name], rtol=1e-3, atol=1e-5, msg=name)  # stored in half precision
    assert second.step == 0


def test_progress_follows_whichever_budget_is_used_up_faster(tmp_path: Path):
    trainer = Trainer(tmp_path, replace(CONFIG, minutes=10.0, steps=100))
    trainer.step, trainer.elapsed_s = 20, 300.0
    assert trainer.progress == 0.5
    trainer.step = 80
    assert trainer.progress == 0.8
    trainer.elapsed_s = 1e6
    assert trainer.progress == 1.0


def test_wrong_model_or_folder_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="vit_b"):
        Trainer(tmp_path, TrainConfig(model="vit_x"))
    Trainer(tmp_path, CONFIG).save()
    assert (tmp_path / STATE_FILE).exists()
    monkeypatch.setitem(MODELS, "other", replace(MICRO, name="other"))
    with pytest.raises(ConfigError, match="micro"):
        Trainer(tmp_path, replace(CONFIG, model="other"))
