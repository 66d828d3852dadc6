"""What a run did: the summary of each shard, and of all of them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from samray.config import Config, MaskConfig, setting_rows
from samray.inputs.skipped import Skipped
from samray.output.schema import ImageRecord, reason_of
from samray.text import cost_in_words, duration


@dataclass
class Labelled:
    """The records of a shard, or of a batch of its images, in the order of the images, and what they cost."""

    records: list[ImageRecord] = field(default_factory=list)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Of a shard only."""
    device_seconds: float = 0.0
    """In the mask generator, summed over the threads that run one."""
    held_seconds: float = 0.0
    """Of a shard only, and only in a run: how long its actor has existed for it, since the shard before or since its
    start, times those threads. What is not device_seconds of it, the device was idle."""
    gpu_seconds: float = 0.0
    """The same, without the threads, times the GPUs that the actor holds: what one pays for."""
    encoded_bytes: int = 0
    """Of the images that came encoded."""
    batch_images: int = 0
    """Given to the mask generator."""
    batch_room: int = 0
    """What batch_images would be, had every batch been full."""

    def add(self, batch: Labelled) -> None:
        """Append a batch."""
        self.records += batch.records
        self.device_seconds += batch.device_seconds
        self.encoded_bytes += batch.encoded_bytes
        self.batch_images += batch.batch_images
        self.batch_room += batch.batch_room


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """Counts of one shard, small enough to send to the driver; the shard's Parquet metadata keeps them too."""

    shard: int
    num_images: int = 0
    num_masks: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """Reason -> number of images that failed for it."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    device_seconds: float = 0.0
    """Time in the mask generator, on whatever device it ran."""
    held_seconds: float = 0.0
    gpu_seconds: float = 0.0
    """As in `Labelled`."""

    @classmethod
    def of(cls, shard: int, done: Labelled) -> ShardSummary:
        """The summary of a shard just labelled."""
        return cls(
            shard=shard,
            num_images=len(done.records),
            num_masks=sum(len(record.annotations) for record in done.records),
            failures=dict(Counter(reason_of(record.error) for record in done.records if record.error is not None)),
            stage_seconds=done.stage_seconds,
            device_seconds=done.device_seconds,
            held_seconds=done.held_seconds,
            gpu_seconds=done.gpu_seconds,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def to_json(self) -> str:
        """As one line."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> ShardSummary:
        """The opposite of to_json."""
        return cls(**json.loads(text))


@dataclass(kw_only=True)
class WithFailures:
    """Failed images of a whole output, earlier runs included."""

    num_failed: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """Reason -> number of those, the most frequent first."""

    def add_failures(self, failures: dict[str, int]) -> None:
        """Count failed images."""
        self.num_failed += sum(failures.values())
        self.failures = dict((Counter(self.failures) + Counter(failures)).most_common())


@dataclass
class LabelReport(WithFailures):
    """What `samray.label` did, and how it ended."""

    output: str
    num_images: int
    """In the plan."""
    num_shards: int
    num_shards_skipped: int = 0
    """Of earlier runs, found done."""
    num_labelled: int = 0
    """Images labelled by this run."""
    num_masks: int = 0
    """Of this run."""
    num_missing_shards: int = 0
    num_images_not_found: int = 0
    """Images of a file of prompts (`input.prompts`) that the plan does not have."""
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)
    """What the listing of INPUT left out: reason -> kind of file -> number (`samray.inputs.skipped`)."""
    wall_s: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Summed over all workers of this run."""
    device_seconds: float = 0.0
    held_seconds: float = 0.0
    gpu_seconds: float = 0.0
    """Of this run; as in `Labelled`."""
    gpu_price_per_hour: float | None = None
    exit_code: int = 0
    """0 all there; 1 shards missing or too many failed images; 130 or 143 interrupted, and resumable."""
    problem: str | None = None
    """Why exit_code is not 0, in a sentence."""
    warning: str | None = None
    """What looks wrong although all went well, in a sentence."""

    @property
    def images_per_s(self) -> float:
        """Of this run, start-up included."""
        done = self.num_labelled
        return done / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def busy_share(self) -> float:
        """Part of the actors' time in which they were at masks, from 0 to 1; the rest they waited."""
        return min(self.device_seconds / self.held_seconds, 1.0) if self.held_seconds > 0 else 0.0

    @property
    def cost(self) -> float | None:
        """Of the GPUs, for the time that this run's actors held them; None where no price was given."""
        return None if self.gpu_price_per_hour is None else self.gpu_seconds / 3600 * self.gpu_price_per_hour

    @property
    def cost_per_million_images(self) -> float | None:
        """The same for a million labelled images; None where none was labelled or no price was given."""
        return None if self.cost is None or not self.num_labelled else 1e6 * self.cost / self.num_labelled

    def add(self, summary: ShardSummary) -> None:
        """Count a shard that this run committed; not its failures, for those are of the output as it is at the end."""
        self.num_labelled += summary.num_images - sum(summary.failures.values())
        self.num_masks += summary.num_masks
        self.device_seconds += summary.device_seconds
        self.held_seconds += summary.held_seconds
        self.gpu_seconds += summary.gpu_seconds
        for name, seconds in summary.stage_seconds.items():
            self.stage_seconds[name] = self.stage_seconds.get(name, 0.0) + seconds


