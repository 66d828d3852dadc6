"""`jobs/benchmark.py generator`: samray's mask generator and its peers, which run in `peers.py`, taking turns.

In order: images, weights and thresholds that all engines share; the turns; the evaluation.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import samray
from jobs.benchmarks.measuring import timed
from samray.config import MaskConfig, load_config
from samray.sam.sam import Sam
from samray.sam.spec import MODELS, HieraSpec, VitSpec

ROOT = Path(__file__).resolve().parents[2]

ENGINES = ("samray", "samray-bfloat16", "segment-anything", "sam2", "transformers")
"""samray-bfloat16 is samray with `model.dtype=bfloat16`; transformers with SAM 2 is its networks alone."""

_RATIOS = ("seconds", "encoder_seconds", "seconds_after_encoder", "peak_mb", "peak_beyond_model_mb")


def generator(
    models: list[str],
    engines: list[str],
    rounds: int,
    image_hw: tuple[int, int],
    num_images: int,
    photos: Path | None,
    checkpoint: str | None,
    dtype: str,
    stages: bool,
    points: int = 32,
) -> dict[str, Any]:
    """The whole mask generator and its peers: same images, same weights, one process each, taking turns.

    Uses seeded random weights unless `checkpoint` names published ones. The thresholds let a third of an image's 3,072
    candidates pass the IoU filter and keep about 100 masks, as with real weights.
    """
    images = _benchmark_images(image_hw, num_images, photos)
    results: dict[str, Any] = {}
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            job = _make_job(Path(folder), name, images, checkpoint, dtype, points)
            able = [engine for engine in engines if _can_run(engine, name)]
            runs = _take_turns(able, {**job, "stages": False}, rounds)
            result = {
                "settings": job["settings"],
                **{engine: _summary(engine_runs) for engine, engine_runs in runs.items()},
            }
            for engine in able if "samray" in able else []:
                ours = result["samray"]
                if engine != "samray":
                    result[f"{engine} / samray"] = {key: result[engine][key] / ours[key] for key in _RATIOS}
            for engine in able if "samray" in able else []:
                if engine in ("samray-bfloat16", "segment-anything", "sam2"):
                    result[f"agreement with {engine}"] = agreement_of(
                        runs["samray"][-1]["masks"], runs[engine][-1]["masks"], engine
                    )
            if stages:
                watched = _take_turns(["samray"], {**job, "stages": True}, rounds)["samray"]
                keys = watched[0]["stage_seconds"]
                result["stage_seconds"] = {
                    k: statistics.median(run["stage_seconds"][k] for run in watched) for k in keys
                }
                result["arithmetic"] = _arithmetic(Path(folder), job)
            results[name] = result
    return {"images": [list(image.shape) for image in images], "rounds": rounds, "models": results}


def against_sam2(models: list[str], rounds: int, points: int, image_hw: tuple[int, int]) -> dict[str, Any]:
    """`generator` for SAM 2, against its package and transformers' networks, with seeded random weights.

    `bars` are the least that samray must reach against the package: times, and its share of the peak memory.
    """
    if importlib.util.find_spec("sam2") is None:
        install = "SAM2_BUILD_CUDA=0 pip install --no-deps --no-build-isolation sam2==1.1.0"
        sys.exit(f"the package sam2 is missing: {install}")
    engines = ["samray", "sam2", "transformers"]
    comparison = generator(models, engines, rounds, image_hw, 1, None, None, "float32", False, points)
    for result in comparison["models"].values():
        ratios = result["sam2 / samray"]
        result["bars"] = {
            "4x after the encoder": ratios["seconds_after_encoder"] >= 4,
            "2.5x in all": ratios["seconds"] >= 2.5,
            "a third of the peak memory": ratios["peak_mb"] >= 3,
        }
    return {"points_per_side": points, **comparison}


def _can_run(engine: str, name: str) -> bool:
    """Whether an engine has this model."""
    spec = MODELS[name]
    if engine == "sam2":
        return isinstance(spec.encoder, HieraSpec)
    if engine == "segment-anything":
        return spec.frame == "pad"
    return engine != "transformers" or isinstance(spec.encoder, VitSpec | HieraSpec)


def _benchmark_images(image_hw: tuple[int, int], number: int, photos: Path | None) -> list[Any]:
    """Photographs resized to the given size; without any, seeded coloured patches."""
    from jobs.benchmarks.weights import blobs

    if photos is None:
        return [blobs(seed, image_hw) for seed in range(number)]
    return list(photographs(photos, image_hw, number))


def photographs(photos: Path, image_hw: tuple[int, int], number: int) -> Iterator[Any]:
    """Yield photographs of a folder, resized to the given size."""
    import numpy as np
    from PIL import Image

    files = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[:number]
    size = (image_hw[1], image_hw[0])
    for file in files:
        yield np.asarray(Image.open(file).convert("RGB").resize(size, Image.Resampling.BICUBIC))


def _make_job(
    folder: Path, name: str, images: list[Any], checkpoint: str | None, dtype: str, points: int
) -> dict[str, Any]:
    """Write the weights, images and settings that all engines share to files in folder."""
    import numpy as np
    from safetensors.torch import save_file

    from jobs.benchmarks.weights import random_sam

    model = (
        samray.load_model(name, checkpoint, "cpu", "float32")
        if checkpoint
        else random_sam(MODELS[name], image=images[0])
    )
    grid = {} if points == MaskConfig().points_per_side else {"points_per_side": points}
    settings = (_preset_of(name) if checkpoint else typical_settings(model, images[0], points)) | grid
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "weights.safetensors")
    paths = []
    for i, image in enumerate(images):
        np.save(folder / f"{i}.npy", image)
        paths.append(str(folder / f"{i}.npy"))
    job = {"model": name, "weights": str(folder / "weights.safetensors"), "images": paths, "dtype": dtype}
    return {**job, "settings": {"pred_iou_thresh": 0.88, "stability_score_thresh": 0.95, **settings}}


def _preset_of(name: str) -> dict[str, Any]:
    """The defaults of `samray label` for a published model: its preset for the embedded one, else none."""
    wanted = load_config(None, None, [f"model.name={name}"]).masks.model_dump()
    return {key: value for key, value in wanted.items() if value != MaskConfig().model_dump()[key]}


@torch.inference_mode()
def typical_settings(model: Sam, image: Any, points: int) -> dict[str, float]:
    """Make random weights keep as many candidates as published ones: shifts the predicted IoUs to put a third above
    0.88, and returns thresholds of stability and NMS that keep 600 and then about 100. If the boxes are so similar that
    NMS can keep only far fewer or all, it keeps all.
    """
    import numpy as np

    from samray.masks.nms import box_nms

    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    iou: list[torch.Tensor] = []
    decode = model.decode_points

    def watched(*args: Any, **kwargs: Any) -> Any:
        decoded = decode(*args, **{**kwargs, "min_iou": 2.0})
        iou.append(decoded.all_iou.flatten())
        return decoded

    model.decode_points = watched  # type: ignore[method-assign]
    samray.MaskGenerator(model, MaskConfig(points_per_side=points)).generate([image])
    model.decode_points = decode  # type: ignore[method-assign]
    score = torch.logit if model.spec.decoder.sigmoid_iou else torch.nn.Identity()
    shift = score(torch.tensor(0.88)) - score(torch.cat(iou).quantile(2 / 3).cpu())
    model.mask_decoder.iou_prediction_head.layers[-1].bias.add_(float(shift))  # type: ignore[operator]
    everything = MaskConfig(points_per_side=points, stability_score_thresh=0.0, box_nms_thresh=1.0)
    masks = samray.MaskGenerator(model, everything).generate([image])[0]
    model.to("cpu")
    stability = np.array([mask["stability_score"] for mask in masks])
    boxes = np.array([mask["bbox"] for mask in masks])
    boxes[:, 2:] += boxes[:, :2] - 1
    scores = np.array([mask["predicted_iou"] for mask in masks])
    stability_score_thresh = round(float(np.quantile(stability, 0.4)), 4)
    stable = stability >= stability_score_thresh
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if len(box_nms(boxes[stable], scores[stable], middle)) < 100 else (low, middle)
    return {"stability_score_thresh": stability_score_thresh, "box_nms_thresh": round(high, 4)}


def _take_turns(engines: list[str], job: dict[str, Any], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every engine's results per round. No round is discarded as warm-up: medians tolerate it, and a round is long."""
    path = Path(job["weights"]).with_name("job.json")
    path.write_text(json.dumps(job))
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    with contextlib.ExitStack() as stack:
        workers = {}
        for engine in engines:
            command = [sys.executable, "-m", "jobs.benchmarks.peers", engine, str(path)]
            worker = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
            )
            assert worker.stdout is not None
            worker.stdout.readline()
            workers[engine] = worker
        for _ in range(rounds):
            for engine, worker in workers.items():
                assert worker.stdin is not None
                assert worker.stdout is not None
                worker.stdin.write("run\n")
                figures = json.loads(worker.stdout.readline())
                print(f"{job['model']} {engine}: {figures['seconds']:.2f} s", file=sys.stderr, flush=True)
                runs[engine].append(figures)
        for worker in workers.values():
            assert worker.stdin is not None
            worker.stdin.close()
    return runs


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds."""
    keys = [key for key in runs[0] if key not in ("masks", "stage_seconds")]
    medians = {key: statistics.median(run[key] for run in runs) for key in keys}
    num_masks = [len(masks) for masks in runs[-1]["masks"]]
    rates = {"images_per_s": len(num_masks) / medians["seconds"], "masks_per_s": sum(num_masks) / medians["seconds"]}
    return {**medians, **rates, "masks": num_masks, "all_seconds": [round(run["seconds"], 3) for run in runs]}


def agreement_of(ours: list[list[dict[str, Any]]], theirs: list[list[dict[str, Any]]], engine: str) -> dict[str, Any]:
    """Similarity of two engines' masks: counts, identical RLEs, and each mask's IoU with its best match."""
    from pycocotools import mask as coco_mask

    same, best = 0, []
    for a, b in zip(ours, theirs, strict=True):
        counts = {mask["segmentation"]["counts"] for mask in b}
        same += sum(mask["segmentation"]["counts"] in counts for mask in a)
        if a and b:
            ious = coco_mask.iou([m["segmentation"] for m in a], [m["segmentation"] for m in b], [0] * len(b))
            best += ious.max(axis=1).tolist()
    numbers = {"samray": sum(map(len, ours)), engine: sum(map(len, theirs))}
    mean, over_90 = (statistics.fmean(best), statistics.fmean(iou > 0.9 for iou in best)) if best else (None, None)
    return {**numbers, "identical_rle": same, "mean_best_iou": mean, "share_above_iou_0.9": over_90}


@torch.inference_mode()
def _arithmetic(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Floating point operations for one image, counted by torch, and the machine's rate for a plain matrix product.

    On a CPU both per second of CPU time, so that other programs hardly change the share; best with OMP_NUM_THREADS=1.
    """
    import numpy as np
    from torch.utils.flop_counter import FlopCounterMode

    from jobs.benchmarks.peers import samray_engine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    run, model, _ = samray_engine(job, device)
    image = np.load(job["images"][0])
    with FlopCounterMode(display=False) as counter:
        run([image])

    def seconds_of(body: Callable[[], Any]) -> float:
        start = time.process_time()
        seconds = timed(body)
        return seconds if device == "cuda" else time.process_time() - start

    seconds = seconds_of(lambda: run([image]))
    size = 8192 if device == "cuda" else 3072
    a = torch.rand(size, size, device=device, dtype=model.dtype)

    def product() -> None:
        torch.mm(a, a)
        if device == "cuda":
            torch.cuda.synchronize()

    product()
    peak = 2 * size**3 / min(seconds_of(product) for _ in range(7))
    flop = counter.get_total_flops()
    return {
        "tflop": flop / 1e12,
        "measured_peak_tflop_per_s": peak / 1e12,
        "share_of_peak": flop / seconds / peak,
        "by_part": {key: value / 1e12 for key, value in _flop_by_part(counter).items()},
    }


def _flop_by_part(counter: Any) -> dict[str, float]:
    totals = {module: sum(by_op.values()) for module, by_op in counter.get_flop_counts().items()}
    return {name: totals[name] for name in totals if name.count(".") <= 1}
