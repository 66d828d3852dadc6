"""`jobs/benchmark.py quality`: time and memory of `samray quality`, and whether it finds what was planted."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc

ROOT: Final = Path(__file__).resolve().parents[2]
CAMERAS: Final = 10
DRIFTING, BORDERED = 3, 7
"""Cameras whose scores are planted lower, and whose images share a mask."""
EVERY: Final = 1000
"""One image in so many is planted to repeat another's masks, and one to have none."""

IMAGES_PER_SHARD: Final = 256

CODE: Final = """
import json, sys, samray
run = samray.quality(*sys.argv[1:3], num_examples=0, progress=False)
pieces = {"pieces": run.num_pieces, "skipped": run.num_pieces_skipped}
print(json.dumps({"seconds": run.wall_s, **pieces, "counts": run.counts}))
"""


class Planter:
    """Makes the masks of a synthetic output differ from each other and, if asked for, plants faults."""

    def __init__(self, plant: bool) -> None:
        self.plant, self.rng = plant, np.random.default_rng(1)
        self.num_repeats = self.num_empty = 0

    def __call__(self, table: pa.Table) -> pa.Table:
        ids = pc.struct_field(table["image"], "image_id").to_numpy()
        annotations = table["annotations"].combine_chunks()
        masks = annotations.flatten()
        parents = pc.list_parent_indices(annotations).to_numpy()
        counts = np.bincount(parents, minlength=len(ids))
        # Numbers of masks that vary as those of labels do, from half of the masks to all.
        keep = self.rng.random(len(parents)) < self.rng.uniform(0.5, 1.0, len(ids))[parents]
        number = len(masks)
        values = self._numbers(masks, number)
        camera = (ids % CAMERAS)[parents]
        if self.plant:
            values["predicted_iou"] -= 0.06 * (camera == DRIFTING)
            border = (camera == BORDERED) & (np.arange(number) == np.cumsum(counts)[parents] - counts[parents])
            values["bbox"][border] = [0, 1400, 2250, 100]
            values["area"][border] = self.rng.integers(219_000, 221_000, int(border.sum()))
            keep |= border
            empty = (ids % EVERY == 501)[parents]
            keep &= ~empty
            self.num_empty += int((ids % EVERY == 501).sum())
            repeats = np.flatnonzero((ids % EVERY == 251) & (np.arange(len(ids)) > 0))
            self._repeat(values, keep, parents, counts, repeats)
        return self._table(table, masks, values, keep, parents)

    def _numbers(self, masks: pa.StructArray, number: int) -> dict[str, Any]:
        boxes = masks.field("bbox").flatten().to_numpy().reshape(-1, 4).copy()
        scale = self.rng.uniform(0.5, 1.0, (number, 2))
        boxes[:, 2:] = np.maximum(np.round(boxes[:, 2:] * scale), 1)
        room = np.array([2250, 1500]) - boxes[:, 2:]
        boxes[:, :2] = np.floor(self.rng.random((number, 2)) * (room + 1))
        fill = self.rng.uniform(0.4, 0.9, number)
        return {
            "bbox": boxes,
            "area": np.maximum((boxes[:, 2:].prod(1) * fill).astype(np.int64), 1),
            "predicted_iou": self.rng.uniform(0.88, 1.0, number),
            "stability_score": self.rng.uniform(0.92, 1.0, number),
        }

    def _repeat(self, values: dict[str, Any], keep: Any, parents: Any, counts: Any, repeats: Any) -> None:
        """Give these images the masks of the image before them."""
        starts = np.cumsum(counts) - counts
        for image in repeats.tolist():
            of_image = slice(starts[image], starts[image] + counts[image])
            before = slice(starts[image - 1], starts[image - 1] + counts[image - 1])
            for column in (*values.values(), keep):
                column[of_image] = column[before]
        self.num_repeats += len(repeats)

    @staticmethod
    def _table(table: pa.Table, masks: Any, values: dict[str, Any], keep: Any, parents: Any) -> pa.Table:
        columns = []
        for field in masks.type:
            column = masks.field(field.name)
            if field.name == "bbox":
                offsets = pa.array(np.arange(len(masks) + 1, dtype=np.int32) * 4)
                column = pa.ListArray.from_arrays(offsets, pa.array(values["bbox"].ravel()))
            elif field.name in values:
                column = pa.array(values[field.name], field.type)
            columns.append(column)
        kept = pa.StructArray.from_arrays(columns, fields=list(masks.type)).filter(pa.array(keep))
        ends = np.cumsum(np.bincount(parents[keep], minlength=table.num_rows))
        lists = pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]), pa.int32()), kept)
        return table.set_column(1, table.schema.field("annotations"), lists)


