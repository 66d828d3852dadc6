"""The progress of a run from its output alone: anyone who can read OUTPUT can ask, from anywhere, without side effects.

One LIST shows which shards exist and when each was written, by the storage's clock. Masks, failures and GPU time are in
the shards' footers, of which a sample is read.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from samray import storage
from samray.output import manifests as generations
from samray.output.pace import pace_of
from samray.output.plan import Plan, load_plan
from samray.output.sample import Footer, read_footers
from samray.output.schema import STATS_SECONDS, categories_of
from samray.output.shards import FOLDER, read_success, shard_number
from samray.output.tile_files import list_tiles

MAX_FOOTERS: Final = 200
"""Maximum number of footers read; with more shards they are a sample."""

RECENT_SHARDS: Final = 100
"""The rate is measured over this many shards, without pauses."""

QUIET_S: Final = 300.0
QUIET_WITHOUT_PACE_S: Final = 1800.0
"""Seconds without activity before a run counts as stalled; the second value applies if its pace is unknown."""

UNKNOWN: Final = "unknown"
"""The failure reason for images in a shard that samray did not label itself."""

Footers = dict[tuple[int, float | None], Footer]
"""Footers by shard and write time. Pass the same mapping again to read each footer only once."""

State = Literal["not begun", "running", "stalled", "unmarked", "finished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The state of a run according to its output. Counts of images and shards are exact; for others see
    num_shards_read."""

    output: str
    state: State
    """stalled: no activity for much longer than usual; unmarked: all shards are there, but not `_SUCCESS`."""
    num_shards: int
    num_shards_done: int
    num_shards_begun: int
    """Begun but not done: an actor works on them, or died doing so."""
    num_images: int
    num_tiles_done: int = 0
    """Tiles of large images (`masks.tile`) in shards that are not done."""
    num_images_done: int
    """Images in finished shards, including failed ones."""
    num_shards_read: int
    """Shards whose footers were read. If fewer than are done, the following values are extrapolated from these."""
    num_masks: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """Reason -> number of images."""
    labels: dict[str, int] | None = None
    """Name -> number of masks, for each name that the run asked for, in order; None for a run without names. The rest
    of num_masks has no name."""
    device_seconds: float = 0.0
    held_seconds: float = 0.0
    gpu_seconds: float = 0.0
    images_per_s: float | None = None
    """Recent rate."""
    images_per_s_overall: float | None = None
    """Rate since the plan (its last generation) was made, including start-up and pauses."""
    eta_s: float | None = None
    last_shard_s_ago: float | None = None
    quiet_s: float | None = None
    """Seconds since the last activity: a shard begun or done, a tile of a large image, or the plan made."""
    usual_gap_s: float | None = None
    """Recent seconds from one shard to the next."""
    own_clock: bool = False
    """Whether `ago` uses this machine's clock, because the storage's clock is not available."""
    gpu_price_per_hour: float | None = None
    """From the run's cluster.gpu_price_per_hour."""

    @property
    def num_failed(self) -> int:
        return sum(self.failures.values())

    @property
    def cost(self) -> float | None:
        """Cost of the GPUs for the time that they were reserved by the actors of these shards."""
        return None if self.gpu_price_per_hour is None else self.gpu_seconds / 3600 * self.gpu_price_per_hour

    @property
    def estimated(self) -> bool:
        """Whether figures are extrapolated from a sample of the shards."""
        return self.num_shards_read < self.num_shards_done

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "num_failed": self.num_failed, "estimated": self.estimated, "cost": self.cost}


