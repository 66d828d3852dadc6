"""Automatic mask generation by samray and its peers, each in its own process, for `jobs/benchmark.py generator`.

A worker loads one engine with given weights and waits; for every line on its standard input it generates the masks of
the image once, and prints seconds, memory and masks as one line of JSON. This lets engines take turns on the same
machine without affecting each other's caches or memory.

    python -m jobs.benchmarks.peers ENGINE JOB.json    ENGINE: one of `compare.ENGINES`
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from samray.config import MaskConfig  # noqa: E402
from samray.masks import MaskGenerator  # noqa: E402
from samray.masks import generator as masks_generator  # noqa: E402
from samray.rle import encode as rle  # noqa: E402
from samray.sam.sam import Sam  # noqa: E402
from samray.sam.spec import MODELS  # noqa: E402

Images = list[np.ndarray[Any, np.dtype[np.uint8]]]
Run = Callable[[Images], Sequence[Sequence[Mapping[str, Any]]]]
"""Images (H, W, 3) RGB to one list of masks each, with `segmentation` as COCO RLE, `predicted_iou`."""


Encoder = tuple[Any, str]
"""An object and the name of its method that encodes images, which is timed."""


def samray_engine(job: dict[str, Any], device: str) -> tuple[Run, Sam, MaskGenerator]:
    dtype = torch.bfloat16 if job.get("dtype") == "bfloat16" else torch.float32
    model = Sam(MODELS[job["model"]])
    model.load_state_dict(load_file(job["weights"]))
    model = model.eval().requires_grad_(False).to(device).cast_image_side(dtype)
    generator = MaskGenerator(model, MaskConfig(bbox_convention="sam", **job["settings"]))
    return generator.generate, model, generator


def segment_anything_engine(job: dict[str, Any], device: str) -> tuple[Run, Encoder]:
    from jobs.benchmarks.reference import build_reference, segment_anything

    model = build_reference(MODELS[job["model"]], load_file(job["weights"])).to(device)
    make = segment_anything().SamAutomaticMaskGenerator
    generator = make(model, output_mode="coco_rle", **job["settings"])
    return lambda images: [generator.generate(image) for image in images], (model.image_encoder, "forward")


def sam2_engine(job: dict[str, Any], device: str) -> tuple[Run, Encoder]:
    from jobs.benchmarks.reference_sam2 import build_sam2, sam2_generator, sam2_state

    spec = MODELS[job["model"]]
    model = build_sam2(spec)
    model.load_state_dict(sam2_state(model, load_file(job["weights"])))
    generator = sam2_generator(model.to(device), spec, job["settings"])
    return lambda images: [generator.generate(image) for image in images], (model, "forward_image")


def transformers_sam2_engine(job: dict[str, Any], device: str) -> tuple[Run, Encoder]:
    """Its networks alone, for the same clicks in batches of 64, to low-resolution logits: no masks are made of them.

    Its image processor, and so its pipeline, needs torchvision.
    """
    from jobs.benchmarks.reference import transformers_sam2_with
    from samray.masks.points import point_grid

    state = load_file(job["weights"])
    spec = MODELS[job["model"]]
    model = transformers_sam2_with(spec, state).to(device)
    preprocess = Sam(spec).to(device)
    points = torch.from_numpy(point_grid(job["settings"].get("points_per_side", 32))).float() * spec.image_size

    def run(images: Images) -> list[list[dict[str, Any]]]:
        for image in images:
            embeddings = model.get_image_embeddings(preprocess.preprocess([image])[0])
            for batch in points.to(device).split(64):
                model(
                    image_embeddings=embeddings,
                    input_points=batch[None, :, None],
                    input_labels=torch.ones(1, len(batch), 1, dtype=torch.int64, device=device),
                    multimask_output=True,
                )
        return [[] for _ in images]

    return run, (model, "get_image_embeddings")


def transformers_engine(job: dict[str, Any], device: str) -> tuple[Run, Encoder]:
    if MODELS[job["model"]].frame == "square":
        return transformers_sam2_engine(job, device)
    from jobs.benchmarks.reference import transformers_pipeline

    pipeline = transformers_pipeline(MODELS[job["model"]], load_file(job["weights"]), device)
    settings = job["settings"]
    options = {
        "points_per_crop": settings.get("points_per_side", 32),
        "pred_iou_thresh": settings["pred_iou_thresh"],
        "stability_score_thresh": settings["stability_score_thresh"],
        "crops_nms_thresh": settings.get("box_nms_thresh", 0.7),  # its only NMS threshold
        "points_per_batch": 64,
    }

    def run(images: Images) -> list[list[dict[str, Any]]]:
        from PIL import Image

        results = [pipeline(Image.fromarray(image), output_rle_mask=True, **options) for image in images]
        return [[{"predicted_iou": float(score)} for score in one["scores"]] for one in results]

    return run, (pipeline.model.vision_encoder, "forward")


# --- where samray's time goes --------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds by name, of calls that do not overlap; nested calls count for the inner one."""

    def __init__(self, device: str) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._cuda = device.startswith("cuda")
        self._open: list[list[float]] = []

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = self._now()
        self._open.append([0.0])
        try:
            yield
        finally:
            seconds = self._now() - start
            (within,) = self._open.pop()
            self.seconds[name] += seconds - within
            if self._open:
                self._open[-1][0] += seconds

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Time every call of a method under a name."""
        body = getattr(owner, method)

        @functools.wraps(body)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.time(name):
                return body(*args, **kwargs)

        setattr(owner, method, wrapped)


def watch_stages(model: Sam, generator: MaskGenerator, device: str) -> Stopwatch:
    """A stopwatch on the parts of a mask generator. On a GPU it waits for each part, which makes the whole slower."""
    generator.overlaps = False  # concurrent work cannot be timed separately
    watch = Stopwatch(device)
    watch.wrap(model, "resize", "resize")
    watch.wrap(model, "normalize", "resize")
    watch.wrap(model, "encode_images", "encoder")
    watch.wrap(model, "prepare_decoder", "decoder")
    watch.wrap(model.prompt_encoder, "encode_points", "prompts")
    watch.wrap(model.mask_decoder, "run", "decoder")
    watch.wrap(model.mask_decoder, "upscale", "upscaling")
    watch.wrap(generator, "_measure", "scoring")
    watch.wrap(generator, "_filter", "scoring")
    watch.wrap(masks_generator, "box_nms", "NMS")
    watch.wrap(generator, "_finish", "run lengths")
    watch.wrap(rle, "compress", "RLE strings")
    return watch


# --- the worker ----------------------------------------------------------------------------------------------------


def status_bytes(field: str) -> int:
    """A value of /proc/self/status, such as VmHWM (peak resident memory) or VmRSS (current)."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, field
    return int(match[1]) * 1024


