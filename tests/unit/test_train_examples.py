"""What a training learns from: scenes and labelled images as examples, what is held out, and mixtures of them."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from samray import storage
from samray.errors import ConfigError
from samray.scenes.scene import Scene, make_scene
from samray.train.augment import View, draw_view, jitter_colour, whole_view
from samray.train.data import blocks, open_data, output_of
from samray.train.examples import Frame, MaskExamples, SceneExamples, area_downsample, held_out
from samray.train.mixture import CYCLE, Mixture
from samray.train.settings import DataConfig
from tests.support.handmade import HEIGHT, WIDTH, annotation, write_output
from tests.support.micro import FRAME, settings_of
from tests.support.scene_outputs import paint, write_scenes


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twenty scenes of 48 x 64 pixels with their masks, as an output."""
    return write_scenes(str(tmp_path_factory.mktemp("world")), paint(20)).output


# --- scenes -----------------------------------------------------------------------------------------------------------


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
    # Cells of one and a half pixels: the middle row and column are shared.
    three = np.zeros((1, 3, 3), bool)
    three[0, 0, 0] = three[0, 1, 1] = True
    assert area_downsample(three, 2).tolist() == [[[255 * 5 // 9, 255 // 9], [255 // 9, 255 // 9]]]


# --- labelled images --------------------------------------------------------------------------------------------------


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
        masks_of = examples._masks(0)
        assert masks_of is not None
        rles, names = masks_of
        drawn = [
            examples._draw_masks(rles, names, whole_view(64, 64, 64), np.random.default_rng(i))[0] for i in range(600)
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
        self.target_of_all = {
            "segmentation": [annotation(mask)["segmentation"] for mask in masks],
            "area": torch.tensor(masks.sum((1, 2))),
            "predicted_iou": torch.tensor(scores, dtype=torch.float32),
            "stability_score": torch.ones(len(masks)),
        }

    def target(self, index: int) -> dict[str, Any]:
        return self.target_of_all


def named_output(root: Path) -> str:
    """Five images: a dog at the left, a cat at the right, and below them a mask without a name; the last has no dog."""
    masks = np.zeros((3, HEIGHT, WIDTH), bool)
    masks[0, :10, :10] = masks[1, :10, 18:28] = masks[2, 14:24] = True
    marks = [("dog", 0.5), ("cat", 0.5), (None, None)]

    def masks_of(index: int) -> list[dict[str, Any]]:
        named = zip(masks, marks, strict=True)
        annotations = [{**annotation(mask), "label": name, "label_score": score} for mask, (name, score) in named]
        return annotations[index == 4 :]

    return write_output(str(root), [f"{i}.png" for i in range(5)], masks=masks_of, categories=("cat", "dog")).output


@pytest.mark.parametrize(
    ("names", "areas"), [(["dog"], [100]), (["object", "dog"], [100, 310]), (None, [100, 100, 310])]
)
def test_only_masks_with_the_chosen_names_are_used(tmp_path: Path, names: list[str] | None, areas: list[int]):
    settings = settings_of("data.validation_fraction=0", *([] if names is None else [f"data.labels={names}"]))
    examples = MaskExamples(named_output(tmp_path), settings.data, seed=0)
    for index in range(5):
        wanted = areas[index == 4 :]  # the last image has no dog
        masks = examples._masks(index)
        assert (masks is None) == (wanted == [])
        if masks is not None:
            rles, weights = masks
            assert [int(coco_mask.area(rle)) for rle in rles] == wanted
            assert len(weights) == len(wanted)
    assert all(examples.example(draw, FRAME)["targets"].any() for draw in range(5))


def test_names_that_data_lack_are_errors(tmp_path: Path, labels: str):
    output = named_output(tmp_path)
    with pytest.raises(ConfigError, match=r"data.labels: .* has none of these names; its names are cat, dog, object$"):
        MaskExamples(output, DataConfig(labels=("fox",)), seed=0)
    with pytest.raises(ConfigError, match="has none of these names; its names are object"):
        MaskExamples(labels, DataConfig(labels=("dog",)), seed=0)
    with pytest.raises(ConfigError, match=r"no DATA has the name 'dogs'; did you mean dog\?"):
        open_data([output], settings_of("data.labels=[cat,dogs]"))


def test_without_names_the_identity_is_as_before_there_were_any():
    assert "labels" not in settings_of().identity()["data"]
    assert settings_of("data.labels=dog").identity()["data"]["labels"] == ["dog"]


def test_an_epoch_has_each_image_once_and_the_next_another_order(labels: str):
    examples = MaskExamples(labels, DataConfig(validation_fraction=0.3), seed=0)
    first, second = examples.order.epoch(0), examples.order.epoch(1)
    assert sorted(first) == sorted(second) == sorted(examples.train)
    assert list(first) != list(second)
    assert not set(examples.train) & set(examples.heldout)
    assert len(examples.train) + len(examples.heldout) == 20


def test_what_was_drawn_is_not_pickled_and_is_drawn_again_the_same(labels: str):
    """Also by the mixture, whose order is kept in the same way."""
    mixture = Mixture([MaskExamples(labels, DataConfig(validation_fraction=0), seed=3)], None, seed=0)
    fresh = len(pickle.dumps(mixture))
    drawn = [(mixture.locate(i), mixture.parts[0].order[i]) for i in (0, 19, 20, 39, 3000)]
    assert len(pickle.dumps(mixture)) == fresh
    again = pickle.loads(pickle.dumps(mixture))
    assert [(again.locate(i), again.parts[0].order[i]) for i in (0, 19, 20, 39, 3000)] == drawn


def test_the_split_is_by_uri_alone():
    uris = [f"s3://bucket/{i}.jpg" for i in range(2000)]
    is_held_out = held_out(uris, 0.1)
    assert 150 < is_held_out.sum() < 250
    assert np.array_equal(held_out(uris[::-1], 0.1)[::-1], is_held_out)
    assert not held_out(uris, 0.0).any()
    assert held_out(uris[:3], 1e-6).sum() == 1, "of few images one"
    assert (held_out(uris, 0.2) | ~is_held_out).all(), "a larger fraction holds out the same and more"


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
    storage.delete(examples.dataset.uris()[examples.order[0]])
    assert examples.example(0, FRAME)["image"].any()
    for uri in examples.dataset.uris():
        storage.delete(uri)
    with pytest.raises(Exception, match=r"images of .* cannot be used.*image_root"):
        examples.example(0, FRAME)


def test_images_without_a_mask_that_passes_are_passed_over(tmp_path: Path):
    """However many follow each other; if no image is left, it is an error of the settings."""
    made = paint(24)
    small, large = np.zeros((2, 1, 48, 64), bool)
    small[0, :9, :9] = large[0, 8:40, 8:40] = True
    output = write_scenes(str(tmp_path), made, lambda scene: large if scene is made[5] else small).output
    config = DataConfig(validation_fraction=0, min_area=200, scale_jitter=(1, 1), flip_fraction=0, colour_jitter=0)
    examples = MaskExamples(output, config, seed=0)
    for draw in range(24):
        assert np.array_equal(examples.example(draw, FRAME)["image"][:48, :64], made[5].image)
    none = MaskExamples(output, config.model_copy(update={"min_area": 2000}), seed=0)
    with pytest.raises(ConfigError, match=r"of the 24 images .* lower data.min_area \(2000\)"):
        none.example(0, FRAME)


def test_a_moved_root_is_that_of_one_data_of_several(tmp_path: Path, labels: str):
    """The first DATA's images lie where they lay, the second's moved; a root that no image has is refused at once."""
    (tmp_path / "old").mkdir()
    plan = write_scenes(str(tmp_path / "old"), paint(6))
    images = Path(MaskExamples(plan.output, DataConfig(validation_fraction=0), 0).dataset.uris()[0]).parent
    images.rename(tmp_path / "new")
    moved = f"data.image_root=[{images},{tmp_path / 'new'}]"
    mixture = open_data([labels, plan.output], settings_of(moved, "data.validation_fraction=0"))
    assert all(part.example(0, FRAME)["image"].any() for part in mixture.parts)
    with pytest.raises(ConfigError, match=r"no image of the DATA is below /nowhere"):
        open_data([labels], settings_of("data.image_root=[/nowhere,/here]"))


# --- mixtures ---------------------------------------------------------------------------------------------------------


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
    assert [Mixture(parts, None, seed=3).locate(n) for n in (5, 3000)] == [mixture.locate(n) for n in (5, 3000)]


def test_given_shares_win_and_a_share_of_nothing_is_never_drawn():
    parts = [_Counted(5), _Counted(5)]
    mixture = Mixture(parts, (1.0, 0.0), seed=0)
    assert {mixture.locate(number)[0] for number in range(CYCLE)} == {0}
    assert len(list(mixture.validation(3, FRAME))) == 3
    assert Mixture(parts, (3000.0, 1.0), seed=0).slots == [CYCLE - 1, 1], "what has a share is drawn"
    with pytest.raises(ConfigError, match="1 numbers, but there are 2 DATA"):
        Mixture(parts, (1.0,), seed=0)


def test_scenes_twice_would_be_the_same_ones():
    with pytest.raises(ConfigError, match="DATA has scenes twice"):
        open_data(["scenes", "scenes"], settings_of())


def test_steps_have_the_numbers_of_their_place():
    assert [list(b) for b in blocks(3, 2, 4)] == [[12, 13, 14, 15], [16, 17, 18, 19]]


def test_data_may_be_named_by_its_folder_of_shards():
    for name in ("/a/labels", "/a/labels/annotations", "/a/labels/annotations/*.parquet", "/a/labels/annotations/"):
        assert output_of(name) == "/a/labels"
    assert output_of("s3://b/labels/annotations/*.parquet") == "s3://b/labels"


def test_no_data_and_all_held_out_are_config_errors(labels: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="expected DATA"):
        open_data([], settings_of())
    with pytest.raises(ConfigError, match="is not the output of a samray run"):
        open_data([str(tmp_path)], settings_of())
    with pytest.raises(ConfigError, match=r"are held out; lower data.validation_fraction"):
        open_data([labels], settings_of("data.validation_fraction=0.9999999"))
