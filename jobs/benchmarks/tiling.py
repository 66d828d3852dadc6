"""`jobs/benchmark.py tiles`: masks of photographs measured and run-length encoded in open tiles only, and as wholes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import samray
from jobs.benchmarks.compare import photographs
from samray.config import load_config
from samray.masks import pixels, tiles
from samray.masks.scores import MASK_THRESHOLD


@torch.inference_mode()
def tiling(
    photos: Path, model_name: str, image_hw: tuple[int, int], num_images: int, points: int, rounds: int
) -> dict[str, Any]:
    """Milliseconds per photograph for stability, areas and boxes of all candidates, and run lengths of the kept masks.

    Both ways on the same logits, taking turns; each photograph is encoded and decoded once, untimed. Small regions are
    not removed. CPU time is that of all threads.
    """
    config = load_config(None, None, [f"model.name={model_name}", f"masks.points_per_side={points}"]).masks
    model = samray.load_model(model_name, None, "cpu", "float32")
    generator, offset = samray.MaskGenerator(model, config), config.stability_score_offset
    frame, hw = generator.frame, (image_hw[0], image_hw[1])
    ways: dict[str, tuple[Callable[..., Tensor], Callable[..., Any]]] = {
        "tiles": (pixels.measure, pixels.run_lengths),
        "whole": (pixels.measure_whole, pixels.run_lengths_whole),
    }
    times: dict[str, dict[str, list[float]]] = {way: {"wall_ms": [], "cpu_ms": []} for way in ways}
    num_candidates, num_masks, open_shares, same, stability = 0, 0, [], True, 0.0
    for image in photographs(photos, hw, num_images):
        candidates, kept = _logits(generator, image)
        num_candidates, num_masks = num_candidates + len(candidates), num_masks + len(kept)
        at_once = generator._masks_at_once(generator._crops(hw)[0])
        results: dict[str, Any] = {}

        def run(way: str, candidates: Tensor = candidates, kept: Tensor = kept, at_once: int = at_once) -> Any:
            measure, run_lengths = ways[way]
            measured = measure(frame, candidates, hw, offset, at_once)
            return measured, run_lengths(frame, kept, hw, (0, 0), hw, at_once)

        for turn in range(rounds + 1):
            for way, seconds in times.items():
                wall, cpu = time.perf_counter(), time.process_time()
                results[way] = run(way)
                if turn:  # the first warms up
                    seconds["wall_ms"].append(1000 * (time.perf_counter() - wall))
                    seconds["cpu_ms"].append(1000 * (time.process_time() - cpu))
        (ours, our_runs), (theirs, their_runs) = results["tiles"], results["whole"]
        # In large images the other way measures in windows, whose coordinates are rounded differently.
        same &= torch.equal(ours, pixels.measure_whole(frame, candidates, hw, offset, max(at_once, 2)))
        same &= all(np.array_equal(a, b) for a, b in zip(our_runs, their_runs, strict=True))
        stability = max([stability, *(ours - theirs)[:, 0].abs().tolist()])
        grid = pixels.tile_grid_of(frame, candidates, hw)
        if grid is not None:
            open_shares.append(tiles.open_share(grid, candidates.numpy(), MASK_THRESHOLD, offset))
    medians = {way: {name: statistics.median(values) for name, values in of.items()} for way, of in times.items()}
    return {
        "model": model_name,
        "image_hw": list(hw),
        "images": num_images,
        "rounds": rounds,
        "candidates": num_candidates,
        "masks": num_masks,
        "open_tiles": statistics.fmean(open_shares) if open_shares else None,
        "median_per_image": medians,
        "ratio": {name: medians["whole"][name] / medians["tiles"][name] for name in ("wall_ms", "cpu_ms")},
        "scores_areas_boxes_and_runs_are_identical": same,
        "largest_difference_of_stability_from_windows": stability,
    }


def _logits(generator: samray.MaskGenerator, image: Any) -> tuple[Tensor, Tensor]:
    """Low-res logits of an image's candidates that passed the IoU filter, and of the masks that are encoded."""
    # Also for an image without any.
    none = torch.zeros(0, 4 * generator.model.spec.grid, 4 * generator.model.spec.grid)
    recorded: dict[str, list[Tensor]] = {"_measure": [none], "_runs": [none]}
    for name, logits in recorded.items():
        body = getattr(type(generator), name)

        def recording(part: Tensor, *rest: Any, body: Any = body, logits: list[Tensor] = logits) -> Any:
            logits.append(part.clone())
            return body(generator, part, *rest)

        setattr(generator, name, recording)
    generator.generate([image])
    candidates, kept = (torch.cat(recorded[name]) for name in recorded)
    return candidates, kept
