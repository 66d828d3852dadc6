"""Results of a run: the summary of each shard, and of all shards."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from samray.config import Config, MaskConfig, setting_rows
from samray.config.labels import WAYS
from samray.inputs.skipped import Skipped
from samray.output.schema import ImageRecord, reason_of
from samray.text import cost_in_words, duration


@dataclass
class Labelled:
    """The records of a shard or of a batch of its images, in image order, and what they cost."""

    records: list[ImageRecord] = field(default_factory=list)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """For a shard only."""
    device_seconds: float = 0.0
    """Seconds in the mask generator, summed over its threads."""
    held_seconds: float = 0.0
    """For a shard in a run only: seconds since the actor's start or its previous shard, times its threads. The device
    was idle for the part that is not device_seconds."""
    gpu_seconds: float = 0.0
    """The same without the threads, times the actor's GPUs: the GPU time to pay for."""
    encoded_bytes: int = 0
    """Bytes of the images that came encoded."""
    embedding_bytes: int = 0
    """Size of the embedding files; for a shard in a run only."""
    batch_images: int = 0
    """Images passed to the mask generator."""
    batch_room: int = 0
    """batch_images if every batch had been full."""

    def add(self, batch: Labelled) -> None:
        """Append a batch."""
        # Embeddings are only in the batch: those of a shard may not fit into memory.
        self.records += [r if r.embedding is None else replace(r, embedding=None) for r in batch.records]
        self.device_seconds += batch.device_seconds
        self.encoded_bytes += batch.encoded_bytes
        self.batch_images += batch.batch_images
        self.batch_room += batch.batch_room


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """Counts of one shard, small enough to send to the driver; also stored in the shard's Parquet metadata."""

    shard: int
    num_images: int = 0
    num_masks: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """Reason -> number of failed images."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    device_seconds: float = 0.0
    """Seconds in the mask generator, on any device."""
    held_seconds: float = 0.0
    gpu_seconds: float = 0.0
    """As in `Labelled`."""
    num_named: int = 0
    """Masks with a name."""
    embedding_bytes: int = 0
    """Size of the embedding files."""

    @classmethod
    def of(cls, shard: int, done: Labelled) -> ShardSummary:
        """The summary of a newly labelled shard."""
        return cls(
            shard=shard,
            num_images=len(done.records),
            num_masks=sum(len(record.annotations) for record in done.records),
            num_named=sum(mask.get("label") is not None for record in done.records for mask in record.annotations),
            failures=dict(Counter(reason_of(record.error) for record in done.records if record.error is not None)),
            stage_seconds=done.stage_seconds,
            device_seconds=done.device_seconds,
            held_seconds=done.held_seconds,
            gpu_seconds=done.gpu_seconds,
            embedding_bytes=done.embedding_bytes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def to_json(self) -> str:
        """As one line."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> ShardSummary:
        """The inverse of to_json."""
        return cls(**json.loads(text))


@dataclass(kw_only=True)
class WithFailures:
    """Failed images of a whole output, including earlier runs."""

    num_failed: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """Reason -> number of failed images, most frequent first."""

    def add_failures(self, failures: dict[str, int]) -> None:
        """Add counts of failed images."""
        self.num_failed += sum(failures.values())
        # most_common sorts, and a dict keeps that order for the report and its JSON.
        self.failures = dict((Counter(self.failures) + Counter(failures)).most_common())


@dataclass
class LabelReport(WithFailures):
    """Result of `samray.label`."""

    output: str
    num_images: int
    """Images in the plan."""
    num_shards: int
    num_shards_skipped: int = 0
    """Shards finished by earlier runs."""
    num_labelled: int = 0
    """Images labelled by this run."""
    num_masks: int = 0
    """Masks of this run."""
    num_named: int | None = None
    """Masks with a name; null in a run without names."""
    embedding_bytes: int = 0
    """Size of the embedding files of this run."""
    num_missing_shards: int = 0
    num_images_not_found: int = 0
    """Images in a prompt file (`input.prompts`) that the plan does not have."""
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)
    """Files that the listing of INPUT left out: reason -> kind of file -> number (`samray.inputs.skipped`)."""
    wall_s: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Summed over all workers of this run."""
    device_seconds: float = 0.0
    held_seconds: float = 0.0
    gpu_seconds: float = 0.0
    """For this run; as in `Labelled`."""
    gpu_price_per_hour: float | None = None
    exit_code: int = 0
    """0: complete; 1: shards missing or too many failed images; 130 or 143: interrupted, can be resumed."""
    problem: str | None = None
    """Why exit_code is not 0, as a sentence."""
    warning: str | None = None
    """A likely problem in a successful run, as a sentence."""
    maps: str | None = None
    """Folder of the edge maps of `samray.detect_edges`."""
    only_embeddings: bool = False
    """Whether it is the result of `samray.embed`, which looks for no masks."""

    @property
    def images_per_s(self) -> float:
        """Rate of this run, including start-up."""
        done = self.num_labelled
        return done / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def busy_share(self) -> float:
        """Fraction of the actors' time that they spent generating masks; the rest they waited."""
        return min(self.device_seconds / self.held_seconds, 1.0) if self.held_seconds > 0 else 0.0

    @property
    def cost(self) -> float | None:
        """Cost of the GPUs for the time that this run's actors reserved them; None without a price."""
        return None if self.gpu_price_per_hour is None else self.gpu_seconds / 3600 * self.gpu_price_per_hour

    @property
    def cost_per_million_images(self) -> float | None:
        """The same per million labelled images; None without a price or without labelled images."""
        return None if self.cost is None or not self.num_labelled else 1e6 * self.cost / self.num_labelled

    def add(self, summary: ShardSummary) -> None:
        """Add a shard that this run committed, without its failures: those are counted over the final output."""
        self.num_labelled += summary.num_images - sum(summary.failures.values())
        self.num_masks += summary.num_masks
        if self.num_named is not None:
            self.num_named += summary.num_named
        self.embedding_bytes += summary.embedding_bytes
        self.device_seconds += summary.device_seconds
        self.held_seconds += summary.held_seconds
        self.gpu_seconds += summary.gpu_seconds
        for name, seconds in summary.stage_seconds.items():
            self.stage_seconds[name] = self.stage_seconds.get(name, 0.0) + seconds


