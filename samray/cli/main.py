"""The command line. It only parses, explains, and turns errors into one sentence and an exit code.

Heavy modules are imported inside the commands, which keeps `samray --help` fast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from samray import __version__
from samray.cli import evaluate_edges  # noqa: F401  (adds its command)
from samray.cli.embed import EmbedCommand, embed, label_from
from samray.cli.evaluate import evaluate_app
from samray.cli.evaluate_instances import InstancesCommand, instances
from samray.cli.evaluate_oneshot import OneshotCommand, oneshot
from samray.cli.export import COMMANDS as EXPORT_COMMANDS
from samray.cli.help import Command, CommandWithSettings, HelpfulGroup, refuse_expanded_glob, split_settings
from samray.cli.models import models_app
from samray.cli.name import NameCommand, name
from samray.cli.output import COMMANDS, Output
from samray.cli.quality import quality
from samray.cli.running import fail, run_and_print
from samray.config import load_config
from samray.config.edges import EDGE_SECTIONS, load_edges_config
from samray.errors import ConfigError, SamrayError, StorageError
from samray.train.settings import TRAIN_SECTIONS, load_train_settings

app = typer.Typer(
    name="samray",
    help="Label a bucket of images with Segment Anything on Ray; writes Parquet in the SA-1B layout.\n\n"
    "Start with [bold]samray demo[/bold], which needs no download. Then [bold]samray label INPUT OUTPUT[/bold].",
    cls=HelpfulGroup,
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


Input = Annotated[
    str,
    typer.Argument(
        metavar="INPUT",
        help="Images: a folder, prefix or glob (local, s3://, gs://, ...), a tar or a glob of tars, a manifest "
        "(.parquet, .csv, .jsonl, .txt with a uri column), or Parquet with image bytes.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...", help="Settings, listed below; they override --config and --preset."
    ),
]
Preset = Annotated[
    str | None, typer.Option(help="Start from a preset. Without a preset, mask settings follow the model.")
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Label again the images that failed in an earlier run.")
]
Append = Annotated[
    bool, typer.Option("--append", help="Add images of INPUT that OUTPUT does not have yet, as new shards.")
]
RedoChanged = Annotated[bool, typer.Option("--redo-changed", help="Label again the images whose size or ETag changed.")]

DEMO_FOLDER, DEMO_SCENES = "samray-demo", 6


@app.command(cls=CommandWithSettings)
def label(
    input: Input,
    output: Output,
    settings: Settings = None,
    preset: Preset = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; overrides the preset.")] = None,
    retry_failed: RetryFailed = False,
    append: Append = False,
    redo_changed: RedoChanged = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; same as cluster.address=...")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and exit; writes nothing.")] = False,
    from_: Annotated[
        bool, typer.Option("--from", help="INPUT is an output with embeddings: label from them, without the images.")
    ] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Do not show progress.")] = False,
) -> int:
    """Find the objects in every image of INPUT and write their masks to OUTPUT.

    Writes one row per image, in the SA-1B layout, as Parquet shards. To resume, run the same command again: finished
    shards are kept. Different settings on the same OUTPUT are refused.

    Examples:

      samray label photos/ labels/

      samray label s3://bucket/photos s3://bucket/labels --preset sa1b cluster.num_gpus_per_actor=1

      samray label 'photos/*.tar' labels/ model.name=vit_b masks.points_per_side=16

      samray label s3://bucket/photos s3://bucket/labels --preset sa1b --append

      samray label photos/ labels/ model.name=vit_b input.prompts=clicks.jsonl

      samray label photos/ labels/ model.name=vit_b labels.by=grounding_dino 'labels.phrases=[cat,fire hydrant]'

      samray label --from labels/ more/ masks.points_per_side=48 masks.pred_iou_thresh=0.5
    """
    overrides, (input, output, *extra) = split_settings([input, output, *(settings or ())], ["INPUT", "OUTPUT"])
    refuse_expanded_glob([input, output, *extra])
    overrides += extra  # not settings: load_config reports them
    if address is not None:
        overrides.append(f"cluster.address={address}")
    resolved = load_config(preset, config, overrides)
    if from_:
        others = {"--append": append, "--redo-changed": redo_changed, "--dry-run": dry_run}
        return label_from(input, output, resolved, others=others, retry_failed=retry_failed, progress=not no_progress)
    from samray.cli.plan_view import print_plan
    from samray.pipeline.plan_run import plan_run

    if dry_run:
        print_plan(plan_run(input, output, resolved, append=append, redo_changed=redo_changed, dry_run=True))
        return 0
    from samray.pipeline.run import label_with

    start = functools.partial(label_with, retry_failed=retry_failed, append=append, redo_changed=redo_changed)
    return run_and_print(functools.partial(start, input, output, resolved, progress=not no_progress))


class EdgesCommand(CommandWithSettings):
    """Lists the settings of edge detection in --help."""

    sections = EDGE_SECTIONS
    has_presets = False


@app.command(cls=EdgesCommand)
def edges(
    input: Input,
    output: Output,
    settings: Settings = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    retry_failed: RetryFailed = False,
    append: Append = False,
    redo_changed: RedoChanged = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; same as cluster.address=...")] = None,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Do not show progress.")] = False,
) -> int:
    """Write an edge map of every image of INPUT to OUTPUT/edges/, by the zero-shot method of the SAM paper.

    The map of a/1.jpg is OUTPUT/edges/a/1.png: grey, as large as the image, brighter for stronger edges. OUTPUT also
    has one row per image with its status. To resume, run the same command again. Measure with `samray evaluate edges`.

    Examples:

      samray edges photos/ out/

      samray edges s3://bucket/photos s3://bucket/out model.name=vit_h cluster.num_gpus_per_actor=1 edges.bits=16
    """
    overrides, (input, output, *extra) = split_settings(
        [input, output, *(settings or ())], ["INPUT", "OUTPUT"], EDGE_SECTIONS
    )
    refuse_expanded_glob([input, output, *extra])
    overrides += extra  # not settings: load_edges_config reports them
    if address is not None:
        overrides.append(f"cluster.address={address}")
    resolved = load_edges_config(config, overrides)
    from samray.pipeline.edges import detect_edges_with

    start = functools.partial(detect_edges_with, retry_failed=retry_failed, append=append, redo_changed=redo_changed)
    return run_and_print(functools.partial(start, input, output, resolved, progress=not no_progress))


class TrainCommand(CommandWithSettings):
    """Lists the settings of training in --help."""

    sections = TRAIN_SECTIONS
    has_presets = False


@app.command(cls=TrainCommand)
def train(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA... OUTPUT [SECTION.KEY=VALUE]...",
            help="DATA: outputs of `samray label` or `samray import`, or `scenes` (synthetic images); several are "
            "mixed. With train.objective=mae: unlabelled images, whatever `samray label` takes as INPUT, or `scenes`. "
            "OUTPUT: a folder or prefix for weights, state and metrics. Settings are listed below.",
        ),
    ],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; same as cluster.address=...")] = None,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Do not show progress.")] = False,
) -> int:
    """Train a model on the output of `samray label` or `samray import`.

    To resume, run the same command again. Different settings on the same OUTPUT are refused.

    Writes weights.safetensors, for `samray label ... model.checkpoint=`, and curves.png to OUTPUT.

    train.objective=mae pre-trains the image encoder on images without labels, and also writes reconstructions.png. Its
    weights are the start of a training: train.encoder_checkpoint=.

    train.objective=text learns prompts by text, for `samray label ... labels.by=sam_text`, from masks alone.

    Examples:

      samray train labels/ weights/

      samray train s3://bucket/labels s3://bucket/weights model.name=vit_b train.trainable=decoder train.steps=5000

      samray train labels/ scenes weights/ data.shares=[3,1] train.minutes=60 train.steps=null

      samray train photos/ mae/ train.objective=mae model.name=vit_b
    """
    overrides, places = split_settings(words, ["DATA", "OUTPUT"], TRAIN_SECTIONS)
    if address is not None:
        overrides.append(f"cluster.address={address}")
    resolved = load_train_settings(config, overrides)
    from samray.train.progress import print_train_report
    from samray.train.run import train as run_train

    try:
        report = run_train(places[:-1], places[-1], resolved, progress=not no_progress)
    except KeyboardInterrupt:  # pressed before the run handles it, or pressed twice
        return fail("interrupted; run the same command to resume", 130)
    print_train_report(report)
    return report.exit_code


@app.command(cls=CommandWithSettings)
def demo(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder for images, labels and report.")] = Path(
        DEMO_FOLDER
    ),
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings of `samray label`.")
    ] = None,
    num_scenes: Annotated[
        int, typer.Option("--scenes", min=1, max=1000, help="Number of painted scenes.")
    ] = DEMO_SCENES,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the report in the browser.")] = True,
    small_world: Annotated[
        bool, typer.Option("--train", help="On a small world: label, correct, train, label again.")
    ] = False,
) -> int:
    """Label photographs, and painted scenes with known masks, with the embedded model, and report how well it did.

    The photographs come with scikit-image: nothing is downloaded. Writes the report as one HTML page, which opens in
    any browser.

    --train shows the data engine on a small world that the model has not seen: it labels scenes, a simulated annotator
    corrects them, it trains on these and labels others again. Prints figures, and makes a picture of before and after.
    """
    overrides, places = split_settings([str(directory), *(settings or ())], [])
    directory = Path(places[0]) if places else Path(DEMO_FOLDER)
    overrides += places[1:]
    if small_world:
        from samray.cli.demo_train import DEFAULTS, Rounds, train_demo

        return train_demo(directory / "train", load_config(None, None, [*DEFAULTS, *overrides]), Rounds())
    config = load_config(None, None, overrides)
    from samray.cli.demo import run_demo

    options = [] if num_scenes == DEMO_SCENES else [f"--scenes={num_scenes}"]
    options += [*([] if show else ["--no-open"]), *overrides]
    return run_demo(directory, config, num_scenes, show=show, options=options)


for _command in [*COMMANDS, *EXPORT_COMMANDS]:
    _class = EXPORT_COMMANDS.get(_command, Command)
    app.command(_command.__name__.strip("_").replace("_", "-"), cls=_class)(_command)


evaluate_app.command(cls=InstancesCommand)(instances)
app.command(cls=NameCommand)(name)
app.command(cls=Command)(quality)
app.command(cls=EmbedCommand)(embed)
evaluate_app.command(cls=OneshotCommand)(oneshot)
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(models_app, name="models")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> int:
    if version:
        print(__version__)
        raise typer.Exit
    return 0


@functools.cache
def _parser() -> Callable[..., object]:
    """The parser of a command; made once per process, because that takes 20 ms."""
    return typer.main.get_command(app)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. `jobs/autolabel.py` calls it, too."""
    try:
        # Not standalone: click would print errors and exit by itself.
        code = _parser()(argv, prog_name="samray", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted", 130)
    except ConfigError as error:
        return fail(str(error), 2)
    except StorageError as error:
        return fail(str(error), 3)
    except SamrayError as error:
        return fail(str(error), 1)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
            usage = error.format_message()
            return fail(f"{usage.rstrip('.')} (see samray --help)", 2) if usage else 2
        text = " ".join(str(error).split()) or "no message"
        return fail(f"unexpected {type(error).__name__}: {text} (set SAMRAY_DEBUG=1 for a traceback)", 1)
