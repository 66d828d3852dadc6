"""`jobs/benchmark.py onnx`: ONNX files of models in their real sizes, in onnxruntime against torch."""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from safetensors.torch import save_file

from jobs.benchmarks.weights import random_sam
from samray.sam.onnx_export import export_onnx
from samray.sam.spec import MODELS


def onnx(models: list[str]) -> dict[str, Any]:
    """Writes each model with seeded weights as `samray models export` does, which compares the files with torch.

    difference: the largest of any output, relative to the largest number of that output. click_iou: the smallest IoU
    of the masks of a click, each side with its own encoder. Raises: SamrayError if they are not within its bounds.
    """
    results = {}
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "weights.safetensors"
            save_file(random_sam(MODELS[name]).state_dict(), weights)
            start = perf_counter()
            report = export_onnx(name, Path(folder) / "onnx", checkpoint=str(weights))
            results[name] = {
                "difference": float(f"{report.difference:.1e}"),
                "click_iou": round(report.click_iou, 6),
                "megabytes": {path.name: round(path.stat().st_size / 1e6, 1) for path in report.files},
                "seconds": round(perf_counter() - start, 1),
                "peak_rss_mb_so_far": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        print(name, results[name], file=sys.stderr, flush=True)
    return {"models": results}
