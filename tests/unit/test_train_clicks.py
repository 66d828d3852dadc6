"""The clicks of a step: the first in the mask, the next where the answer was wrong, round by round."""

from typing import Any

import numpy as np
import pytest
import torch

from samray.sam.sam import Sam
from samray.scenes.scene import make_scene
from samray.train.clicks import corrective_clicks, first_prompts
from samray.train.interaction import Rounds, draw_course, normalise, seed_of
from samray.train.settings import TrainConfig
from tests.support.micro import MICRO, batches_of, learner_of, settings_of

pytestmark = pytest.mark.usefixtures("micro_model")


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


def test_corrective_clicks_fall_on_the_error_with_the_right_label():
    target = torch.zeros(2, 8, 8)
    target[:, 2:6, 2:6] = 1
    logits = torch.where(target > 0, 5.0, -5.0)
    logits[0, 3, 4] = -5  # missed: a foreground click is due
    logits[1, 7, 0] = 5  # exceeded: a background click
    points, labels = corrective_clicks(logits, target, 4.0, torch.Generator().manual_seed(0))
    assert labels.tolist() == [[1], [0]]
    assert points.tolist() == [[[4 * 4 + 1.5, 3 * 4 + 1.5]], [[1.5, 7 * 4 + 1.5]]]


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
    calls: list[Any] = []

    def answer(embeddings: Any, sparse: Any, mask_input: Any = None) -> Any:
        calls.append((sparse.shape[2], mask_input))
        half = torch.full((2, 4, 4, 16, 16), -5.0)
        half[..., 4:8, 4:8] = 5.0
        return half.requires_grad_(), torch.zeros(2, 4, 4, requires_grad=True)

    monkeypatch.setattr(sam, "decode_batch", answer)
    course = draw_course(config, 0)
    rounds = Rounds(sam, config, course, batch, torch.Generator().manual_seed(0))
    losses = list(rounds.run(torch.zeros(1)))
    assert len(losses) == len(calls) == 5
    assert calls[0][1] is None
    clicks_before = 1
    for adds_click, (tokens, mask) in zip(course.adds_click, calls[1:], strict=True):
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
    overrides = ("train.interaction_steps=4", "train.box_fraction=1", "train.later_multi_weight=0.5")
    settings, learner = settings_of(*overrides), learner_of(*overrides)
    batch = next(batches_of(settings))
    total, _ = learner.loss(batch, 0, 0)
    total.backward()
    gradients = {name: p.grad.clone() for name, p in learner.sam.named_parameters() if p.grad is not None}
    learner.sam.zero_grad()
    embeddings = learner.sam.encode_images(normalise(learner.sam, batch["image"], batch["input_hw"]))
    generator = torch.Generator().manual_seed(seed_of("clicks", 0, 0, 0))
    rounds = Rounds(learner.sam, settings.train, draw_course(settings.train, 0), batch, generator)
    plain = sum(rounds.run(embeddings))
    plain.backward()  # type: ignore[union-attr]
    torch.testing.assert_close(total, plain)
    wanted = {name: p.grad for name, p in learner.sam.named_parameters() if p.grad is not None}
    assert gradients.keys() == wanted.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def test_each_seed_has_streams_of_its_own():
    """torch's generator on a CPU takes 32 bits of a seed: the bits above them have no effect."""
    overrides = ("train.interaction_steps=6", "train.box_fraction=0.5")
    configs = [settings_of(f"train.seed={seed}", *overrides).train for seed in (0, 1, 2)]
    first, second, third = ([draw_course(config, step) for step in range(64)] for config in configs)
    assert first != second != third != first
    steps = (0, 3, 3 + 2**20, 10**8)
    numbers = [(seed, step, stream) for seed in (0, 1, 2**31 - 1) for step in steps for stream in (0, 7)]
    seeds = [seed_of(purpose, *number) for purpose in ("clicks", "drop path") for number in numbers]
    assert len({float(torch.rand(1, generator=torch.Generator().manual_seed(seed))) for seed in seeds}) == len(seeds)
