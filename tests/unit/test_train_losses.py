"""The losses of a step against values worked out by hand, and which answers they teach."""

import numpy as np
import pytest
import torch

from samray.sam.sam import Sam
from samray.train.interaction import Rounds, draw_course
from samray.train.losses import actual_iou, mask_losses, ranking_loss, sam_loss, trust
from tests.support.micro import MICRO, settings_of


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


def test_later_rounds_train_the_single_mask():
    target = (torch.rand(2, 8, 8) > 0.5).float()
    logits = torch.randn(2, 4, 8, 8, requires_grad=True)
    losses = sam_loss(logits, torch.zeros(2, 4), target, single_weight=1.0, multi_weight=0.0)
    losses.total.backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum(dim=(0, 2, 3)).gt(0).tolist() == [True, False, False, False]


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
    inputs = {
        "points": torch.zeros(2, 2, 2),
        "boxes_xyxy": torch.zeros(2, 2, 4),
        "targets": targets,
        "from_labels": torch.tensor([True, False]),
    }
    rounds = Rounds(Sam(MICRO), settings, draw_course(settings, 0), inputs, torch.Generator())
    assert rounds.doubt is not None
    assert rounds.doubt.tolist() == [1, 1, 0, 0]
    plain = settings_of().train
    assert Rounds(Sam(MICRO), plain, draw_course(plain, 0), inputs, torch.Generator()).doubt is None


def test_ranking_loss_is_what_the_chosen_mask_misses():
    iou = torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.8, 0.5]])
    assert float(ranking_loss(torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1]]), iou).mean()) == pytest.approx(
        0.15, abs=1e-4
    )
    assert float(ranking_loss(torch.zeros(2, 3), iou).mean()) == pytest.approx(1 - float(iou.mean()), abs=1e-6)
    scores = torch.zeros(2, 3, requires_grad=True)
    ranking_loss(scores, iou).mean().backward()
    assert scores.grad is not None
    assert scores.grad.argmin(dim=1).tolist() == [0, 1]  # the best mask's score has to rise
