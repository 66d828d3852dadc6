"""A model and a kind of input that are one file and one row each label images on Ray, through the command line."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from samray.cli.main import main
from samray.config.models import MODELS
from samray.inputs.readers import READERS
from samray.output.shards import read_shard
from samray.sam.sam import Sam
from tests.support.standin import make_image
from tests.toys import base64_input, on_ray, patch_model


def test_a_toy_model_labels_a_toy_input(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "toy", patch_model.SPEC)
    READERS.append(base64_input.READER)
    monkeypatch.setattr("samray.pipeline.fetch.fetch_shard", on_ray.fetch_shard)
    monkeypatch.setattr("samray.pipeline.labeler.build_labeler", on_ray.build_labeler)
    (tmp_path / "three.b64").write_bytes(b"\n".join(base64.b64encode(make_image(i)) for i in range(3)))
    torch.manual_seed(0)
    save_file({k: v.contiguous() for k, v in Sam(patch_model.SPEC).state_dict().items()}, tmp_path / "toy.safetensors")
    settings = ["model.name=toy", f"model.checkpoint={tmp_path / 'toy.safetensors'}", "masks.points_per_side=2"]
    settings += ["masks.pred_iou_thresh=0", "masks.stability_score_thresh=0", "cluster.max_actors=1"]
    try:
        assert main(["label", str(tmp_path / "three.b64"), str(tmp_path / "out"), *settings, "--no-progress"]) == 0
    finally:
        READERS.remove(base64_input.READER)
    rows = read_shard(str(tmp_path / "out"), 0).to_pylist()
    assert [row["uri"].rpartition("/")[2] for row in rows] == [f"three.b64#line={i}" for i in range(3)]
    assert [row["status"] for row in rows] == ["ok"] * 3