def forget_peak() -> None:
    """Reset the peak to the current memory use."""
    Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def main(engine: str, job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = [np.load(path) for path in job["images"]]
    watch = None
    if engine in ("samray", "samray-bfloat16"):
        job["dtype"] = "bfloat16" if engine == "samray-bfloat16" else job.get("dtype")
        run, model, generator = samray_engine(job, device)
        encoder: Encoder = (model, "encode_images")
        if job.get("stages"):
            watch = watch_stages(model, generator, device)
    else:
        peers = {"segment-anything": segment_anything_engine, "sam2": sam2_engine, "transformers": transformers_engine}
        run, encoder = peers[engine](job, device)
    encoding = Stopwatch(device)
    if watch is None:  # else it is one of the stages
        encoding.wrap(*encoder, "encoder")
    loaded = status_bytes("VmRSS")
    print(json.dumps({"loaded_mb": loaded / 1e6}), flush=True)
    for _ in sys.stdin:
        forget_peak()
        if watch is not None:
            watch.seconds.clear()
        encoding.seconds.clear()
        start = time.perf_counter()
        with torch.inference_mode():
            masks = run(images)
        seconds = time.perf_counter() - start
        figures: dict[str, Any] = {
            "seconds": seconds,
            "peak_mb": status_bytes("VmHWM") / 1e6,
            "peak_beyond_model_mb": (status_bytes("VmHWM") - loaded) / 1e6,
            "masks": masks,
        }
        if watch is None:
            figures["encoder_seconds"] = encoding.seconds["encoder"]
            figures["seconds_after_encoder"] = seconds - encoding.seconds["encoder"]
        if device == "cuda":
            figures["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 1e6
        if watch is not None:
            figures["stage_seconds"] = {**watch.seconds, "other": seconds - sum(watch.seconds.values())}
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
