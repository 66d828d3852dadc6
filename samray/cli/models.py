"""The commands `samray models` and `samray models export`: arguments and printed results."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from samray.cli.help import Command, HelpfulGroup
from samray.cli.running import ended_by_sigterm
from samray.errors import ConfigError

models_app = typer.Typer(
    name="models",
    help="List the models: size, licence, source of the weights, and which are on this machine.\n\n"
    "[bold]samray models export[/bold] writes one for other programs.",
    cls=HelpfulGroup,
    rich_markup_mode="rich",
    invoke_without_command=True,
)


@models_app.callback()
def models(context: typer.Context) -> int:
    """Print the table, unless a command follows."""
    if context.invoked_subcommand is not None:
        return 0
    from samray.sam.checkpoints import list_models

    rows = list_models()
    table = Table(box=None, pad_edge=False)
    for title in ("name", "parameters", "file", "licence", "here", "verified by", "from"):
        table.add_column(title, justify="right" if title in ("parameters", "file") else "left")
    for row in rows:
        presence = "[green]yes[/green]" if row.present else "no" if row.url or row.gated else "[red]missing[/red]"
        size = f"{row.size_mb:,.1f} MB" if row.size_mb else ""
        table.add_row(
            row.name, f"{row.parameters / 1e6:.1f} M", size, row.licence, presence, row.verified_by, row.source
        )
    console = Console()
    console.print(table)
    console.print("\nweights", style="bold")
    width = max(len(row.name) for row in rows)
    for row in rows:
        where = row.present or row.url or (row.gated and f"gated; get {row.file_name} from {row.gated}")
        if where:
            console.print(f"  {row.name:{width}}  {where}", highlight=False, soft_wrap=True, markup=False)
    return 0


@models_app.command(cls=Command)
def export(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Model, as in `samray models`.")],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Local folder for the files.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX files.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also write the encoder with int8 weights, and print what it costs in IoU.")
    ] = False,
    single_mask: Annotated[
        bool, typer.Option("--single-mask", help="One mask per prompt instead of all, for tools that expect one.")
    ] = False,
    checkpoint: Annotated[
        str | None, typer.Option(help="Path or URI of the weights; by default the published or embedded ones.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Path or URI of a LoRA adapter to merge into them.")] = None,
) -> int:
    """Write a model's encoder and decoder as ONNX files, for annotation tools, browsers and other languages.

    The files are NAME.encoder.onnx, NAME.decoder.onnx, and NAME.json, which says how to call them. Before they appear,
    onnxruntime's results are compared with torch's on a photograph. Needs the extra `onnx` of samray.

    Examples:

      samray models export vit_b onnx/ --onnx --int8

      samray models export sam2.1_t onnx/ --onnx --checkpoint s3://weights/sam2.1_hiera_tiny.pt
    """
    if not onnx:
        raise ConfigError("choose a format: samray models export NAME DIR --onnx")
    from samray.sam.onnx_export import export_onnx

    with ended_by_sigterm():
        report = export_onnx(
            name, directory, checkpoint=checkpoint, adapter=adapter, int8=int8, single_mask=single_mask
        )
    lines = [f"{path}  {path.stat().st_size / 1e6:,.1f} MB" for path in report.files]
    lines.append(
        f"difference from torch: {report.difference:.1e} of the numbers' scale; a click's masks have IoU"
        f" {report.click_iou:.4f}"
    )
    if report.int8_iou is not None:
        lines.append(
            f"int8 encoder: mean IoU {report.int8_iou:.4f} with the float32 one's masks, {report.num_clicks} clicks on"
            " scikit-image's photographs"
        )
    console = Console(highlight=False)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    return 0
