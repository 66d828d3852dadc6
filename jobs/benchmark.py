"""The measurements behind docs/benchmarks.md. Each prints JSON with the machine and the versions.

    python jobs/benchmark.py decoder             samray's decoder and the published one: 64 prompts, one process
    python jobs/benchmark.py generator           all masks of an image, by samray (also in bfloat16) and its peers
    python jobs/benchmark.py sam2                the same for SAM 2, against the package sam2 and transformers' networks
    python jobs/benchmark.py core                CPU seconds of an encoder's pass and of a prompt, as plans estimate
    python jobs/benchmark.py onnx                ONNX files of every model in its real size, against torch
    python jobs/benchmark.py tiles PHOTOS        scoring and run lengths in open tiles only, and of whole masks
    python jobs/benchmark.py large               a 20,000 x 20,000 image in tiles, killed half-way: peak memory
    python jobs/benchmark.py seams               masks of scenes in tiles and of the same scenes as wholes
    python jobs/benchmark.py merging             the masks of 677 tiles made those of one image: seconds and memory
    python jobs/benchmark.py embeddings PHOTOS   masks from stored embeddings: agreement, bytes per image, seconds
    python jobs/benchmark.py decode PHOTOS       JPEG decoding by Pillow and others, and whether pixels agree
    python jobs/benchmark.py host PHOTOS         CPU time of a GPU's host per image, and its share under Python's lock
    python jobs/benchmark.py rasters             memory and seconds of windows of a large TIFF, JPEG and PNG (extra geo)
    python jobs/benchmark.py memory              peak memory of the mask generator on one 12-megapixel image
    python jobs/benchmark.py pipeline PHOTOS     `samray.label` and the bare MaskGenerator on the same images
    python jobs/benchmark.py phrases             finding 1, 10 and 100 phrases, by Grounding DINO or SAM 3
    python jobs/benchmark.py start               seconds until `samray.label` has labelled one image
    python jobs/benchmark.py export              memory and seconds of `samray.export`, killed half-way and resumed
    python jobs/benchmark.py report              seconds, memory and page size of `samray report` on 100,000 images
    python jobs/benchmark.py quality             `samray quality` on 1,000,000 rows, and on others with planted faults
    python jobs/benchmark.py extract PARQUET DIR writes the photographs of a Parquet file with a `jpeg` column as files
    python jobs/benchmark.py read                bytes read from S3 for one image of 100,000, and for an index
    python jobs/benchmark.py train DATA...       `samray train` and a plain PyTorch loop, same model and batches
    python jobs/benchmark.py pretrain            fine-tuning from a masked autoencoder and training from scratch
    python jobs/benchmark.py text                SAM's own text prompt on painted things, with held-out phrases
    python jobs/benchmark.py edge-draws DATA     the BSDS500 benchmark's matching, with other random outliers
    python jobs/benchmark.py lora                an adapter and full fine-tuning on a small world: IoU and sizes

`decoder` and `read` need the test extra (segment-anything, an S3 server). Quote ratios of one run, not single times.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import samray  # noqa: E402
from jobs.benchmarks import (  # noqa: E402
    adapters,
    compare,
    core_cost,
    decoding,
    edge_draws,
    embeddings,
    host,
    large,
    onnx_files,
    outputs,
    peers,
    phrases,
    pipelines,
    pretraining,
    quality,
    rasters,
    starting,
    text_prompts,
    tiling,
    training,
)
from jobs.benchmarks.measuring import measure, timed  # noqa: E402
from samray.rle.records import MaskRecord  # noqa: E402
from samray.sam.sam import Sam  # noqa: E402
from samray.sam.spec import MODELS  # noqa: E402

PRODUCT_SIDE = 2048
"""Side of the square matrices of a plain product."""


@torch.inference_mode()
def decoder(rounds: int, prompts: int) -> dict[str, Any]:
    """Seconds for one batch of click prompts on one image embedding of the full-size decoder, to low-res logits.

    share_of_product: the rate of its products and convolutions, all other work included, to that of a plain product.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from jobs.benchmarks.reference import build_reference
    from jobs.benchmarks.weights import random_sam

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
    # A third of the candidates passes the IoU filter, which is typical of real weights.
    min_iou = float(iou.flatten().quantile(2 / 3))

    def run_all() -> Any:
        return model.decode_points(model.prepare_decoder(embedding), points, labels)

    def run_filtered() -> Any:
        return model.decode_points(model.prepare_decoder(embedding), points, labels, min_iou=min_iou)

    square = torch.rand(PRODUCT_SIDE, PRODUCT_SIDE, generator=generator)
    product_flops = 2 * PRODUCT_SIDE**3
    with FlopCounterMode(display=False) as counter:
        run_all()
    flops = counter.get_total_flops()

    difference = float((run_all().logits.view_as(logits) - logits).abs().max() / logits.abs().max())
    seconds: dict[str, list[float]] = {"reference": [], "samray": [], "samray_iou_filter": [], "product": []}
    for _ in range(rounds):
        seconds["reference"].append(timed(run_reference))
        seconds["samray"].append(timed(run_all))
        seconds["samray_iou_filter"].append(timed(run_filtered))
        seconds["product"].append(timed(lambda: torch.mm(square, square)))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "prompts": prompts,
        "rounds": rounds,
        "median_s": median,
        "speedup": median["reference"] / median["samray"],
        "speedup_iou_filter": median["reference"] / median["samray_iou_filter"],
        "gflops": flops / 1e9,
        "share_of_product": flops / median["samray"] / (product_flops / median["product"]),
        "max_difference_relative_to_logits": difference,
    }


