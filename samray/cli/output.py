"""The commands on an existing OUTPUT (`samray verify`, `report`, `status`, `compact`): arguments and printed
results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from samray import storage
from samray.text import count, two_columns

Output = Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or prefix of the labels (local, s3://, ...).")]
WhereOption = Annotated[
    str | None,
    typer.Option(metavar="SQL", help='Only these images and masks, such as "area > 100 and width >= 640".'),
]
QualityOption = Annotated[
    str | None,
    typer.Option(metavar="DEST", help="Where `samray quality` wrote, for its columns in --where, if DEST was given."),
]


def verify(
    output: Output,
    deep: Annotated[bool, typer.Option("--deep", help="Also check every mask's run lengths, area and box.")] = False,
) -> int:
    """Check that every planned image is in OUTPUT exactly once, and that its masks are sound."""
    from samray.output.verify import verify as run_verify

    report = run_verify(output, deep=deep)
    table = two_columns()
    table.add_row("images", f"{report.num_images:,}")
    table.add_row("masks", f"{report.num_masks:,}")
    table.add_row("failed images", f"{report.num_failed:,}")
    table.add_row("checked", "bytes, rows, ids" + (", and every mask" if deep else " (--deep: also every mask)"))
    if report.num_without_checksum:
        number = count(report.num_without_checksum, "shard")
        table.add_row("no checksum", f"{number}, by an older samray: some damage to them cannot be seen")
    table.add_row(
        "result", "[green]sound[/green]" if report.ok else f"[red]{count(len(report.problems), 'problem')}[/red]"
    )
    console = Console()
    console.print(table)
    for problem in report.problems[:20]:
        console.print(f"  {problem}", markup=False, highlight=False, soft_wrap=True)
    if len(report.problems) > 20:
        console.print(f"  and {len(report.problems) - 20} more")
    return 0 if report.ok else 1


def report(
    output: Output,
    out: Annotated[str | None, typer.Option(help="Where to write the page. [OUTPUT/_samray/report.html]")] = None,
    images: Annotated[int, typer.Option(min=0, max=200, help="Images to show with their masks.")] = 24,
    where: WhereOption = None,
    quality: QualityOption = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> int:
    """Write a self-contained HTML page about OUTPUT that opens in any browser, also offline.

    OUTPUT of `samray label`: images with their masks to hover over, isolate, filter and colour by score; distributions
    of masks per image, predicted IoU, stability, area and click points; time spent; failures by reason; settings. For a
    large OUTPUT the counts are exact, and the distributions are estimated from a random sample of images, which takes
    seconds.

    OUTPUT of `samray train`: curves, validations, data, settings (in OUTPUT/report.html).

    Examples:

      samray report labels/ --open

      samray report s3://bucket/labels --out report.html --images 60

      samray report labels/ --where "label = 'dog' and num_selected > 0"
    """
    from samray.errors import ConfigError
    from samray.report.output import open_page, write_report
    from samray.report.training import write_train_report
    from samray.train.store import is_training

    if is_training(output):
        if where is not None or quality is not None:
            raise ConfigError(f"--where selects images and masks; {output} is a training, which has none")
        uri = write_train_report(output, out)
    else:
        uri = write_report(output, out, num_images=images, where=where, quality=quality)
    Console().print(uri, highlight=False, soft_wrap=True, markup=False)
    if show and not open_page(uri):
        Console(stderr=True).print(
            "cannot open the page: this machine has no display, or the page is not on it", highlight=False
        )
    return 0


def status(
    output: Output,
    watch: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="SECONDS", help="Repeat every SECONDS until the run is finished."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object each time.")] = False,
    gpu_price: Annotated[
        float | None,
        typer.Option(min=0, help="Price per GPU hour; overrides the run's cluster.gpu_price_per_hour."),
    ] = None,
) -> int:
    """Show how far the run that writes OUTPUT is: images done, rate, time left, masks, failures, cost.

    Works during and after the run, on any machine that can read OUTPUT. Reads the listing and the footers of at most
    200 shards. The exit code is always 0; `state` in --json is one of not begun, running, stalled, unmarked (all shards
    are there, but not _SUCCESS) and finished.

    Examples:

      samray status s3://bucket/labels --watch 30

      samray status labels/ --json | jq .eta_s
    """
    from samray.cli.status_view import show_status

    show_status(output, watch_s=watch, as_json=json, gpu_price_per_hour=gpu_price)
    return 0


def compact(
    output: Output,
    dest: Annotated[str, typer.Argument(metavar="DEST", help="An empty folder or prefix (local, s3://, ...).")],
    file_size: Annotated[int, typer.Option(min=1, metavar="MB", help="Approximate size of the files.")] = 128,
    where: WhereOption = None,
    quality: QualityOption = None,
) -> int:
    """Write the rows of a finished OUTPUT to DEST, in a few large files instead of many small ones.

    DEST is a complete output with the same plan, ids and rows. OUTPUT is not changed, because object stores cannot
    replace a set of files in one step: keep reading OUTPUT until DEST has `_SUCCESS`, then delete it; --append works on
    DEST. To resume, run the same command again.

    --where: DEST has only the selected images and masks, with the ids they had; do not use --append on it.

    Examples:

      samray compact s3://bucket/labels s3://bucket/labels-compact --file-size 256

      samray compact labels/ sure/ --where "predicted_iou > 0.95 and status = 'ok'"
    """
    from rich.progress import Progress

    from samray.output.compact import compact as run_compact
    from samray.output.where import make_where

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("images", total=None)
        done = run_compact(
            output,
            dest,
            file_size * 10**6,
            lambda done, total: progress.update(task, completed=done, total=total),
            where=make_where(where, storage.normalize(output), quality),
        )
    table = two_columns()
    table.add_row("images", f"{done.num_images:,}")
    skipped = f" ({done.num_files_skipped} existed)" if done.num_files_skipped else ""
    table.add_row("files", f"{done.num_files:,}{skipped}, before {done.num_files_before:,}")
    table.add_row("output", escape(done.dest))
    Console().print(table)
    return 0


COMMANDS: list[Callable[..., int]] = [status, verify, report, compact]
"""In the order of `samray --help`."""