def run_status(output: str, footers: Footers | None = None) -> Status:
    """Read the current state. Raises: ConfigError if OUTPUT has no run, StorageError."""
    plan = load_plan(output)
    manifests = storage.list_times(storage.join(plan.output, generations.FOLDER))
    planned_at = {
        g.number: manifests.get(generations.manifest_uri(plan.output, g.number).rpartition("/")[2])
        for g in plan.generations
    }
    done = _done(plan, planned_at)
    num_done = sum(plan.num_images_of(shard) for shard in done)
    begun = _begun(plan.output, done)
    # Files are dated by the storage's clock, and this machine's may differ.
    clock = storage.clock(plan.output)
    now = time.time() if clock is None else clock

    last_planned_at = planned_at[plan.last_generation]
    written = sorted((at, plan.num_images_of(shard)) for shard, at in done.items() if at is not None)
    tiles = {shard: of_shard for shard, of_shard in list_tiles(plan.output).items() if shard not in done}
    # Any sign of life: the plan, the last shard, an attempt that began, or a tile.
    last_shard_at = [at for at, _ in written[-1:]]
    times = (last_planned_at, *last_shard_at, *begun.values(), *(of_shard.written_at for of_shard in tiles.values()))
    signs = [at for at in times if at is not None]
    quiet_s = max(now - max(signs), 0.0) if signs else None  # with a slow clock here this would be negative
    # The time since the last shard counts only by the clock that dated it, and while shards are missing.
    waits = clock is not None and len(done) < plan.num_shards and bool(written)
    # Wait for several shards of each actor, whatever the number of actors.
    recent = written[-max(RECENT_SHARDS, 5 * len(begun)) :]
    pace = pace_of(recent, wait_s=now - written[-1][0] if waits else 0.0)
    # For a run with too few shards for a pace: the rate since its plan was made.
    overall = None
    if last_planned_at is not None:
        since = [entry for entry in written if entry[0] > last_planned_at]
        span_s = since[-1][0] - last_planned_at if since else 0.0
        overall = sum(number for _, number in since) / span_s if span_s > 0 else None
    rate = pace.images_per_s or overall
    patience_s = QUIET_WITHOUT_PACE_S if pace.longest_gap_s is None else max(QUIET_S, 3 * pace.longest_gap_s)
    state = _state(plan, len(done), len(begun), quiet_s, patience_s)
    return Status(
        output=storage.redact(plan.output),
        state=state,
        num_shards=plan.num_shards,
        num_shards_done=len(done),
        num_shards_begun=len(begun),
        num_images=plan.num_images,
        num_tiles_done=sum(of_shard.num_tiles for of_shard in tiles.values()),
        num_images_done=num_done,
        images_per_s=rate,
        images_per_s_overall=overall,
        eta_s=(plan.num_images - num_done) / rate if rate and state == "running" else None,
        last_shard_s_ago=max(now - written[-1][0], 0.0) if written else None,
        quiet_s=quiet_s,
        usual_gap_s=pace.usual_gap_s,
        own_clock=clock is None,
        gpu_price_per_hour=plan.run.get("config", {}).get("cluster", {}).get("gpu_price_per_hour"),
        **_from_footers(plan, done, num_done, {} if footers is None else footers),
    )


def _done(plan: Plan, planned_at: Mapping[int, float | None]) -> dict[int, float | None]:
    """Finished shards -> when they were written, without those that must be labelled again for changed images."""
    listed = storage.list_times(storage.join(plan.output, FOLDER)).items()
    done = {n: at for name, at in listed if (n := shard_number(name)) is not None and n < plan.num_shards}
    for shard, number in plan.changed_shards().items():
        at, changed_at = done.get(shard), planned_at[number]
        # If storage reports no times, the shard counts as done.
        if at is not None and changed_at is not None and at < changed_at:
            del done[shard]
    return done


def _begun(output: str, done: Mapping[int, object]) -> dict[int, float | None]:
    """Shards that are not done but have an attempt marker (`samray.pipeline.attempts`) -> when it was written."""
    begun: dict[int, float | None] = {}
    for name, at in storage.list_times(storage.join(output, generations.FOLDER, "attempts")).items():
        number = name.removeprefix("shard-").partition(".")[0]
        if number.isdecimal() and int(number) not in done:
            begun[int(number)] = max(at or 0.0, begun.get(int(number)) or 0.0) or None
    return begun


def _state(plan: Plan, num_done: int, num_begun: int, quiet_s: float | None, patience_s: float) -> State:
    if num_done == plan.num_shards:
        return "finished" if _marked(plan) else "unmarked"
    if not num_done and not num_begun:
        return "not begun"
    return "stalled" if quiet_s is not None and quiet_s > patience_s else "running"


def _marked(plan: Plan) -> bool:
    success = read_success(plan.output)
    return success is not None and success.marks(plan.num_shards, plan.last_generation)


def _from_footers(plan: Plan, done: Mapping[int, float | None], num_done: int, cache: Footers) -> dict[str, Any]:
    """Fields of Status from the footers of the finished shards, or of a sample of them."""
    step = 1
    while len(done) > MAX_FOOTERS * step:
        step *= 2  # a power of two: the next call, with more shards, reuses most of this sample
    # The first ones, if no finished shard is a multiple of `step`.
    sample = [shard for shard in done if shard % step == 0][:MAX_FOOTERS] or sorted(done)[:MAX_FOOTERS]
    unread = [shard for shard in sample if (shard, done[shard]) not in cache]
    names = categories_of(plan.run["identity"])
    read = read_footers(plan.output, unread, labels=names is not None)
    cache.update({(footer.shard, done[footer.shard]): footer for footer in read})
    footers = [cache[shard, done[shard]] for shard in sample]
    scale = num_done / max(sum(footer.num_images for footer in footers), 1)
    failures: Counter[str] = Counter()
    for footer in footers:
        failures.update(footer.stats.get("failures") or {UNKNOWN: footer.num_failed} if footer.num_failed else {})
    return {
        "num_shards_read": len(footers),
        "num_masks": round(sum(footer.num_masks for footer in footers) * scale),
        "labels": None
        if names is None
        else {name: round(sum(f.labels.get(name, 0) for f in footers) * scale) for name in names},
        "failures": {reason: round(number * scale) for reason, number in failures.most_common()},
        **{key: sum(footer.stats.get(key, 0.0) for footer in footers) * scale for key in STATS_SECONDS},
    }
