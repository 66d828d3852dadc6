"""SAM 2 on Ray, from a checkpoint in Meta's format: label, resume, verify; the small one in full size as a RayJob."""

from __future__ import annotations

import shlex
from pathlib import Path

import jsonschema
import pytest
import torch

from samray.cli.main import main
from samray.config.models import MODELS
from samray.output.shards import read_shard
from tests.kuberay import extract
from tests.support.here import use_no_ray
from tests.support.manifests import KIND_JOB, ray_document
from tests.support.micro import MICRO_SAM2
from tests.support.sam2_files import meta_state, random_state
from tests.support.standin import make_image
from tests.toys import on_ray


def test_a_run_with_metas_checkpoint(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, MICRO_SAM2.name, MICRO_SAM2)
    monkeypatch.setattr("samray.pipeline.labeler.build_labeler", on_ray.build_labeler)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        (tmp_path / "photos" / f"{i}.png").write_bytes(make_image(i))
    torch.save({"model": meta_state(random_state(MICRO_SAM2))}, tmp_path / "sam2.1.pt")
    out = str(tmp_path / "out")
    settings = ["model.name=micro_sam2", f"model.checkpoint={tmp_path / 'sam2.1.pt'}", "masks.points_per_side=2"]
    settings += ["masks.pred_iou_thresh=0", "masks.stability_score_thresh=0", "cluster.max_actors=1"]
    settings += ["output.images_per_shard=2"]
    command = ["label", str(tmp_path / "photos"), out, *settings, "--no-progress"]
    assert main(command) == 0
    before = [read_shard(out, shard).to_pylist() for shard in range(2)]
    assert [row["status"] for rows in before for row in rows] == ["ok"] * 3
    assert any(row["annotations"] for rows in before for row in rows)
    # As if the run had been killed after its first shard.
    use_no_ray(monkeypatch)
    (tmp_path / "out" / "_SUCCESS").unlink()
    next((tmp_path / "out" / "annotations").glob("shard-000001*")).unlink()
    assert main(command) == 0
    assert [read_shard(out, shard).to_pylist() for shard in range(2)] == before
    assert main(["verify", out]) == 0
    # The same checkpoint under SAM's name: refused before anything is written.
    command[3:4] = ["model.name=vit_b"]
    command[2] = str(tmp_path / "other")
    capsys.readouterr()
    assert main(command) != 0
    words = " ".join(capsys.readouterr().err.split())
    assert "has weights of SAM 2.1 (micro_sam2), not of SAM (vit_b): set model.name=micro_sam2, or" in words
    assert not (tmp_path / "other").exists()


@pytest.mark.timeout(900)
def test_the_job_for_kuberay_with_sam2(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest for own pictures with a checkpoint of sam2.1_t is valid, and its command works on this machine."""
    job = ray_document(KIND_JOB)
    job["spec"]["entrypoint"] = (
        "samray label /data/photos /data/labels model.name=sam2.1_t model.checkpoint=/data/sam2.1_hiera_tiny.pt"
        " masks.points_per_side=1 masks.pred_iou_thresh=0 masks.stability_score_thresh=0 output.images_per_shard=1"
    )
    jsonschema.Draft202012Validator(extract.load()[job["apiVersion"], job["kind"]]).validate(job)
    (tmp_path / "photos").mkdir()
    for i in range(2):
        (tmp_path / "photos" / f"{i}.png").write_bytes(make_image(i))
    torch.save({"model": meta_state(random_state(MODELS["sam2.1_t"]))}, tmp_path / "sam2.1_hiera_tiny.pt")
    command = shlex.split(job["spec"]["entrypoint"].replace("/data/", f"{tmp_path}/"))[1:]
    out = tmp_path / "labels"
    assert main(command) == 0
    before = [read_shard(str(out), shard).to_pylist() for shard in range(2)]
    assert [row["status"] for rows in before for row in rows] == ["ok", "ok"]
    # As if the job had been killed after its first shard; KubeRay submits it again.
    use_no_ray(monkeypatch)
    (out / "_SUCCESS").unlink()
    next((out / "annotations").glob("shard-000001*")).unlink()
    assert main(command) == 0
    assert [read_shard(str(out), shard).to_pylist() for shard in range(2)] == before
    assert main(["verify", str(out), "--deep"]) == 0
