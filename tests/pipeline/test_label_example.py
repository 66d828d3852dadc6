"""`samray label ... labels.by=example` on a real Ray, with a real model: names on disk, resume, readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samray.config import Config, load_config
from samray.errors import ConfigError
from samray.exports.export import export
from samray.exports.formats import FORMATS
from samray.output.compact import compact
from samray.output.lookup import read_image
from samray.output.mask_dataset import MaskDataset
from samray.output.schema import samray_metadata
from samray.output.shards import shard_uri
from samray.output.verify import verify
from samray.pipeline.run import label
from samray.scenes.scene import make_scene
from samray.storage.tables import read_parquet
from tests.support.here import use_no_ray
from tests.support.outputs import rows_of


@pytest.fixture
def named(tmp_path: Path) -> Callable[..., Config]:
    """Settings for the class of one object of a painted scene; the scenes are in `in`."""
    (tmp_path / "in").mkdir()
    for seed in range(3):
        Image.fromarray(make_scene(seed, 128).image).save(tmp_path / "in" / f"{seed}.png")
    scene = make_scene(0, 128)
    largest = max(scene.masks, key=np.count_nonzero)
    Image.fromarray(largest).save(tmp_path / "key_mask.png")

    def settings(*overrides: str) -> Config:
        base = [
            "labels.by=example", f"labels.example={tmp_path}/in/0.png", f"labels.example_mask={tmp_path}/key_mask.png",
            "labels.name=thing", "labels.max_instances=2", "labels.score_thresh=-0.5", "output.images_per_shard=1",
            "cluster.max_actors=1", "cluster.num_cpus_per_actor=1", "masks.min_mask_area=1",
        ]  # fmt: skip
        return load_config(None, None, [*base, *overrides])

    return settings


def test_names_are_on_disk_and_every_reader_takes_them(
    tmp_path: Path, named: Callable[..., Config], local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path / "out")
    assert label(tmp_path / "in", output, named(), progress=False).exit_code == 0
    run = json.loads((tmp_path / "out/_samray/run.json").read_text())
    assert run["categories"] == ["thing"]
    rows = rows_of(output)
    masks = [mask for row in rows for mask in row["annotations"]]
    assert len(rows) == 3
    assert masks
    assert {mask["label"] for mask in masks} == {"thing"}
    assert not verify(output, deep=True).problems

    data = Path(shard_uri(output, 1)).read_bytes()
    assert samray_metadata(read_parquet(data).schema)["categories"] == ["thing"]
    Path(shard_uri(output, 1)).unlink()
    use_no_ray(monkeypatch)
    assert label(tmp_path / "in", output, named(), progress=False).num_labelled == 1
    assert read_parquet(Path(shard_uri(output, 1)).read_bytes()).equals(read_parquet(data)), "the same masks again"
    with pytest.raises(ConfigError, match=r"labels\.max_instances: 2 there, 3 now"):
        label(tmp_path / "in", output, named("labels.max_instances=3"), progress=False)
    with pytest.raises(ConfigError, match=r'labels\.by: "example" there, null now'):
        label(tmp_path / "in", output, Config(), progress=False)

    assert read_image(output, rows[0]["image"]["image_id"])["annotations"][0]["label"] == "thing"
    assert len(MaskDataset(output)) == 3
    compact(output, str(tmp_path / "one"), 10)
    assert not verify(str(tmp_path / "one"), deep=True).problems
    for format in FORMATS:
        options = {"coordinates": "pixels"} if format.startswith("geo") else {}
        assert export(
            tmp_path / "one", tmp_path / format, format=format, ray=False, progress=False, **options
        ).num_masks
