"""`jobs/benchmark.py large`: a large image labelled in tiles, killed half-way, with the memory of all processes; and
`jobs/benchmark.py seams`: scenes labelled as wholes and in tiles, compared with each other and with the truth; and
`jobs/benchmark.py merging`: many masks of many tiles made those of one image."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image
from pycocotools import mask as coco_mask

import samray
from samray.config import MaskConfig, load_config
from samray.masks.image_tiles import OVERVIEW, Tiling, make_tiling
from samray.masks.seams import Piece, merge, of_one_tile, pieces_of
from samray.output.schema import ANNOTATIONS_PER_IMAGE
from samray.output.verify import verify
from samray.rle import encode as rle
from samray.rle.records import MaskRecord, Rle
from samray.scenes.scene import make_scene

ROOT = Path(__file__).resolve().parent.parent.parent
_SCENE = 2000
_SCENES = 6
AGREES = 0.9
"""Mask IoU from which on two masks agree."""

Pixels = npt.NDArray[np.uint8]


def write_mosaic(path: Path, side: int) -> None:
    """A JPEG of side x side pixels, made of scenes."""
    scenes = [make_scene(seed, _SCENE, None, "heldout").image for seed in range(_SCENES)]
    pixels = np.empty((side, side, 3), dtype=np.uint8)
    rng = np.random.default_rng(0)
    for y in range(0, side, _SCENE):
        for x in range(0, side, _SCENE):
            scene = scenes[int(rng.integers(_SCENES))][:: int(rng.choice([-1, 1])), :: int(rng.choice([-1, 1]))]
            pixels[y : y + _SCENE, x : x + _SCENE] = scene[: side - y, : side - x]
    Image.MAX_IMAGE_PIXELS = None
    Image.fromarray(pixels).save(path, quality=90)


def large(side: int, tile: int, points: int, kill_at: float) -> dict[str, Any]:
    """Label one image of side x side pixels in a process of its own, killed with -9 once this share of its tiles is
    there, and again to its end. Peak memory in MB of each kind of process, and of all together, as PSS: pages that
    processes share count once."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "in").mkdir()
        write = "import sys; from pathlib import Path; from jobs.benchmarks.large import write_mosaic;"
        code = f"{write} write_mosaic(Path(sys.argv[1]), int(sys.argv[2]))"
        _run([sys.executable, "-c", code, str(root / "in" / "large.jpg"), str(side)]).wait()
        tiles = len(make_tiling((side, side), tile, MaskConfig().tile_overlap))
        settings = [f"masks.tile={tile}", f"masks.points_per_side={points}", "input.max_bytes=2000000000"]
        command = [sys.executable, "-m", "samray", "label", str(root / "in"), str(root / "out"), *settings]
        peaks: dict[str, float] = {}
        started = time.monotonic()
        killed_with = _watch(command, peaks, root / "out", until=int(kill_at * tiles))
        written_before = set(_tile_files(root / "out"))
        seconds = [time.monotonic() - started]
        started = time.monotonic()
        _watch(command, peaks, root / "out", until=None, keep=written_before)
        seconds.append(time.monotonic() - started)
        checked = verify(str(root / "out"), deep=True)
        return {
            "side": side,
            "file_mb": (root / "in" / "large.jpg").stat().st_size / 1e6,
            "tile": tile,
            "tiles": tiles,
            "points_per_side": points,
            "tiles_there_when_killed": killed_with,
            "of_those_written_again": len(_RENEWED),
            "seconds_until_killed_and_after": seconds,
            "verify_deep_is_ok": checked.ok,
            "images": checked.num_images,
            "masks": checked.num_masks,
            "peak_mb": dict(sorted(peaks.items(), key=lambda item: -item[1])),
            "peak_mb_of_all": peaks.get("all"),
        }


_RENEWED: set[str] = set()