def camera_name(number: int) -> str:
    return f"camera-{number % CAMERAS}/{number:07d}.jpg"


def quality(images: int, planted_images: int, masks: int, folder: Path | None) -> dict[str, Any]:
    """Time and peak memory of a check of a clean output, and of one with planted faults that is killed and resumed."""
    from jobs.synthetic_output import write_synthetic_output

    with tempfile.TemporaryDirectory() if folder is None else contextlib.nullcontext(str(folder)) as root:
        results: dict[str, Any] = {"masks_per_image": masks}
        for name, number in (("planted", planted_images), ("clean", images)):
            planter = Planter(plant=name == "planted")
            output = f"{root}/{name}"
            if not Path(output, "_SUCCESS").exists():
                options: dict[str, Any] = {"log_radius": (1.1, 1.7), "num_shapes": 200, "name_of": camera_name}
                options["images_per_shard"] = IMAGES_PER_SHARD
                write_synthetic_output(output, number, masks, edit=planter, **options)
            results[name] = _check(output, f"{root}/{name}-quality")
            if planter.plant:
                results["planted_repeats"], results["planted_empty"] = planter.num_repeats, planter.num_empty
        killed = _kill(f"{root}/planted", f"{root}/killed-quality", results["planted"]["pieces"])
        same = _tables(f"{root}/killed-quality") == _tables(f"{root}/planted-quality")
        return {**results, "killed": killed, "same_after_kill": same}


def _start(output: str, dest: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CODE, output, dest], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def _check(output: str, dest: str) -> dict[str, Any]:
    process = _start(output, dest)
    with _watched(process.pid) as used:
        report = json.loads(process.communicate()[0].splitlines()[-1])
    return {**report, **used}


@contextlib.contextmanager
def _watched(pid: int) -> Iterator[dict[str, float]]:
    """What a process and its children use: the largest sum of their proportional set sizes, in which shared memory
    counts once, and CPU seconds, which other processes on the machine do not change."""
    used, stop = {"peak_mb": 0.0, "cpu_seconds": 0.0}, threading.Event()
    cpu: dict[int, float] = {}

    def watch() -> None:
        while not stop.wait(0.5):
            total = 0
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(pid)
                for process in (parent, *parent.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                        total += process.memory_full_info().pss
                        cpu[process.pid] = sum(process.cpu_times()[:2])
            used.update(peak_mb=max(used["peak_mb"], total / 1e6), cpu_seconds=sum(cpu.values()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield used
    finally:
        stop.set()
        thread.join()


def _kill(output: str, dest: str, num_pieces: int) -> dict[str, Any]:
    """Kill a check with half of its pieces measured, and run it again."""
    victim = _start(output, dest)
    measured = Path(dest, "_quality", "measured")
    while victim.poll() is None and (not measured.exists() or len(os.listdir(measured)) < num_pieces):
        time.sleep(0.05)
    victim.kill()
    victim.wait()
    report: dict[str, Any] = json.loads(_start(output, dest).communicate()[0].splitlines()[-1])
    return report


def _tables(dest: str) -> dict[str, bytes]:
    files = [file for file in Path(dest).rglob("*.parquet") if not file.name.startswith(".")]
    return {str(file.relative_to(dest)): file.read_bytes() for file in files}
