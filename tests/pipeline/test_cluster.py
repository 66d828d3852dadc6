"""How the stages are cut to the cluster; no Ray is started."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from samray.cluster.sizes import IO_CPUS, Sizes, check_fits, choose_sizes
from samray.config import ClusterConfig
from samray.errors import ConfigError
from samray.pipeline.report import LabelReport, ShardSummary, print_report
from samray.progress import ProgressView
from samray.text import duration

LAPTOP = [{"CPU": 2.0}]
GPU_CLUSTER = [{"CPU": 0.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 32.0, "GPU": 4.0}]


def test_a_small_machine_gets_one_actor_that_uses_it_all() -> None:
    sizes = choose_sizes(ClusterConfig(), LAPTOP, num_shards=10)
    assert (sizes.min_actors, sizes.max_actors, sizes.num_threads, sizes.actor_gpus) == (1, 1, 2, 0)


@pytest.mark.parametrize("cpus", [1.0, 2.0, 3.0, 4.0, 16.0])
def test_fetch_and_write_tasks_fit_next_to_the_actors(cpus: float) -> None:
    sizes = choose_sizes(ClusterConfig(), [{"CPU": cpus}], num_shards=1000)
    left = cpus - sizes.max_actors * sizes.actor_cpus
    assert left >= 2 * IO_CPUS
    check_fits(sizes, [{"CPU": cpus}])


def test_a_gpu_is_an_actor() -> None:
    sizes = choose_sizes(ClusterConfig(), GPU_CLUSTER, num_shards=1000)
    assert (sizes.max_actors, sizes.actor_gpus, sizes.num_threads) == (5, 1.0, 8)
    halves = choose_sizes(ClusterConfig(num_gpus_per_actor=0.5), GPU_CLUSTER, num_shards=1000)
    assert (halves.max_actors, halves.num_threads) == (10, 4)


def test_actors_on_cpus_hold_no_gpu() -> None:
    nodes = [{"CPU": 64.0, "GPU": 2.0}]
    sizes = choose_sizes(ClusterConfig(), nodes, num_shards=1000, device="cpu")
    assert (sizes.actor_gpus, sizes.max_actors, sizes.num_threads) == (0.0, 17, 4)
    assert choose_sizes(ClusterConfig(), nodes, num_shards=1000).actor_gpus == 1.0


def test_no_more_actors_than_shards_and_no_fewer_than_asked_for() -> None:
    assert choose_sizes(ClusterConfig(), GPU_CLUSTER, num_shards=2).max_actors == 2
    growing = choose_sizes(ClusterConfig(num_gpus_per_actor=1, min_actors=3, max_actors=8), LAPTOP, num_shards=100)
    assert (growing.min_actors, growing.max_actors) == (3, 8)


def test_an_actor_that_fits_nowhere_is_a_config_error() -> None:
    sizes = choose_sizes(ClusterConfig(num_cpus_per_actor=8), LAPTOP, num_shards=10)
    with pytest.raises(ConfigError, match=r"cluster\.num_cpus_per_actor"):
        check_fits(sizes, LAPTOP)
    assert isinstance(sizes, Sizes)


def _report() -> LabelReport:
    report = LabelReport("/out", num_images=10, num_shards=3, wall_s=20.0)
    report.add(ShardSummary(0, 4, 40, {"truncated": 1}, {"encode": 3.0, "decode": 6.0}, 9.0))
    report.add(ShardSummary(1, 4, 20, {"truncated": 1, "empty": 1}, {"encode": 1.0}, 1.0))
    report.add_failures({"empty": 1})
    report.add_failures({"truncated": 2})
    return report


def test_shards_add_up_to_the_report() -> None:
    report = _report()
    assert (report.num_labelled, report.num_masks, report.num_failed) == (5, 60, 3)
    assert report.failures == {"truncated": 2, "empty": 1}
    assert report.stage_seconds == {"encode": 4.0, "decode": 6.0}
    assert report.images_per_s == 0.25
    summary = ShardSummary(7, 4, 20, {"empty": 1}, {"encode": 1.0}, 1.0)
    assert ShardSummary.from_json(summary.to_json()) == summary


def _printed(report: LabelReport) -> str:
    file = io.StringIO()
    print_report(report, Console(file=file, width=100))
    return file.getvalue()


def test_the_closing_summary_says_what_was_done_and_what_to_do_next() -> None:
    text = _printed(_report())
    for part in ("5 in 20.0 s", "0.25 images/s", "60, 12.0 per image", "2 truncated, 1 empty", "decode 60%", "/out"):
        assert part in text
    assert "samray verify /out" in text
    assert "--retry-failed" in text
    interrupted = _report()
    interrupted.exit_code, interrupted.problem = 143, "interrupted with 1 of 3 shards to do"
    assert "run the same command to resume" in _printed(interrupted)
    assert "samray verify" not in _printed(interrupted)


def test_progress_off_a_terminal_is_lines() -> None:
    file = io.StringIO()
    with ProgressView(8, 2, file=file) as view:
        view.update(note="labelling")
        view.update(num_done=4)
        view.update(num_done=5)
        assert file.getvalue() == "samray: labelling, 2/8 images (25%)\n", "one line in ten seconds"
    assert file.getvalue().endswith("\nsamray: labelling, 5/8 images (62%)\n"), "and one at the end"
    with ProgressView(8, 0, file=file, enabled=False) as view:
        view.update(note="labelling")
    assert file.getvalue().count("\n") == 2


def test_progress_shows_no_rate_that_is_not_known_and_no_time_left_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 1000, 20))
    monkeypatch.setattr("samray.progress.time.monotonic", lambda: float(next(seconds)))
    file = io.StringIO()
    with ProgressView(8, 0, file=file) as view:
        for num_done in (2, 2, 4, 8):
            view.update(num_done=num_done)
    assert [line.partition("%)")[2] for line in file.getvalue().splitlines()] == [
        "", "", ", 0.05 images/s, 1 min 20 s left", ", 0.10 images/s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.85, "850 ms"), (12.34, "12.3 s"), (245, "4 min 5 s"), (10920, "3 h 2 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_gpu_that_no_node_has_is_refused() -> None:
    two_gpus = [{"CPU": 4.0, "GPU": 2.0}]
    for device, nodes in ((None, LAPTOP), ("cpu", LAPTOP), ("cuda:0", two_gpus)):
        check_fits(choose_sizes(ClusterConfig(), nodes, num_shards=1), nodes, device)
    with pytest.raises(ConfigError, match="an actor sees only the 1 GPUs that it reserves"):
        check_fits(choose_sizes(ClusterConfig(), two_gpus, num_shards=1), two_gpus, "cuda:1")
    with pytest.raises(ConfigError, match=r"model.device = 'cuda' is not possible: this machine has no GPU"):
        check_fits(choose_sizes(ClusterConfig(), LAPTOP, num_shards=1), LAPTOP, "cuda")


def test_the_closing_summary_prints_paths_as_they_are() -> None:
    report = LabelReport("/data/[final]/labels[/b]", num_images=1, num_shards=1)
    report.exit_code, report.problem = 1, "of /data/[final] 1 shard is missing"
    for part in ("/data/[final]/labels[/b]", "of /data/[final] 1 shard"):
        assert part in _printed(report)
