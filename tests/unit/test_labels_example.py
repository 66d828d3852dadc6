"""`labels.by=example`: settings, the example's files, names on disk, and what the generators find on plain pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from samray.config import Config, LabelsConfig
from samray.config.labels import DESIGNS
from samray.errors import ConfigError
from samray.labels.example import Example, build_generator, read_example
from samray.labels.persam import find_instances
from samray.labels.similarity import FeatureTap, difference, discriminant, similarity_map, smoothed, target_of
from samray.labels.stitched import StitchedGenerator, closed, stitched
from samray.labels.ways import labels_identity
from samray.output.identity import refuse_differences
from samray.output.schema import (
    CORRECTED_SCHEMA,
    NAMED_ANNOTATION,
    SCHEMA,
    ImageRecord,
    check_columns,
    records_to_table,
    samray_metadata,
    schema_of,
)
from samray.output.shards import shard_bytes
from samray.output.verify_rows import check_image
from samray.sam.sam import Sam
from samray.storage.tables import read_parquet
from tests.parity.common import randomize
from tests.support.micro import MICRO


def example_files(folder: Path, size: tuple[int, int] = (48, 64)) -> tuple[Path, Path]:
    """A red square on grey; its mask."""
    pixels = np.full((*size, 3), 90, np.uint8)
    mask = np.zeros(size, np.uint8)
    pixels[16:32, 16:32], mask[16:32, 16:32] = (220, 30, 30), 255
    Image.fromarray(pixels).save(folder / "key.png")
    Image.fromarray(mask).save(folder / "mask.png")
    return folder / "key.png", folder / "mask.png"


def settings(folder: Path, **changes: Any) -> Config:
    image, mask = example_files(folder)
    labels = {"by": "example", "example": str(image), "example_mask": str(mask), "name": "square", **changes}
    return Config(labels=labels, masks={"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "min_mask_area": 0})


def micro(seed: int = 0) -> Sam:
    """A random Sam that is sure of its masks."""
    model = Sam(MICRO).eval()
    randomize(model, seed)
    with torch.no_grad():
        model.mask_decoder.iou_prediction_head.layers[-1].bias.fill_(20.0)
    return model


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"by": "example", "name": "x"}, r"needs labels\.example and labels\.example_mask"),
        ({"example": "key.jpg"}, r"labels\.example needs labels\.by"),
        ({"by": "exampel"}, "exampel"),
        ({"by": "example", "design": "sewn"}, "one of persam, stitched_points"),
    ],
)
def test_settings_that_do_not_fit_are_refused(labels: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LabelsConfig(**labels)


def test_an_example_and_prompts_are_refused_together(tmp_path: Path) -> None:
    labels = settings(tmp_path).labels
    with pytest.raises(ConfigError, match=r"leave input\.prompts out"):
        Config(labels=labels, input={"prompts": "clicks.jsonl"})


def test_a_run_without_names_records_no_settings_of_names(tmp_path: Path) -> None:
    assert "labels" not in Config().identity()
    assert Config().default_identity()["labels"]["by"] is None
    config = settings(tmp_path)
    identity = labels_identity(config, read_example(config))["labels"]
    assert identity["categories"] == ["square"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    there = settings(moved)
    assert labels_identity(there, read_example(there))["labels"] == identity, "a file may move"
    Image.fromarray(np.full((48, 64), 255, np.uint8)).save(moved / "mask.png")
    assert labels_identity(there, read_example(there))["labels"] != identity, "but not change"


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((48, 64), np.uint8), "is black"),
        (np.full((64, 48), 9, np.uint8), "is 48x64 pixels, but labels.example is 64x48"),
        (None, "cannot be read as an image"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(tmp_path: Path, mask: np.ndarray | None, message: str) -> None:
    config = settings(tmp_path)
    if mask is None:
        (tmp_path / "mask.png").write_bytes(b"no image")
    else:
        Image.fromarray(mask).save(tmp_path / "mask.png")
    with pytest.raises(ConfigError, match=message):
        read_example(config)


def test_a_missing_example_is_named(tmp_path: Path) -> None:
    config = settings(tmp_path)
    (tmp_path / "key.png").unlink()
    with pytest.raises(ConfigError, match=r"labels\.example .*key\.png does not exist"):
        read_example(config)


# --- on disk ----------------------------------------------------------------------------------------------------------


def run_of(categories: list[str] | None, **identity: Any) -> dict[str, Any]:
    labels = {} if categories is None else {"labels": {"categories": categories}}
    return {"identity": {**identity, **labels}}


def record(**columns: Any) -> ImageRecord:
    mask = {
        "segmentation": {"size": [2, 2], "counts": "04"}, "bbox": [0.0, 0.0, 2.0, 2.0], "area": 4, "predicted_iou": 1.0,
        "stability_score": 1.0, "point_coords": [[1.0, 1.0]], "crop_box": [0.0, 0.0, 2.0, 2.0], **columns,
    }  # fmt: skip
    return ImageRecord(image_id=0, width=2, height=2, file_name="a", uri="a", annotations=[mask])


def test_only_runs_that_name_have_the_two_fields() -> None:
    assert schema_of(run_of(None)).equals(SCHEMA)
    assert schema_of(run_of(None, corrects={})).equals(CORRECTED_SCHEMA)
    for schema in (schema_of(run_of(["x"])), schema_of(run_of(["x"], corrects={}))):
        assert schema.field("annotations").type == pa.list_(NAMED_ANNOTATION)
        check_columns(schema)
    assert [field.name for field in NAMED_ANNOTATION][-2:] == ["label", "label_score"]


@pytest.mark.parametrize("corrects", [{}, {"corrects": {}}])
def test_names_come_back_from_a_shard(corrects: dict[str, Any]) -> None:
    run = run_of(["x", "y"], **corrects)
    table = read_parquet(shard_bytes(records_to_table([record(label="y", label_score=0.5), record()], run)))
    assert samray_metadata(table.schema)["categories"] == ["x", "y"]
    labels = [(mask["label"], mask["label_score"]) for row in table["annotations"].to_pylist() for mask in row]
    assert labels == [("y", 0.5), (None, None)]


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"label": "x", "label_score": 0.5}, None),
        ({"label": None, "label_score": None}, None),
        ({"label": "x", "label_score": None}, "expected both or none"),
        ({"label": "", "label_score": 0.5}, "empty name"),
        ({"label": "x", "label_score": float("nan")}, "not a number"),
    ],
)
def test_verify_checks_names(columns: dict[str, Any], problem: str | None) -> None:
    row = records_to_table([record(**columns)], run_of(["x"])).to_pylist()[0]
    problems = list(check_image("shard", row, "coco", deep=False))
    assert not problems if problem is None else problem in problems[0]


# --- finding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS)
def test_every_design_gives_named_masks_again_the_same(tmp_path: Path, design: str) -> None:
    labels = {"runs": 4, "vote_thresh": 0.0, "score_thresh": -2.0, "relative_thresh": 0.0, "max_instances": 3}
    config = settings(tmp_path, design=design, **labels)
    make = build_generator(micro(), config, read_example(config))
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    (masks,) = make(None).generate([image])
    assert masks == make(16).generate([image])[0]
    assert masks
    assert len(masks) <= 3
    for mask in masks:
        assert mask["label"] == "square"
        assert mask["segmentation"]["size"] == [40, 56]
        assert -2 <= mask["label_score"] <= 2


def test_the_target_is_most_like_its_own_example(tmp_path: Path) -> None:
    pixels = np.asarray(Image.open(example_files(tmp_path, (64, 64))[0]))
    mask = np.asarray(Image.open(tmp_path / "mask.png")) > 0
    model = micro()
    for levels in (False, True):
        (encoded,) = FeatureTap(model, levels=levels).encode([pixels])
        for contrast in (False, True):
            target = target_of(model, encoded, mask, contrast=contrast)
            for points_per_side in (0, 3):
                similarity = similarity_map(model, encoded, target, points_per_side).numpy()
                assert similarity[mask].mean() > similarity[~mask].mean()


def test_a_discriminant_is_one_inside_and_zero_outside_and_ignores_what_varies_anyway() -> None:
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(0, 0.01, (3, 20, 20)).astype(np.float32))
    inside = torch.zeros(20, 20)
    inside[5:12, 5:12] = 1
    features[0] += inside  # tells the two apart
    features[1] += torch.from_numpy(rng.normal(0, 3, (20, 20)).astype(np.float32))  # noise, and much of it
    direction, offset = discriminant(features, inside, 1 - inside)
    similarity = torch.einsum("d,dhw->hw", direction, features) - offset
    assert float(similarity[inside > 0].mean()) == pytest.approx(1, abs=1e-4)
    assert float(similarity[inside == 0].mean()) == pytest.approx(0, abs=1e-4)
    assert abs(direction[1]) < abs(direction[0])


def test_a_smoothed_map_is_flatter_within_masks_and_stays_in_its_range(tmp_path: Path) -> None:
    model = micro()
    (encoded,) = FeatureTap(model, levels=True).encode([np.zeros((64, 48, 3), np.uint8)])
    side = 4 * model.spec.grid
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(side, side)).astype(np.float32))
    after = smoothed(model, encoded, noise, 4)
    shown = after[:, : round(side * 48 / 64)]
    assert shown.std() < noise.std()
    assert noise.min() <= after.min()
    assert after.max() <= noise.max()


def test_taps_leave_the_model_as_it_was() -> None:
    model = micro()
    for _ in range(3):
        FeatureTap(model, levels=True).encode([np.zeros((8, 8, 3), np.uint8)])
    assert not any(block._forward_hooks for block in model.image_encoder.blocks_in_order())


def test_relative_thresh_keeps_what_is_near_the_most_similar(tmp_path: Path) -> None:
    model, config = micro(), settings(tmp_path, score_thresh=-2.0, max_instances=8)
    (encoded,) = FeatureTap(model, levels=True).encode([np.asarray(Image.open(tmp_path / "key.png"))])
    target = target_of(model, encoded, read_example(config).decode().mask, contrast=True)
    similarity = similarity_map(model, encoded, target)
    for relative in (0.0, 0.5, 0.9):
        instances = find_instances(model, encoded, target, max_instances=8, threshold=-9.0, relative=relative)
        least = float(similarity.min() + relative * (similarity.max() - similarity.min()))
        assert all(one.similarity >= least for one in instances)
    none = find_instances(model, encoded, target, max_instances=8, threshold=float(similarity.max()) + 1, relative=0)
    assert none == [], "the absolute threshold counts, too"


def recorded_by_the_first_version(config: Config, **changes: Any) -> dict[str, Any]:
    """The part of a run.json about names as samray wrote it before there was `labels.features`."""
    values = {
        "block": None, "by": "example", "contrast": True, "design": "persam", "grid": 6, "keep": 0.5,
        "max_instances": 10, "pick": "evidence", "points": 3, "runs": 32, "score_thresh": None, "seed": 0,
        "vote_thresh": 0.05,
    }  # fmt: skip
    return {**values, **read_example(config).identity, "categories": ["square"], **changes}


@pytest.mark.parametrize("labels", [{}, {"block": 1}, {"contrast": False, "score_thresh": 0.25}])
def test_an_output_of_the_first_version_goes_on_as_it_began(tmp_path: Path, labels: dict[str, Any]) -> None:
    config = settings(tmp_path, **labels)
    recorded = {**config.identity(), "labels": recorded_by_the_first_version(config, **labels)}
    resumed = config.as_begun(recorded)
    asked = {**resumed.identity(), **labels_identity(resumed, read_example(resumed))}
    refuse_differences("out", recorded, asked, resumed.default_identity())
    assert resumed.labels.is_first_version
    begun_now = {**config.identity(), **labels_identity(config, read_example(config))}
    assert config.as_begun(begun_now).labels.is_first_version == ("block" in labels), "only what it began"


@pytest.mark.parametrize("labels", [{"smooth": 4}, {"features": "levels"}, {"block": 1}])
def test_an_output_of_the_first_version_refuses_other_settings(tmp_path: Path, labels: dict[str, Any]) -> None:
    config = settings(tmp_path, **labels)
    recorded = {**config.identity(), "labels": recorded_by_the_first_version(config)}
    resumed = config.as_begun(recorded)
    asked = {**resumed.identity(), **labels_identity(resumed, read_example(resumed))}
    with pytest.raises(ConfigError, match=r"labels\.block"):
        refuse_differences("out", recorded, asked, resumed.default_identity())


def test_similarity_of_the_first_version_against_loops() -> None:
    """The difference of the two means' directions, and the threshold with the best IoU on the example, by trial."""
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(5, 6, 7, generator=generator)
    inside = torch.zeros(6, 7)
    inside[1:4, 2:5] = 1
    inside[4, 2:5] = 0.3
    direction, threshold = difference(features, inside, 1 - inside, contrast=True)
    means = []
    for weights in (inside, 1 - inside):
        total = torch.stack([features[:, y, x] * weights[y, x] for y in range(6) for x in range(7)]).sum(0)
        means.append(total / total.norm())
    torch.testing.assert_close(direction, means[0] - means[1])
    similarity = {
        (y, x): float(direction @ features[:, y, x] / features[:, y, x].norm()) for y in range(6) for x in range(7)
    }
    shown = {cell for cell in similarity if inside[cell] > 0.5}
    ious = {}
    for candidate in similarity.values():
        chosen = {cell for cell, value in similarity.items() if value >= candidate}
        ious[candidate] = len(chosen & shown) / len(chosen | shown)
    assert threshold == pytest.approx(max(ious, key=lambda candidate: ious[candidate]), abs=1e-5)


