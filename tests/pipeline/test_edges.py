"""`samray edges` on Ray: one map per image, named after it, and a run that resumes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import samray
from samray.config.edges import load_edges_config
from samray.errors import ConfigError
from samray.masks.edge_png import decode_edges, encode_edges
from samray.output.shards import done_shards, shard_uri
from samray.sam.checkpoints import load_model
from tests.support import standin
from tests.support.here import use_no_ray
from tests.support.outputs import rows_of

HW = (48, 64)


def settings(checkpoint: Path, *overrides: str) -> samray.EdgesConfig:
    base = [f"model.checkpoint={checkpoint}", "edges.points_per_side=2", "output.images_per_shard=2"]
    return load_edges_config(None, [*base, "cluster.max_actors=1", "output.max_failed_fraction=1.0", *overrides])


def test_each_image_gets_the_map_of_the_generator(
    local_ray: None, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = {"a/1.png": 1, "a/1.jpeg": 2, "2.png": 3}
    for name, seed in images.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(standin.make_image(seed, HW[::-1]))
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    config = settings(tiny_checkpoint, "edges.bits=16")
    report = samray.detect_edges(tmp_path / "in", tmp_path / "out", config, progress=False)
    assert (report.exit_code, report.num_labelled, report.num_failed, report.warning) == (0, 3, 1, None)
    rows = rows_of(str(tmp_path / "out"))
    ids = {row["image"]["file_name"]: row["image"]["image_id"] for row in rows}
    assert sorted(ids) == sorted([*images, "broken.png"])
    assert all(row["annotations"] == [] for row in rows)
    maps = {path.relative_to(tmp_path / "out" / "edges").as_posix(): path for path in tmp_path.glob("out/edges/**/*.*")}
    shared = [f"a/1-{ids[name]}.png" for name in ("a/1.png", "a/1.jpeg")]
    assert sorted(maps) == sorted(["2.png", *shared]), "images with the same stem do not share a map"

    generator = samray.EdgeGenerator(load_model("tiny", str(tiny_checkpoint), "cpu"), config.edges)
    pixels = np.asarray(Image.open(tmp_path / "in" / "2.png").convert("RGB"))
    (expected,) = generator.generate([pixels])
    assert maps["2.png"].read_bytes() == encode_edges(expected, 16)
    assert 0 < np.count_nonzero(decode_edges(maps["2.png"].read_bytes(), HW, "2")) < HW[0] * HW[1] / 2

    # A shard that is missing is done again, and the others are left alone.
    written = maps["2.png"].stat().st_mtime_ns
    last = max(done_shards(str(tmp_path / "out")))
    Path(shard_uri(str(tmp_path / "out"), last)).unlink()
    use_no_ray(monkeypatch)
    again = samray.detect_edges(tmp_path / "in", tmp_path / "out", config, progress=False)
    assert (again.exit_code, again.num_shards_skipped) == (0, 1)
    assert maps["2.png"].stat().st_mtime_ns == written
    assert sorted(row["image"]["file_name"] for row in rows_of(str(tmp_path / "out"))) == sorted(ids)

    # Neither another method nor `samray label` may resume it.
    with pytest.raises(ConfigError, match=r"edges\.thin"):
        samray.detect_edges(tmp_path / "in", tmp_path / "out", settings(tiny_checkpoint, "edges.thin=false"))
    identity = json.loads((tmp_path / "out" / "_samray" / "run.json").read_text())["identity"]
    assert identity["task"] == "edges"
    with pytest.raises(ConfigError, match="task"):
        samray.label(tmp_path / "in", tmp_path / "out", samray.Config(model=config.model, output=config.output))
