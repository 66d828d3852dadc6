"""`jobs/benchmark.py core`: what `core_seconds` in `samray/config/models.py` says of a model.

CPU time of one thread, not wall time: other programs on the machine make it only a little longer.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

import samray
from jobs.benchmarks.compare import typical_settings
from jobs.benchmarks.weights import blobs, random_sam
from samray.config import MaskConfig
from samray.sam.spec import MODELS


@torch.inference_mode()
def core(models: list[str], points: int, image_hw: tuple[int, int]) -> dict[str, Any]:
    """CPU seconds of a pass of the image encoder, and of each prompt of a grid from the decoder to the masks.

    Seeded random weights; the thresholds let a third of the candidates pass the IoU filter, as real weights do.
    """
    torch.set_num_threads(1)
    image = blobs(0, image_hw)
    found = {}
    for name in models:
        model = random_sam(MODELS[name], image=image)
        settings: dict[str, Any] = typical_settings(model, image, points)
        generator = samray.MaskGenerator(model, MaskConfig(points_per_side=points, **settings))
        generator.overlaps = False
        pixels = model.preprocess([image])[0]
        start = time.process_time()
        model.encode_images(pixels)
        encoded = time.process_time()
        generator.generate([image])
        done = time.process_time()
        encoder_s = encoded - start
        found[name] = {
            "encoder_s": round(encoder_s, 3),
            "prompt_s": round((done - encoded - encoder_s) / points**2, 4),
        }
        print(name, found[name], file=sys.stderr, flush=True)
    return {"points_per_side": points, "image": list(image.shape), "models": found}