def memory(model_name: str, megapixels: float) -> dict[str, Any]:
    """Peak resident memory, beyond the loaded model, while generating the masks of one large image.

    Default options, but stability_score_thresh 0.5: random weights replace the published ones, and their masks are
    less stable.
    """
    from jobs.benchmarks.weights import blobs, random_sam

    model = random_sam(MODELS[model_name])
    width = round((megapixels * 1e6 * 4 / 3) ** 0.5)
    image = blobs(0, (width * 3 // 4, width))
    before = peers.status_bytes("VmHWM")
    current = peers.status_bytes("VmRSS")
    peers.forget_peak()
    generator = samray.MaskGenerator(model, samray.MaskConfig(stability_score_thresh=0.5))
    masks: list[MaskRecord] = []
    seconds = timed(lambda: masks.extend(generator.generate([image])[0]))
    return {
        "model": model_name,
        "image": list(image.shape),
        "masks": len(masks),
        "seconds": seconds,
        "peak_beyond_model_mb": (peers.status_bytes("VmHWM") - current) / 1e6,
        "peak_before_mb": before / 1e6,
        "stage_seconds": generator.stage_seconds,
    }


def extract(parquet: Path, folder: Path, limit: int | None) -> dict[str, Any]:
    """Write the photographs of a Parquet file with the columns file_name and jpeg as files."""
    from samray.storage.tables import read_parquet

    with open(parquet, "rb") as stream:
        table = read_parquet(stream, ["file_name", "jpeg"]).slice(0, limit)
    folder.mkdir(parents=True, exist_ok=True)
    for row in table.to_pylist():
        (folder / Path(row["file_name"]).with_suffix(".jpg").name).write_bytes(row["jpeg"])
    return {"written": table.num_rows, "folder": str(folder)}


def main() -> int:
    """All commands with their options: one table, which splitting would only scatter, so it is long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("decoder")
    sub.add_argument("--rounds", type=int, default=7)
    sub.add_argument("--prompts", type=int, default=64)
    sub = commands.add_parser("generator")
    sub.add_argument("--models", nargs="+", default=["vit_t", "vit_b"], choices=list(MODELS))
    sub.add_argument("--engines", nargs="+", default=["samray", "segment-anything"], choices=compare.ENGINES)
    sub.add_argument("--rounds", type=int, default=3)
    sub.add_argument("--image-hw", nargs=2, type=int, default=(1200, 1800), metavar=("H", "W"))
    sub.add_argument("--num-images", type=int, default=1, help="images per call")
    sub.add_argument("--photos", type=Path, help="folder of photographs (default: seeded coloured patches)")
    sub.add_argument("--checkpoint", help="published weights (default: seeded random ones)")
    sub.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="for samray; peers use their defaults"
    )
    sub.add_argument("--stages", action="store_true", help="also measure samray's stages and FLOP")
    sub = commands.add_parser("sam2")
    sub.add_argument("--models", nargs="+", default=["sam2.1_t", "sam2.1_b+"], choices=list(MODELS))
    sub.add_argument("--rounds", type=int, default=1)
    sub.add_argument("--points", type=int, default=32, help="points per side")
    sub.add_argument("--image-hw", nargs=2, type=int, default=(1200, 1800), metavar=("H", "W"))
    sub = commands.add_parser("core")
    sub.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    sub.add_argument("--prompts", type=int, default=32)
    sub = commands.add_parser("onnx")
    sub.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    sub = commands.add_parser("tiles")
    sub.add_argument("photos", type=Path)
    sub.add_argument("--model", dest="model_name", default="tiny", choices=list(MODELS))
    sub.add_argument("--image-hw", nargs=2, type=int, default=(1500, 2250), metavar=("H", "W"))
    sub.add_argument("--num-images", type=int, default=6)
    sub.add_argument("--points", type=int, default=24, help="points per side")
    sub.add_argument("--rounds", type=int, default=3)
    sub = commands.add_parser("host")
    sub.add_argument("photos", type=Path)
    sub.add_argument("--image-hw", nargs=2, type=int, default=(1500, 2250), metavar=("H", "W"))
    sub.add_argument("--num-images", type=int, default=2)
    sub.add_argument("--points", type=int, default=16, help="points per side")
    sub.add_argument("--points-per-batch", type=int, default=64)
    sub = commands.add_parser("large")
    sub.add_argument("--side", type=int, default=20_000, help="pixels")
    sub.add_argument("--tile", type=int, default=1024)
    sub.add_argument(
        "--points", type=int, default=8, help="points per side of a tile; few, because only memory matters"
    )
    sub.add_argument("--kill-at", type=float, default=0.4, help="share of the tiles")
    sub = commands.add_parser("merging")
    sub.add_argument("--side", type=int, default=20_000, help="pixels")
    sub.add_argument("--tile", type=int, default=1024)
    sub.add_argument("--masks-per-tile", type=int, default=80)
    sub = commands.add_parser("seams")
    sub.add_argument("--side", type=int, default=4096, help="pixels")
    sub.add_argument("--tile", type=int, default=1024)
    sub.add_argument("--num-scenes", type=int, default=6)
    sub.add_argument("--jitter", type=int, default=2, help="pixels by which borders move from tile to tile")
    sub.add_argument("--with-model", action="store_true", help="also with the embedded model, minutes per scene")
    sub = commands.add_parser("embeddings")
    sub.add_argument("photos", type=Path)
    sub.add_argument("settings", nargs="*", default=[], help="masks.key=value")
    sub.add_argument("--model", dest="model_name", default="tiny", choices=list(MODELS))
    sub.add_argument("--checkpoint", help="weights (default: embedded or seeded random ones)")
    sub.add_argument("--image-hw", nargs=2, type=int, default=(1200, 1800), metavar=("H", "W"))
    sub.add_argument("--num-images", type=int, default=10)
    sub = commands.add_parser("memory")
    sub.add_argument("--model", dest="model_name", default="vit_b", choices=list(MODELS))
    sub.add_argument("--megapixels", type=float, default=12.0)
    sub = commands.add_parser("rasters")
    sub.add_argument("--side", type=int, default=20_000)
    sub.add_argument("--kinds", nargs="+", default=["tif", "jpg", "png"], choices=["tif", "jpg", "png"])
    sub = commands.add_parser("decode")
    sub.add_argument("photos", type=Path)
    sub.add_argument("--megapixels", type=float, default=3.375)
    sub.add_argument("--limit", type=int)
    sub = commands.add_parser("pipeline")
    sub.add_argument("photos", type=Path)
    sub.add_argument("settings", nargs="*", help="section.key=value")
    sub.add_argument("--limit", type=int)
    sub = commands.add_parser("export")
    sub.add_argument("--images", type=int, default=10_000)
    sub.add_argument("--masks", type=int, default=100, help="masks per image")
    sub.add_argument("--format", default="coco", choices=["sa1b", "coco", "yolo", "flat", "label-map"])
    sub.add_argument("--polygons", action="store_true")
    sub = commands.add_parser("report")
    sub.add_argument("--images", type=int, default=100_000)
    sub.add_argument("--masks", type=int, default=100, help="masks per image")
    sub.add_argument("--file-mb", type=int, default=256, help="file size of the compacted output")
    sub.add_argument("--folder", type=Path, help="folder to keep the outputs in (default: deleted)")
    sub = commands.add_parser("quality")
    sub.add_argument("--images", type=int, default=1_000_000)
    sub.add_argument("--planted-images", type=int, default=100_000, help="images of the output with planted faults")
    sub.add_argument("--masks", type=int, default=20, help="masks per image")
    sub.add_argument("--folder", type=Path, help="folder to keep the outputs in (default: deleted)")
    sub = commands.add_parser("extract")
    sub.add_argument("parquet", type=Path)
    sub.add_argument("folder", type=Path)
    sub.add_argument("--limit", type=int)
    sub = commands.add_parser("train")
    sub.add_argument("data", nargs="+", metavar="DATA", help="as for `samray train`")
    sub.add_argument("--rounds", type=int, default=3)
    sub.add_argument("--steps", type=int, default=40)
    sub.add_argument("--settings", nargs="*", default=[], help="section.key=value")
    sub = commands.add_parser("start")
    sub.add_argument("--rounds", type=int, default=3)
    sub = commands.add_parser("phrases")
    sub.add_argument("--by", choices=["grounding_dino", "sam3"], default="grounding_dino")
    sub.add_argument("--numbers", nargs="+", type=int, default=[1, 10, 100])
    sub.add_argument("--rounds", type=int, default=3)
    sub.add_argument("--image-hw", nargs=2, type=int, default=(800, 1200), metavar=("H", "W"))
    sub = commands.add_parser("pretrain")
    sub.add_argument("--seeds", type=int, default=5)
    sub.add_argument("--images", type=int, default=4000, help="unlabelled images")
    sub.add_argument("--pretrain-steps", type=int, default=2000)
    sub.add_argument("--steps", type=int, default=300, help="of training on masks, with either start")
    sub.add_argument("--validation-images", type=int, default=96)
    sub.add_argument("--folder", type=Path, help="folder to keep the runs in (default: deleted)")
    sub = commands.add_parser("text")
    sub.add_argument("--clip-steps", type=int, default=300)
    sub.add_argument("--steps", type=int, default=1200)
    sub.add_argument("--images", type=int, default=600, help="labelled images to train on")
    sub.add_argument("--test-images", type=int, default=200)
    sub.add_argument("--seed", type=int, default=0, help="of both trainings; the images are always the same")
    sub.add_argument("--folder", type=Path, help="folder to keep the runs in (default: deleted)")
    sub = commands.add_parser("edge-draws")
    sub.add_argument("data")
    sub.add_argument("--draws", type=int, default=4)
    sub.add_argument("--names", nargs="*", metavar="IMAGE", help="file names of images to match (default: all)")
    sub.add_argument("--seed", type=int, default=0)
    sub = commands.add_parser("lora")
    sub.add_argument("--steps", type=int, default=60)
    sub.add_argument("--images", type=int, default=24)
    sub.add_argument("--heldout", type=int, default=24)
    sub.add_argument("--rank", type=int, default=8)
    sub.add_argument("--rate-all", type=float, default=1e-3)
    sub.add_argument("--rate-lora", type=float, default=1e-2)
    sub.add_argument("--decay-all", type=float, default=1.0, help="train.layer_decay")
    sub.add_argument("--decay-lora", type=float, default=1.0, help="train.layer_decay")
    sub.add_argument("--folder", type=Path, help="folder to keep the runs in (default: deleted)")
    sub = commands.add_parser("read")
    sub.add_argument("--rows", type=int, default=100_000)
    sub.add_argument("--masks", type=int, default=12, help="masks per image")
    sub.add_argument("--shapes", type=int, default=4000, help="number of different masks")
    sub.add_argument("--uri", help="an empty folder on an object store (default: starts a local S3 server)")
    bodies: dict[str, Callable[..., dict[str, Any]]] = {
        "decoder": decoder,
        "decode": decoding.decode,
        "generator": compare.generator,
        "sam2": compare.against_sam2,
        "core": core_cost.core,
        "onnx": onnx_files.onnx,
        "memory": memory,
        "rasters": rasters.measure_rasters,
        "tiles": tiling.tiling,
        "host": host.host,
        "large": large.large,
        "merging": large.merging,
        "seams": large.seams,
        "embeddings": embeddings.embeddings,
        "pipeline": pipelines.pipeline,
        "export": outputs.export,
        "report": outputs.report,
        "quality": quality.quality,
        "extract": extract,
        "read": outputs.read,
        "train": training.throughput,
        "pretrain": pretraining.pretrain,
        "text": text_prompts.text,
        "edge-draws": edge_draws.edge_draws,
        "lora": adapters.lora,
        "start": starting.start,
        "phrases": phrases.phrases,
    }
    return measure(parser, commands, bodies)


if __name__ == "__main__":
    sys.exit(main())
