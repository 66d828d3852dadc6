"""How far a run is, from its output alone: whoever can read OUTPUT can ask, from anywhere, and disturbs nothing.

One LIST tells which shards are there and when each was written, by the storage's own clock; what only the shards know
(masks, failures, GPU time) stands in their footers, of which a sample is read.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from samray import storage
from samray.dataset import generations
from samray.dataset.manifest import Plan, load_plan
from samray.dataset.sample import Footer, read_footers
from samray.dataset.shards import FOLDER, SUCCESS, shard_number
from samray.errors import NotFoundError

MAX_FOOTERS: Final = 200
"""Of more shards than this a sample is read."""

RECENT_SHARDS: Final = 100
"""The rate is that of this many shards, or of fewer where the run paused in between."""

PAUSE_S: Final = 1800.0
"""A shorter wait from one shard to the next is no pause."""

QUIET_S: Final = 300.0
QUIET_WITHOUT_PACE_S: Final = 1800.0
"""A run is not called stalled before it was quiet for so long: the second where no two shards tell how fast it is."""

UNKNOWN: Final = "unknown"
"""The reason of failed images in a shard that samray did not label itself."""

Footers = dict[tuple[int, float | None], Footer]
"""By shard and when it was written. Hand the same one in again, and no footer is read twice."""


State = Literal["not begun", "running", "stalled", "unmarked", "finished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A run as its output shows it. Counts of images and shards are exact; see num_shards_read for the others."""

    output: str
    state: State
    """stalled: no sign of life for much longer than usual; unmarked: every shard is there, but not `_SUCCESS`."""
    num_shards: int
    num_shards_done: int
    num_shards_begun: int
    """And not done: an actor works on them, or died doing so."""
    num_images: int
    num_images_done: int
    """Of the shards that are done; failed images are among them."""
    num_shards_read: int
    """Shards whose footers were read. Where that is fewer than are done, what follows is scaled up from them."""
    num_masks: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """Reason -> number of images."""
    device_seconds: float = 0.0
    held_seconds: float = 0.0
    gpu_seconds: float = 0.0
    images_per_s: float | None = None
    """Lately."""
    images_per_s_overall: float | None = None
    """Since the plan (the last generation of it) was made, start-up and pauses included."""
    eta_s: float | None = None
    last_shard_s_ago: float | None = None
    quiet_s: float | None = None
    """Since the last sign of life: a shard begun or done, or the plan made."""
    usual_gap_s: float | None = None
    """Between one shard and the next, lately."""
    own_clock: bool = False
    """Whether `ago` is by this machine's clock, because the storage's own could not be asked."""
    gpu_price_per_hour: float | None = None
    """As the run was told, by cluster.gpu_price_per_hour."""

    @property
    def num_failed(self) -> int:
        return sum(self.failures.values())

    @property
    def cost(self) -> float | None:
        """Of the GPUs, for the time that the actors which labelled these shards held them."""
        return None if self.gpu_price_per_hour is None else self.gpu_seconds / 3600 * self.gpu_price_per_hour

    @property
    def estimated(self) -> bool:
        """Whether figures are scaled up from a sample of the shards."""
        return self.num_shards_read < self.num_shards_done

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "num_failed": self.num_failed, "estimated": self.estimated, "cost": self.cost}


def run_status(output: str, footers: Footers | None = None) -> Status:
    """Look at what is there now. Raises: ConfigError where OUTPUT holds no run, StorageError."""
    plan = load_plan(output)
    listed = storage.list_times(storage.join(plan.output, FOLDER)).items()
    done = {n: at for name, at in listed if (n := shard_number(name)) is not None and n < plan.num_shards}
    num_done = sum(plan.num_images_of(shard) for shard in done)
    begun = _begun(plan.output, done)
    manifest = generations.manifest_uri(plan.output, plan.last_generation).rpartition("/")[2]
    planned_at = storage.list_times(storage.join(plan.output, generations.FOLDER)).get(manifest)
    clock = storage.clock(plan.output)
    now = time.time() if clock is None else clock

    written = sorted((at, shard) for shard, at in done.items() if at is not None)
    recent = _since_last_pause(written[-RECENT_SHARDS:])
    gaps = _gaps(recent)
    usual_gap_s = statistics.median(gaps) if gaps else 0.0
    new = [entry for entry in written if entry[1] >= plan.generations[-1].first_shard]
    overall = None if planned_at is None else _rate(plan, [(planned_at, -1), *new])
    # Shards may come in bursts, as many at once as there are actors: the wait for the next burst counts.
    waits = clock is not None and len(done) < plan.num_shards
    rate = _rate(plan, recent, until=now - usual_gap_s if waits else 0.0) or overall
    signs = [at for at in (planned_at, *(at for at, _ in written[-1:]), *begun.values()) if at is not None]
    quiet_s = max(now - max(signs), 0.0) if signs else None  # a clock that is behind sees the future
    state = _state(plan, len(done), len(begun), quiet_s, max(QUIET_S, 3 * max(gaps)) if gaps else QUIET_WITHOUT_PACE_S)
    return Status(
        output=storage.redact(plan.output),
        state=state,
        num_shards=plan.num_shards,
        num_shards_done=len(done),
        num_shards_begun=len(begun),
        num_images=plan.num_images,
        num_images_done=num_done,
        images_per_s=rate,
        images_per_s_overall=overall,
        eta_s=(plan.num_images - num_done) / rate if rate and state == "running" else None,
        last_shard_s_ago=max(now - written[-1][0], 0.0) if written else None,
        quiet_s=quiet_s,
        usual_gap_s=usual_gap_s if gaps else None,
        own_clock=clock is None,
        gpu_price_per_hour=plan.run.get("config", {}).get("cluster", {}).get("gpu_price_per_hour"),
        **_from_footers(plan, done, num_done, {} if footers is None else footers),
    )