def test_clicks_of_the_stitched_designs(tmp_path: Path) -> None:
    counts = {}
    for design in [name for name in DESIGNS if name.startswith("stitched")]:
        config = settings(tmp_path, design=design, points=2, grid=3, runs=9)
        files = read_example(config)
        generator = StitchedGenerator(micro(), config, files.decode())
        picture, left = stitched(generator.example.pixels, np.zeros((24, 30, 3), np.uint8))
        assert (picture.shape, left) == ((24, 32 + 30, 3), 32)
        runs = list(generator._clicks(picture.shape[:2], left))
        xy = np.stack([points for points, _ in runs])
        labels = np.stack([kinds for _, kinds in runs])
        on_image = xy[..., 0] >= left
        assert not (on_image & (labels == 0)).any(), "background points are on the example"
        counts[design] = (labels == 1).sum(1)[0], (labels == 0).sum(1)[0], on_image.sum(1)[0]
        inside = np.concatenate([points[(points[:, 0] < left) & (kinds == 1)] for points, kinds in runs])
        assert ((inside >= 8) & (inside <= 16)).all(), "at half the example's size"
        if design in ("stitched_single", "stitched_negative"):
            assert len(np.unique(xy[on_image], axis=0)) == 9, "every candidate has its turn"
    assert counts == {
        "stitched_points": (2, 0, 0), "stitched_grid": (11, 0, 9), "stitched_single": (3, 0, 1),
        "stitched_negative": (3, 2, 1),
    }  # fmt: skip


def test_closing_fills_a_gap_and_keeps_the_border() -> None:
    mask = np.ones((100, 100), bool)
    mask[50, 50] = False
    assert closed(mask).all()


def test_the_example_decodes_as_it_was_checked(tmp_path: Path) -> None:
    files = read_example(settings(tmp_path))
    example = files.decode()
    assert isinstance(example, Example)
    assert example.mask.sum() == 256
    assert tuple(example.pixels[20, 20]) == (220, 30, 30)
