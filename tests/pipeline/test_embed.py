"""`samray embed` and `samray label --from` on Ray, with the embedded architecture."""

from __future__ import annotations

from pathlib import Path

import pytest

import samray
from samray.config.embed import load_embed_config
from samray.output.verify import verify
from samray.pipeline.report import print_report
from tests.support import standin
from tests.support.here import use_no_ray
from tests.support.outputs import rows_of


def test_embeddings_are_stored_and_labelled_from(
    local_ray: None,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    standin.write_images(str(tmp_path / "in"), 3)
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    base = [f"model.checkpoint={tiny_checkpoint}", "output.images_per_shard=2", "cluster.max_actors=1"]
    config = load_embed_config(None, [*base, "output.embeddings=float32", "output.max_failed_fraction=1.0"])
    use_no_ray(monkeypatch)
    report = samray.embed(tmp_path / "in", tmp_path / "embedded", config, progress=False)
    assert (report.exit_code, report.num_labelled, report.num_failed, report.warning) == (0, 3, 1, None)
    stored = sum(path.stat().st_size for path in (tmp_path / "embedded" / "embeddings").iterdir())
    assert report.embedding_bytes == stored > 10**5
    print_report(report)
    summary = capsys.readouterr().err
    assert f"{stored / 1e6:.1f} MB, {stored / 3e6:.2f} MB per image" in summary
    assert "masks" not in summary
    assert verify(str(tmp_path / "embedded"), deep=True).ok

    for image in (tmp_path / "in").iterdir():
        image.unlink()
    thresholds = ["masks.points_per_side=2", "masks.pred_iou_thresh=0.5", "masks.stability_score_thresh=0.5"]
    settings = samray.load_config(None, None, [*thresholds, "cluster.max_actors=1", "output.max_failed_fraction=1.0"])
    monkeypatch.undo()  # on Ray
    report = samray.label_from(tmp_path / "embedded", tmp_path / "new", settings, progress=False)
    assert (report.exit_code, report.num_labelled, report.num_failed) == (0, 3, 1)
    assert report.stage_seconds["encode"] == 0
    assert verify(str(tmp_path / "new"), deep=True).ok
    again = samray.label_from(tmp_path / "embedded", tmp_path / "new", settings, progress=False)
    assert (again.exit_code, again.num_shards_skipped) == (0, 2)
    (failed,) = [row for row in rows_of(str(tmp_path / "new")) if row["status"] == "failed"]
    assert failed["image"]["file_name"] == "broken.png"
