"""The command `samray embed`, and `samray label --from`: arguments and printed plans."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer
from rich.console import Console
from rich.markup import escape

from samray import storage
from samray.cli.help import CommandWithSettings, refuse_expanded_glob, split_settings
from samray.cli.running import run_and_print
from samray.config import Config, Sections
from samray.config.embed import EMBED_SECTIONS, load_embed_config
from samray.errors import ConfigError
from samray.text import count, two_columns

if TYPE_CHECKING:
    from samray.config import ModelConfig
    from samray.pipeline.plan_run import RunPlan


class EmbedCommand(CommandWithSettings):
    """Lists the settings of `samray embed` in --help."""

    sections: ClassVar[Sections] = EMBED_SECTIONS
    has_presets: ClassVar[bool] = False


def embed(
    input: Annotated[str, typer.Argument(metavar="INPUT", help="Images, as for `samray label`.")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or prefix (local, s3://, ...).")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings, listed below; they override --config."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Encode again the images that failed in an earlier run.")
    ] = False,
    append: Annotated[
        bool, typer.Option("--append", help="Add images of INPUT that OUTPUT does not have yet, as new shards.")
    ] = False,
    redo_changed: Annotated[
        bool, typer.Option("--redo-changed", help="Encode again the images whose size or ETag changed.")
    ] = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; same as cluster.address=...")] = None,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Do not show progress.")] = False,
) -> int:
    """Store the image embedding of every image of INPUT in OUTPUT/embeddings/, without making masks.

    `samray label --from OUTPUT NEW` makes masks from them, as often as you like, without the images and without the
    encoder. samray.read_embedding gives one to an annotation tool. OUTPUT also has one row per image with its status.
    To resume, run the same command again.

    `samray label ... output.embeddings=float16` stores them along with masks.

    Examples:

      samray embed photos/ embedded/

      samray embed s3://bucket/photos s3://bucket/embedded model.name=vit_h cluster.num_gpus_per_actor=1
    """
    words = [input, output, *(settings or ())]
    overrides, (input, output, *extra) = split_settings(words, ["INPUT", "OUTPUT"], EMBED_SECTIONS)
    refuse_expanded_glob([input, output, *extra])
    overrides += extra  # not settings: load_embed_config reports them
    if address is not None:
        overrides.append(f"cluster.address={address}")
    resolved = load_embed_config(config, overrides)
    from samray.pipeline.embed import embed_with

    start = functools.partial(embed_with, retry_failed=retry_failed, append=append, redo_changed=redo_changed)
    return run_and_print(functools.partial(start, input, output, resolved, progress=not no_progress))


def label_from(
    output: str, dest: str, config: Config, *, others: dict[str, bool], retry_failed: bool, progress: bool
) -> int:
    """`samray label --from OUTPUT NEW`. others: options of `samray label` that it does not take -> whether set."""
    from samray.pipeline.label_from import label_from_with

    for option, is_set in others.items():
        if is_set:
            raise ConfigError(f"{option} does not go with --from: NEW has exactly the images of OUTPUT")
    start = functools.partial(label_from_with, output, dest, config, retry_failed=retry_failed, progress=progress)
    return run_and_print(start, functools.partial(print_from_plan, given=config.model))


def print_from_plan(planned: RunPlan, given: ModelConfig) -> None:
    """Print what will be labelled, from which embeddings, to stderr. given: the model as the user gave it."""
    from samray.cli.plan_view import masks_in_words, model_rows
    from samray.pipeline.label_from import named_by_output

    plan, source = planned.plan, planned.plan.run["identity"]["from"]
    num_done = sum(plan.num_images_of(shard) for shard in planned.versions)
    named = named_by_output(given, planned.config.model)
    cut = f"in {count(plan.num_shards, 'shard')} of up to {plan.generations[0].images_per_shard}"
    rows = [
        ("embeddings of", f"{source['output']}, stored as {source['embeddings']}"),
        ("images", f"{plan.num_images:,} {cut}"),
        ("done before", count(num_done, "image") if num_done else "none"),
        *model_rows(planned.config, plan.run["identity"]["model"].get("checkpoint_sha256")),
        *[("", f"{name} from the run.json of {source['output']}") for name in named],
        ("masks", masks_in_words(planned.config)),
        ("output", plan.output),
    ]
    table = two_columns()
    for title, value in rows:
        table.add_row(f"[bold]{title}[/bold]", escape(storage.redact(value)))
    Console(stderr=True, highlight=False).print(table, soft_wrap=True)
