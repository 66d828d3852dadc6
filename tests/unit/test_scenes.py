"""Scenes: deterministic, exact masks, occlusion, the two splits apart; and the source of cut-outs."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from samray.errors import ConfigError
from samray.evaluate.scenes import NamedScenes
from samray.scenes import scene as scenes
from samray.scenes.named import LOOKS, named_scene
from samray.scenes.scene import MIN_VISIBLE_PIXELS, make_scene
from samray.train.cutouts import CUTOUT_SIDE, CutoutSource


def test_scene_has_the_promised_types():
    scene = make_scene(3, (96, 128))
    assert scene.image.shape == (96, 128, 3)
    assert scene.image.dtype == np.uint8
    assert scene.masks.shape == (len(scene.kinds), 96, 128)
    assert scene.masks.dtype == bool
    assert set(scene.kinds) <= {"object", "part", "region"}


def test_equal_arguments_give_equal_scenes_and_others_do_not():
    first, again, other = make_scene(5, 96), make_scene(5, 96), make_scene(6, 96)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.masks, again.masks)
    assert first.kinds == again.kinds
    assert not np.array_equal(first.image, other.image)
    assert not np.array_equal(first.image, make_scene(5, 96, split="heldout").image)


def test_wholes_are_disjoint_and_contain_their_parts():
    num_parts = 0
    for seed in range(30):
        scene = make_scene(seed, 128)
        wholes = scene.masks[[kind != "part" for kind in scene.kinds]]
        assert wholes.sum(axis=0).max(initial=0) <= 1, "visible pixels belong to one layer"
        assert (scene.masks.sum(axis=(1, 2)) >= MIN_VISIBLE_PIXELS).all()
        for part in scene.masks[[kind == "part" for kind in scene.kinds]]:
            num_parts += 1
            inside = [whole for whole in wholes if (whole & part).any()]
            # A whole that is mostly hidden is no target although a piece of it may be.
            assert len(inside) <= 1
            assert not inside or not (part & ~inside[0]).any()
    assert num_parts > 10


def test_objects_come_at_many_scales():
    areas = [mask.mean() for seed in range(30) for mask in make_scene(seed, 128).masks]
    assert np.quantile(areas, 0.1) < 0.01
    assert np.quantile(areas, 0.95) > 0.1


def test_masks_lie_on_the_edges_that_one_sees():
    """Across a mask's border colours change more than within: on average over scenes, so masks and paint agree."""
    across, within = [], []
    for seed in range(20):
        scene = make_scene(seed, 128)
        step = np.abs(np.diff(scene.image.astype(float), axis=1)).mean(axis=2)
        for mask, kind in zip(scene.masks, scene.kinds, strict=True):
            if kind == "object":
                across.append(step[mask[:, 1:] != mask[:, :-1]].mean())
                within.append(step[mask[:, 1:] & mask[:, :-1]].mean())
    assert np.mean(across) > 2 * np.mean(within)


def test_a_layer_takes_exactly_the_pixels_that_it_covers():
    canvas = np.zeros((64, 64, 3), np.float32)
    owner, part_of = np.full((64, 64), -1, np.int16), np.zeros((64, 64), np.int16)
    rng = np.random.default_rng(1)
    num_taken = 0
    for index in range(1, 9):
        before = owner.copy()
        colour = np.full((40, 40, 3), 20.0 * index, np.float32)
        scenes._paint(
            rng,
            scenes._Layer(colour, np.ones((40, 40), np.float32), np.zeros((40, 40), np.int16)),
            index,
            canvas,
            owner,
            part_of,
        )
        assert np.array_equal(owner == index, canvas[..., 0] == 20.0 * index)
        num_taken += np.count_nonzero((before > 0) & (owner == index))
    assert num_taken > 100, "later layers cover earlier ones"


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="heldout"):
        make_scene(0, 64, split="test")  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty round cut-outs of as many names, a wallpaper, and files that are neither."""
    root = tmp_path / "pictures"
    (root / "deep").mkdir(parents=True)
    for i in range(30):
        image = Image.new("RGBA", (300, 240), (0, 0, 0, 0))
        ImageDraw.Draw(image).ellipse((40, 40, 250, 200), fill=(8 * i, 100, 200, 255))
        image.save(root / "deep" / f"thing-{'abcdefghijklmnopqrstuvwxyzABCD'[i]}_1.png")
    Image.new("RGB", (1600, 900), (10, 200, 30)).save(root / "meadow.jpg")
    Image.new("RGB", (100, 100)).save(root / "opaque.png")
    Image.new("RGBA", (100, 100), (0, 0, 0, 0)).save(root / "nothing.png")
    (root / "broken.png").write_bytes(b"not a picture")
    return root


def test_source_takes_what_is_usable_and_keeps_the_splits_apart(folder: Path, tmp_path: Path):
    source = CutoutSource([folder], tmp_path / "cache")
    objects, photos = np.add(source.count("train"), source.count("heldout"))
    assert (objects, photos) == (30, 1)
    seen = {}
    for split in ("train", "heldout"):
        rng = np.random.default_rng(0)
        pictures = [source.cutout(rng, split) for _ in range(200)]
        assert all(p is not None and p.mode == "RGBA" and max(p.size) == CUTOUT_SIDE for p in pictures)
        seen[split] = {p.getpixel((p.width // 2, p.height // 2)) for p in pictures if p is not None}
    assert len(seen["train"]) > 15
    assert not seen["train"] & seen["heldout"]


def test_source_is_read_from_its_cache_the_second_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = CutoutSource([folder], tmp_path / "cache")
    monkeypatch.setattr("samray.train.cutouts._build", lambda *_: pytest.fail("built again"))
    again = CutoutSource([folder], tmp_path / "cache")
    assert np.array_equal(make_scene(1, 96, first).image, make_scene(1, 96, again).image)


def test_source_is_made_anew_where_its_cache_is_not(folder: Path, tmp_path: Path):
    """As on another node of a cluster, which gets it as a pickle."""
    source = CutoutSource([folder], tmp_path / "cache")
    sent, expected = pickle.dumps(source), make_scene(1, 96, source).image
    shutil.rmtree(tmp_path / "cache")
    assert np.array_equal(make_scene(1, 96, pickle.loads(sent)).image, expected)


def test_source_changes_the_scenes(folder: Path, tmp_path: Path):
    source = CutoutSource([folder], tmp_path / "cache")
    assert not np.array_equal(make_scene(1, 96, source).image, make_scene(1, 96).image)


def test_source_without_anything_usable_is_a_config_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="not a folder"):
        CutoutSource([tmp_path / "missing"], tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no usable"):
        CutoutSource([tmp_path / "empty"], tmp_path / "cache")


def test_named_scenes_show_the_same_looks_again_and_name_objects_alone() -> None:
    named = [named_scene(seed, 96) for seed in range(8)]
    for scene in named:
        assert len(scene.names) == len(scene.masks)
        assert all(kind == "object" for kind, name in zip(scene.kinds, scene.names, strict=True) if name)
    names = [name for scene in named for name in scene.names if name]
    assert set(names) <= set(LOOKS)
    assert len(names) > len(set(names)), "a look comes again"
    assert np.array_equal(named[3].image, named_scene(3, 96).image)


def test_named_scenes_are_data_of_an_evaluation() -> None:
    (first, second) = NamedScenes(2)
    assert [len(first.annotators[0]), len(second.annotators[0])] == [len(first.names[0]), len(second.names[0])]
    assert first.annotators[0][0]["size"] == list(first.pixels.shape[:2])
