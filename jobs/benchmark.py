"""The measurements behind the README's figures. Each prints JSON with the machine and the versions.

    python jobs/benchmark.py decoder             our decoder against the published one: 64 prompts, one process
    python jobs/benchmark.py memory              peak memory of the mask generator on one 12-megapixel image
    python jobs/benchmark.py pipeline PHOTOS     `samray.label` against the bare MaskGenerator, the same images
    python jobs/benchmark.py extract PARQUET DIR writes the photographs of a Parquet file with a `jpeg` column as files

`decoder` needs the test extra (segment-anything). Quote ratios of one run, not single times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import samray  # noqa: E402
from samray.config import load_config  # noqa: E402
from samray.images import decode_image  # noqa: E402
from samray.sam.sam import Sam  # noqa: E402
from samray.sam.spec import MODELS  # noqa: E402


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":", 1)[1].strip() for line in info.open() if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    packages = {name: version(name) for name in ("torch", "ray", "pyarrow")}
    versions = {"python": platform.python_version(), "samray": samray.__version__, **packages}
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu, **versions}


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
        "failed": run.num_failed,
        "plain_stage_seconds": generator.stage_seconds,
        "label_stage_seconds": run.stage_seconds,
    }


def extract(parquet: Path, folder: Path, limit: int | None) -> dict[str, Any]:
    """Write the photographs of a Parquet file with the columns file_name and jpeg as files."""
    import pyarrow.parquet as pq

    table = pq.read_table(parquet, columns=["file_name", "jpeg"]).slice(0, limit)
    folder.mkdir(parents=True, exist_ok=True)
    for row in table.to_pylist():
        (folder / Path(row["file_name"]).with_suffix(".jpg").name).write_bytes(row["jpeg"])
    return {"written": table.num_rows, "folder": str(folder)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("decoder")
    sub.add_argument("--rounds", type=int, default=7)
    sub.add_argument("--prompts", type=int, default=64)
    sub = commands.add_parser("memory")
    sub.add_argument("--model", dest="model_name", default="vit_b", choices=list(MODELS))
    sub.add_argument("--megapixels", type=float, default=12.0)
    sub = commands.add_parser("pipeline")
    sub.add_argument("photos", type=Path)
    sub.add_argument("settings", nargs="*", help="section.key=value")
    sub.add_argument("--limit", type=int)
    sub = commands.add_parser("extract")
    sub.add_argument("parquet", type=Path)
    sub.add_argument("folder", type=Path)
    sub.add_argument("--limit", type=int)
    arguments = vars(parser.parse_args())
    bodies: dict[str, Callable[..., dict[str, Any]]] = {
        "decoder": decoder,
        "memory": memory,
        "pipeline": pipeline,
        "extract": extract,
    }
    command = arguments.pop("command")
    print(json.dumps({"benchmark": command, **bodies[command](**arguments), "machine": machine()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
