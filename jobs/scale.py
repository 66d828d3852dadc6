"""How samray scales beyond one machine: plans of millions of images and many actors, measured on a small machine.

    python jobs/scale.py plan --images 10000000      planning from a listing, and resuming, each in a fresh process
    python jobs/scale.py simulate                    `samray.label` on 1 to 64 actors that sleep instead of labelling
    python jobs/scale.py driver                      the driver's CPU time, idle and per image
    python jobs/scale.py start --shards 20000        seconds until the first shard comes out of Ray Data
    python jobs/scale.py paper                       GPU hours and days of SA-1B, by calculation: nothing is measured

Each prints JSON with the machine and the versions.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jobs.benchmarks.measuring import measure  # noqa: E402
from jobs.benchmarks.planning import plan  # noqa: E402
from samray.config import Config, load_config  # noqa: E402
from samray.rle.records import MaskRecord  # noqa: E402

# --- many actors ---------------------------------------------------------------------------------------------------


def simulate(actors: list[int], seconds: float, masks: int, shards: int, images_per_shard: int) -> dict[str, Any]:
    """`samray.label` on a local Ray with as many logical GPUs as actors; only the mask generator is replaced by a
    sleep.

    Measures from the first image of the last actor to start to the last image of the first actor to run out of work,
    which excludes start-up and end. Images are tiny, because on a cluster other machines decode them.
    """
    results = {}
    for number in actors:
        print(f"{number} actors, {seconds:g} s per image", file=sys.stderr, flush=True)
        settings = [number, seconds, masks, shards, images_per_shard]
        command = [sys.executable, __file__, "one-simulation", *map(str, settings)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        results[str(number)] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(results[str(number)]), file=sys.stderr, flush=True)
    return {"s_per_image": seconds, "masks_per_image": masks, "images_per_shard": images_per_shard, "actors": results}


def driver(actors: int, seconds: list[float], window_s: float, images_per_shard: int) -> dict[str, Any]:
    """The driver process's CPU time: a constant part, and a part per image.

    Ray Data's scheduler polls ten times a second, so CPU time divided by images means little if images are slow. Actors
    of several speeds give several rates; a line is fitted through CPU share over images per second.
    """
    import numpy as np

    if len(set(seconds)) < 2:
        raise SystemExit("--seconds: fitting a line needs at least two speeds")
    runs = []
    for s_per_image in seconds:
        shards = max(3, round(window_s / (images_per_shard * s_per_image)) + 2)
        runs.append(simulate([actors], s_per_image, 1, shards, images_per_shard)["actors"][str(actors)])
    rates, shares = ([one[name] for one in runs] for name in ("images_per_s", "driver_cpu_share"))
    slope, standing = np.polyfit(rates, shares, 1).tolist()
    line = {"standing_cpu_share": standing, "ms_more_per_image": 1000 * slope}
    return {"actors": actors, "images_per_shard": images_per_shard, **line, "runs": runs}


class Sleeper:
    """Replaces a mask generator: sleeps, and logs the times."""

    def __init__(self, seconds: float, masks: int, log: str) -> None:
        self.seconds = seconds
        self.stage_seconds = {"encode": 0.0}
        self.log = Path(log, str(os.getpid()))
        mask: MaskRecord = {
            "segmentation": {"size": [8, 8], "counts": "0P2"},
            "bbox": [0.0, 0.0, 8.0, 8.0],
            "area": 64,
            "predicted_iou": 0.9,
            "stability_score": 0.95,
            "point_coords": [[4.0, 4.0]],
            "crop_box": [0.0, 0.0, 8.0, 8.0],
        }
        self.masks = [mask] * masks

    def generate(self, images: list[Any]) -> list[list[MaskRecord]]:
        started = time.time()
        time.sleep(self.seconds * len(images))
        self.stage_seconds["encode"] += self.seconds * len(images)
        with self.log.open("a") as file:
            file.write(f"{started} {time.time()} {len(images)}\n")
        return [self.masks for _ in images]


def make_sleeper(config: Config, num_threads: int, seconds: float, masks: int, log: str) -> Any:
    """For `label_with`: grouped as on a GPU."""
    from samray.pipeline.labeler import ShardLabeler

    return ShardLabeler(
        lambda _: Sleeper(seconds, masks, log),
        max_pixels=config.input.max_pixels,
        num_threads=num_threads,
        device_type="cuda",
    )


def one_simulation(actors: int, seconds: float, masks: int, shards: int, images_per_shard: int) -> dict[str, Any]:
    """One number of actors, in a separate process, whose CPU time is then the driver's."""
    from PIL import Image

    from samray.cluster.session import local_ray
    from samray.pipeline.run import label_with

    num_images = actors * shards * images_per_shard
    with tempfile.TemporaryDirectory() as folder, CpuWatch() as watch:
        for i in range(256):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(f"{folder}/{i}.png")
        names = [f"{i}.png" for i in range(num_images)]
        for i in range(256, num_images):  # equal names would count as one image
            os.link(f"{folder}/{i % 256}.png", f"{folder}/{i}.png")
        Path(folder, "listing.txt").write_text("\n".join(names))
        Path(folder, "log").mkdir()
        # An actor reserves a quarter of a CPU when it uses half of one.
        with local_ray(num_cpus=actors // 2 + 4, num_gpus=actors, object_store_memory=2**30):
            config = load_config(
                "tiny",
                None,
                [
                    *(f"output.images_per_shard={images_per_shard}", "cluster.num_cpus_per_actor=0.5"),
                    *(f"cluster.min_actors={actors}", f"cluster.max_actors={actors}"),
                ],
            )
            make_labeler = functools.partial(make_sleeper, seconds=seconds, masks=masks, log=f"{folder}/log")
            report = label_with(
                f"{folder}/listing.txt", f"{folder}/output", config, progress=False, make_labeler=make_labeler
            )
        assert report.num_labelled == num_images, report
        logs = [
            [tuple(map(float, line.split())) for line in path.read_text().splitlines()]
            for path in Path(folder, "log").iterdir()
        ]
    assert len(logs) == actors, len(logs)
    start, end = max(log[0][0] for log in logs), min(log[-1][1] for log in logs)
    assert start < end, "the first actor ran out of work before the last one started: increase --shards"
    done = sum(
        number * max(0.0, min(to, end) - max(since, start)) / (to - since) for log in logs for since, to, number in log
    )
    slept = sum(max(0.0, min(to, end) - max(since, start)) for log in logs for since, to, _ in log)
    main_s, driver_s, machine_s = watch.between(start, end)
    return {
        "images_per_s": done / (end - start),
        "share_of_ideal": done / (end - start) * seconds / actors,
        "share_of_time_in_sleep": slept / (end - start) / actors,
        "window_s": end - start,
        "images_in_window": round(done),
        "samray_driver_ms_per_image": 1000 * main_s / done,
        "driver_process_ms_per_image": 1000 * driver_s / done,
        "driver_cpu_share": driver_s / (end - start),
        "machine_cpu_share": machine_s / (end - start) / (os.cpu_count() or 1),
        "wall_s": report.wall_s,
    }


class CpuWatch:
    """CPU seconds of this process, of its main thread (samray's driver) and of the machine over time."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float, float, float]] = []
        self._main = time.pthread_getcpuclockid(threading.main_thread().ident or 0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CpuWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        ticks = os.sysconf("SC_CLK_TCK")
        while not self._ended.wait(0.5):
            user, nice, system = map(int, Path("/proc/stat").read_text().split(None, 4)[1:4])
            cpu_seconds = (time.clock_gettime(self._main), time.process_time())
            self.samples.append((time.time(), *cpu_seconds, (user + nice + system) / ticks))

    def between(self, start: float, end: float) -> list[float]:
        """CPU seconds of the main thread, the process and the machine between two times, accurate to half a second."""
        inside = [sample for sample in self.samples if start <= sample[0] <= end]
        first, last = inside[0], inside[-1]
        return [(last[i] - first[i]) * (end - start) / (last[0] - first[0]) for i in (1, 2, 3)]


def start(shards: int, ways: list[str]) -> dict[str, Any]:
    """Seconds until the first shard has passed a stage, with the way in which samray gives shards to Ray Data.

    For comparison, the plain way: one block per shard in the object store.
    """
    import ray.data

    from samray.cluster.session import local_ray
    from samray.cluster.sizes import IO_CPUS, data_settings
    from samray.pipeline.fetch import shards_to_do, source_table

    def put_as_blocks(table: Any) -> Any:
        return ray.data.from_blocks([table.slice(i, 1) for i in range(len(table))])

    with local_ray(num_cpus=2, object_store_memory=2**30):
        figures: dict[str, Any] = {"shards": shards}
        with data_settings(load_config("tiny").cluster):
            for make in (way for way in (shards_to_do, put_as_blocks) if way.__name__ in ways):
                wall, cpu = time.perf_counter(), time.process_time()
                dataset = make(source_table(dict.fromkeys(range(shards), False)))
                options: dict[str, Any] = {"num_cpus": IO_CPUS, "compute": ray.data.TaskPoolStrategy(size=2)}
                passed = dataset.map_batches(_as_it_is, batch_size=1, batch_format="pyarrow", **options)
                first: Any = next(
                    iter(passed.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
                )
                assert first.num_rows == 1, first
                figures[make.__name__] = {
                    "seconds": time.perf_counter() - wall,
                    "cpu_seconds": time.process_time() - cpu,
                }
    return figures


def _as_it_is(batch: Any) -> Any:
    return batch


# --- on paper -------------------------------------------------------------------------------------------------------

ENCODER_TFLOP = 5.9
"""ViT-H, one pass."""
PROMPT_TFLOP = (0.85 + 0.8) / 1000
"""One point through the decoder with its three masks upscaled: an upper bound, because not all are upscaled."""
PEAK_TFLOP_PER_S = 989.0
"""Dense bf16 rate of an H100 SXM or H200, from the data sheet."""
PRESETS = {"default": (1, 32 * 32), "sa1b": (1 + 4 + 16, 32 * 32 + 4 * 16 * 16 + 16 * 8 * 8)}
"""Encoder passes and points per image."""


def paper(images: int, gpus: int, shares: list[float], efficiency: float, seconds: list[float]) -> dict[str, Any]:
    """GPU hours and time for ViT-H, from seconds per image if given, else from FLOP at fractions of the peak rate.

    Counts only the networks, not NMS and run-length encoding. efficiency: of the pipeline, see `simulate`.
    """

    def cost(s_per_image: float) -> dict[str, float]:
        gpu_hours = images * s_per_image / 3600 / efficiency
        return {"s_per_image": s_per_image, "gpu_hours": gpu_hours, "hours": gpu_hours / gpus}

    costs = {f"{s:g} s an image": cost(s) for s in seconds}
    by_preset = {}
    for preset, (passes, points) in PRESETS.items():
        tflop = passes * ENCODER_TFLOP + points * PROMPT_TFLOP
        at = {f"{share:.0%} of the peak": cost(tflop / (share * PEAK_TFLOP_PER_S)) for share in shares}
        by_preset[preset] = {"tflop_per_image": tflop, **at}
    note = "calculated, not measured"
    assumed = {"images": images, "gpus": gpus, "efficiency": efficiency, "peak_tflop_per_s": PEAK_TFLOP_PER_S}
    return {"note": note, **assumed, **by_preset, **costs}


def _above_zero(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def main() -> int:
    if sys.argv[1:2] == ["one-simulation"]:
        actors, seconds, *numbers = sys.argv[2:]
        print(json.dumps(one_simulation(int(actors), float(seconds), *map(int, numbers))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("plan")
    sub.add_argument("--images", type=int, default=1_000_000)
    sub.add_argument("--kind", default="parquet", choices=["parquet", "csv", "txt"], help="format of the listing")
    sub.add_argument("--left", type=_above_zero, default=5, help="shards left for the resume")
    sub.add_argument("--failed", type=float, default=0.01, help="fraction of the images that failed")
    sub.add_argument("--folder", type=Path, help="folder for the temporary listing and output")
    sub = commands.add_parser("simulate")
    sub.add_argument("--actors", type=int, nargs="+", default=[1, 4, 16, 64])
    sub.add_argument("--seconds", type=float, default=0.25, help="seconds per image on a GPU")
    sub.add_argument("--masks", type=int, default=1, help="masks per image")
    sub.add_argument("--shards", type=int, default=10, help="shards per actor")
    sub.add_argument("--images-per-shard", type=int, default=64)
    sub = commands.add_parser("driver")
    sub.add_argument("--actors", type=int, default=16)
    sub.add_argument(
        "--seconds", type=float, nargs="+", default=[0.5, 0.125, 0.0625], help="seconds per image, for each run"
    )
    sub.add_argument("--window-s", type=float, default=40, help="approximate seconds of work per actor")
    sub.add_argument("--images-per-shard", type=int, default=64)
    sub = commands.add_parser("start")
    sub.add_argument("--shards", type=int, default=5000)
    names = ["shards_to_do", "put_as_blocks"]
    sub.add_argument("--ways", nargs="+", default=names, choices=names, help="samray's and the plain way")
    sub = commands.add_parser("paper")
    sub.add_argument("--images", type=int, default=11_000_000)
    sub.add_argument("--gpus", type=int, default=64)
    sub.add_argument(
        "--shares", type=float, nargs="+", default=[0.1, 0.2, 0.4], help="fractions of the GPU's peak rate in bf16"
    )
    sub.add_argument("--efficiency", type=float, default=0.95, help="efficiency of the pipeline")
    sub.add_argument("--seconds", type=float, nargs="*", default=[], help="measured seconds per image")
    bodies: dict[str, Callable[..., dict[str, Any]]] = {
        "plan": plan,
        "simulate": simulate,
        "driver": driver,
        "start": start,
        "paper": paper,
    }
    return measure(parser, commands, bodies)


if __name__ == "__main__":
    sys.exit(main())
