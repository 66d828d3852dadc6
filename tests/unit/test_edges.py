"""Edge maps from masks: where an edge is, how strong it is, and how it is thinned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from samray.config import Config
from samray.config.edges import EdgesConfig, load_edges_config
from samray.errors import ConfigError
from samray.masks.edges import boundary_strength, suppress_non_maxima


def disc(hw: tuple[int, int], centre: tuple[int, int], radius: float, slope: float) -> torch.Tensor:
    """Logits that fall by slope per pixel away from a circle, and are positive inside."""
    y, x = np.indices(hw)
    return torch.from_numpy(slope * (radius - np.hypot(y - centre[0], x - centre[1]))).float()


def test_a_mask_has_its_edge_just_outside() -> None:
    logits = disc((40, 50), (20, 25), 10, 3.0)[None]
    strength = boundary_strength(logits)[0].numpy()
    y, x = np.nonzero(strength)
    distance = np.hypot(y - 20, x - 25)
    assert distance.min() >= 10
    assert distance.max() < 12
    assert len(y) >= 2 * np.pi * 10


def test_a_sharper_mask_has_a_stronger_edge() -> None:
    sharp, soft = (boundary_strength(disc((40, 50), (20, 25), 10, slope)[None]).max() for slope in (3.0, 0.5))
    assert sharp > 2 * soft


def test_the_edge_of_the_image_is_not_an_edge() -> None:
    assert boundary_strength(torch.full((1, 20, 30), 5.0)).max() == 0


def test_ridges_are_thinned_across_in_any_direction() -> None:
    y, x = np.indices((60, 60))
    for angle in (0.0, 0.4, np.pi / 4, 1.2, np.pi / 2):
        across = (x - 30) * np.cos(angle) + (y - 30) * np.sin(angle)
        ridge = np.exp(-(across**2) / 8).astype(np.float32)
        thin = suppress_non_maxima(ridge)[10:-10, 10:-10]
        assert np.abs(across[10:-10, 10:-10][thin > 0.5]).max() < 1.2, angle
        assert 35 <= np.count_nonzero(thin > 0.5) <= 90, angle


def test_the_settings_of_edges_decide_those_of_masks() -> None:
    config = load_edges_config(None, ["edges.points_per_side=8"])
    assert (config.masks.points_per_side, config.masks.pred_iou_thresh, config.masks.min_mask_area) == (8, 0.0, 0)
    with pytest.raises(ConfigError, match="masks"):
        load_edges_config(None, ["masks.points_per_side=8"])
    with pytest.raises(ConfigError, match="prompts"):
        load_edges_config(None, ["input.prompts=clicks.jsonl"])


def test_a_run_of_edges_differs_from_one_of_masks() -> None:
    edges = EdgesConfig()
    assert edges.identity()["task"] == "edges"
    assert "task" not in edges.default_identity()
    assert "task" not in Config().identity()