def _begun(output: str, done: Mapping[int, object]) -> dict[int, float | None]:
    """Shards with a mark of an attempt (`samray.pipeline.attempts`) that are not done -> when it was made."""
    begun: dict[int, float | None] = {}
    for name, at in storage.list_times(storage.join(output, generations.FOLDER, "attempts")).items():
        number = name.removeprefix("shard-").partition(".")[0]
        if number.isdecimal() and int(number) not in done:
            begun[int(number)] = max(at or 0.0, begun.get(int(number)) or 0.0) or None
    return begun


def _since_last_pause(written: Sequence[tuple[float, int]]) -> Sequence[tuple[float, int]]:
    """The last of these shards, from the first one after a gap so long that the run must have stood still."""
    gaps = _gaps(written)
    pause = max(PAUSE_S, 20 * statistics.median(gaps)) if gaps else 0.0
    after = max((i + 1 for i, gap in enumerate(gaps) if gap > pause), default=0)
    return written[after:]


def _gaps(written: Sequence[tuple[float, int]]) -> list[float]:
    return [later - earlier for (earlier, _), (later, _) in itertools.pairwise(written)]


def _rate(plan: Plan, written: Sequence[tuple[float, int]], until: float = 0.0) -> float | None:
    """Images/s from the first of these times, whose own shard does not count, to the last, or to a later `until`."""
    if len(written) < 2 or written[-1][0] <= written[0][0]:
        return None
    num_images = sum(plan.num_images_of(shard) for at, shard in written if at > written[0][0])
    return num_images / (max(written[-1][0], until) - written[0][0])


def _state(plan: Plan, num_done: int, num_begun: int, quiet_s: float | None, patience_s: float) -> State:
    if num_done == plan.num_shards:
        return "finished" if _marked(plan) else "unmarked"
    if not num_done and not num_begun:
        return "not begun"
    return "stalled" if quiet_s is not None and quiet_s > patience_s else "running"


def _marked(plan: Plan) -> bool:
    try:
        return bool(json.loads(storage.read_bytes(storage.join(plan.output, SUCCESS)))["num_shards"] == plan.num_shards)
    except (NotFoundError, ValueError, KeyError, TypeError):
        return False


def _from_footers(plan: Plan, done: Mapping[int, float | None], num_done: int, held: Footers) -> dict[str, Any]:
    """What the footers of done shards, or of a sample of them, say of all: fields of Status."""
    step = 1
    while len(done) > MAX_FOOTERS * step:
        step *= 2  # so that the next look, with more shards done, finds most of its sample read already
    sample = [shard for shard in done if shard % step == 0][:MAX_FOOTERS] or sorted(done)[:MAX_FOOTERS]
    unread = [shard for shard in sample if (shard, done[shard]) not in held]
    held.update({(footer.shard, done[footer.shard]): footer for footer in read_footers(plan.output, unread)})
    footers = [held[shard, done[shard]] for shard in sample]
    scale = num_done / max(sum(footer.num_images for footer in footers), 1)
    failures: Counter[str] = Counter()
    for footer in footers:
        failures.update(footer.stats.get("failures") or {UNKNOWN: footer.num_failed} if footer.num_failed else {})
    seconds = ("device_seconds", "held_seconds", "gpu_seconds")
    return {
        "num_shards_read": len(footers),
        "num_masks": round(sum(footer.num_masks for footer in footers) * scale),
        "failures": {reason: round(number * scale) for reason, number in failures.most_common()},
        **{key: sum(footer.stats.get(key, 0.0) for footer in footers) * scale for key in seconds},
    }
