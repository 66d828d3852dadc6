"""The trainer's pieces against values worked out by hand, and one short run that learns, stops and goes on."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import annotation
from safetensors import safe_open
from scene_outputs import paint, write_scenes

from samray import storage
from samray.errors import ConfigError
from samray.evaluate.points import centre
from samray.evaluate.scenes import evaluate_clicks
from samray.sam.sam import Sam
from samray.sam.spec import MODELS, TinyVitSpec, VitSpec
from samray.scenes import Scene, make_scene
from samray.train.augment import View, draw_view, jitter_colour, whole_view
from samray.train.clicks import corrective_clicks, first_prompts
from samray.train.data import ExampleMaker, blocks, open_data, output_of
from samray.train.examples import Frame, MaskExamples, SceneExamples, area_downsample, held_out
from samray.train.interaction import Rounds, draw_course
from samray.train.learner import Learner, check_settings, frame_of, size_due
from samray.train.loop import Worker, run_leg, save_all
from samray.train.losses import actual_iou, mask_losses, sam_loss, trust
from samray.train.mixture import CYCLE, Mixture
from samray.train.optimizer import add_drop_path, layer_of, learning_rate, make_optimizer, set_trainable
from samray.train.run import choose_sizes
from samray.train.settings import DataConfig, TrainConfig, TrainSettings, load_train_settings
from samray.train.store import METRICS_FILE, WEIGHTS_FILE, Position, Store

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
MICRO_VIT = replace(MICRO, encoder=VitSpec(dim=16, depth=4, num_heads=2, global_blocks=(1, 3), window=2))
FRAME = Frame(64, 16)
CPU = torch.device("cpu")


def settings_of(*overrides: str) -> TrainSettings:
    """For the micro model, which has no checkpoint: small steps from random weights."""
    base = [
        "train.from_scratch=true", "train.steps=4", "train.batch_size=2", "data.prompts_per_image=4",
        "data.validation_images=2", "train.interaction_steps=1", "train.box_fraction=0", "train.learning_rate=8e-4",
        "train.warmup_steps=200", "train.layer_decay=1", "train.log_every=1",
    ]  # fmt: skip
    resolved = load_train_settings(None, [*base, *overrides])
    return resolved.model_copy(update={"model": resolved.model.model_copy(update={"name": "micro"})})


def learner_of(*overrides: str, spec: Any = MICRO, **options: Any) -> Learner:
    return Learner(settings_of(*overrides), spec, image_size=spec.image_size, device=CPU, **options)


def batches_of(settings: TrainSettings, frame: Frame = FRAME, first: int = 0, count: int = 10_000) -> Iterator[Any]:
    """Painted scenes as the stream gives them, from a step on."""
    maker = ExampleMaker(open_data(["scenes"], settings), frame)
    for numbers in blocks(first, count, settings.train.batch_size):
        yield {name: torch.from_numpy(array) for name, array in maker({"number": numbers}).items()}


@pytest.fixture(autouse=True)
def _micro(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MODELS, "micro", MICRO)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twenty scenes of 48 x 64 pixels with their masks, as an output."""
    return write_scenes(str(tmp_path_factory.mktemp("world")), paint(20)).output


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
    masks = make_scene(2, (48, 64)).masks
    masks = masks[np.arange(50) % len(masks)]
    points, boxes = first_prompts(masks, 0.5, np.random.default_rng(0))
    for (x, y), mask in zip(points.astype(int), masks, strict=True):
        assert mask[y, x]
    assert (boxes[:, 2:] > boxes[:, :2]).mean() > 0.9
    tight = [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] for ys, xs in map(np.nonzero, masks)]
    noise = boxes - np.array(tight)
    assert np.abs(noise).max() <= 20
    assert noise.std() > 0


