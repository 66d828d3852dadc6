"""The commands on an OUTPUT that lies there: what `samray verify`, `report` and their like take and print."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from samray.cli_help import count, two_columns

Output = Annotated[
    str, typer.Argument(metavar="OUTPUT", help="A folder or prefix that holds, or is to hold, the labels.")
]


def verify(
    output: Output,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also decode every mask and recompute its area and box.")
    ] = False,
) -> int:
    """Check that every planned image is in OUTPUT exactly once, and that its masks are sound."""
    from samray.dataset.verify import verify as run_verify

    found = run_verify(output, deep=deep)
    table = two_columns()
    table.add_row("images", f"{found.num_images:,}")
    table.add_row("masks", f"{found.num_masks:,}")
    table.add_row("failed images", f"{found.num_failed:,}")
    table.add_row("checked", "rows, ids, and every mask decoded" if deep else "rows and ids (--deep decodes the masks)")
    table.add_row(
        "result", "[green]sound[/green]" if found.ok else f"[red]{count(len(found.problems), 'problem')}[/red]"
    )
    console = Console()
    console.print(table)
    for problem in found.problems[:20]:
        console.print(f"  {problem}", markup=False, highlight=False, soft_wrap=True)
    if len(found.problems) > 20:
        console.print(f"  and {len(found.problems) - 20} more")
    return 0 if found.ok else 1


def report(
    output: Output,
    out: Annotated[str | None, typer.Option(help="Where to write the page. [OUTPUT/_samray/report.html]")] = None,
    images: Annotated[int, typer.Option(min=0, max=200, help="Images to show with their masks.")] = 24,
) -> int:
    """Write one self-contained HTML page about OUTPUT: overlays, histograms, times, failures, settings."""
    from samray.report import write_report

    Console().print(write_report(output, out, num_images=images), highlight=False, soft_wrap=True, markup=False)
    return 0


COMMANDS: list[Callable[..., int]] = [verify, report]
"""In the order in which `samray --help` lists them."""
