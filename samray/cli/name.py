"""The command `samray name`: arguments and the printed plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer
from rich.console import Console
from rich.markup import escape

from samray import storage
from samray.cli.help import CommandWithSettings, split_settings
from samray.config import Sections
from samray.config.names import NAME_SECTIONS, load_names_config
from samray.errors import ConfigError
from samray.text import abridged, count, two_columns

if TYPE_CHECKING:
    from samray.pipeline.plan_run import RunPlan


class NameCommand(CommandWithSettings):
    """Lists the settings of naming in --help."""

    sections: ClassVar[Sections] = NAME_SECTIONS
    has_presets: ClassVar[bool] = False


def name(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A finished output, whose masks get names.")],
    dest: Annotated[str, typer.Argument(metavar="DEST", help="Folder or prefix for the output with names.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings, listed below; they override --config."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Read again the images that failed in an earlier run.")
    ] = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; same as cluster.address=...")] = None,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Do not show progress.")] = False,
) -> int:
    """Name the masks of a finished OUTPUT by CLIP, without labelling again, and write them to DEST.

    DEST gets the same images, masks and ids, with a label and its probability for each mask. A mask whose best name is
    less likely than labels.score_thresh stays unnamed. The images are read again, from where OUTPUT has them. To
    resume, run the same command again: finished shards are kept.

    The probabilities of the names given sum to 1: also give names for what else there is, such as background. With one
    name alone every mask gets it. Needs the extra `text` of samray.

    Examples:

      samray name labels/ named/ labels.phrases=names.txt

      samray name labels/ named/ labels.phrases=names.txt labels.checkpoint=clip/ labels.score_thresh=0.8

      samray name s3://bucket/labels s3://bucket/named labels.phrases=s3://bucket/names.txt cluster.num_gpus_per_actor=1
    """
    words = [output, dest, *(settings or ())]
    overrides, (output, dest, *extra) = split_settings(words, ["OUTPUT", "DEST"], NAME_SECTIONS)
    if extra:
        raise ConfigError(f"expected OUTPUT and DEST, got also {abridged(extra, 3)}")
    if address is not None:
        overrides.append(f"cluster.address={address}")
    resolved = load_names_config(config, overrides)
    from samray.pipeline.naming import name_with
    from samray.pipeline.report import print_report

    report = name_with(
        output, dest, resolved, on_plan=print_names_plan, retry_failed=retry_failed, progress=not no_progress
    )
    print_report(report)
    return report.exit_code


def print_names_plan(planned: RunPlan) -> None:
    """Print what will be named, by what, to stderr."""
    plan, labels = planned.plan, planned.labels
    assert labels is not None
    num_done = sum(plan.num_images_of(shard) for shard in planned.versions)
    cut = f"in {count(plan.num_shards, 'shard')} of up to {plan.generations[0].images_per_shard}"
    rows = [
        ("masks of", plan.run["identity"]["names"]["output"]),
        ("images", f"{plan.num_images:,} {cut}"),
        ("done before", count(num_done, "image") if num_done else "none"),
        *labels.plan_rows(planned.config),
        ("output", plan.output),
    ]
    table = two_columns()
    for title, value in rows:
        table.add_row(f"[bold]{title}[/bold]", escape(storage.redact(value)))
    Console(stderr=True, highlight=False).print(table, soft_wrap=True)
