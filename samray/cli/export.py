"""The commands `samray export` and `samray import`: arguments and printed results."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from samray.cli.help import Command
from samray.cli.output import Output, QualityOption, WhereOption
from samray.text import count, two_columns

if TYPE_CHECKING:
    from samray.exports.export import ExportReport
    from samray.pipeline.report import ImportReport


class ExportCommand(Command):
    """Adds the options of every format, from the table of formats, which is imported only on use."""

    def get_params(self, ctx: Any) -> list[Any]:
        from samray.exports.formats import FORMATS

        if _OPTIONS not in ctx.meta:  # keep the same objects, because the parser compares them
            ctx.meta[_OPTIONS] = _format_options()
        params: list[Any] = super().get_params(ctx)
        after = next(index for index, param in enumerate(params) if param.name == "format") + 1
        params[after - 1].help = "; ".join(f"{name}: {row.help}" for name, row in FORMATS.items()) + "."
        return [*params[:after], *ctx.meta[_OPTIONS], *params[after:]]

    def invoke(self, ctx: Any) -> Any:
        # The function has no parameters for the options of formats, so they go through ctx.obj.
        ctx.obj = {param.name: ctx.params.pop(param.name) for param in ctx.meta[_OPTIONS]}
        return super().invoke(ctx)


_OPTIONS: Final = "samray.cli.export.options"


def _format_options() -> list[Any]:
    """The options of all formats as parameters of a command; an option of several formats is one parameter."""
    from samray.exports.base import as_option
    from samray.exports.formats import option_fields, option_help

    parameters = []
    for name, fields in option_fields().items():
        kind: Any = next(iter(fields.values())).annotation
        flag = kind is bool  # --name only: typer would also add --no-name
        option = typer.Option(*([as_option(name)] if flag else []), help=option_help(fields))
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if flag else None,
                annotation=Annotated[kind if flag else kind | None, option],
            )
        )

    # Typer makes options only from a function's signature, so this one gets the wanted signature.
    def options(**values: Any) -> None:
        pass

    options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command()(options)
    return [param for param in typer.main.get_command(app).params if param.name in option_fields()]


Ray = Annotated[
    bool | None,
    typer.Option(
        "--ray/--no-ray",
        help="Use Ray Data tasks, or only this process; the default depends on the size.",
    ),
]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join (auto, host:port or ray://...); implies --ray.")]
Confident = Annotated[
    float | None,
    typer.Option(min=0, max=1, metavar="IOU", help="--corrects: --confident of the export."),
]
Stable = Annotated[
    float | None,
    typer.Option(min=0, max=1, metavar="SCORE", help="--corrects: --stable of the export."),
]
SourceFormat = Annotated[
    str | None, typer.Option("--format", "-f", help="sa1b or coco; detected from SOURCE by default.")
]
Images = Annotated[
    str | None, typer.Option(help="Folder of the images that SOURCE names, if not next to its JSON files.")
]
Corrects = Annotated[
    str | None,
    typer.Option(metavar="LABELS", help="The output whose export was corrected manually to get SOURCE."),
]
KeepRest = Annotated[
    bool,
    typer.Option(
        "--keep-rest", help="--corrects: keep the masks that --confident and --stable left out of the export."
    ),
]
AllowOutside = Annotated[
    bool,
    typer.Option("--allow-outside", help="Accept images outside --images. Only if you trust SOURCE."),
]
Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="JSON files: a folder, prefix, glob or file. SA-1B: also tars.")
]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="Do not show progress.")]


def export(
    ctx: typer.Context,
    output: Output,
    dest: Annotated[str, typer.Argument(metavar="DEST", help="An empty folder or prefix (local, s3://, ...).")],
    format: Annotated[str, typer.Option("--format", "-f")],
    where: WhereOption = None,
    quality: QualityOption = None,
    partial: Annotated[bool, typer.Option("--partial", help="Export only the finished shards of OUTPUT.")] = False,
    ray: Ray = None,
    address: Address = None,
    no_progress: NoProgress = False,
) -> int:
    """Write the masks of OUTPUT to DEST in the format of another tool.

    Failed images are left out. To resume, run the same command again. A different format, different options or a
    changed OUTPUT are refused.

    --where: a term over columns of the masks (area, bbox, predicted_iou, stability_score, label, ...) selects masks;
    one over columns of the image alone (width, height, uri, num_masks, ...) selects images.

    Examples:

      samray export labels/ coco/ --format coco

      samray export s3://bucket/labels s3://bucket/flat --format flat --partitions 16 --address auto

      samray export labels/ yolo/ --format yolo --with-images

      samray export labels/ coco/ --format coco --where "area > 0.001 * width * height and label in ('dog', 'cat')"

      samray export labels/ cvat/ --format coco --layout cvat --confident 0.9 --stable 0.95
    """
    from samray.exports.export import export as run_export

    try:
        report = run_export(
            output,
            dest,
            format=format,
            where=where,
            quality=quality,
            partial=partial,
            ray=ray,
            address=address,
            progress=not no_progress,
            **ctx.obj,
        )
    except KeyboardInterrupt:
        return _interrupted()
    _print_export(report)
    return 0


_NO_PLACE: Final = "of images that do not say where they are, or in a CRS that cannot be converted"
_WHY_LEFT_OUT: Final = {"saco": "without a name", "geojson": _NO_PLACE, "geoparquet": _NO_PLACE}


def _print_export(report: ExportReport) -> None:
    table = two_columns()
    table.add_row("images", f"{report.num_images:,}")
    table.add_row("masks", f"{report.num_masks:,}")
    if report.num_left_out:
        why = _WHY_LEFT_OUT.get(report.format, "below --confident or --stable")
        table.add_row("left out", f"{count(report.num_left_out, 'mask')} {why}")
    if report.num_failed:
        table.add_row("left out", f"{count(report.num_failed, 'failed image')}")
    if report.num_images_not_selected or report.num_masks_not_selected:
        masks = f"{count(report.num_masks_not_selected, 'mask')} of the images that are exported"
        table.add_row("not selected", f"{count(report.num_images_not_selected, 'image')}, and {masks} (--where)")
    if report.num_unreadable:
        table.add_row(
            "not copied",
            f"{count(report.num_unreadable, 'image')} that cannot be read any more, or whose size changed",
        )
    if report.num_pieces_skipped:
        table.add_row("done before", f"{report.num_pieces_skipped:,} of {count(report.num_pieces, 'piece')}")
    for name in report.files[:3]:
        table.add_row("file", name)
    if len(report.files) > 3:
        table.add_row("", f"and {len(report.files) - 3:,} more")
    Console().print(table)
    Console().print(report.dest, highlight=False, soft_wrap=True, markup=False)


def import_(
    source: Source,
    output: Output,
    format: SourceFormat = None,
    images: Images = None,
    images_per_shard: Annotated[int | None, typer.Option(min=1, help="Images per Parquet shard; default 64.")] = None,
    corrects: Corrects = None,
    confident: Confident = None,
    stable: Stable = None,
    keep_rest: KeepRest = False,
    allow_outside: AllowOutside = False,
    ray: Ray = None,
    address: Address = None,
    no_progress: NoProgress = False,
) -> int:
    """Convert annotations in SA-1B or COCO format into an OUTPUT like that of `samray label`.

    SA-1B: one JSON file per image, or the published tars. COCO: instances JSON of any size, with compressed or plain
    RLE or polygons. All other commands then work on OUTPUT. Annotations get new ids, and areas and boxes are measured
    again. The names of categories become `label`; iscrowd is dropped, because the SA-1B layout does not have it. To
    resume, run the same command again.

    --corrects: OUTPUT gets the masks of LABELS with the manual corrections, and a column `corrections` that lists the
    changes. Give the same --confident and --stable as for the export. Masks are matched by the attribute samray_id,
    else by their pixels (IoU of at least 0.5), and keep their ids; new masks get new ids. A category of SOURCE replaces
    the mask's name. Images that SOURCE lacks stay unchanged.

    Examples:

      samray import 'sa1b/sa_0000*.tar' labels/

      samray import instances_val2017.json labels/ --images val2017/

      samray import corrected.json labels-2/ --corrects labels/ --confident 0.9 --stable 0.95
    """
    from samray.imports.import_ import import_ as run_import

    try:
        report = run_import(
            source,
            output,
            format=format,
            images=images,
            images_per_shard=images_per_shard,
            corrects=corrects,
            confident=confident,
            stable=stable,
            keep_rest=keep_rest,
            allow_outside=allow_outside,
            ray=ray,
            address=address,
            progress=not no_progress,
        )
    except KeyboardInterrupt:
        return _interrupted()
    _print_import(report)
    return int(0 < report.num_images == report.num_failed)


def _print_import(report: ImportReport) -> None:
    table = two_columns()
    table.add_row("images", f"{report.num_images:,} ({report.format})")
    table.add_row("masks", f"{report.num_masks:,}")
    if report.num_corrected:
        table.add_row("corrected", f"{count(report.num_corrected, 'image')}; the others are unchanged")
        for change in ("unchanged", "changed", "added", "removed", "left_out"):
            if report.changes.get(change):
                why = ", below --confident or --stable (--keep-rest keeps them)" if change == "left_out" else ""
                table.add_row(change.replace("_", " "), f"{count(report.changes[change], 'mask')}{why}")
    if report.num_unknown_images:
        table.add_row("not found", f"{count(report.num_unknown_images, 'image')} of SOURCE that LABELS does not have")
    if report.num_dropped:
        table.add_row("dropped", f"{count(report.num_dropped, 'annotation')} without a pixel or without an image")
    if report.num_failed:
        reasons = ", ".join(f"{number} {reason}" for reason, number in report.failures.items())
        table.add_row("failed images", f"{report.num_failed:,}: {reasons}")
    if report.num_shards_skipped:
        table.add_row("done before", f"{report.num_shards_skipped:,} of {count(report.num_shards, 'shard')}")
    Console().print(table)
    Console().print(report.output, highlight=False, soft_wrap=True, markup=False)
    if report.warning:
        Console(stderr=True).print(f"samray: warning: {report.warning}", highlight=False, soft_wrap=True, markup=False)


def _interrupted() -> int:
    Console(stderr=True).print("samray: interrupted; run the same command to resume", style="bold red")
    return 130


COMMANDS: dict[Callable[..., int], type[Command]] = {export: ExportCommand, import_: Command}
"""In the order of `samray --help`."""
