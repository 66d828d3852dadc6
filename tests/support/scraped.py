"""`samray.label` with the stand-in labeler on a Ray whose metrics are scraped as Prometheus would, printed as JSON.

python -m tests.support.scraped.py INPUT OUTPUT IMAGES [section.key=value ...]
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import threading
import time
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from jobs.benchmarks.s3_server import free_ports
from samray.cluster.session import local_ray
from samray.config import load_config
from samray.pipeline.run import label_with
from tests.support import standin

Samples = list[tuple[str, dict[str, str], float]]
PATIENCE_S = 240.0


def scrape(port: int) -> Samples:
    """Every sample of the node, but those of Ray's own that are not about actors."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    return [(s.name, s.labels, s.value) for s in samples if s.name.startswith("ray_samray_") or s.name == "ray_actors"]


def total(samples: Samples, name: str) -> float:
    return sum(value for sample_name, _, value in samples if sample_name == name)


def main(input: str, output: str, images: str, *overrides: str) -> None:
    (port,) = free_ports(1)
    quick = {"metrics_report_interval_ms": 300}
    under_way: Samples = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            try:
                under_way.extend(scrape(port))
            except OSError:  # the agent is not there yet
                continue

    options = {"num_gpus": 1, "_metrics_export_port": port, "_system_config": quick}
    with local_ray(num_cpus=2, object_store_memory=100 * 2**20, **options):
        threading.Thread(target=watch, daemon=True).start()
        config = load_config(None, None, [f"model.checkpoint={__file__}", "output.max_failed_fraction=1.0", *overrides])
        make_labeler = functools.partial(standin.make_labeler, pace=standin.Pace(0.1))
        report = label_with(input, output, config, make_labeler=make_labeler, progress=False)
        over.set()
        deadline = time.monotonic() + PATIENCE_S
        samples = scrape(port)
        while time.monotonic() < deadline and (
            total(samples, "ray_samray_images_total") < int(images)
            or total(samples, "ray_samray_shards_total") < report.num_shards
            or total(samples, "ray_samray_run_images_done") < int(images)
            or total(samples, "ray_samray_run_images_failed") < report.num_failed
        ):
            time.sleep(0.2)
            samples = scrape(port)
        figures = {**dataclasses.asdict(report), "busy_share": report.busy_share, "cost": report.cost}
        print(json.dumps({"report": figures, "under_way": under_way, "samples": samples}))
        over.set()


if __name__ == "__main__":
    main(*sys.argv[1:])
