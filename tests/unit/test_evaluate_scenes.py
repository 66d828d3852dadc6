"""Clicks on scenes with known masks: where a mask is clicked, and what a model's answers are worth."""

import numpy as np
import pytest
import torch

from samray.evaluate.points import centre
from samray.evaluate.scenes import evaluate_clicks
from samray.sam.sam import Sam
from samray.scenes.scene import Scene, make_scene
from tests.support.micro import MICRO

pytestmark = pytest.mark.usefixtures("micro_model")


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
