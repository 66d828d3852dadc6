"""The command `samray quality`: arguments and the printed result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from samray.cli.export import Address, NoProgress, Ray
from samray.cli.output import Output
from samray.text import count, two_columns

if TYPE_CHECKING:
    from samray.audit.run import QualityReport


def quality(
    output: Output,
    dest: Annotated[
        str | None,
        typer.Argument(metavar="[DEST]", help="An empty folder or prefix. [OUTPUT/_samray/quality]"),
    ] = None,
    images: Annotated[
        bool,
        typer.Option("--images", help="Also read the images: find duplicates, dark or blurred ones. Extra `quality`."),
    ] = False,
    against: Annotated[
        str | None, typer.Option(metavar="OUTPUT2", help="A second output, in which to look for the same images.")
    ] = None,
    prefix_depth: Annotated[
        int,
        typer.Option(min=1, max=100, metavar="N", help="Folders of a file name that make a group, such as a camera."),
    ] = 1,
    examples: Annotated[int, typer.Option(min=0, max=200, help="Worst images to show on the page.")] = 24,
    ray: Ray = None,
    address: Address = None,
    no_progress: NoProgress = False,
) -> int:
    """Check the quality of a finished OUTPUT: duplicates, suspicious images, repeated masks, drift.

    Reads only Parquet, without --images. Finds images that repeat another's masks, images with few or many masks, masks
    at the same place in many images (a camera's border), and prefixes or windows of images whose masks differ from the
    others'. Ranks all images by how far they are from the others.

    Writes to DEST: quality.html; images/ (a row per image, whose columns --where knows as quality.NAME); review.parquet
    (the worst images first: an INPUT of `samray label`); groups.parquet; regions.parquet. To resume, run the same
    command again.

    Examples:

      samray quality labels/

      samray export labels/ coco/ --format coco --where "quality.same_masks_as is null and not quality.few_masks"

      samray label labels/_samray/quality/review.parquet again/ input.allow_outside=true masks.points_per_side=64
    """
    from samray.audit.run import quality as run_quality

    try:
        report = run_quality(
            output,
            dest,
            images=images,
            against=against,
            prefix_depth=prefix_depth,
            num_examples=examples,
            ray=ray,
            address=address,
            progress=not no_progress,
        )
    except KeyboardInterrupt:
        Console(stderr=True).print("samray: interrupted; run the same command to resume", style="bold red")
        return 130
    _print(report)
    return 0


def _print(report: QualityReport) -> None:
    from samray.audit.page import FINDINGS

    table = two_columns()
    table.add_row("images", f"{report.counts['images']:,}")
    table.add_row("masks", f"{report.counts['masks']:,}")
    for key, (what, _) in FINDINGS.items():
        if report.counts.get(key):
            table.add_row("found", f"[yellow]{report.counts[key]:,}[/yellow] {what}")
    if not any(report.counts.get(key) for key in FINDINGS):
        table.add_row("found", "[green]nothing[/green]")
    if report.num_pieces_skipped:
        table.add_row("done before", f"{report.num_pieces_skipped:,} of {count(report.num_pieces, 'piece')}")
    Console().print(table)
    Console().print(report.page, highlight=False, soft_wrap=True, markup=False)