@dataclass
class ImportReport(WithFailures):
    """What `samray.import_` did."""

    output: str
    format: str
    num_images: int = 0
    """In OUTPUT, failed ones included."""
    num_masks: int = 0
    """Of this run."""
    num_dropped: int = 0
    """Annotations of this run that hold no pixel, or belong to no image."""
    num_corrected: int = 0
    """Images that a person looked at; 0 where nothing is corrected."""
    num_unknown_images: int = 0
    """Of a person's file, which the corrected output does not have."""
    changes: dict[str, int] = field(default_factory=dict)
    """Of this run: masks that a person left unchanged, changed, added or removed, and those that were left_out."""
    num_shards: int = 0
    num_shards_skipped: int = 0
    """Found done."""
    warning: str = ""
    """What is likely wrong, though the import went through: no image was found."""
    wall_s: float = 0.0

    def add(self, summary: ShardSummary, num_dropped: int) -> None:
        """Count a shard that this run wrote."""
        self.num_masks += summary.num_masks
        self.num_dropped += num_dropped
        self.add_failures(summary.failures)


def no_masks(num_images: int, config: Config) -> str:
    """The warning that none of so many labelled images has a mask, and what the likely reason is."""
    images = "the one image" if num_images == 1 else f"any of the {num_images:,} images"
    found = f"NO MASK was found in {images} labelled"
    if config.input.prompts is not None:
        return f"{found}: {config.input.prompts} holds no prompt for them"
    own = MaskConfig().for_model(config.model.name)
    strict = [
        f"{row.name}={getattr(config.masks, key)} (its own: {getattr(own, key)})"
        for row in setting_rows("masks")
        if getattr(config.masks, key := row.name.partition(".")[2]) != getattr(own, key)
    ]
    if strict:
        return (
            f"{found}. These settings are not those that suit the model {config.model.name}: {', '.join(strict)};"
            " leave them out, or change them, and label into another OUTPUT"
        )
    return (
        f"{found}, with the settings that suit the model {config.model.name}. Look at the images, and at"
        " model.checkpoint if it is your own. Lower thresholds find more, into another OUTPUT:"
        f" masks.pred_iou_thresh is {own.pred_iou_thresh:g},"
        f" masks.stability_score_thresh is {own.stability_score_thresh:g}"
    )


def print_report(report: LabelReport, console: Console | None = None) -> None:
    """The closing summary of a run, for people."""
    console = console or Console(stderr=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    skipped = f" ({report.num_shards_skipped} of {report.num_shards} shards were done before)"
    table.add_row("images", f"{report.num_images}" + skipped * bool(report.num_shards_skipped))
    if report.num_labelled:
        rate = f"{report.images_per_s:.2f} images/s with the start of Ray"
        table.add_row("labelled now", f"{report.num_labelled} in {duration(report.wall_s)}, {rate}")
        table.add_row("masks", f"{report.num_masks}, {report.num_masks / report.num_labelled:.1f} an image")
    if report.num_failed:
        reasons = ", ".join(f"{number} {reason}" for reason, number in report.failures.items())
        table.add_row("failed images", f"{report.num_failed}: {reasons}")
    if report.num_images_not_found:
        table.add_row("not found", f"images with prompts that INPUT does not have: {report.num_images_not_found}")
    for i, line in enumerate(Skipped(report.skipped).lines()):
        table.add_row("left out" if i == 0 else "", escape(line))
    if report.stage_seconds:
        busy = f", device busy {100 * report.busy_share:.0f}% of the actors' time" if report.held_seconds else ""
        table.add_row("device time", duration(report.device_seconds) + busy)
        table.add_row("by stage", _stages(report.stage_seconds))
    if report.gpu_price_per_hour is not None and report.num_labelled:
        table.add_row("cost", cost_in_words(report.gpu_seconds, report.gpu_price_per_hour, report.num_labelled))
    table.add_row("output", escape(report.output))
    if report.problem:
        table.add_row("[red]problem[/red]", escape(report.problem))
    if report.warning:
        table.add_row("[bold yellow]WARNING[/bold yellow]", f"[yellow]{escape(report.warning)}[/yellow]")
    console.print(table)
    for line in _next_commands(report):
        console.print(f"  {line}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _stages(stage_seconds: dict[str, float]) -> str:
    total = sum(stage_seconds.values()) or 1.0
    largest_first = sorted(stage_seconds.items(), key=lambda item: -item[1])
    return ", ".join(
        f"{name} {100 * seconds / total:.0f}%" for name, seconds in largest_first if seconds / total >= 0.005
    )


def _next_commands(report: LabelReport) -> list[str]:
    if report.exit_code in (130, 143):
        return ["the same command again goes on from here"]
    if report.num_missing_shards:
        return ["the same command again labels what is missing"]
    retry = ["the same command with --retry-failed tries the failed images again"] * bool(report.num_failed)
    return [*retry, f"samray verify {report.output}", f"samray report {report.output}"]
