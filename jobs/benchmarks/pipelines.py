"""`jobs/benchmark.py pipeline`: `samray.label` against a plain loop over the mask generator."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import samray
from samray.config import load_config
from samray.inputs.decode import decode_image
from samray.inputs.listing import list_images
from samray.sam.checkpoints import load_configured


def pipeline(photos: Path, limit: int | None, settings: list[str]) -> dict[str, Any]:
    """Wall time of `samray.label` and of a plain loop over the same files; a run with one image gives the start-up."""
    config = load_config(None, None, settings + ([f"input.limit={limit}"] if limit else []))
    listed = list_images(str(photos), config.input).images["uri"].to_pylist()
    files = [Path(uri) for uri in listed]  # the files of the run, in its order
    model = load_configured(config.model)
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
    """Fraction of the labelling actor's time in which its model worked, from the shards' counts.

    Excludes the shard with the lowest fraction: that is the one that waited for the model to load.
    """
    from samray.output.shards import done_shards, read_metadata

    stats = [read_metadata(output, shard)["stats"] for shard in done_shards(output)]
    stats.sort(key=lambda one: one["held_seconds"] - one["device_seconds"])
    held_s = sum(one["held_seconds"] for one in stats[:-1])
    return sum(one["device_seconds"] for one in stats[:-1]) / held_s if held_s else None
