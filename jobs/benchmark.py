"""The measurements behind the README's figures. Each prints JSON with the machine and the versions.

    python jobs/benchmark.py decoder             our decoder against the published one: 64 prompts, one process
    python jobs/benchmark.py generator           all masks of an image, by samray, segment-anything and transformers
    python jobs/benchmark.py decode PHOTOS       JPEG by Pillow and by others, and whether it is the same
    python jobs/benchmark.py memory              peak memory of the mask generator on one 12-megapixel image
    python jobs/benchmark.py pipeline PHOTOS     `samray.label` against the bare MaskGenerator, the same images
    python jobs/benchmark.py export              memory and seconds of `samray.export`, killed half-way and run again
    python jobs/benchmark.py report              seconds, memory and page size of `samray report` on 100,000 images
    python jobs/benchmark.py extract PARQUET DIR writes the photographs of a Parquet file with a `jpeg` column as files
    python jobs/benchmark.py read                bytes that one image of 100,000 costs on S3, and what an index costs

`decoder` and `read` need the test extra (segment-anything, an S3 server). Quote ratios of one run, not single times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from measuring import measure  # noqa: E402

import samray  # noqa: E402
from samray.config import load_config  # noqa: E402
from samray.images import decode_image  # noqa: E402
from samray.sam.sam import Sam  # noqa: E402
from samray.sam.spec import MODELS  # noqa: E402

ENGINES = ("samray", "segment-anything", "transformers")


def timed(body: Callable[[], object]) -> float:
    start = time.perf_counter()
    body()
    return time.perf_counter() - start


@torch.inference_mode()
def decoder(rounds: int, prompts: int) -> dict[str, Any]:
    """Seconds for one batch of click prompts on one image embedding of the full-size decoder, to low-res logits."""
    sys.path.insert(0, str(ROOT / "tests" / "parity"))
    from reference import build_reference
    from weights import random_sam

    model: Sam = random_sam(MODELS["vit_b"])  # all published sizes have this decoder; the encoder is not timed
    reference = build_reference(model.spec, model.state_dict())
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(1, model.spec.embed_dim, model.spec.grid, model.spec.grid, generator=generator)
    points = torch.rand(prompts, 1, 2, generator=generator) * model.image_size
    labels = torch.ones(prompts, 1, dtype=torch.int64)

    def run_reference() -> tuple[torch.Tensor, torch.Tensor]:
        sparse, dense = reference.prompt_encoder(points=(points, labels), boxes=None, masks=None)
        out: tuple[torch.Tensor, torch.Tensor] = reference.mask_decoder(
            image_embeddings=embedding,
            image_pe=reference.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        return out

    logits, iou = run_reference()
    # A third of the candidates passes the IoU filter, as is typical of real weights.
    min_iou = float(iou.flatten().quantile(2 / 3))

    def run_all() -> Any:
        return model.decode_points(model.prepare_decoder(embedding), points, labels)

    def run_filtered() -> Any:
        return model.decode_points(model.prepare_decoder(embedding), points, labels, min_iou=min_iou)

    difference = float((run_all().logits.view_as(logits) - logits).abs().max() / logits.abs().max())
    seconds: dict[str, list[float]] = {"reference": [], "samray": [], "samray_iou_filter": []}
    for _ in range(rounds):
        seconds["reference"].append(timed(run_reference))
        seconds["samray"].append(timed(run_all))
        seconds["samray_iou_filter"].append(timed(run_filtered))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "prompts": prompts,
        "rounds": rounds,
        "median_s": median,
        "speedup": median["reference"] / median["samray"],
        "speedup_iou_filter": median["reference"] / median["samray_iou_filter"],
        "max_difference_relative_to_logits": difference,
    }


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
) -> dict[str, Any]:
    """The whole mask generator and its peers: same images, same weights, one process each, taking turns.

    Seeded random weights, unless `checkpoint` names published ones, with thresholds such that a third of the 3,072
    candidates of an image passes the IoU filter and about 100 masks are kept, as with real weights.
    """
    images = _benchmark_images(image_hw, num_images, photos)
    results: dict[str, Any] = {}
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            job = _make_job(Path(folder), name, images, checkpoint, dtype)
            able = [engine for engine in engines if engine != "transformers" or name in ("vit_b", "vit_l", "vit_h")]
            runs = _take_turns(able, {**job, "stages": False}, rounds)
            result = {"settings": job["settings"], **{engine: _summary(found) for engine, found in runs.items()}}
            ours = result["samray"]
            for engine in able:
                if engine != "samray":
                    ratios = {
                        key: result[engine][key] / ours[key] for key in ("seconds", "peak_mb", "peak_beyond_model_mb")
                    }
                    result[f"{engine} / samray"] = ratios
            if "segment-anything" in able:
                result["agreement"] = _agreement(runs["samray"][-1]["masks"], runs["segment-anything"][-1]["masks"])
            if stages:
                watched = _take_turns(["samray"], {**job, "stages": True}, rounds)["samray"]
                keys = watched[0]["stage_seconds"]
                result["stage_seconds"] = {
                    k: statistics.median(run["stage_seconds"][k] for run in watched) for k in keys
                }
                result["arithmetic"] = _arithmetic(Path(folder), job)
            results[name] = result
    return {"images": [list(image.shape) for image in images], "rounds": rounds, "models": results}


def _benchmark_images(image_hw: tuple[int, int], number: int, photos: Path | None) -> list[Any]:
    """Photographs in the given size, scaled up where they are smaller; without any, seeded coloured patches."""
    import numpy as np
    from PIL import Image

    sys.path.insert(0, str(ROOT / "tests" / "parity"))
    from weights import blobs

    if photos is None:
        return [blobs(seed, image_hw) for seed in range(number)]
    files = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[:number]
    size = (image_hw[1], image_hw[0])
    return [np.asarray(Image.open(file).convert("RGB").resize(size, Image.Resampling.BICUBIC)) for file in files]


def _make_job(folder: Path, name: str, images: list[Any], checkpoint: str | None, dtype: str) -> dict[str, Any]:
    """The weights, images and settings that all engines share, as files in folder."""
    import numpy as np
    from safetensors.torch import save_file
    from weights import random_sam

    model = (
        samray.load_model(name, checkpoint, "cpu", "float32")
        if checkpoint
        else random_sam(MODELS[name], image=images[0])
    )
    settings = {} if checkpoint else _typical_settings(model, images[0])
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "weights.safetensors")
    paths = []
    for i, image in enumerate(images):
        np.save(folder / f"{i}.npy", image)
        paths.append(str(folder / f"{i}.npy"))
    job = {"model": name, "weights": str(folder / "weights.safetensors"), "images": paths, "dtype": dtype}
    return {**job, "settings": {"pred_iou_thresh": 0.88, "stability_score_thresh": 0.95, **settings}}


@torch.inference_mode()
def _typical_settings(model: Sam, image: Any) -> dict[str, float]:
    """Have random weights let as many candidates through as published ones do: moves the predicted IoUs so that a
    third is above 0.88, and returns thresholds of stability and of NMS with which 600 and then about 100 are left.
    Where boxes are so alike that NMS leaves either far fewer or all, all are.
    """
    import numpy as np

    from samray.config import MaskConfig
    from samray.masks.nms import box_nms

    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    iou: list[torch.Tensor] = []
    decode = model.decode_points

    def watched(*args: Any, **kwargs: Any) -> Any:
        decoded = decode(*args, **{**kwargs, "min_iou": 2.0})
        iou.append(decoded.all_iou.flatten())
        return decoded

    model.decode_points = watched  # type: ignore[method-assign]
    samray.MaskGenerator(model, MaskConfig()).generate([image])
    model.decode_points = decode  # type: ignore[method-assign]
    model.mask_decoder.iou_prediction_head.layers[-1].bias.add_(0.88 - torch.cat(iou).quantile(2 / 3))  # type: ignore[operator]
    everything = MaskConfig(stability_score_thresh=0.0, box_nms_thresh=1.0)
    found = samray.MaskGenerator(model, everything).generate([image])[0]
    model.to("cpu")
    stability = np.array([mask["stability_score"] for mask in found])
    boxes = np.array([mask["bbox"] for mask in found])
    boxes[:, 2:] += boxes[:, :2] - 1
    scores = np.array([mask["predicted_iou"] for mask in found])
    stability_score_thresh = round(float(np.quantile(stability, 0.4)), 4)
    stable = stability >= stability_score_thresh
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if len(box_nms(boxes[stable], scores[stable], middle)) < 100 else (low, middle)
    return {"stability_score_thresh": stability_score_thresh, "box_nms_thresh": round(high, 4)}


def _take_turns(engines: list[str], job: dict[str, Any], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every engine's figures of each round. None is left out to warm up: medians do not mind, and a round is long."""
    path = Path(job["weights"]).with_name("job.json")
    path.write_text(json.dumps(job))
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    with contextlib.ExitStack() as stack:
        workers = {}
        for engine in engines:
            command = [sys.executable, str(ROOT / "jobs" / "peers.py"), engine, str(path)]
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