def _run(command: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _watch(
    command: list[str],
    peaks: dict[str, float],
    output: Path,
    until: int | None,
    keep: set[tuple[str, float]] | None = None,
) -> int:
    """Run a command and note the peaks; kill it once there are `until` tiles. Returns how many there were."""
    process = _run(command)
    driver = psutil.Process(process.pid)
    seen: list[psutil.Process] = []
    while process.poll() is None:
        seen = _note(driver, peaks)
        if keep:
            now = dict(_tile_files(output))
            _RENEWED.update(name for name, written in keep if now.get(name, written) != written)
        if until is not None and len(_tile_files(output)) >= until:
            process.kill()
            break
        time.sleep(0.5)
    process.wait()
    psutil.wait_procs(seen, timeout=60)
    return len(_tile_files(output))


def _tile_files(output: Path) -> list[tuple[str, float]]:
    files = []
    for path in output.glob("_samray/tiles/**/tile-*.parquet"):
        try:
            files.append((str(path), path.stat().st_mtime))
        except FileNotFoundError:  # merged in between
            continue
    return files


def _note(driver: psutil.Process, peaks: dict[str, float]) -> list[psutil.Process]:
    """Add the memory of a driver and all its children to the peaks."""
    total = 0.0
    processes = [driver]
    try:
        processes += driver.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for process in processes:
        try:
            mb = process.memory_full_info().pss / 1e6
            kind = _kind(" ".join(process.cmdline()))
        except psutil.Error:
            continue
        total += mb
        peaks[kind] = max(peaks.get(kind, 0.0), mb)
    peaks["all"] = max(peaks.get("all", 0.0), total)
    return processes


def _kind(title: str) -> str:
    kinds = {
        "samray.inputs.child": "child that decodes",
        "LabelActor": "labelling actor",
        "MapWorker": "labelling actor",
        "ray::": "other Ray worker",
        "raylet": "raylet",
        "gcs_server": "GCS",
        "samray label": "driver",
    }
    return next((kind for part, kind in kinds.items() if part in title), "rest of Ray")


# --- seams -----------------------------------------------------------------------------------------------------------


class _InMemory:
    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]

    def read(self, x0: int, y0: int, x1: int, y1: int) -> Pixels:
        return self.pixels[y0:y1, x0:x1]


def seams(side: int, tile: int, num_scenes: int, jitter: int, with_model: bool) -> dict[str, Any]:
    """Share of masks of whole scenes that a mask of the same scene in tiles agrees with.

    First with a perfect model, which finds in each tile the true masks that are connected, with borders moved by up to
    `jitter` pixels, by another random number in every tile: what is lost is lost at the seams. Then, with_model, with
    the embedded model; overview_with_whole is how well it agrees with itself, without any seam: the overview is the
    same scene, scaled to a tile first.
    """
    tiling = make_tiling((side, side), tile, MaskConfig().tile_overlap)
    perfect: list[float] = []
    against: dict[str, list[float]] = {
        "tiled_with_whole": [], "overview_with_whole": [], "whole_with_truth": [], "tiled_with_truth": [],
    }  # fmt: skip
    generator = whole_generator = None
    if with_model:
        model, config = samray.load_model("tiny", None, "cpu", "float32"), load_config(None, None, []).masks
        generator = samray.MaskGenerator(model, of_one_tile(config))
        whole_generator = samray.MaskGenerator(model, config)
    counts = {"whole": 0, "tiled": 0}
    for seed in range(1, num_scenes + 1):
        scene = make_scene(seed, side, None, "heldout")
        truth = [rle.compress(rle.encode_array(mask), (side, side)) for mask in scene.masks]
        connected = [mask for mask in scene.masks if _is_connected(mask)]
        wanted = [rle.compress(rle.encode_array(mask), (side, side)) for mask in connected]
        rng = np.random.default_rng(seed)
        joined = _joined(_perfect(connected, tiling, jitter, rng), tiling, MaskConfig())
        perfect += _best_ious(wanted, joined)
        if generator is not None and whole_generator is not None:
            image = _InMemory(scene.image)
            tiles = {n: generator.generate([tiling.read(image, n)])[0] for n in range(len(tiling))}
            tiled = _joined(tiles, tiling, generator.config)
            whole = [record["segmentation"] for record in whole_generator.generate([scene.image])[0]]
            counts["whole"] += len(whole)
            counts["tiled"] += len(tiled)
            against["tiled_with_whole"] += _best_ious(whole, tiled)
            overview = _joined({OVERVIEW: tiles[OVERVIEW]}, tiling, generator.config)
            against["overview_with_whole"] += _best_ious(whole, overview)
            against["whole_with_truth"] += _best_ious(truth, whole)
            against["tiled_with_truth"] += _best_ious(truth, tiled)
    return {
        "side": side,
        "tile": tile,
        "windows": len(tiling) - 1,
        "scenes": num_scenes,
        "jitter": jitter,
        "perfect_model": _summary(perfect),
        "embedded_model": {name: _summary(ious) for name, ious in against.items()} | {"masks": counts}
        if with_model
        else None,
    }