def test_scene_examples_repeat_by_number_and_are_padded():
    examples = SceneExamples(None, DataConfig(prompts_per_image=4), seed=0)
    first, again, other = (examples.example(draw, FRAME) for draw in (7, 7, 8))
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(first["image"], other["image"])
    h, w = first["input_hw"]
    assert (h, w) != (64, 64)
    assert not first["image"][h:].any()
    assert not first["targets"][:, -(-h // 4) :].any()


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


def test_a_label_that_no_answer_fits_teaches_less():
    best = torch.tensor([0.9, 0.1, 0.5, 0.0])
    weight = trust(best, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert weight.tolist() == pytest.approx([1.0 / 0.6, 0.2 / 0.6, 1, 1]), "0.1 + IoU over their mean; the others are 1"
    assert trust(best, torch.zeros(4)).tolist() == [1, 1, 1, 1]
    squared = trust(best[:2], torch.full((2,), 2.0))
    assert squared.tolist() == pytest.approx([0.91 / 0.51, 0.11 / 0.51])


def test_doubt_weighs_the_loss_of_labelled_images_alone():
    settings = settings_of("train.doubt=1").train
    targets = torch.zeros(2, 2, 16, 16, dtype=torch.uint8)
    targets[:, :, :4] = 255
    given = {
        "points": torch.zeros(2, 2, 2),
        "boxes_xyxy": torch.zeros(2, 2, 4),
        "targets": targets,
        "from_labels": torch.tensor([True, False]),
    }
    rounds = Rounds(Sam(MICRO), settings, draw_course(settings, 0), given, torch.Generator())
    assert rounds.doubt is not None
    assert rounds.doubt.tolist() == [1, 1, 0, 0]
    plain = settings_of().train
    assert Rounds(Sam(MICRO), plain, draw_course(plain, 0), given, torch.Generator()).doubt is None


# --- examples of labelled images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_flipped", [False, True])
def test_a_view_shows_the_same_part_of_image_and_mask(is_flipped: bool):
    """The image is the mask in grey: wherever the view puts it, both must agree, but for the rim."""
    mask = np.zeros((90, 120), bool)
    mask[20:70, 30:50] = True
    mask[10:30, 80:110] = True
    image = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
    rng = np.random.default_rng(0)
    for _ in range(20):
        drawn = draw_view(90, 120, 64, (0.3, 3.0), 0.0, rng)
        view = View(drawn.box, drawn.size_hw, is_flipped)
        seen, seen_mask = view.of_image(image), view.of_mask(mask)
        assert seen.shape[:2] == seen_mask.shape == view.size_hw
        assert max(view.size_hw) <= 64
        assert ((seen[..., 0] > 127) == seen_mask).all()


def test_large_scale_jitter_crops_above_one_and_pads_below():
    rng = np.random.default_rng(0)
    whole = draw_view(90, 120, 64, (0.5, 0.5), 0.0, rng)
    assert (whole.box, whole.size_hw) == ((0, 0, 120, 90), (24, 32))
    part = draw_view(90, 120, 64, (2.0, 2.0), 0.0, rng)
    left, top, right, bottom = part.box
    assert right - left == pytest.approx(60)
    assert bottom - top == pytest.approx(60)
    assert part.size_hw == (64, 64)
    assert whole_view(90, 120, 64).size_hw == (48, 64)
    flipped = [draw_view(90, 120, 64, (1.0, 1.0), 0.5, rng).is_flipped for _ in range(200)]
    assert 60 < sum(flipped) < 140


def test_colour_jitter_changes_colours_alone():
    image = make_scene(1, 32).image
    changed = jitter_colour(image, 0.3, np.random.default_rng(0))
    assert changed.shape == image.shape
    assert changed.dtype == np.uint8
    assert (changed != image).any()
    assert np.array_equal(jitter_colour(image, 0.0, np.random.default_rng(0)), image)


def test_examples_of_an_output_show_its_own_masks(labels: str):
    config = DataConfig(
        prompts_per_image=3, scale_jitter=(1.0, 1.0), flip_fraction=0, colour_jitter=0, validation_fraction=0
    )
    examples = MaskExamples(labels, config, seed=0)
    scenes = paint(20)
    for draw in range(20):
        example = examples.example(draw, FRAME)
        h, w = example["input_hw"]
        scene = next(s for s in scenes if np.array_equal(s.image, example["image"][:h, :w]))
        known = {area_downsample(np.pad(m, ((0, 16), (0, 0)))[None], 16).tobytes() for m in scene.masks}
        assert {target.tobytes() for target in example["targets"]} <= known


def test_masks_are_asked_for_by_their_area_and_scores(labels: str):
    def first_drawn(*weights: float, **settings: Any) -> list[int]:
        """How often each of three masks, of 1024, 64 and 64 pixels, is the first one drawn of 600."""
        masks = np.zeros((3, 64, 64), bool)
        masks[0, :32, :32] = masks[1, 40:48, 40:48] = masks[2, 40:48, :8] = True
        config = DataConfig(prompts_per_image=1, validation_fraction=0, **settings)
        examples = MaskExamples(labels, config, seed=0)
        examples.dataset = _OneImage(masks, weights)  # type: ignore[assignment]
        _, rles, found = examples._read(0)
        drawn = [
            examples._draw_masks(rles, found, whole_view(64, 64, 64), np.random.default_rng(i))[0] for i in range(600)
        ]
        return [sum(np.array_equal(mask, one) for one in drawn) for mask in masks]

    assert all(150 < count < 250 for count in first_drawn(1, 1, 0.1))
    assert first_drawn(1, 1, 0.1, area_power=1.0)[0] > 500, "1024 of 1152"
    by_score = first_drawn(1, 1, 0.1, weigh_by_score=True)
    assert by_score[2] < 60 < 230 < min(by_score[:2]), "0.1 of 2.1"
    assert first_drawn(0, 0, 0, weigh_by_score=True) != [600, 0, 0], "of masks that all have no score, any"


class _OneImage:
    """In the place of a MaskDataset."""

    def __init__(self, masks: np.ndarray, scores: Any) -> None:
        self.target = {
            "segmentation": [annotation(mask)["segmentation"] for mask in masks],
            "area": torch.tensor(masks.sum((1, 2))),
            "predicted_iou": torch.tensor(scores, dtype=torch.float32),
            "stability_score": torch.ones(len(masks)),
        }

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        return torch.zeros(3, 64, 64, dtype=torch.uint8), self.target


def test_an_epoch_has_each_image_once_and_the_next_another_order(labels: str):
    examples = MaskExamples(labels, DataConfig(validation_fraction=0.3), seed=0)
    first, second = examples._order(0), examples._order(1)
    assert sorted(first) == sorted(second) == sorted(examples.train)
    assert list(first) != list(second)
    assert not set(examples.train) & set(examples.heldout)
    assert len(examples.train) + len(examples.heldout) == 20


def test_the_split_is_by_uri_alone():
    uris = [f"s3://bucket/{i}.jpg" for i in range(2000)]
    held = held_out(uris, 0.1)
    assert 150 < held.sum() < 250
    assert np.array_equal(held_out(uris[::-1], 0.1)[::-1], held)
    assert not held_out(uris, 0.0).any()
    assert held_out(uris[:3], 1e-6).sum() == 1, "of few images one"
    assert (held_out(uris, 0.2) | ~held).all(), "a larger fraction holds out the same and more"


def test_validation_images_are_never_trained_on_and_always_the_same(labels: str):
    examples = MaskExamples(labels, DataConfig(validation_fraction=0.4, prompts_per_image=1), seed=0)
    scenes = list(examples.validation(100, FRAME))
    assert 0 < len(scenes) <= len(examples.heldout), "but for those whose masks are all too small"
    again = list(examples.validation(100, FRAME))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(scenes, again, strict=True))
    assert len(list(examples.validation(1, FRAME))) == 1


def test_an_image_that_is_gone_gives_way_to_the_next(tmp_path: Path):
    plan = write_scenes(str(tmp_path), paint(8))
    examples = MaskExamples(plan.output, DataConfig(validation_fraction=0, prompts_per_image=2), seed=0)
    storage.delete(examples.dataset.uris()[int(examples._order(0)[0])])
    assert examples.example(0, FRAME)["image"].any()
    for uri in examples.dataset.uris():
        storage.delete(uri)
    with pytest.raises(Exception, match=r"none could be used.*image_root"):
        examples.example(0, FRAME)


# --- mixtures --------------------------------------------------------------------------------------------------------


class _Counted:
    """A DATA that remembers what was asked of it."""

    def __init__(self, num_images: int | None) -> None:
        self.num_images = num_images
        self.draws: list[int] = []

    def example(self, draw: int, frame: Frame) -> dict[str, Any]:
        self.draws.append(draw)
        return {}

    def validation(self, limit: int, frame: Frame) -> Iterator[Scene]:
        yield from [make_scene(0, 16)] * limit


def test_a_mixture_keeps_shares_and_uses_each_draw_once():
    parts = [_Counted(100), _Counted(900), _Counted(None)]
    mixture = Mixture(parts, None, seed=3)
    for number in range(2 * CYCLE):
        mixture.example(number, FRAME)
    for part in parts:
        assert sorted(part.draws) == list(range(len(part.draws)))
    shares = [len(part.draws) / (2 * CYCLE) for part in parts]
    assert shares == pytest.approx([10 / 60, 30 / 60, 20 / 60], abs=2e-3), "roots of 100 and 900; scenes as their mean"
    assert len(list(mixture.validation(7, FRAME))) == 7
    assert [Mixture(parts, None, seed=3).place(n) for n in (5, 3000)] == [mixture.place(n) for n in (5, 3000)]


def test_given_shares_win_and_a_share_of_nothing_is_never_drawn():
    parts = [_Counted(5), _Counted(5)]
    mixture = Mixture(parts, (1.0, 0.0), seed=0)
    assert {mixture.place(number)[0] for number in range(CYCLE)} == {0}
    assert len(list(mixture.validation(3, FRAME))) == 3
    with pytest.raises(ConfigError, match="1 numbers, but there are 2 DATA"):
        Mixture(parts, (1.0,), seed=0)


def test_steps_have_the_numbers_of_their_place():
    assert [list(b) for b in blocks(3, 2, 4)] == [[12, 13, 14, 15], [16, 17, 18, 19]]


def test_data_may_be_named_by_its_folder_of_shards():
    for name in ("/a/labels", "/a/labels/annotations", "/a/labels/annotations/*.parquet", "/a/labels/annotations/"):
        assert output_of(name) == "/a/labels"
    assert output_of("s3://b/labels/annotations/*.parquet") == "s3://b/labels"


# --- the interaction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rounds", "without"), [(1, 0), (2, 0), (3, 1), (4, 2), (11, 2)])
def test_two_rounds_add_no_click_a_random_one_and_the_last(rounds: int, without: int):
    config = TrainConfig(interaction_steps=rounds)
    courses = [draw_course(config, step) for step in range(300)]
    assert {len(course.adds_click) for course in courses} == {rounds - 1}
    assert {course.adds_click.count(False) for course in courses} == {without}
    if without:
        assert not any(course.adds_click[-1] for course in courses)
    if without == 2:
        between = {course.adds_click[:-1].index(False) for course in courses}
        assert between == set(range(rounds - 2))
    assert 100 < sum(course.use_boxes for course in courses) < 200


def test_the_cheap_recipe_is_a_matter_of_settings():
    config = TrainConfig(interaction_steps=2, box_fraction=0.06, refine_fraction=0.08)
    courses = [draw_course(config, step) for step in range(5000)]
    assert 0.05 < np.mean([course.use_boxes for course in courses]) < 0.07
    assert 0.07 < np.mean([bool(course.adds_click) for course in courses]) < 0.09
    assert courses[17] == draw_course(config, 17)


def test_rounds_click_where_the_last_answer_was_wrong_and_give_it_back(monkeypatch: pytest.MonkeyPatch):
    """A model that always answers the same half: clicks must fall on the rest of the target, with label 1."""
    config = TrainConfig(interaction_steps=5, box_fraction=0.0)
    batch = next(batches_of(settings_of()))
    batch["targets"] = torch.zeros_like(batch["targets"])
    batch["targets"][..., 4:8, 4:12] = 255
    sam = Sam(MICRO)
    given: list[Any] = []

    def answer(embeddings: Any, sparse: Any, mask_input: Any = None) -> Any:
        given.append((sparse.shape[2], mask_input))
        half = torch.full((2, 4, 4, 16, 16), -5.0)
        half[..., 4:8, 4:8] = 5.0
        return half.requires_grad_(), torch.zeros(2, 4, 4, requires_grad=True)

    monkeypatch.setattr(sam, "decode_batch", answer)
    course = draw_course(config, 0)
    rounds = Rounds(sam, config, course, batch, torch.Generator().manual_seed(0))
    losses = list(rounds.run(torch.zeros(1)))
    assert len(losses) == len(given) == 5
    assert given[0][1] is None
    clicks_before = 1
    for adds_click, (tokens, mask) in zip(course.adds_click, given[1:], strict=True):
        clicks_before += adds_click
        assert tokens == clicks_before + 1, "the clicks and the padding"
        assert mask.shape == (8, 1, 16, 16)
        assert (mask[:, 0, 4:8, 4:8] > 0).all()
        assert mask.gt(0).sum() == 8 * 16
    later = rounds.clicks[:, :, 1:]
    assert (rounds.labels == 1).all()
    assert later[..., 0].min() >= 8 * 4, "input pixels of the missed half"
    assert later[..., 0].max() < 12 * 4
    assert later[..., 1].min() >= 4 * 4


def test_gradients_taken_round_by_round_are_those_of_the_sum():
    settings = settings_of("train.interaction_steps=4", "train.box_fraction=1", "train.later_multi_weight=0.5")
    batch = next(batches_of(settings))
    learner = learner_of("train.interaction_steps=4", "train.box_fraction=1", "train.later_multi_weight=0.5")
    total, _ = learner.loss(batch, 0, 0)
    total.backward()
    found = {name: p.grad.clone() for name, p in learner.sam.named_parameters() if p.grad is not None}
    learner.sam.zero_grad()
    from samray.train.interaction import normalise

    embeddings = learner.sam.encode_images(normalise(learner.sam, batch["image"], batch["input_hw"]))
    generator = torch.Generator().manual_seed(0)
    rounds = Rounds(learner.sam, settings.train, draw_course(settings.train, 0), batch, generator)
    plain = sum(rounds.run(embeddings))
    plain.backward()  # type: ignore[union-attr]
    torch.testing.assert_close(total, plain)
    wanted = {name: p.grad for name, p in learner.sam.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def test_later_rounds_train_the_single_mask():
    target = (torch.rand(2, 8, 8) > 0.5).float()
    logits = torch.randn(2, 4, 8, 8, requires_grad=True)
    losses = sam_loss(logits, torch.zeros(2, 4), target, single_weight=1.0, multi_weight=0.0)
    losses.total.backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum(dim=(0, 2, 3)).gt(0).tolist() == [True, False, False, False]


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


# --- what learns, and how fast ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [MICRO, MICRO_VIT], ids=["tiny_vit", "vit"])
def test_layers_learn_slower_towards_the_image(spec: Any):
    sam = Sam(spec)
    blocks_of = 4 if spec is MICRO_VIT else 3
    layers = layer_of(sam)
    assert {layers[name] for name in layers if name.startswith("mask_decoder")} == {blocks_of + 1}
    assert min(layers.values()) == 0
    optimizer = make_optimizer(sam, TrainConfig(layer_decay=0.5))
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in sam.named_parameters():
        assert scale[id(parameter)] == 0.5 ** (blocks_of + 1 - layers[name]), name
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(sam.named_parameters())
    assert decays[id(named["mask_decoder.iou_token.weight"])] == 0
    assert decays[id(named["image_encoder.neck.0.weight"])] == 0.05
    alike = make_optimizer(sam, TrainConfig(layer_decay=1.0))
    assert len(alike.param_groups) == 2


def test_layers_of_a_tiny_vit_by_name():
    layers = layer_of(Sam(MICRO))
    assert layers["image_encoder.patch_embed.seq.0.c.weight"] == 0
    assert layers["image_encoder.layers.0.blocks.0.conv1.c.weight"] == 1
    assert layers["image_encoder.layers.0.downsample.conv1.c.weight"] == 1
    assert layers["image_encoder.layers.2.blocks.0.attn.qkv.weight"] == 3
    assert layers["image_encoder.neck.0.weight"] == layers["prompt_encoder.no_mask_embed.weight"] == 4


@pytest.mark.parametrize(
    ("trainable", "changed"),
    [
        ("all", ("image_encoder.patch_embed", "image_encoder.layers", "image_encoder.neck", "prompt", "mask_decoder")),
        ("decoder", ("mask_decoder",)),
        ("decoder+prompt", ("prompt_encoder", "mask_decoder")),
        ("last_blocks:1", ("image_encoder.layers.2", "image_encoder.neck", "prompt", "mask_decoder")),
    ],
)
def test_only_what_is_trainable_changes_statistics_included(trainable: str, changed: tuple[str, ...]):
    overrides = (f"train.trainable={trainable}", "train.interaction_steps=2", "train.warmup_steps=1")
    learner = learner_of(*overrides)
    before = {name: value.clone() for name, value in learner.sam.state_dict().items()}
    for batch in batches_of(settings_of(*overrides), count=2):
        learner.step(batch)
    moved = {name for name, value in learner.sam.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.startswith(changed) for name in moved), sorted(moved)
    for prefix in changed:
        assert any(name.startswith(prefix) for name in moved), prefix
    average = learner.average
    assert average is not None
    drifted = {n for n, v in average.state_dict().items() if not torch.equal(v, before[n])}
    assert drifted <= moved


def test_more_blocks_than_there_are_is_a_config_error():
    with pytest.raises(ConfigError, match="only 3 blocks"):
        set_trainable(Sam(MICRO), "last_blocks:4")


def test_the_schedules():
    cosine = TrainConfig(learning_rate=1.0, warmup_steps=10)
    assert learning_rate(cosine, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(cosine, 50, 0.5) == pytest.approx(0.5)
    assert learning_rate(cosine, 50, 1.0) == pytest.approx(0.0)
    step = TrainConfig(learning_rate=1.0, warmup_steps=1, schedule="step", decay_at=(0.5, 0.9))
    assert [learning_rate(step, 9, p) for p in (0.4, 0.5, 0.95)] == pytest.approx([1.0, 0.1, 0.01])
    assert learning_rate(TrainConfig(learning_rate=1.0, schedule="constant"), 500, 0.9) == 1.0


@pytest.mark.parametrize("spec", [MICRO, MICRO_VIT], ids=["tiny_vit", "vit"])
def test_drop_path_leaves_whole_branches_out_in_training_only(spec: Any):
    torch.manual_seed(0)
    sam = Sam(spec)
    pixels = torch.randn(2, 3, 64, 64)
    sam.eval()
    plain = sam.encode_images(pixels)
    add_drop_path(sam, 0.9)
    assert torch.equal(sam.encode_images(pixels), plain)
    sam.train()
    seen = []
    for module in sam.modules():
        if type(module).__name__ == "Attention" and hasattr(module, "qkv"):
            module.register_forward_hook(lambda m, i, out: seen.append(out))
    for _ in range(6):
        sam.encode_images(pixels)
    per_image = torch.stack([out.unflatten(0, (2, -1)).flatten(1).abs().amax(dim=1) for out in seen])
    assert (per_image == 0).any()
    assert (per_image > 0).any()


# --- a leg -----------------------------------------------------------------------------------------------------------


def run_to_end(output: Path, *overrides: str, stop_at: int | None = None) -> Store:
    """Legs as the driver makes them, without Ray; stop_at: ask for a stop after so many steps."""
    settings, store = settings_of(*overrides), Store(str(output))
    mixture = open_data(["scenes"], settings)
    while (position := store.read_position()).progress(settings.train) < 1:
        size, until = size_due(settings.train, MICRO, position)
        learner = Learner(settings, MICRO, image_size=size, device=CPU, state=store.read_state())
        worker = Worker(
            config=settings.train,
            store=store,
            validation=lambda: mixture.validation(2, FRAME),
            until=until,
            report=lambda line: line["step"] == stop_at,
        )
        run_leg(learner, batches_of(settings, frame_of(MICRO, size), position.step), worker)
        if stop_at is not None:
            break
    return store


def test_repeating_one_batch_drives_its_loss_down():
    """Real learning: on the same few clicks the best-scored mask must come to fit."""
    learner = learner_of("train.steps=10000", "train.warmup_steps=5")
    batch = next(batches_of(settings_of()))
    history = []
    for _ in range(60):
        found = learner.step(batch)
        history.append((found["mask_loss"], found["iou_scored"]))
    assert np.mean(history[-5:], axis=0)[0] < 0.5 * history[0][0]
    assert np.mean(history[-5:], axis=0)[1] > history[0][1] + 0.15


@pytest.mark.parametrize("prompts", ["box", "refine"])
def test_boxes_and_corrective_clicks_train_their_parts_of_the_prompt_encoder(prompts: str):
    overrides = ["train.box_fraction=1"] if prompts == "box" else ["train.interaction_steps=2"]
    learner = learner_of(*overrides)
    learner.step(next(batches_of(settings_of())))
    encoder = learner.sam.prompt_encoder
    corner, mask = encoder.point_embeddings[2].weight.grad, encoder.mask_downscaling[0].weight.grad
    assert (corner is not None) == (prompts == "box")
    assert (mask is not None) == (prompts == "refine")


def test_a_run_writes_weights_that_load_and_metrics(tmp_path: Path):
    store = run_to_end(tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata()["model"] == "micro"
    Sam(MICRO).load_state_dict(weights, strict=True)
    assert weights["mask_decoder.iou_token.weight"].dtype == torch.float16
    assert all(torch.isfinite(w.float()).all() for w in weights.values())
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["validation", *["train"] * 4, "validation"]
    assert lines[-1]["step"] == 4
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"]
    assert [p.name for p in tmp_path.glob("state-*")] == ["state-00000004.pt"]
    assert store.read_position().step == 4


@pytest.mark.parametrize("extra", [(), ("train.interaction_steps=4", "train.drop_path=0.3", "train.log_every=2")])
def test_a_stopped_run_goes_on_where_it_was_and_ends_as_an_undisturbed_one(tmp_path: Path, extra: tuple[str, ...]):
    whole = run_to_end(tmp_path / "whole", *extra)
    parts = run_to_end(tmp_path / "parts", *extra, stop_at=1)
    assert parts.read_position().step == 1
    run_to_end(tmp_path / "parts", *extra)
    expected, found = whole.read_state(), parts.read_state()
    assert expected is not None
    assert found is not None
    for name, value in expected["model"].items():
        torch.testing.assert_close(found["model"][name], value, rtol=0, atol=0, msg=name)
    timing = ("minutes", "examples_per_s")
    without = [
        [{k: v for k, v in line.items() if k not in timing} for line in s.read_metrics()] for s in (whole, parts)
    ]
    assert without[0] == without[1]


def test_small_images_come_first_and_what_they_taught_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = []
    step = Learner.step
    monkeypatch.setattr(Learner, "step", lambda self, b, p: (sizes.append(b["image"].shape[1]), step(self, b, p))[1])
    overrides = ("train.first_image_size=32", "train.first_fraction=0.5", "train.learning_rate=1e-9")
    before = learner_of(*overrides).sam.mask_decoder.iou_token.weight.detach().clone()
    store = run_to_end(tmp_path, *overrides)
    assert sizes == [32, 32, 64, 64]
    state = store.read_state()
    assert state is not None
    # A learning rate of nearly nothing: had the second part begun anew, these would be other numbers altogether.
    torch.testing.assert_close(state["model"]["mask_decoder.iou_token.weight"], before, atol=1e-4, rtol=0)


def test_a_run_can_begin_with_weights(tmp_path: Path):
    store = run_to_end(tmp_path)
    settings = settings_of("train.from_scratch=false", "train.seed=1")
    model = settings.model.model_copy(update={"checkpoint": store.uri(WEIGHTS_FILE)})
    learner = Learner(settings.model_copy(update={"model": model}), MICRO, image_size=64, device=CPU)
    begun = store.read_state()
    assert begun is not None
    for name, value in learner.sam.state_dict().items():
        torch.testing.assert_close(value, begun["ema"][name], rtol=1e-3, atol=1e-5, msg=name)  # in half precision
    assert learner.position.step == 0


def test_a_distilled_encoder_learns_its_teachers_embeddings(monkeypatch: pytest.MonkeyPatch):
    teacher = Sam(replace(MICRO, encoder=replace(MICRO.encoder, dims=(16, 16, 32)))).eval().requires_grad_(False)
    monkeypatch.setattr("samray.train.learner.load_model", lambda name, checkpoint, device: teacher)
    overrides = ("train.distill_from=vit_h", "train.steps=10000", "train.warmup_steps=1")
    learner = learner_of(*overrides)
    batch = next(batches_of(settings_of()))
    losses = [learner.step(batch)["distill_loss"] for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    for name, value in teacher.mask_decoder.state_dict().items():
        assert torch.equal(learner.sam.mask_decoder.state_dict()[name], value), name


def test_progress_follows_whichever_budget_is_used_up_faster():
    config = TrainConfig(minutes=10.0, steps=100)
    assert Position(20, 300.0).progress(config) == 0.5
    assert Position(80, 300.0).progress(config) == 0.8
    assert Position(80, 1e6).progress(config) == 1.0
    assert Position(80, 300.0).progress(TrainConfig(minutes=10.0, steps=None)) == 0.5
    assert Position(80, 300.0).progress(TrainConfig(steps=160)) == 0.5


# --- what lies in OUTPUT ---------------------------------------------------------------------------------------------


def test_files_of_a_run_on_any_storage(output_root: str):
    """A save that dies before its position is written leaves the save before it in force."""
    store, learner = Store(output_root), learner_of()
    assert store.read_state() is None
    learner.position.step = 3
    save_all(learner, store)
    assert store.read_position() == Position(3, 0.0)
    store._put("state-00000007.pt", lambda path: path.write_bytes(b"of a save that died"))
    state = store.read_state()
    assert state is not None
    assert state["position"].step == 3
    learner.position.step = 8
    save_all(learner, store)
    names = storage.list_names(output_root)
    assert {name for name in names if name.startswith("state")} == {"state-00000008.pt"}
    store.write_metrics([{"kind": "train", "step": s} for s in (5, 8, 9)])
    assert [line["step"] for line in store.read_metrics(8)] == [5, 8]


def test_another_config_is_refused_with_the_difference(tmp_path: Path):
    store = Store(str(tmp_path))
    store.claim(settings_of().identity(), {})
    store.claim(settings_of("cluster.num_workers=2", "train.save_every_minutes=1").identity(), {})
    with pytest.raises(ConfigError, match=r"train.seed: 0 there, 1 now[^$]*give another OUTPUT"):
        store.claim(settings_of("train.seed=1").identity(), {})
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(ConfigError, match="cannot be understood"):
        store.claim(settings_of().identity(), {})
    (tmp_path / "train.json").unlink()
    (tmp_path / "position.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds position.json, but no train.json"):
        store.claim(settings_of().identity(), {})


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=5", "no setting train.step; did you mean train.steps"),
        ("steps=5", "did you mean train.steps"),
        ("masks.points_per_side=8", "no section masks; sections are data, model, train, cluster"),
        ("train.steps=null", "both null"),
        ("train.trainable=last_blocks:0", "last_blocks:N"),
        ("train.trainable=encoder", "decoder.prompt"),
        ("train.distill_checkpoint=a.pth", "needs train.distill_from"),
        ("model.dtype=float16", "auto, float32 or bfloat16"),
        ("data.scale_jitter=[2,1]", "takes a range above 0"),
        ("data.scale_jitter=2", "a list of two numbers"),
        ("data.shares=[-1]", "at least 0"),
        ("data.shares=x", "a list of numbers or null"),
        ("data.flip_fraction=2", "a number from 0 to 1"),
        ("train.schedule=linear", "one of cosine, step, constant"),
    ],
)
def test_wrong_settings_are_told_in_words(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_train_settings(None, [override])


@pytest.mark.parametrize(
    ("model", "override", "message"),
    [
        ("vit_b", "train.first_fraction=0.5", "needs a model with a TinyViT"),
        ("tiny", "train.distill_from=vit_h", "have 256 channels, those of tiny 128"),
        ("vit_h", "train.distill_from=vit_h", "takes another model"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(model: str, override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        check_settings(load_train_settings(None, [f"model.name={model}", override]))
    with pytest.raises(ConfigError, match=r"multiple of 16"):
        check_settings(load_train_settings(None, ["train.first_fraction=0.5", "train.first_image_size=100"]))


def test_lists_are_taken_from_files_and_the_command_line(tmp_path: Path):
    file = tmp_path / "train.yaml"
    file.write_text("train:\n  decay_at: [0.5, 1]\ndata:\n  sources: [a, b]\n  shares: [1, 2.5]\n")
    settings = load_train_settings(file, ["data.scale_jitter=[1,1]", "data.image_root=[s3://a,/b]"])
    assert settings.train.decay_at == (0.5, 1.0)
    assert settings.data.sources == ("a", "b")
    assert settings.data.shares == (1.0, 2.5)
    assert settings.data.scale_jitter == (1.0, 1.0)
    assert settings.data.image_root == ("s3://a", "/b")


def test_no_data_and_all_held_out_are_config_errors(labels: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="no DATA"):
        open_data([], settings_of())
    with pytest.raises(ConfigError, match="holds no samray run"):
        open_data([str(tmp_path)], settings_of())
    with pytest.raises(ConfigError, match=r"are held out; lower data.validation_fraction"):
        open_data([labels], settings_of("data.validation_fraction=0.9999999"))


def test_sizes_share_out_the_cluster():
    two_cores = [{"CPU": 2.0}]
    one = choose_sizes(settings_of(), two_cores)
    assert (one.num_workers, one.num_threads, one.num_data_actors, one.worker_gpus) == (1, 2, 1, 0)
    assert one.worker_cpus + 0.25 * one.num_data_actors < 2
    pair = choose_sizes(settings_of("cluster.num_workers=2"), [{"CPU": 1.0}])
    assert 2 * pair.worker_cpus + 0.25 * pair.num_data_actors <= 1
    gpus = choose_sizes(settings_of("train.batch_size=16"), [{"CPU": 64.0, "GPU": 8.0}])
    assert (gpus.num_workers, gpus.worker_gpus, gpus.num_data_actors) == (8, 1, 56)
    with pytest.raises(ConfigError, match=r"train.batch_size = 2 cannot be shared out among 8 workers"):
        choose_sizes(settings_of(), [{"CPU": 64.0, "GPU": 8.0}])
    assert math.isclose(choose_sizes(settings_of(), [{"CPU": 1.0}]).worker_cpus, 0.5)
