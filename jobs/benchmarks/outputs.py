"""`jobs/benchmark.py export`, `report` and `read`: the cost of reading large outputs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import samray

ROOT = Path(__file__).resolve().parents[2]

# VmHWM instead of ru_maxrss, which a child inherits from its parent process.
EXPORT_CODE = """
import json, re, sys, samray
run = samray.export(*sys.argv[1:3], format=sys.argv[3], polygons=bool(int(sys.argv[4])))
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
counts = {"masks": run.num_masks, "pieces": run.num_pieces, "skipped": run.num_pieces_skipped}
print(json.dumps({"peak_mb": peak, "seconds": run.wall_s, **counts}))
"""


def export(images: int, masks: int, format: str, polygons: bool) -> dict[str, Any]:
    """Peak memory and seconds of an export in a fresh process; then of one that is killed half-way and resumed."""
    from jobs.synthetic_output import digest, write_synthetic_output

    with tempfile.TemporaryDirectory() as folder:
        made = write_synthetic_output(f"{folder}/output", images, masks)

        def start(dest: str) -> subprocess.Popen[str]:
            arguments = [
                sys.executable,
                "-c",
                EXPORT_CODE,
                f"{folder}/output",
                f"{folder}/{dest}",
                format,
                str(int(polygons)),
            ]
            return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)

        whole = json.loads(start("whole").communicate()[0])
        victim = start("killed")
        done = Path(folder, "killed", "_export", "done")
        while victim.poll() is None and (not done.exists() or len(os.listdir(done)) < whole["pieces"] // 2):
            time.sleep(0.05)
        victim.kill()
        victim.wait()
        again = json.loads(start("killed").communicate()[0])
        same = digest(Path(folder, "whole")) == digest(Path(folder, "killed"))
        files = [f.stat().st_size for f in Path(folder, "whole").rglob("*") if f.is_file() and "_export" not in f.parts]
    return {
        "format": format,
        "output": made,
        "export": whole,
        "masks_per_s": whole["masks"] / whole["seconds"],
        "files": len(files),
        "mb_written": sum(files) / 1e6,
        "killed_half_way_and_run_again": again,
        "same_bytes_as_undisturbed": same,
    }


REPORT_CODE = """
import json, os, re, sys, time
start = time.perf_counter()
from samray.report.output import write_report
page = write_report(*sys.argv[1:3])
seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time()}
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
print(json.dumps({**seconds, "peak_mb": peak, "page_mb": os.path.getsize(page) / 1e6}))
"""


def report(images: int, masks: int, file_mb: int, folder: Path | None) -> dict[str, Any]:
    """A report on a synthetic output in shards of 64 images, and on the same output compacted into files of `file_mb`.

    Its images are 8 different ones of 2250x1500, used in turn. Each report runs in a fresh process; imports are
    included.
    """
    from PIL import Image

    from jobs.synthetic_output import HEIGHT, WIDTH, write_synthetic_output
    from samray.output.compact import compact
    from samray.scenes.scene import make_scene

    with tempfile.TemporaryDirectory() as temporary:
        root = folder or Path(temporary)
        photos = [root / f"photo-{i}.jpg" for i in range(8)]
        if not (root / "output" / "_SUCCESS").exists():  # else it exists from an earlier call
            root.mkdir(parents=True, exist_ok=True)
            for i, photo in enumerate(photos):
                Image.fromarray(make_scene(i, (480, 720)).image).resize((WIDTH, HEIGHT)).save(photo)
            write_synthetic_output(str(root / "output"), images, masks, photos=list(map(str, photos)))
        compact(str(root / "output"), str(root / "compact"), file_mb * 10**6)

        def measure(name: str) -> dict[str, Any]:
            arguments = [sys.executable, "-c", REPORT_CODE, str(root / name), str(root / f"{name}.html")]
            done = subprocess.run(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            files = [f.stat().st_size for f in (root / name / "annotations").iterdir()]
            return {"files": len(files), "gb": sum(files) / 1e9, **json.loads(done.stdout)}

        return {"images": images, "masks": images * masks, **{name: measure(name) for name in ("output", "compact")}}


def read(rows: int, masks: int, shapes: int, uri: str | None) -> dict[str, Any]:
    """Bytes fetched to read single images by id from an output of one shard.

    Without `uri` the output is on a local S3 server, and everything it sends is counted on the wire, including headers
    and lookups; other readers of the same image are measured, too. With `uri`, an empty folder on an object store, only
    the bytes that samray reads are counted.
    """
    from jobs.benchmarks.byte_counts import count_on_the_wire, count_reads
    from jobs.benchmarks.s3_server import make_bucket, running_s3
    from jobs.synthetic_output import write_synthetic_output

    # Radii that give RLEs of 60 to 300 characters, and enough shapes that pages compress as if all were different.
    options: dict[str, Any] = {"images_per_shard": rows, "log_radius": (1.1, 1.7), "num_shapes": shapes}
    if uri is not None:
        made = write_synthetic_output(uri, rows, masks, **options)
        with count_reads() as count:
            return {"output": made, **_one_image(uri, rows, lambda: count.num_bytes)}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        server = stack.enter_context(running_s3(Path(folder)))
        wire = stack.enter_context(count_on_the_wire(server.endpoint))
        os.environ.update({**server.environment, "AWS_ENDPOINT_URL": wire.endpoint})
        make_bucket("bucket")
        output = "s3://bucket/large"
        made = write_synthetic_output(output, rows, masks, **options)
        result = _one_image(output, rows, lambda: wire.num_bytes)
        for name, query in _queries(f"{output}/annotations/shard-000000.parquet", rows // 3).items():
            before = wire.num_bytes
            assert query() == 1, name
            num_bytes = wire.num_bytes - before
            result[name] = {"bytes": num_bytes, "share": num_bytes / result["shard_bytes"]}
    return {"output": made, **result}


def _one_image(output: str, rows: int, count: Callable[[], int]) -> dict[str, Any]:
    """Bytes fetched by `read_image` and `MaskDataset`, by a counter of bytes so far."""
    from samray import storage
    from samray.output.lookup import read_footer
    from samray.output.shards import shard_uri

    uri = shard_uri(output, 0)
    size = storage.file_size(uri) or 0
    footer = read_footer(uri, size)
    wanted = [rows // 3, 0, rows - 1, rows // 2, rows * 4 // 5]
    costs = []
    for image_id in wanted:
        before = count()
        assert samray.read_image(output, image_id)["image"]["image_id"] == image_id
        costs.append(count() - before)
    before = count()
    dataset = samray.MaskDataset(output, images=False)
    opened = count() - before
    assert len(dataset[rows // 3][1]["masks"]) > 0
    index = dataset._index
    return {
        "rows": rows,
        "shard_bytes": size,
        "row_groups": footer.num_row_groups,
        "footer_bytes": footer.serialized_size,
        "read_image": {"bytes": costs, "largest_share": max(costs) / size},
        "open_mask_dataset": {"bytes": opened, "share": opened / size},
        "index_bytes_per_image": (index.shards.nbytes + index.rows.nbytes) / len(dataset),
    }


def _queries(uri: str, image_id: int) -> dict[str, Callable[[], int]]:
    """Queries for one image with other readers; each returns the number of rows found."""
    import duckdb
    import polars
    import pyarrow.dataset as pads
    import s3fs

    duckdb.register_filesystem(s3fs.S3FileSystem(default_cache_type="none"))  # else it reads ahead blocks of 50 MB
    return {
        "pyarrow_dataset": lambda: (
            pads.dataset(uri).to_table(filter=pads.field("image", "image_id") == image_id).num_rows
        ),
        "duckdb": lambda: len(duckdb.execute(f"SELECT * FROM '{uri}' WHERE image.image_id = {image_id}").fetchall()),
        "polars": lambda: (
            polars.scan_parquet(uri).filter(polars.col("image").struct.field("image_id") == image_id).collect().height
        ),
    }