def _summary(ious: list[float]) -> dict[str, float]:
    values = np.array(ious)
    return {
        "masks": len(values),
        "share_that_agrees": float((values >= AGREES).mean()),
        "mean_iou": float(values.mean()),
    }


def _is_connected(mask: npt.NDArray[np.bool_]) -> bool:
    from scipy import ndimage

    return int(ndimage.label(mask)[1]) == 1


def _perfect(
    masks: list[npt.NDArray[np.bool_]], tiling: Tiling, jitter: int, rng: np.random.Generator
) -> dict[int, list[MaskRecord]]:
    """The true masks as each window shows them; none in the overview."""
    from scipy import ndimage

    by_tile: dict[int, list[MaskRecord]] = {OVERVIEW: []}
    for number in range(1, len(tiling)):
        x0, y0, x1, y1 = tiling.box(number)
        records = []
        for mask in masks:
            part, by = mask[y0:y1, x0:x1], int(rng.integers(-jitter, jitter + 1))
            if by:
                change = ndimage.binary_dilation if by > 0 else ndimage.binary_erosion
                part = change(part, iterations=abs(by), border_value=int(by < 0)) if part.any() else part
            if part.any():
                records.append(_record(part))
        by_tile[number] = records
    return by_tile


def _record(mask: npt.NDArray[np.bool_]) -> MaskRecord:
    hw = (mask.shape[0], mask.shape[1])
    counts = rle.encode_array(mask)
    return MaskRecord(
        segmentation=rle.compress(counts, hw),
        bbox=[],
        area=rle.area(counts),
        predicted_iou=1.0,
        stability_score=1.0,
        point_coords=[],
        crop_box=[0.0, 0.0, float(hw[1]), float(hw[0])],
    )


def _joined(by_tile: dict[int, list[MaskRecord]], tiling: Tiling, config: MaskConfig) -> list[Rle]:
    pieces: dict[int, list[Piece]] = {number: pieces_of(masks, tiling, number) for number, masks in by_tile.items()}
    return [record["segmentation"] for record in merge(pieces, tiling, config, ANNOTATIONS_PER_IMAGE)[0]]


def _best_ious(wanted: list[Rle], predicted: list[Rle]) -> list[float]:
    """For each mask the IoU of the one that fits it best."""
    if not wanted or not predicted:
        return [0.0] * len(wanted)
    best: list[float] = coco_mask.iou(wanted, predicted, [0] * len(predicted)).max(axis=1).tolist()
    return best


# --- merging ---------------------------------------------------------------------------------------------------------


def merging(side: int, tile: int, masks_per_tile: int) -> dict[str, Any]:
    """Merge the tiles of one image, each with this many ellipses of any size up to that of the tile: seconds, and the
    peak memory of the process beyond what it has with all libraries loaded."""
    tiling = make_tiling((side, side), tile, MaskConfig().tile_overlap)
    rng = np.random.default_rng(0)
    # A few tiles' worth of different masks, which come again: only their number and size matter here.
    sets = [_ellipses(rng, tile, masks_per_tile) for _ in range(8)]
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    pieces = {}
    for number in range(len(tiling)):
        hw = tiling.tile_hw(number)
        assert hw == (tile, tile)
        pieces[number] = pieces_of(sets[int(rng.integers(len(sets)))], tiling, number)
    read_s = time.perf_counter() - started
    records, _ = merge(pieces, tiling, MaskConfig(), ANNOTATIONS_PER_IMAGE)
    return {
        "side": side,
        "tiles": len(tiling),
        "masks_in_tiles": sum(map(len, pieces.values())),
        "masks_merged": len(records),
        "run_length_mb": sum(len(record["segmentation"]["counts"]) for record in records) / 1e6,
        "seconds": {"read": read_s, "merge": time.perf_counter() - started - read_s},
        "peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e6,
    }


def _ellipses(rng: np.random.Generator, side: int, number: int) -> list[MaskRecord]:
    y, x = np.ogrid[:side, :side]
    records = []
    for _ in range(number):
        centre, radii = rng.uniform(0, side, 2), side * np.exp(rng.uniform(np.log(0.01), np.log(0.5), 2))
        records.append(_record(((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1))
    return [record for record in records if record["area"]]
