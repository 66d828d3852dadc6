"""Metrics of a run for monitoring: Ray exports them for Prometheus, with `ray_` before the name.

Not exact: a shard that is labelled twice counts twice, and values may get lost. Shares are pairs of counters, because a
gauge that is set once per shard is missing from most scrapes.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections import Counter as Tally
from collections.abc import Mapping
from typing import Any, Final

from samray.output.schema import reason_of
from samray.pipeline.report import Labelled

logger = logging.getLogger(__name__)

COUNTERS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "samray_images": ("Images labelled, including failed ones.", ()),
    "samray_masks": ("Masks generated.", ()),
    "samray_failed_images": ("Images that became a failed row.", ("reason",)),
    "samray_encoded_bytes": ("Encoded bytes of these images.", ()),
    "samray_stage_seconds": ("Seconds of work, summed over all workers.", ("stage",)),
    "samray_batch_images": ("Images passed to the model.", ()),
    "samray_batch_room_images": ("Images that full batches would have contained.", ()),
    "samray_device_busy_seconds": ("Seconds that labelling actors spent generating masks.", ()),
    "samray_device_held_seconds": ("Lifetime of labelling actors in seconds; on a CPU times their threads.", ()),
    "samray_shards": ("Shards committed.", ()),
    "samray_written_bytes": ("Bytes of these shards.", ()),
}
"""Name -> description and tags. Prometheus sees `ray_<name>_total`."""

GAUGES: Final = {
    "samray_run_images": "Images in the plan.",
    "samray_run_images_done": "Images of finished shards, and labelled images of shards in progress.",
    "samray_run_images_failed": "Failed images of this run.",
}
"""Set regularly by the driver. Prometheus sees `ray_<name>`."""

HISTOGRAMS: Final = {"samray_shard_seconds": "Seconds from one finished shard of an actor to the next."}
"""Prometheus sees `ray_<name>_bucket`, `_sum` and `_count`."""

SHARD_SECONDS: Final = [1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0]


def exported_names() -> set[str]:
    """The names that Prometheus may query."""
    histograms = {f"ray_{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}
    return {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES} | histograms


# One object per name and process, made on first use: Ray may not run yet when this module is imported.
@functools.cache
def _metric(name: str) -> Any:
    from ray.util.metrics import Counter, Gauge, Histogram

    if name in COUNTERS:
        return Counter(name, *COUNTERS[name])
    return Gauge(name, GAUGES[name]) if name in GAUGES else Histogram(name, HISTOGRAMS[name], SHARD_SECONDS)


def record(name: str, value: float, **tags: str) -> None:
    """Add to a counter, set a gauge or observe for a histogram; costs microseconds. Never raises.

    No effect without Ray, or if Ray exports no metrics.
    """
    try:
        metric = _metric(name)
        if name in GAUGES:
            metric.set(value)
        elif name in HISTOGRAMS:
            metric.observe(value)
        elif value > 0:  # Ray's counters refuse 0 and below
            metric.inc(value, tags)
    except Exception:  # a failed metric must not fail a shard
        logger.debug("could not record %s", name, exc_info=True)


class ActorFigures:
    """The counters of one labelling actor. Create it before loading the model, to count the whole time on the
    device."""

    def __init__(self) -> None:
        self._shard_from = self._counted_to = time.monotonic()

    def add(self, batch: Labelled, num_workers: int) -> None:
        """Count newly labelled images, and the time since the last call."""
        record("samray_images", len(batch.records))
        record("samray_masks", sum(len(r.annotations) for r in batch.records))
        # One call per reason, not per image.
        for reason, number in Tally(reason_of(r.error) for r in batch.records if r.error is not None).items():
            record("samray_failed_images", number, reason=reason)
        record("samray_encoded_bytes", batch.encoded_bytes)
        record("samray_batch_images", batch.batch_images)
        record("samray_batch_room_images", batch.batch_room)
        record("samray_device_busy_seconds", batch.device_seconds)
        now = time.monotonic()
        record("samray_device_held_seconds", (now - self._counted_to) * num_workers)
        self._counted_to = now

    def lap(self, num_workers: int) -> dict[str, float]:
        """Lifetime of the actor since its last shard or lap, as held_seconds and gpu_seconds of `Labelled`."""
        now = time.monotonic()
        held_s, self._shard_from = now - self._shard_from, now
        return {"held_seconds": held_s * num_workers, "gpu_seconds": held_s * reserved_gpus()}

    def finish(self, shard: Labelled, num_workers: int) -> Labelled:
        """Count the stages of a finished shard. Returns it with the actor's lifetime since the one before."""
        now = time.monotonic()
        held_s, self._shard_from = now - self._shard_from, now
        record("samray_shard_seconds", held_s)
        record_stages(shard.stage_seconds)
        return dataclasses.replace(shard, held_seconds=held_s * num_workers, gpu_seconds=held_s * reserved_gpus())


def record_stages(stage_seconds: Mapping[str, float]) -> None:
    """Count the seconds of each stage."""
    for stage, seconds in stage_seconds.items():
        record("samray_stage_seconds", seconds, stage=stage)


def reserved_gpus() -> float:
    """GPUs, possibly a fraction, that Ray reserved for this actor; 0 outside of an actor."""
    import ray

    if not ray.is_initialized():
        return 0.0  # asking for the context would start Ray
    context: Any = ray.get_runtime_context()
    return float(context.get_assigned_resources().get("GPU", 0.0)) if context.get_actor_id() else 0.0
