"""What Prometheus is shown of a run, scraped from a real Ray node, and what the closing summary says of it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from samray.config import ClusterConfig, load_config
from samray.errors import ConfigError
from samray.output.schema import samray_metadata
from samray.output.shards import read_shard
from samray.output.status import run_status
from samray.pipeline import metrics
from samray.pipeline.report import LabelReport, ShardSummary, print_report
from tests.support import REPOSITORY, standin


class Run:
    """A finished run: its report, and what was scraped while it went on (`under_way`) and after it."""

    def __init__(self, said: dict[str, Any], source: Path, output: Path) -> None:
        self.report: dict[str, Any] = said["report"]
        self.under_way: list[Any] = said["under_way"]
        self.samples: list[Any] = said["samples"]
        self.source, self.output = source, output

    def by(self, name: str, tag: str = "") -> dict[str, float]:
        """A counter after the run, summed over the workers, by one of its tags."""
        values: Counter[str] = Counter()
        for sample, labels, value in self.samples:
            if sample == f"ray_{name}_total":
                values[labels.get(tag, "")] += value
        return dict(values)

    def total(self, name: str) -> float:
        return sum(self.by(name).values())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ten good images and two broken ones in three shards, by one actor that holds half a GPU (as Ray counts)."""
    root = tmp_path_factory.mktemp("metrics")
    standin.write_images(str(root / "in"), 10)
    (root / "in" / "cut.png").write_bytes(standin.make_image(1)[:80])
    (root / "in" / "empty.png").write_bytes(b"")
    settings = ("output.images_per_shard=4", "cluster.num_gpus_per_actor=0.5", "cluster.num_cpus_per_actor=1")
    command = [sys.executable, "-m", "tests.support.scraped", str(root / "in"), str(root / "out"), "12", *settings]
    done = subprocess.run(
        [*command, "cluster.max_actors=1", "cluster.gpu_price_per_hour=2"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return Run(json.loads(done.stdout.splitlines()[-1]), root / "in", root / "out")


def test_the_counters_are_those_of_the_report(run: Run) -> None:
    assert run.report["failures"] == {"truncated": 1, "empty": 1}
    assert run.total("samray_images") == run.report["num_labelled"] + run.report["num_failed"] == 12
    assert run.total("samray_masks") == run.report["num_masks"] == 30
    assert run.by("samray_failed_images", "reason") == run.report["failures"]
    assert run.total("samray_shards") == run.report["num_shards"] == 3
    assert run.by("samray_stage_seconds", "stage") == pytest.approx(run.report["stage_seconds"])
    assert run.total("samray_device_busy_seconds") == pytest.approx(run.report["device_seconds"])
    assert run.report["device_seconds"] > 0


def test_bytes_are_those_of_the_files(run: Run) -> None:
    assert run.total("samray_encoded_bytes") == sum(file.stat().st_size for file in run.source.iterdir())
    written = (run.output / "annotations").iterdir()
    assert run.total("samray_written_bytes") == sum(file.stat().st_size for file in written)


def test_fill_and_idle_time(run: Run) -> None:
    assert run.total("samray_batch_images") == run.total("samray_batch_room_images") == 10  # on a CPU one at a time
    held_s = run.total("samray_device_held_seconds")
    assert run.total("samray_device_busy_seconds") < held_s <= run.report["held_seconds"]
    assert 0 < run.report["busy_share"] < 1


def test_the_driver_tells_how_far_it_is(run: Run) -> None:
    gauges: dict[str, set[float]] = {}
    for name, _, value in run.under_way + run.samples:
        gauges.setdefault(name, set()).add(value)
    assert gauges["ray_samray_run_images"] == {12.0}
    assert max(gauges["ray_samray_run_images_done"]) == 12.0
    assert max(gauges["ray_samray_run_images_failed"]) == 2.0


def test_every_name_and_no_other_is_exported(run: Run) -> None:
    """And the dashboard's count of actors finds ours among Ray's own figures."""
    seen = {name for name, _, _ in run.under_way + run.samples}
    assert seen - {"ray_actors"} == metrics.exported_names()
    names = {labels["Name"] for name, labels, value in run.under_way if name == "ray_actors" and value > 0}
    assert any("LabelActor" in name for name in names)
    tags = {tag for name, labels, _ in run.samples if "samray" in name for tag in labels}
    ours = tags - {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "JobId", "le"}
    assert {tag for tag in ours if not tag.startswith("otel_")} == {"reason", "stage"}


def test_cost_is_for_the_gpu_time_that_the_actor_held(run: Run) -> None:
    assert run.report["gpu_seconds"] == pytest.approx(run.report["held_seconds"] / 2)
    assert run.report["cost"] == pytest.approx(run.report["gpu_seconds"] / 3600 * 2)
    seen = run_status(str(run.output))
    assert (seen.state, seen.num_masks, seen.failures) == ("finished", 30, run.report["failures"])
    assert seen.cost == pytest.approx(run.report["cost"])
    kept = samray_metadata(read_shard(str(run.output), 0).schema)["stats"]
    assert kept["held_seconds"] > kept["device_seconds"] > 0


# --- without Ray ---------------------------------------------------------------------------------------------------


def test_a_figure_that_cannot_be_recorded_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def inc(self, value: float, tags: dict[str, str]) -> None:
            raise OSError("the metrics agent is gone")

        set = observe = inc

    for name in (*metrics.COUNTERS, *metrics.GAUGES, *metrics.HISTOGRAMS, "samray_no_such_name"):
        metrics.record(name, 1.0)  # whether or not there is a Ray
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "_metric", lambda name: Broken())
            metrics.record(name, 1.0)


def _printed(report: LabelReport) -> str:
    file = io.StringIO()
    print_report(report, Console(file=file, width=160))
    return file.getvalue()


def test_the_closing_summary_tells_idle_time_and_cost() -> None:
    report = LabelReport("/out", num_images=2000, num_shards=2, wall_s=4000.0)
    for shard in range(2):
        summary = ShardSummary(shard, 1000, 10, {}, {"decode": 1.0}, 1674.0, held_seconds=1800.0, gpu_seconds=1800.0)
        report.add(summary)
    assert "device busy 93% of the actors' time" in _printed(report)
    assert "cost" not in _printed(report)
    report.gpu_price_per_hour = 2.5
    assert (report.cost, report.cost_per_million_images) == (2.5, 1250.0)
    assert "2.50, 1,250.00 per million images at 2.50 per GPU hour (1 GPU hours)" in _printed(report)
    report.gpu_seconds = 0.0
    assert "none: no actor used a GPU" in _printed(report)


def test_a_price_is_no_part_of_a_runs_identity() -> None:
    priced = load_config(None, None, ["cluster.gpu_price_per_hour=2"])
    assert priced.identity() == load_config().identity()
    with pytest.raises(ConfigError, match=r"cluster\.gpu_price_per_hour = -1"):
        ClusterConfig(gpu_price_per_hour=-1)
