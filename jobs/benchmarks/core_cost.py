"""`jobs/benchmark.py core`: what `core_seconds` in `samray/config/models.py` says of a model.

CPU time of one thread, not wall time: other programs on the machine make it only a little longer.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from samray.sam.encoder import packed
from samray.sam.sam import Sam
from samray.sam.spec import MODELS


@torch.inference_mode()
def core(models: list[str], prompts: int) -> dict[str, Any]:
    """CPU seconds of a pass of the image encoder, and of a click from prompt to three low-resolution masks.

    Freshly initialised weights: the time does not depend on them.
    """
    torch.set_num_threads(1)
    costs = {}
    for name in models:
        torch.manual_seed(0)
        model = Sam(MODELS[name]).eval()
        pixels = torch.randn(1, 3, model.image_size, model.image_size)
        start = time.process_time()
        features = model.image_encoder.features(pixels)
        encoder_s = time.process_time() - start
        context = model.prepare_decoder(packed(features))
        points = torch.rand(prompts, 1, 2) * model.image_size
        start = time.process_time()
        model.decode_points(context, points, torch.ones(prompts, 1))
        prompt_s = (time.process_time() - start) / prompts
        costs[name] = {"encoder_s": round(encoder_s, 2), "prompt_s": round(prompt_s, 4)}
        print(name, costs[name], file=sys.stderr, flush=True)
    return {"prompts": prompts, "models": costs}
