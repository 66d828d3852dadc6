"""`jobs/benchmark.py embeddings`: masks from stored embeddings against those of the images, their size and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import samray
from jobs.benchmarks.compare import agreement_of, photographs
from jobs.benchmarks.weights import random_sam
from samray.config import load_config
from samray.output.embeddings import file_bytes, make_row, maps_of
from samray.pipeline.kept import packed_embedding, with_embedding
from samray.sam.spec import MODELS
from samray.storage.tables import open_parquet

DTYPES = ("float32", "float16", "int8")


def embeddings(
    photos: Path,
    model_name: str,
    checkpoint: str | None,
    image_hw: tuple[int, int],
    num_images: int,
    settings: list[str],
) -> dict[str, Any]:
    """For each type of stored values: bytes per image as a Parquet file, agreement of the masks with those of
    `MaskGenerator.generate`, and median CPU seconds per image to read an embedding and to make the masks from it.

    Without Ray and without reading or decoding images, so the times compare the networks alone. CPU time is that of all
    threads. Models without embedded weights have seeded random ones unless a checkpoint is given.
    """
    config = load_config(None, None, [f"model.name={model_name}", *settings]).masks
    images = list(photographs(photos, (image_hw[0], image_hw[1]), num_images))
    if checkpoint is None and MODELS[model_name].url is not None:
        model = random_sam(MODELS[model_name], image=images[0])
    else:
        model = samray.load_model(model_name, checkpoint, None, "auto")
    generator = samray.MaskGenerator(model, config)
    generator.generate(images[:1])  # warm
    whole_s: list[float] = []
    wanted = [_timed(whole_s, lambda image=image: generator.generate([image])[0]) for image in images]  # type: ignore[misc]
    encode_s: list[float] = []
    encoded = [_timed(encode_s, lambda image=image: generator.encode([image])[0]) for image in images]  # type: ignore[misc]
    results = {}
    for dtype in DTYPES:
        sizes, read_s, label_s, masks = [], [], [], []  # type: list[int], list[float], list[float], list[Any]
        for number, (image, embedding) in enumerate(zip(images, encoded, strict=True)):
            made = with_embedding(model, image, [], embedding, dtype)
            row = make_row(number, image.shape[:2], made.input_hw, made.maps, dtype)
            data = file_bytes([row], {})
            sizes.append(len(data))

            def read(data: bytes = data) -> Any:
                (stored,) = open_parquet(data).read().to_pylist()
                return packed_embedding(maps_of(stored))

            again = _timed(read_s, read)
            hw = image.shape[:2]
            masks.append(_timed(label_s, lambda e=again, hw=hw: generator.generate_from([e], [hw])[0]))  # type: ignore[misc]
        results[dtype] = {
            "mb_per_image": statistics.fmean(sizes) / 1e6,
            "shapes": {feature["name"]: feature["shape"] for feature in row["features"]},
            "read_cpu_s": statistics.median(read_s),
            "label_cpu_s": statistics.median(label_s),
            **agreement_of(wanted, masks, "from_embeddings"),
        }
    return {
        "model": model_name,
        "images": len(images),
        "image_hw": list(image_hw),
        "masks": sum(map(len, wanted)),
        "label_with_encoder_cpu_s": statistics.median(whole_s),
        "encode_cpu_s": statistics.median(encode_s),
        "stored": results,
    }


def _timed(seconds: list[float], body: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = body()
    seconds.append(time.process_time() - start)
    return result