@dataclass
class ImportReport(WithFailures):
    """Result of `samray.import_`."""

    output: str
    format: str
    num_images: int = 0
    """Images in OUTPUT, including failed ones."""
    num_masks: int = 0
    """Masks of this run."""
    num_dropped: int = 0
    """Annotations of this run without a pixel or without an image."""
    num_corrected: int = 0
    """Images with manual corrections; 0 for a plain import."""
    num_unknown_images: int = 0
    """Images of the corrected file that the output does not have."""
    changes: dict[str, int] = field(default_factory=dict)
    """Masks of this run by change: unchanged, changed, added, removed, left_out."""
    num_shards: int = 0
    num_shards_skipped: int = 0
    """Shards finished by earlier calls."""
    warning: str = ""
    """A likely problem in a successful import: no image was found."""
    wall_s: float = 0.0

    def add(self, summary: ShardSummary, num_dropped: int) -> None:
        """Add a shard that this run wrote."""
        self.num_masks += summary.num_masks
        self.num_dropped += num_dropped
        self.add_failures(summary.failures)


def no_masks(num_images: int, config: Config) -> str:
    """The warning that none of the labelled images has a mask, with the likely reason."""
    images = "the only image" if num_images == 1 else f"any of the {num_images:,} images"
    sentence = f"NO MASK was found in {images} labelled"
    if config.masks_are_prompted:
        return f"{sentence}: {config.input.prompts} has no prompts for them"
    by = config.labels.by
    if by is not None and not config.labels.gives_names and config.input.prompts is None:
        return f"{sentence}. Look at the images; a lower labels.conf_thresh gives more masks, into another OUTPUT"
    if by is not None and not config.labels.finds_all and config.labels.example is None:
        thresholds = " and ".join(f"labels.{key}" for key in WAYS[by].thresholds)
        return f"{sentence} for any of the phrases. Lower {thresholds}, into another OUTPUT, or use other words"
    if not config.labels.finds_all:
        return (
            f"{sentence} like {config.labels.example}. Look at the example and its mask; a lower labels.score_thresh"
            " (design persam) or labels.vote_thresh (the others) gives more masks, into another OUTPUT"
        )
    defaults = MaskConfig().for_model(config.model.name)
    # Mask settings that differ from the model's own defaults: a likely reason, so name them.
    strict = [
        f"{row.name}={getattr(config.masks, key)} (default: {getattr(defaults, key)})"
        for row in setting_rows("masks")
        if getattr(config.masks, key := row.name.partition(".")[2]) != getattr(defaults, key)
    ]
    if strict:
        return (
            f"{sentence}. These settings differ from the defaults of the model {config.model.name}: {', '.join(strict)}"
            "; remove or change them, and label into another OUTPUT"
        )
    return (
        f"{sentence}, with the default settings of the model {config.model.name}. Look at the images, and at"
        " model.checkpoint if you set it. Lower thresholds give more masks (into another OUTPUT):"
        f" masks.pred_iou_thresh is {defaults.pred_iou_thresh:g},"
        f" masks.stability_score_thresh is {defaults.stability_score_thresh:g}"
    )


def print_report(report: LabelReport, console: Console | None = None) -> None:
    """Print the closing summary of a run."""
    console = console or Console(stderr=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    images = f"{report.num_images}"
    if report.num_shards_skipped:
        images += f" ({report.num_shards_skipped} of {report.num_shards} shards were done before)"
    table.add_row("images", images)
    if report.num_labelled:
        rate = f"{report.images_per_s:.2f} images/s including the start of Ray"
        table.add_row("labelled now", f"{report.num_labelled} in {duration(report.wall_s)}, {rate}")
        # Edge maps and embeddings have no masks to count.
        if report.maps is None and not report.only_embeddings:
            names = "" if report.num_named is None else f", {report.num_named} with a name"
            table.add_row("masks", f"{report.num_masks}, {report.num_masks / report.num_labelled:.1f} per image{names}")
        if report.embedding_bytes:
            mb_per_image = report.embedding_bytes / report.num_labelled / 1e6
            table.add_row("embeddings", f"{report.embedding_bytes / 1e6:,.1f} MB, {mb_per_image:.2f} MB per image")
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
    if report.maps is not None:
        table.add_row("edge maps", escape(report.maps))
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
    # After a signal (2 or 15, plus 128) nothing is wrong: only say how to go on.
    if report.exit_code in (130, 143):
        return ["run the same command to resume"]
    if report.num_missing_shards:
        return ["run the same command to label the missing images"]
    commands = [f"samray verify {report.output}"]
    if report.maps is None and not report.only_embeddings:
        commands.append(f"samray report {report.output}")
    if report.num_failed:
        commands.insert(0, "add --retry-failed to the same command to retry the failed images")
    return commands
