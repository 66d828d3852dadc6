"""For jobs/scale.py: a plan of millions of images and a resume of it, each in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# VmHWM instead of ru_maxrss, which a child inherits from its parent process.
FIGURES_CODE = """
import json, re, sys, time
started = time.perf_counter()
def figures(**more):
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time()}
    print(json.dumps({**seconds, "peak_mb": peak, **more}))
"""

PLAN_CODE = (
    FIGURES_CODE
    + """
from samray.config import load_config
from samray.output.plan import make_plan
from samray.pipeline.plan_run import run_identity
config = load_config("tiny")
plan = make_plan(*sys.argv[1:], config, run_identity(config))
figures(images=plan.num_images, shards=plan.num_shards)
"""
)

# All of `samray.label` until it would start Ray.
RESUME_CODE = (
    FIGURES_CODE
    + """
from samray.config import load_config
from samray.pipeline import run
failures_of_shards, failures = run.failures_of_shards, {}
def counted(*args):
    failures.update(failures_of_shards(*args))
    return failures
def on_ray(one):
    figures(shards_to_do=len(one.todo), failed_images=sum(sum(of_shard.values()) for of_shard in failures.values()))
    sys.stdout.flush()
    os._exit(0)
import os
run.failures_of_shards, run._run_on_ray = counted, on_ray
run.label(*sys.argv[1:], load_config("tiny"), progress=False)
"""
)


def plan(images: int, kind: str, left: int, failed: float, folder: Path | None) -> dict[str, Any]:
    """Seconds and peak memory for planning from a manifest of URIs, and for a resume up to the start of Ray.

    For the resume all shards but `left` are done: small ones with one image each, whose recorded failures follow the
    given rate at random.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        input, output = f"{temporary}/listing.{kind}", f"{temporary}/output"
        write_listing(Path(input), images)
        print(f"planning {images:,} images from {kind}", file=sys.stderr, flush=True)
        planned = _in_fresh_process(PLAN_CODE, input, output)
        print(f"finishing {planned['shards'] - left:,} shards", file=sys.stderr, flush=True)
        num_failed = finish_shards(output, left, failed)
        print("resuming", file=sys.stderr, flush=True)
        first = _in_fresh_process(RESUME_CODE, input, output)
        again = _in_fresh_process(RESUME_CODE, input, output)
        sizes = {
            "listing_mb": os.path.getsize(input) / 1e6,
            "manifest_mb": os.path.getsize(f"{output}/_samray/manifest.parquet") / 1e6,
        }
    assert first["failed_images"] == again["failed_images"] == num_failed, (first, again, num_failed)
    return {**sizes, "plan": planned, "resume_with_all_footers_read": first, "resume": again}


def _in_fresh_process(code: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def write_listing(path: Path, num_images: int) -> None:
    """An input on an object store: Parquet with uri and size, csv with both, or txt."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv
    import pyarrow.parquet as pq

    schema = pa.schema([("uri", pa.string()), ("size", pa.int64())])
    with path.open("wb") as file:
        options = pa.csv.WriteOptions(include_header=path.suffix == ".csv", quoting_style="none")
        writer: Any = pq.ParquetWriter(file, schema) if path.suffix == ".parquet" else None
        if writer is None:
            columns = schema if path.suffix == ".csv" else pa.schema([schema.field("uri")])
            writer = pa.csv.CSVWriter(file, columns, write_options=options)
        for start in range(0, num_images, 1_000_000):
            number = pa.array(range(start + 1, min(start + 1_000_000, num_images) + 1), pa.int64())
            part = pc.utf8_lpad(pc.cast(pc.divide(number, 10_000), pa.string()), 6, "0")
            names = ["s3://photos/sa/part-", part, "/sa_", pc.cast(number, pa.string()), ".jpg"]
            uris = pc.binary_join_element_wise(*names, "")
            table = pa.table([uris, pc.add(number, 200_000)], schema=schema)
            writer.write_table(table if path.suffix != ".txt" else table.select(["uri"]))
        writer.close()


def finish_shards(output: str, left: int, failed: float) -> int:
    """Write small valid shards for all but the last `left` shards of the plan. Returns the number of failed images."""
    import numpy as np

    from samray.output.plan import load_plan
    from samray.output.schema import ImageRecord, records_to_table, with_stats
    from samray.output.shards import FOLDER, shard_bytes, shard_name
    from samray.pipeline.report import ShardSummary

    plan = load_plan(output)
    folder = Path(output, FOLDER)
    folder.mkdir()
    record = ImageRecord(image_id=1, width=8, height=8, file_name="sa_1.jpg", uri="s3://photos/sa_1.jpg")
    table = records_to_table([record], plan.run)
    made: dict[int, bytes] = {}
    num_done = max(0, plan.num_shards - left)
    numbers = np.random.default_rng(0).binomial(plan.generations[0].images_per_shard, failed, num_done)
    for shard, number in enumerate(numbers.tolist()):
        if number not in made:
            summary = ShardSummary(shard, 64, 0, failures={"truncated": number} if number else {})
            made[number] = shard_bytes(with_stats(table, summary.to_dict()))
        (folder / shard_name(shard)).write_bytes(made[number])
    return int(numbers.sum())