def _agreement(ours: list[list[dict[str, Any]]], theirs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """How alike two engines' masks are: counts, RLEs that are the same, and IoU of each mask with its best match."""
    from pycocotools import mask as coco_mask

    same, best = 0, []
    for a, b in zip(ours, theirs, strict=True):
        counts = {mask["segmentation"]["counts"] for mask in b}
        same += sum(mask["segmentation"]["counts"] in counts for mask in a)
        if a and b:
            ious = coco_mask.iou([m["segmentation"] for m in a], [m["segmentation"] for m in b], [0] * len(b))
            best += ious.max(axis=1).tolist()
    numbers = {"samray": sum(map(len, ours)), "segment-anything": sum(map(len, theirs))}
    return {**numbers, "identical_rle": same, "mean_best_iou": statistics.fmean(best) if best else None}


@torch.inference_mode()
def _arithmetic(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Floating point operations of one image, by torch's own count, and what the machine does in a plain product."""
    import numpy as np
    from peers import samray_engine
    from torch.utils.flop_counter import FlopCounterMode

    device = "cuda" if torch.cuda.is_available() else "cpu"
    run, model, _ = samray_engine(job, device)
    image = np.load(job["images"][0])
    with FlopCounterMode(display=False) as counter:
        run([image])
    seconds = timed(lambda: run([image]))
    size = 8192 if device == "cuda" else 3072
    a = torch.rand(size, size, device=device, dtype=model.dtype)

    def product() -> None:
        torch.mm(a, a)
        if device == "cuda":
            torch.cuda.synchronize()

    product()
    peak = 2 * size**3 / min(timed(product) for _ in range(7))
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


def memory(model_name: str, megapixels: float) -> dict[str, Any]:
    """Peak resident memory beyond the loaded model while masks of one large image are generated.

    Default options, but stability_score_thresh 0.5: random weights stand in for the published ones, and their masks are
    less stable.
    """
    sys.path.insert(0, str(ROOT / "tests" / "parity"))
    from weights import blobs, random_sam

    model = random_sam(MODELS[model_name])
    width = round((megapixels * 1e6 * 4 / 3) ** 0.5)
    image = blobs(0, (width * 3 // 4, width))
    before = _peak_bytes()
    current = _resident_bytes()
    generator = samray.MaskGenerator(model, samray.MaskConfig(stability_score_thresh=0.5))
    masks: list[dict[str, Any]] = []
    seconds = timed(lambda: masks.extend(generator.generate([image])[0]))
    return {
        "model": model_name,
        "image": list(image.shape),
        "masks": len(masks),
        "seconds": seconds,
        "peak_beyond_model_mb": (_peak_bytes() - current) / 1e6,
        "peak_before_mb": before / 1e6,
        "stage_seconds": generator.stage_seconds,
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def decode(photos: Path, megapixels: float, limit: int | None) -> dict[str, Any]:
    """Milliseconds to decode a JPEG by Pillow, as samray does, and by others; and whether the pixels are the same.

    The photographs as they are, and one of them at `megapixels`. "half size" decodes at half the resolution, as
    libjpeg-turbo can from the frequencies, and resizes that to the model's input; its difference is that of the input.
    """
    import io

    import cv2
    import numpy as np
    from PIL import Image

    files = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[:limit]
    width = round((megapixels * 1e6 * 3 / 2) ** 0.5)
    large = io.BytesIO()
    first = Image.open(files[0]).convert("RGB")
    first.resize((width, width * 2 // 3), Image.Resampling.BICUBIC).save(large, "JPEG", quality=90)

    def by_opencv(data: bytes) -> Any:
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert found is not None
        return cv2.cvtColor(found, cv2.COLOR_BGR2RGB)

    def at_half_size(data: bytes) -> Any:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (image.width // 2, image.height // 2))
        return np.asarray(image)

    def to_input(image: Any) -> Any:
        return np.asarray(Image.fromarray(image).resize((1024, 682), Image.Resampling.BILINEAR), dtype=np.int16)

    results = {}
    for name, encoded in (("photographs", [f.read_bytes() for f in files]), ("large", [large.getvalue()] * 5)):
        seconds: dict[str, list[float]] = {"pillow": [], "opencv": [], "half size": []}
        for data in encoded:
            seconds["pillow"].append(timed(lambda data=data: decode_image(data, 10**9)))  # type: ignore[misc]
            seconds["opencv"].append(timed(lambda data=data: by_opencv(data)))  # type: ignore[misc]
            seconds["half size"].append(timed(lambda data=data: at_half_size(data)))  # type: ignore[misc]
        whole = decode_image(encoded[0], 10**9)
        results[name] = {
            "images": len(encoded),
            "shape": list(whole.shape),
            "median_ms": {key: 1000 * statistics.median(values) for key, values in seconds.items()},
            "opencv_gives_the_same_pixels": bool((whole == by_opencv(encoded[0])).all()),
            "half_size_largest_difference": int(np.abs(to_input(whole) - to_input(at_half_size(encoded[0]))).max()),
        }
    return results


def pipeline(photos: Path, limit: int | None, settings: list[str]) -> dict[str, Any]:
    """Wall time of `samray.label` and of a plain loop over the same files; a run with one image gives the start-up."""
    config = load_config(None, None, settings + ([f"input.limit={limit}"] if limit else []))
    files = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[:limit]
    model = samray.load_model(config.model.name, config.model.checkpoint)
    generator = samray.MaskGenerator(model, config.masks)

    def plain() -> int:
        return sum(len(generator.generate([decode_image(f.read_bytes(), config.input.max_pixels)])[0]) for f in files)

    generator.generate([decode_image(files[0].read_bytes(), config.input.max_pixels)])  # warm
    num_masks = 0
    start = time.perf_counter()
    num_masks = plain()
    plain_s = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        one = load_config(None, None, [*settings, "input.limit=1"])
        first = samray.label(str(photos), f"{folder}/one", one, progress=False)
        run = samray.label(str(photos), f"{folder}/all", config, progress=False)
        again = samray.label(str(photos), f"{folder}/all", config, progress=False)
        busy = _busy_once_running(f"{folder}/all")
    beyond_start = run.wall_s - (first.wall_s - plain_s / len(files))
    return {
        "images": len(files),
        "plain_s": plain_s,
        "label_s": run.wall_s,
        "label_one_image_s": first.wall_s,
        "label_again_s": again.wall_s,
        "start_up_s": run.wall_s - beyond_start,
        "s_per_image_after_start_up": beyond_start / len(files),
        "ratio_after_start_up": beyond_start / plain_s,
        "masks_per_image": run.num_masks / max(1, run.num_labelled),
        "same_masks": run.num_masks == num_masks,
        "model_busy_once_running": busy,
        "failed": run.num_failed,
        "plain_stage_seconds": generator.stage_seconds,
        "label_stage_seconds": run.stage_seconds,
    }


def _busy_once_running(output: str) -> float | None:
    """Of the time that the labelling actor was there, the share in which its model worked, by the shards' own counts.

    Without the shard in which it did so least: that is the one that waited for the model to load.
    """
    from samray.dataset.shards import done_shards, read_metadata

    stats = [read_metadata(output, shard)["stats"] for shard in done_shards(output)]
    stats.sort(key=lambda one: one["held_seconds"] - one["device_seconds"])
    held = sum(one["held_seconds"] for one in stats[:-1])
    return sum(one["device_seconds"] for one in stats[:-1]) / held if held else None


# VmHWM and not ru_maxrss, which a child inherits from the process that started it.
EXPORT_CODE = """
import json, re, sys, samray
run = samray.export(*sys.argv[1:3], format=sys.argv[3], polygons=bool(int(sys.argv[4])))
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
counts = {"masks": run.num_masks, "pieces": run.num_pieces, "skipped": run.num_pieces_skipped}
print(json.dumps({"peak_mb": peak, "seconds": run.wall_s, **counts}))
"""


def export(images: int, masks: int, format: str, polygons: bool) -> dict[str, Any]:
    """Peak memory and seconds of an export in a fresh process; then of one that is killed half-way and run again."""
    from synthetic_output import digest, write_synthetic_output

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
from samray.report import write_report
page = write_report(*sys.argv[1:3])
seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time()}
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
print(json.dumps({**seconds, "peak_mb": peak, "page_mb": os.path.getsize(page) / 1e6}))
"""


def report(images: int, masks: int, file_mb: int, folder: Path | None) -> dict[str, Any]:
    """A report of a synthetic output in shards of 64 images, and of the same compacted into files of `file_mb`.

    Its images are 8 different ones of 2250x1500, used in turn. Each report is made by a fresh process, imports counted.
    """
    from PIL import Image
    from synthetic_output import HEIGHT, WIDTH, write_synthetic_output

    from samray.dataset.compact import compact
    from samray.scenes import make_scene

    with tempfile.TemporaryDirectory() as temporary:
        root = folder or Path(temporary)
        photos = [root / f"photo-{i}.jpg" for i in range(8)]
        if not (root / "output" / "_SUCCESS").exists():  # else it was kept from an earlier call
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


def extract(parquet: Path, folder: Path, limit: int | None) -> dict[str, Any]:
    """Write the photographs of a Parquet file with the columns file_name and jpeg as files."""
    import pyarrow.parquet as pq

    table = pq.read_table(parquet, columns=["file_name", "jpeg"]).slice(0, limit)
    folder.mkdir(parents=True, exist_ok=True)
    for row in table.to_pylist():
        (folder / Path(row["file_name"]).with_suffix(".jpg").name).write_bytes(row["jpeg"])
    return {"written": table.num_rows, "folder": str(folder)}


def read(rows: int, masks: int, shapes: int, uri: str | None) -> dict[str, Any]:
    """Bytes fetched to read single images by id from an output of one shard.

    Without `uri` the output lies on a local S3 server, and all that it sends is counted on the wire: headers, lookups
    and all. What other readers fetch for the same image is counted, too. With `uri`, an empty folder on an object
    store, the bytes that samray reads are counted.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    from byte_counts import count_on_the_wire, count_reads
    from s3_server import make_bucket, running_s3
    from synthetic_output import write_synthetic_output

    # Radii that give RLEs of 60 to 300 characters, and so many shapes that pages compress as if none came twice.
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
    """What `read_image` and `MaskDataset` fetch, by a counter of bytes so far."""
    from samray import storage
    from samray.dataset.lookup import read_footer
    from samray.dataset.shards import shard_uri

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
    """How other readers are asked for one image; each returns the rows that it found."""
    import duckdb
    import polars
    import pyarrow.dataset as pads
    import s3fs

    duckdb.register_filesystem(s3fs.S3FileSystem(default_cache_type="none"))  # else blocks of 50 MB are read ahead
    return {
        "pyarrow_dataset": lambda: (
            pads.dataset(uri).to_table(filter=pads.field("image", "image_id") == image_id).num_rows
        ),
        "duckdb": lambda: len(duckdb.execute(f"SELECT * FROM '{uri}' WHERE image.image_id = {image_id}").fetchall()),
        "polars": lambda: (
            polars.scan_parquet(uri).filter(polars.col("image").struct.field("image_id") == image_id).collect().height
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("decoder")
    sub.add_argument("--rounds", type=int, default=7)
    sub.add_argument("--prompts", type=int, default=64)
    sub = commands.add_parser("generator")
    sub.add_argument("--models", nargs="+", default=["vit_t", "vit_b"], choices=list(MODELS))
    sub.add_argument("--engines", nargs="+", default=["samray", "segment-anything"], choices=ENGINES)
    sub.add_argument("--rounds", type=int, default=3)
    sub.add_argument("--image-hw", nargs=2, type=int, default=(1200, 1800), metavar=("H", "W"))
    sub.add_argument("--num-images", type=int, default=1, help="in one call")
    sub.add_argument("--photos", type=Path, help="a folder of photographs; by default seeded coloured patches")
    sub.add_argument("--checkpoint", help="of published weights; by default seeded random ones")
    sub.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="samray's; peers run as shipped"
    )
    sub.add_argument("--stages", action="store_true", help="also where samray's time goes, and how many FLOP it does")
    sub = commands.add_parser("memory")
    sub.add_argument("--model", dest="model_name", default="vit_b", choices=list(MODELS))
    sub.add_argument("--megapixels", type=float, default=12.0)
    sub = commands.add_parser("decode")
    sub.add_argument("photos", type=Path)
    sub.add_argument("--megapixels", type=float, default=12.0)
    sub.add_argument("--limit", type=int, default=20)
    sub = commands.add_parser("pipeline")
    sub.add_argument("photos", type=Path)
    sub.add_argument("settings", nargs="*", help="section.key=value")
    sub.add_argument("--limit", type=int)
    sub = commands.add_parser("export")
    sub.add_argument("--images", type=int, default=10_000)
    sub.add_argument("--masks", type=int, default=100, help="an image")
    sub.add_argument("--format", default="coco", choices=["sa1b", "coco", "yolo", "flat", "label-map"])
    sub.add_argument("--polygons", action="store_true")
    sub = commands.add_parser("report")
    sub.add_argument("--images", type=int, default=100_000)
    sub.add_argument("--masks", type=int, default=100, help="an image")
    sub.add_argument("--file-mb", type=int, default=256, help="of the compacted output")
    sub.add_argument("--folder", type=Path, help="where the outputs are made and kept; by default they are not")
    sub = commands.add_parser("extract")
    sub.add_argument("parquet", type=Path)
    sub.add_argument("folder", type=Path)
    sub.add_argument("--limit", type=int)
    sub = commands.add_parser("read")
    sub.add_argument("--rows", type=int, default=100_000)
    sub.add_argument("--masks", type=int, default=12, help="an image")
    sub.add_argument("--shapes", type=int, default=4000, help="different masks")
    sub.add_argument("--uri", help="an empty folder on an object store; by default a local S3 server is started")
    bodies: dict[str, Callable[..., dict[str, Any]]] = {
        "decoder": decoder,
        "decode": decode,
        "generator": generator,
        "memory": memory,
        "pipeline": pipeline,
        "export": export,
        "report": report,
        "extract": extract,
        "read": read,
    }
    return measure(parser, commands, bodies)


if __name__ == "__main__":
    sys.exit(main())
